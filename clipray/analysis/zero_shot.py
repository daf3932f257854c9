"""Zero-shot classification (arXiv 2103.00020): the classes nearest to a vector, and how probable each is.

Probability = softmax(logit_scale * cosine) over all classes. In fp32 this is one product, its top-k and its softmax.

In bf16 the product is several times as fast but too coarse to rank classes, so it only proposes: a few more classes than are
returned. Their logits are computed again in fp32. A row whose further classes might still belong among the best is computed
in fp32 as a whole, so labels and their order are those of fp32. The logits of the classes behind the proposed ones stay bf16
in the softmax's denominator: of 16,384 vectors like CLIP's, 1,000 classes and logit_scale 100, probabilities are off by
5e-5 on average and 1.2e-3 at most.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import faiss
import numpy as np
import torch
from torch import Tensor

from clipray.analysis.normalize import l2_normalize
from clipray.analysis.tensors import Precision, as_tensor, native_bf16

SCORES = 2**21  # of a block of rows, unless that makes too few or too many rows
BLOCK_ROWS = 64, 4096  # at least and at most
SPARE = 7  # classes that bf16 proposes beyond those asked for
LANES = 128
UNSURE = -1  # instead of a class
ROUNDING = 2.0**-8  # relative error of a product of two numbers in bf16, at most


@dataclass(frozen=True, eq=False)
class Top:
    """The best classes of n rows, the best first.

    Attributes:
        classes: (n, top) int32, numbers of classes.
        probabilities: (n, top) float32.
    """

    classes: np.ndarray
    probabilities: np.ndarray


def class_vectors(vectors: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(k, d) float32: of each class the mean of its texts' vectors, L2-normalised before and after.

    Args:
        vectors: (t, d), the texts of a class one after the other. counts: (k,) int64, texts of each class, at least 1.
    """
    x = l2_normalize(vectors).astype(np.float64)
    return l2_normalize(np.add.reduceat(x, np.cumsum(counts) - counts, axis=0) / counts[:, None])


class ZeroShot:
    """Classes, ready to label any number of vectors.

    Args:
        classes: (k, d) float32 class vectors of unit length.
        logit_scale: the model's own factor of cosines, the exponential taken.
        top: classes to return of each row; at most k.
        precision: of the product; `auto` is bf16 where the hardware multiplies it natively.
        negatives: (1, d) or (k, d) float32: each class is judged for itself, against its negative prompt: probability =
            sigmoid(logit_scale * (cosine - cosine of the negative)), the softmax of the two.
        logit_bias: each class is judged for itself, by the model's own bias (SigLIP, arXiv 2303.15343): probability =
            sigmoid(logit_scale * cosine + logit_bias).

    Attributes:
        precision: what `auto` became; fp32 where there are too few classes to gain by bf16.
    """

    def __init__(
        self,
        classes: np.ndarray,
        logit_scale: float,
        *,
        top: int = 5,
        precision: Literal["auto", "bf16", "fp32"] = "auto",
        negatives: np.ndarray | None = None,
        logit_bias: float | None = None,
    ) -> None:
        c = torch.from_numpy(np.array(classes, np.float32))
        self._alone = negatives is not None or logit_bias is not None
        self._bias = logit_bias or 0.0
        if negatives is not None:
            c -= torch.from_numpy(np.array(negatives, np.float32))
        elif not self._alone:
            c -= c.mean(0)  # no softmax sees what all classes share, and smaller logits lose less by rounding
        self.n_classes, self.top = len(c), min(top, len(c))
        self._table = c * logit_scale  # (k, d): its product with a row is the row's logits
        self._proposed = self.top + SPARE
        self._rows = min(max(SCORES // self.n_classes, BLOCK_ROWS[0]), BLOCK_ROWS[1])
        if precision == "auto":
            precision = "bf16" if native_bf16(c.device) else "fp32"
        self.precision: Precision = precision if self.n_classes > 2 * self._proposed else "fp32"
        padding = -self.n_classes % LANES
        self._half = torch.nn.functional.pad(self._table, (0, 0, 0, padding)).bfloat16()  # (k', d)
        self._longest = self._table.norm(dim=1).max()

    def label(self, x: np.ndarray) -> Top:
        """The best classes of n vectors of unit length, (n, d) of any float type; one that is not finite gets NaN."""
        best = self._in_blocks(x, self._label_bf16 if self.precision == "bf16" else self._label_fp32)
        unsure = np.flatnonzero(best.classes[:, 0] == UNSURE)
        if len(unsure):
            exact = self._in_blocks(x[unsure], self._label_fp32)
            best.classes[unsure], best.probabilities[unsure] = exact.classes, exact.probabilities
        return best

    def _in_blocks(self, x: np.ndarray, label_block: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Top:
        best = Top(np.empty((len(x), self.top), np.int32), np.empty((len(x), self.top), np.float32))
        vectors = as_tensor(x)
        with torch.inference_mode():
            for start in range(0, len(x), self._rows):
                rows = slice(start, start + self._rows)
                best.classes[rows], best.probabilities[rows] = label_block(vectors[rows].float())
        return best

    def _label_fp32(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(m, d) -> classes (m, top) int64 and their probabilities (m, top) float32."""
        logits = x @ self._table.T  # (m, k)
        best, classes = logits.topk(self.top, dim=1)
        return classes, self._probabilities(best, logits)

    def _label_bf16(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """As `_label_fp32`, or UNSURE in rows where bf16 is too coarse."""
        logits = (x.bfloat16() @ self._half.T).float()  # (m, k')
        logits[:, self.n_classes :] = -torch.inf
        # Only rows that are not finite may propose padding.
        proposed = _highest(logits, self._proposed).clamp_(max=self.n_classes - 1)  # (m, c)
        bound = logits.gather(1, proposed).amin(1)  # (m,), of all other classes
        exact = self._exact_logits(x, proposed)
        logits.scatter_(1, proposed, exact)
        best, order = exact.topk(self.top, dim=1)
        classes, probabilities = proposed.gather(1, order), self._probabilities(best, logits)
        error = ROUNDING * (x.norm(dim=1) * self._longest + bound.abs())
        classes[~(best[:, -1] >= bound + error)] = UNSURE
        return classes, probabilities

    def _probabilities(self, best: Tensor, logits: Tensor) -> Tensor:
        """Of the logits `best` (m, top), descending, among all `logits` (m, k), which are overwritten."""
        if self._alone:
            return torch.sigmoid(best + self._bias)
        first = best[:, :1]
        return torch.exp(best - first) / logits.sub_(first).exp_().sum(1, keepdim=True)

    def _exact_logits(self, x: Tensor, classes: Tensor) -> Tensor:
        """(m, c) float32: the logits of some classes of each row, without a copy of these classes' vectors."""
        logits = np.empty(classes.shape, np.float32)
        arrays = logits, x.numpy(), self._table.numpy(), classes.numpy()
        faiss.fvec_inner_products_by_idx(  # type: ignore[attr-defined] # not in its stubs
            *(faiss.swig_ptr(array) for array in arrays), x.shape[1], *classes.shape
        )
        return torch.from_numpy(logits)


def _highest(scores: Tensor, count: int) -> Tensor:
    """(m, count) int64: the columns of the highest of each row of (m, k) float32, in no order; k is a multiple of LANES.

    They lie in the lanes (every LANES-th column) of the highest maxima, so few columns are left to select from: half the
    time of `topk`.
    """
    m, k = scores.shape
    lanes = _select(scores.view(m, -1, LANES).amax(1), count)
    columns = (torch.arange(0, k, LANES)[:, None] + lanes[:, None]).view(m, -1)
    return columns.gather(1, _select(scores.gather(1, columns), count))


def _select(values: Tensor, count: int) -> Tensor:
    return torch.from_numpy(np.argpartition(values.numpy(), -count, axis=1)[:, -count:])

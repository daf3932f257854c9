"""Which of many classes a vector is nearest to, and how probable each is: zero-shot classification (arXiv 2103.00020).

Probability = softmax(logit_scale * cosine) over all classes. In fp32 everything is computed as it is written. The bf16
product, four times as fast, only proposes: the best few classes of a row come from it, with some to spare; their logits are
computed again in fp32, and a row whose further classes might still belong among the best is computed in fp32 as a whole.
So labels and their order are those of fp32. What bf16 decides is the rest of the softmax's denominator, the classes behind
those few: of 8,192 vectors like CLIP's, 1,000 classes and logit_scale 100, probabilities were off by 6e-5 on average, by
1.5e-3 at most; those of fp32 by 2e-6 at most.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Literal

import faiss
import numpy as np
import torch
from torch import Tensor

from clipray.analysis.ranking import LANES, Precision, native_bf16

SCORES = 2**22  # of a block of rows: 8 MiB in bf16; smaller ones miss the caches less, but Python is asked more often
BLOCK_ROWS = 256, 4096  # at least and at most
CHUNK_ROWS = 16_384  # whose candidates are weighed together: Python is asked less often
LEAST = -3e38  # of columns that pad the scores; finite, as its last bits will hold the column
SPARE, AT_LEAST = 3, 8  # classes of a row whose logits are fp32: so many more than are asked for, and so many
PROBES = 64  # rows that say how values are spread over the columns
OVERFLOW = 80.0  # exp of more than that nears the end of float32
ROUNDING = 2.0**-9  # of one value in bf16, relative, at most


@dataclass(frozen=True, eq=False)
class Top:
    """The best classes of n rows, the best first.

    Attributes:
        classes: (n, top) int32, numbers of classes.
        probabilities: (n, top) float32.
    """

    classes: np.ndarray
    probabilities: np.ndarray

    @property
    def margin(self) -> np.ndarray:
        """(n,) float32: the probability of the best class less that of the next; with one class, its probability."""
        p = self.probabilities
        return p[:, 0] - p[:, 1] if p.shape[1] > 1 else p[:, 0].copy()


def class_vectors(vectors: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(k, d) float32: of each class the mean of its texts' vectors, L2-normalised before and after.

    Args:
        vectors: (t, d), the texts of a class one after the other. counts: (k,) int64, texts of each class, at least 1.
    """
    x = vectors.astype(np.float64)
    x /= np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    means = np.add.reduceat(x, np.cumsum(counts) - counts, axis=0) / counts[:, None]
    return (means / np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12)).astype(np.float32)


class ZeroShot:
    """Classes, ready to label any number of vectors; memory does not grow with these. One thread's: it has buffers.

    Args:
        classes: (k, d) float32 class vectors of unit length.
        logit_scale: the model's own factor of cosines, the exponential taken.
        top: classes to return of each row; at most k.
        precision: of the product; `auto` is bf16 where the hardware multiplies it natively.
        negatives: (1, d) or (k, d) float32: each class is judged for itself, against its negative prompt: probability =
            sigmoid(logit_scale * (cosine - cosine of the negative)), the softmax of the two.
        logit_bias: likewise each for itself, by the model's own bias (SigLIP, arXiv 2303.15343): probability =
            sigmoid(logit_scale * cosine + logit_bias).

    Attributes:
        precision: what `auto` became; fp32 where there are too few classes for anything else to gain.
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
            c -= c.mean(
                0
            )  # the same for all classes of a row, so that no softmax sees it: smaller scores, less rounding
        self.n_classes, self.top = len(c), min(top, len(c))
        self._table = c * logit_scale  # (k, d); its product with a row are the row's logits
        native = "bf16" if native_bf16(c.device) else "fp32"
        self._candidates = max(self.top + SPARE, AT_LEAST)
        self._rows = min(max(SCORES // self.n_classes, BLOCK_ROWS[0]), BLOCK_ROWS[1])
        few = self.n_classes <= 2 * self._candidates
        self.precision: Precision = "fp32" if few else native if precision == "auto" else precision  # type: ignore[assignment]
        if self.precision == "bf16":
            self._half = self._table.bfloat16()
            self._buffers = _Buffers(self._rows, self.n_classes, self._table.shape[1])
            self._overflows = bool(self._table.norm(dim=1).max() > OVERFLOW)

    def label(self, x: np.ndarray) -> Top:
        """The best classes of n vectors of unit length, (n, d) of any float type; one that is not finite gets NaN."""
        found = Top(np.empty((len(x), self.top), np.int32), np.empty((len(x), self.top), np.float32))
        fast = self.precision == "bf16"
        with torch.inference_mode():
            for start in range(0, len(x), CHUNK_ROWS):
                some = _tensor(x[start : start + CHUNK_ROWS])
                todo = self._label_fast(some, found, start) if fast else torch.arange(len(some))
                for here in todo.split(self._rows):
                    found.classes[start + here], found.probabilities[start + here] = self._exact(some[here])
        return found

    def _label_fast(self, x: Tensor, found: Top, start: int) -> Tensor:
        """Fills `found` from `start` on; the rows of `x` (n, d) that bf16 cannot decide, (m,) int64."""
        proposed = [self._propose(some) for some in x.split(self._rows)]
        candidates, least, first, rest = map(torch.cat, zip(*proposed, strict=True))
        logits = self._logits(x, candidates)
        order = torch.from_numpy(np.argsort(-logits.numpy(), axis=1, kind="stable"))  # faster than torch's by half
        logits, classes = logits.gather(1, order), candidates.gather(1, order[:, : self.top])
        best = logits[:, : self.top]
        if self._alone:
            p = torch.sigmoid(best + self._bias)
        else:
            weights = torch.exp(logits - first)
            p = weights[:, : self.top] / (weights.sum(1, keepdim=True) + rest)
        here = slice(start, start + len(x))
        found.classes[here], found.probabilities[here] = classes, p
        sure = best[:, -1] >= least + least.abs() * ROUNDING + self._slack(x)
        return (~sure).nonzero()[:, 0]

    def _exact(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = x @ self._table.T  # (m, k)
        best, classes = logits.topk(self.top, dim=1)
        if self._alone:
            return classes, torch.sigmoid(best + self._bias)
        return classes, torch.exp(best - logits.logsumexp(1, keepdim=True))

    def _slack(self, x: Tensor) -> float:
        """By how much a score may be too low because a row and a class were rounded: five deviations, of the worst class."""
        energy = x[:: max(1, len(x) // PROBES)].square().mean(0)  # (d,)
        worst = max((float((some.square() @ energy).max()) for some in self._table.split(1024)), default=0.0)
        return 5 * ROUNDING * math.sqrt(2 / 3 * worst)

    def _propose(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What bf16 says of (m, d) rows.

        Returns:
            Candidates (m, c) int64, ascending; the least of their scores (m,); the largest (m, 1) as bf16 has it; and the
            sum (m, 1) of exp(score - largest) over all classes but the candidates, float32.
        """
        m, k = len(x), self.n_classes
        padded, weights = self._buffers.scores[:m], self._buffers.weights[:m]
        scores = padded[:, :k]
        torch.mm(self._buffers.rows[:m].copy_(x), self._half.T, out=scores)
        candidates, least, most = _highest(padded, self._candidates)
        first = most.bfloat16()[:, None]
        if self._alone:
            return candidates, least, first.float(), torch.zeros_like(first, dtype=torch.float32)
        if self._overflows:
            scores.sub_(first)
        weights.copy_(scores.exp_())
        rest = weights.sum(1, keepdim=True)
        rest -= weights.gather(1, candidates).sum(1, keepdim=True)
        rest.clamp_(min=0)
        return candidates, least, first.float(), rest if self._overflows else rest * torch.exp(-first.float())

    def _logits(self, x: Tensor, candidates: Tensor) -> Tensor:
        """(m, c) float32: the logits of some classes of each row, without a copy of these classes' vectors."""
        rows, table, wanted = x.numpy(), self._table.numpy(), candidates.numpy()
        logits = np.empty(wanted.shape, np.float32)
        pointers = (faiss.swig_ptr(array) for array in (logits, rows, table, wanted))
        faiss.fvec_inner_products_by_idx(  # type: ignore[attr-defined] # not in its stubs
            *pointers, x.shape[1], *wanted.shape
        )
        return torch.from_numpy(logits)


class _Buffers:
    """Where blocks of rows are worked on, one after the other: memory that is new each time is slower than the work."""

    def __init__(self, rows: int, classes: int, width: int) -> None:
        padding = -classes % LANES if classes > 2 * LANES else 0
        self.rows = torch.empty(rows, width, dtype=torch.bfloat16)
        self.scores = torch.full((rows, classes + padding), LEAST, dtype=torch.bfloat16)
        self.weights = torch.empty(rows, classes)


def _highest(scores: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of (m, k) bf16 the columns of each row's `count` largest values, ascending (m, count) int64; the least, the largest (m,).

    NumPy sorts fast what is not to be followed, so each value carries its column. First the maxima of every LANES-th
    column are sorted: the largest values lie in the lanes of the largest maxima.
    """
    m, k = scores.shape
    if k % LANES or k == LANES:
        best = _sorted(scores, torch.arange(k, dtype=torch.int32))[:, -count:]
    else:
        # Where they are not negative, numbers are ordered as their bits are: and the maximum of integers is quicker.
        best = _within(scores, scores.view(torch.int16).view(m, -1, LANES).amax(1).view(torch.bfloat16), count)
        if not bool((best[:, 0] >= 0).all()):
            best = _within(scores, scores.view(m, -1, LANES).amax(1), count)
    columns = _columns(best).long()
    columns.numpy().sort(axis=1)
    return columns, best[:, 0], best[:, -1]


def _within(scores: Tensor, maxima: Tensor, count: int) -> Tensor:
    """(m, count): as `_sorted` gives them, the largest scores in the lanes with the largest `maxima` (m, LANES)."""
    m, k = scores.shape
    lanes = _columns(_sorted(maxima, torch.arange(LANES, dtype=torch.int32))[:, -count:])  # (m, count)
    columns = (torch.arange(0, k, LANES, dtype=torch.int32)[:, None] + lanes[:, None]).view(m, -1)
    places = columns + torch.arange(0, m * k, k, dtype=torch.int32)[:, None]
    found = scores.view(-1).index_select(0, places.view(-1)).view(m, -1)  # half the time of gather
    return _sorted(found, columns)[:, -count:]


def _sorted(values: Tensor, columns: Tensor) -> Tensor:
    """(m, k) bf16 -> (m, k) float32, ascending: the values, with `columns` < 65,536 in the bits that bf16 lacks."""
    packed = values.float()
    packed.view(torch.int32).bitwise_or_(columns)
    packed.numpy().sort(axis=1)
    return packed


def _columns(packed: Tensor) -> Tensor:
    """The columns that `_sorted` packed, int32."""
    return packed.contiguous().view(torch.int32).bitwise_and(0xFFFF)


def _tensor(x: np.ndarray) -> Tensor:
    """(m, d) float32, without a copy where that is what it is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of arrays that must not be written to: none is
        return torch.from_numpy(np.ascontiguousarray(x, np.float32))

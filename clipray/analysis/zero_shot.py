"""Which of many classes a vector is nearest to, and how probable each is: zero-shot classification (arXiv 2103.00020).

Probability = softmax(logit_scale * cosine) over all classes. In fp32 everything is computed as it is written. The bf16
product, two to five times as fast, only proposes: the best few classes of a row come from it, with some to spare; their
logits are computed again in fp32, and a row whose further classes might still belong among the best is computed in fp32 as
a whole. So labels and their order are those of fp32. What bf16 decides is the rest of the softmax's denominator, the classes
behind those few: of 8,192 vectors like CLIP's, 1,000 classes and logit_scale 100, probabilities were off by 5e-5 on average,
by 1.1e-3 at most; those of fp32 by 3e-6 at most.
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

from clipray.analysis import onednn
from clipray.analysis.nearest_centroid import LANES, Precision, native_bf16

SCORES = 2**20  # of a block of rows: 2 MiB in bf16; smaller ones miss the caches less, but Python is asked more often
BLOCK_ROWS = 256, 4096  # at least and at most
CHUNK_ROWS = 16_384  # whose candidates are weighed together: Python is asked less often
SPARE, AT_LEAST = 3, 8  # classes of a row whose logits are fp32: so many more than are asked for, and so many
COLUMNS = 2**16  # that fit into the bits that bf16 lacks
FAR, NEAR = 64.0, 8.0  # a sigmoid so near to zero is an exponential to 3e-4
PROBES = 64  # rows that say how values are spread over the columns
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
        precision: what `auto` became; fp32 where there are too few classes to gain by bf16, or above 65,408.
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
            # The same for all classes of a row, so that no softmax sees it: smaller logits, and the highest not negative.
            c -= c.mean(0)
        self.n_classes, self.top = len(c), min(top, len(c))
        self._table = c * logit_scale  # (k, d); its product with a row are the row's logits
        native = "bf16" if native_bf16(c.device) else "fp32"
        self._candidates = max(self.top + SPARE, AT_LEAST)
        self._rows = min(max(SCORES // self.n_classes, BLOCK_ROWS[0]), BLOCK_ROWS[1])
        unfit = self.n_classes <= 2 * self._candidates or self.n_classes > COLUMNS - LANES
        self.precision: Precision = "fp32" if unfit else native if precision == "auto" else precision  # type: ignore[assignment]
        if self.precision == "bf16":
            self._weights = _Weights(self._table, self._rows)

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
        packed, tails = zip(*(self._propose(some) for some in x.split(self._rows)), strict=True)
        highest = torch.cat(packed)
        # Where fewer classes weigh anything, some are columns of padding; such a row is not sound.
        candidates = _columns(highest).clamp_(max=self.n_classes - 1).long()
        logits, classes = _descending(self._logits(x, candidates), candidates)
        best, first = logits[:, : self.top], logits[:, :1]
        if self._alone:
            p = torch.sigmoid(best + self._bias)
        else:
            weights = torch.exp(logits - first)
            rest = torch.cat(tails) * torch.exp(self._weights.shift - first)
            p = weights[:, : self.top] / (weights.sum(1, keepdim=True) + rest)
        here = slice(start, start + len(x))
        found.classes[here], found.probabilities[here] = classes[:, : self.top], p
        least, most = _values(highest[:, 0]), _values(highest[:, -1])
        sure = best[:, -1] >= self._weights.highest_logits(least) + self._slack(x)
        return (~(sure & self._weights.sound(least, most))).nonzero()[:, 0]

    def _exact(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = x @ self._table.T  # (m, k)
        best, classes = logits.topk(self.top, dim=1)
        if self._alone:
            return classes, torch.sigmoid(best + self._bias)
        return classes, torch.exp(best - logits.logsumexp(1, keepdim=True))

    def _slack(self, x: Tensor) -> float:
        """By how much a logit may be too low because a row and a class were rounded: five deviations, of the worst class."""
        energy = x[:: max(1, len(x) // PROBES)].square().mean(0)  # (d,)
        worst = max((float((some.square() @ energy).max()) for some in self._table.split(1024)), default=0.0)
        return 5 * ROUNDING * math.sqrt(2 / 3 * worst)

    def _propose(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Of (m, d) rows the candidates (m, c), as `_highest` gives them, and the sum of all other weights (m, 1) float32."""
        weights = self._weights(x)
        best = _highest(weights, self._candidates)
        return best, torch.empty(len(x), 0) if self._alone else _sum_without(weights, _columns(best))

    def _logits(self, x: Tensor, candidates: Tensor) -> Tensor:
        """(m, c) float32: the logits of some classes of each row, without a copy of these classes' vectors."""
        rows, table, wanted = x.numpy(), self._table.numpy(), candidates.numpy()
        logits = np.empty(wanted.shape, np.float32)
        pointers = (faiss.swig_ptr(array) for array in (logits, rows, table, wanted))
        faiss.fvec_inner_products_by_idx(  # type: ignore[attr-defined] # not in its stubs
            *pointers, x.shape[1], *wanted.shape
        )
        return torch.from_numpy(logits)


class _Weights:
    """Of rows and classes exp(logit - shift) in bf16, from one product. One thread's: it has buffers.

    oneDNN can end a product with a function of its sums: a sigmoid, which of numbers far below zero is their exponential.
    So no logit is rounded before, and no score is written only to be read again. Without its operators this is a product,
    rounded, and its exponential.

    Args:
        table: (k, d) float32, whose product with a row are the row's logits.
        rows: of a block, at most.

    Attributes:
        shift: of the logits.
    """

    def __init__(self, table: Tensor, rows: int) -> None:
        k, d = table.shape
        more = -k % LANES if k > 2 * LANES else 0  # columns that weigh nothing
        self._rows = torch.empty(rows, d, dtype=torch.bfloat16)
        self._half, self._fused = table.bfloat16(), onednn.packs()
        if self._fused:
            self._half = onednn.pack(torch.nn.functional.pad(self._half, (0, 0, 0, more)), rows)
            self._bias = torch.tensor([-FAR] * k + [-math.inf] * more, dtype=torch.bfloat16)
            self.shift, self._most = FAR, math.exp(-NEAR)
        else:
            self._scores = torch.zeros(rows, k + more, dtype=torch.bfloat16)
            self.shift, self._most = 0.0, math.exp(FAR)

    def __call__(self, x: Tensor) -> Tensor:
        """(m, d) float32 -> (m, columns) bf16, until the next call."""
        rows = self._rows[: len(x)].copy_(x)
        if self._fused:
            return onednn.linear(rows, self._half, self._bias, then="sigmoid")
        scores = self._scores[: len(x)]
        torch.mm(rows, self._half.T, out=scores[:, : len(self._half)]).exp_()
        return scores

    def highest_logits(self, weights: Tensor) -> Tensor:
        """The highest that logits with such weights, float32, may have been, but for the rounding of what was multiplied."""
        logits = weights.log()
        return logits + self.shift + ROUNDING * (2.0 if self._fused else 1 + logits.abs())

    def sound(self, least: Tensor, most: Tensor) -> Tensor:
        """Whether rows with such weights among their candidates can be judged by them: nothing under- or overflows."""
        return (least > 0) & (most <= self._most)


def _highest(weights: Tensor, count: int) -> Tensor:
    """(m, count): the largest of each row of (m, k) bf16, none of them negative, as `_sorted` gives them.

    NumPy sorts fast what is not to be followed, so each value carries its column. First the maxima of every LANES-th
    column are sorted: the largest values lie in the lanes of the largest maxima.
    """
    m, k = weights.shape
    if k % LANES or k == LANES:
        return _sorted(weights, torch.arange(k, dtype=torch.int32))[:, -count:]
    # Numbers that are not negative are ordered as their bits are, and the maximum of integers is quicker.
    maxima = weights.view(torch.int16).view(m, -1, LANES).amax(1).view(torch.bfloat16)
    lanes = _columns(_sorted(maxima, torch.arange(LANES, dtype=torch.int32))[:, -count:])  # (m, count)
    columns = (torch.arange(0, k, LANES, dtype=torch.int32)[:, None] + lanes[:, None]).view(m, -1)
    places = columns + torch.arange(0, m * k, k, dtype=torch.int32)[:, None]
    found = weights.view(-1).index_select(0, places.view(-1)).view(m, -1)  # half the time of gather
    return _sorted(found, columns)[:, -count:]


def _sorted(values: Tensor, columns: Tensor) -> Tensor:
    """(m, k) bf16 -> (m, k) float32, ascending: the values, with `columns` < COLUMNS in the bits that bf16 lacks."""
    packed = values.float()
    packed.view(torch.int32).bitwise_or_(columns)
    packed.numpy().sort(axis=1)
    return packed


def _columns(packed: Tensor) -> Tensor:
    """The columns that `_sorted` packed, int32."""
    return packed.contiguous().view(torch.int32).bitwise_and(COLUMNS - 1)


def _values(packed: Tensor) -> Tensor:
    """The values that `_sorted` packed, float32."""
    return packed.contiguous().view(torch.int32).bitwise_and(-COLUMNS).view(torch.float32)


def _sum_without(weights: Tensor, columns: Tensor) -> Tensor:
    """(m, 1) float32: the sums of (m, k) bf16, `columns` (m, c) int32 set to 0 before.

    A product with ones adds in float32 and reads bf16: a third of the time of `sum`. It rounds what it returns, so by lanes.
    """
    m, k = weights.shape
    places = columns + torch.arange(0, m * k, k, dtype=torch.int32)[:, None]
    weights.view(-1).index_fill_(0, places.view(-1).long(), 0)
    of_lane = LANES if k % LANES == 0 else k
    sums = torch.mv(weights.view(-1, of_lane), torch.ones(of_lane, dtype=torch.bfloat16))
    return sums.view(m, -1).sum(1, keepdim=True, dtype=torch.float32)


def _descending(logits: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """Both (m, c), float32 and int64, by descending logits; their classes ride along in bits that float64 has to spare."""
    packed = -logits.double()
    packed.view(torch.int64).bitwise_or_(classes)
    packed.numpy().sort(axis=1)
    return -packed.float(), packed.view(torch.int64).bitwise_and(COLUMNS - 1)


def _tensor(x: np.ndarray) -> Tensor:
    """(m, d) float32, without a copy where that is what it is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of arrays that must not be written to: none is
        return torch.from_numpy(np.ascontiguousarray(x, np.float32))

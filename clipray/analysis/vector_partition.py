"""The hot loop of K-means over one shard of vectors in memory: rows to their nearest centroids, and their sums.

Only the choice of a centroid depends on the precision of the product (see `ranking`). What is summed up are the float32
values, and exactly: any split and any order of the rows add up to the same bits (see `Assigned`).
"""

from __future__ import annotations

import itertools
import math
import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from clipray.analysis.errors import DataError
from clipray.analysis.kmeans_data import Assigned, Draw, choose, draw
from clipray.analysis.nearest_centroid import PARTS, bf16_rows, ranking
from clipray.analysis.tensors import Precision, as_tensor, native_bf16

SCORES = 2**23  # bf16 values of a block of scores, 16 MiB: much of them is in the cache when minima are sought
BLOCK_ROWS = 512, 8192  # at least and at most
MOVED_ROWS = 256  # in float64 at a time: again for the cache
LONGEST = 1e12  # beyond it products would overflow
BLURRED = 1e-2  # of the squared lengths, about the mean: below it the vectors are 10 times their spread from the origin


class VectorPartition:
    """Vectors held in memory, and what K-means asks of them: alone the `KMeansData` of one process, or a shard.

    Memory of a value: 4 bytes for float32 in fp32; 6 in bf16, with the copy that is multiplied; 2 for float16 and
    bfloat16 vectors, which are converted again at each pass. Beside them 12 bytes a row and (k, d) float64: the sums are
    kept, so that an assignment adds and subtracts only the rows that changed clusters, and without drift, being exact.
    """

    def __init__(
        self,
        x: np.ndarray | Tensor,
        keys: np.ndarray,
        *,
        precision: Literal["auto", "bf16", "fp32"] = "auto",
        device: str | torch.device = "cpu",
        threads: int | None = None,
    ) -> None:
        """Takes `x` without a copy if it can, and never writes to it.

        Args:
            x: (n, d) float16, bfloat16 or float32, other types become float32; n may be 0.
            keys: (n,) uint64, distinct in the whole table, say hashes of ids: samples depend on them, not on positions.
            precision: of the product; `auto` is bf16 where it is native and the vectors are not farther from the origin
                than 10 times their spread, which bf16 would blur; else fp32.
            threads: on a CPU, each with blocks of its own, so that none waits for another; by default as many as torch has.

        Raises:
            ValueError: `x` without two axes or without columns, or `keys` of another length.
            DataError: vectors that are not finite or longer than 1e12, with the first rows' numbers.
        """
        self.device = torch.device(device)
        self._threads = 1 if self.device.type == "cuda" else threads or torch.get_num_threads()
        self._lock = threading.Lock()
        self._x, self._keys = as_tensor(x).to(self.device), np.asarray(keys, dtype=np.uint64)
        if self._x.ndim != 2 or self._x.shape[1] == 0 or self._keys.shape != self._x.shape[:1]:
            raise ValueError(f"x {tuple(self._x.shape)} and keys {self._keys.shape} should be (n, d >= 1) and (n,)")
        self.n_samples, self.n_features = self._x.shape
        spread = self._measure()
        if precision == "auto":
            precision = "bf16" if spread > BLURRED and native_bf16(self.device) else "fp32"
        self.precision: Precision = precision
        self._copy: Tensor | None = None
        if precision == "bf16" and self._x.dtype == torch.float32:
            self._copy = self._copied()
        self._forget(0)

    def assign(self, centroids: np.ndarray) -> Assigned:
        """The state of these rows, each with the nearest of `centroids` (k, d) float32; a function of these alone.

        Raises ValueError: no centroids, of another width or not finite; and so do the other methods.
        """
        c = self._checked(centroids)
        if len(self._sums) != len(c):
            self._forget(len(c))

        def move(rows: slice, after: Tensor) -> None:
            before = self._labels[rows]
            moved = (after != before).nonzero()[:, 0]
            for block in moved.split(MOVED_ROWS) if len(moved) else ():
                self._move(self._x[rows][block], before[block], after[block])
            before.copy_(after)

        try:
            self._label(c, self.precision, move)
        except BaseException:
            self._forget(0)  # a row may have been taken from one cluster and not yet given to another
            raise
        counts = torch.bincount(self._labels, minlength=len(c))
        return Assigned(*(value.cpu().numpy().copy() for value in (self._sums, counts, self._squares)))

    def nearest(self, centroids: np.ndarray, precision: Precision = "fp32") -> tuple[np.ndarray, np.ndarray]:
        """Each row's nearest centroid, by default ranked in fp32, and the distance from the two vectors' difference.

        Returns:
            Labels (n,) int32 and squared distances (n,) float32.
        """
        c = self._checked(centroids)
        labels = torch.empty(self.n_samples, dtype=torch.int32, device=self.device)
        distances = torch.empty(self.n_samples, device=self.device)

        def measure(rows: slice, nearest: Tensor) -> None:
            labels[rows] = nearest
            distances[rows] = (self._x[rows] - c[nearest]).square_().sum(1)

        self._label(c, precision, measure)
        return labels.cpu().numpy(), distances.cpu().numpy()

    def draw(self, n: int, random_state: int, centroids: np.ndarray | None = None) -> Draw:
        """This shard's candidates for a sample of `n`: uniform or, given centroids, by squared distance to the nearest.

        Rows that equal a centroid are then never drawn.
        """
        weights = None if centroids is None else self.nearest(centroids, self.precision)[1].astype(np.float64)
        return draw(self._keys, n, random_state, weights)

    def sample(self, n: int, random_state: int, centroids: np.ndarray | None = None) -> np.ndarray:
        """As of `KMeansData`, where these are all vectors."""
        (rows,), order = choose([self.draw(n, random_state, centroids)], n)
        return self.rows(rows)[order]

    def rows(self, rows: np.ndarray) -> np.ndarray:
        """The vectors (m, d) float32 of the rows (m,) int64."""
        return self._x[torch.tensor(rows, device=self.device)].float().cpu().numpy()

    def _measure(self) -> float:
        """The share of the squared lengths that is spread about the mean; sets the grid, 2**e above all lengths."""
        total = torch.zeros(self.n_features, dtype=torch.float64, device=self.device)
        squares = torch.zeros(self.n_samples, dtype=torch.float64, device=self.device)

        def measure(rows: slice) -> None:
            values = self._x[rows].double()
            squares[rows] = values.square().sum(1)
            with self._lock:
                total.add_(values.sum(0))

        self._each(SCORES, lambda: measure)
        bad = (~(squares <= LONGEST**2)).nonzero()[:, 0].tolist()
        if bad:
            first = ", ".join(map(str, bad[:5])) + (", …" if len(bad) > 5 else "")
            raise DataError(f"{len(bad)} of {self.n_samples} vectors are not finite (or too long), in rows {first}")
        longest = squares.max().item() if len(squares) else 0.0
        self._exponent = math.frexp(math.sqrt(2 * longest))[1]  # the factor: rounding must not lift unit vectors
        return 1 - total.square().sum().item() / (self.n_samples * squares.sum().item()) if longest else 1.0

    def _copied(self) -> Tensor:
        copy = self._x.new_empty(self.n_samples, self.n_features + 2 * PARTS, dtype=torch.bfloat16)

        def fill(rows: slice) -> None:
            copy[rows] = bf16_rows(self._x[rows])

        self._each(SCORES, lambda: fill)
        return copy

    def _forget(self, k: int) -> None:
        self._labels = torch.full((self.n_samples,), -1, dtype=torch.int32, device=self.device)
        self._sums = torch.zeros(k, self.n_features, dtype=torch.float64, device=self.device)
        self._squares = torch.zeros(k, dtype=torch.float64, device=self.device)

    def _move(self, x: Tensor, before: Tensor, after: Tensor) -> None:
        """Takes the rows `x` (m, d) from their clusters `before`, unless they had none (all -1), to those `after`."""
        values = _on_grid(x.double(), self._exponent - 34)
        squares = _on_grid(torch.linalg.vector_norm(values, dim=1).square_(), 2 * self._exponent - 31)
        with self._lock:
            for labels, sign in ((before, -1), (after, 1)):
                if labels[0] >= 0:
                    self._sums.index_add_(0, labels, values, alpha=sign)
                    self._squares.index_add_(0, labels, squares, alpha=sign)

    def _label(self, c: Tensor, precision: Precision, use: Callable[[slice, Tensor], None]) -> None:
        """Calls `use` with each block of rows and their labels (m,) int64."""
        values = len(c) * (1 if precision == "bf16" else 2)  # of a row, as large as bf16's
        make = ranking(c, precision, self._block(values))

        def worker() -> Callable[[slice], None]:
            nearest = make()
            return lambda rows: use(rows, nearest(self._x[rows], None if self._copy is None else self._copy[rows]))

        self._each(values, worker)

    def _each(self, values: int, worker: Callable[[], Callable[[slice], None]]) -> None:
        """Calls what `worker` returns, once in each thread, with the blocks of rows for scores of so many values each."""
        blocks: queue.SimpleQueue[slice | None] = queue.SimpleQueue()
        for block in (*self._blocks(values), *[None] * self._threads):
            blocks.put(block)

        def work(threads: int) -> None:
            torch.set_num_threads(threads)  # of this thread, and of those that start later
            use = worker()
            for rows in iter(blocks.get, None):
                use(rows)

        if self._threads == 1:
            work(torch.get_num_threads())
            return
        with ThreadPoolExecutor(self._threads) as pool:
            try:
                for done in [pool.submit(work, 1) for _ in range(self._threads)]:
                    done.result()
            finally:
                torch.set_num_threads(torch.get_num_threads())

    def _block(self, values: int) -> int:
        least, most = BLOCK_ROWS
        return min(max(SCORES // values, least), most, max(self.n_samples, 1))

    def _blocks(self, values: int) -> Iterator[slice]:
        """Blocks of nearly one size, as a product with a handful of rows may round otherwise than one with many."""
        count = -(-self.n_samples // self._block(values))
        edges = (i * self.n_samples // count for i in range(count + 1) if count)
        return itertools.starmap(slice, itertools.pairwise(edges))

    def _checked(self, centroids: np.ndarray) -> Tensor:
        c = np.array(centroids, dtype=np.float32, order="C")
        if c.ndim != 2 or c.shape[1] != self.n_features or len(c) == 0:
            raise ValueError(f"centroids have shape {c.shape}, expected (k >= 1, {self.n_features})")
        if not np.isfinite(c).all():
            raise ValueError("centroids should be finite")
        return torch.from_numpy(c).to(self.device)


def _on_grid(values: Tensor, exponent: int) -> Tensor:
    """Float64 `values` rounded in place to multiples of 2**exponent; below 2**(exponent + 51)."""
    magic = 1.5 * 2.0 ** (52 + exponent)
    return values.add_(magic).sub_(magic)

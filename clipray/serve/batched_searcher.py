"""An open index for many clients at once: words of several requests are encoded in one batch."""

from __future__ import annotations

import queue
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future

import numpy as np

from clipray.errors import ClipRayError
from clipray.queries.searcher import Part, Searcher
from clipray.report.run_tables import RunTable
from clipray.storage.memory import give_back

MOST_TEXTS = 64  # of a batch
KEPT_TEXTS = 10_000  # whose vectors are kept

Encode = Callable[[Sequence[str]], np.ndarray]


class TextBatches:
    """Encodes texts of several threads together, and keeps the vectors of the latest.

    While a batch is encoded, what arrives waits and becomes the next one, so a batch costs no waiting of its own.
    """

    def __init__(self, encode: Encode) -> None:
        self._encode = encode
        self._waiting: queue.SimpleQueue[tuple[str, Future[np.ndarray]]] = queue.SimpleQueue()
        self._kept: OrderedDict[str, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()
        threading.Thread(target=self._work, name="text-batches", daemon=True).start()

    def vectors(self, texts: Sequence[str]) -> np.ndarray:
        """(n, d) float32, of n texts. Raises what encoding raises."""
        with self._lock:
            kept = {text: self._kept[text] for text in texts if text in self._kept}
            for text in kept:
                self._kept.move_to_end(text)
        futures: dict[str, Future[np.ndarray]] = {text: Future() for text in texts if text not in kept}
        for waiting in futures.items():
            self._waiting.put(waiting)
        kept |= {text: future.result() for text, future in futures.items()}
        return np.stack([kept[text] for text in texts])

    def _work(self) -> None:
        while True:
            waiting = [self._waiting.get()]
            while len(waiting) < MOST_TEXTS and not self._waiting.empty():
                waiting.append(self._waiting.get())
            texts = list(dict.fromkeys(text for text, _ in waiting))
            try:
                vectors = dict(zip(texts, self._encode(texts), strict=True))
            except Exception as error:  # each of those who wait raises it
                for _, future in waiting:
                    future.set_exception(error)
                continue
            self._keep(vectors)
            for text, future in waiting:
                future.set_result(vectors[text])

    def _keep(self, vectors: dict[str, np.ndarray]) -> None:
        with self._lock:
            self._kept.update(vectors)
            while len(self._kept) > KEPT_TEXTS:
                self._kept.popitem(last=False)


class BatchedSearcher:
    """A `Searcher` whose texts are encoded in batches.

    Attributes:
        built: when the index was finished, by its record.
        problem: why words and images cannot be encoded, "" if they can or as long as that is not known.
    """

    def __init__(self, run: str, index: RunTable) -> None:
        self.searcher = Searcher(run, index.name)
        self.built = index.record.finished_at
        self.problem = self.searcher.why_not
        self._texts = TextBatches(self.searcher.encode_texts)

    @property
    def state(self) -> str:
        """`ready`, `loading`, or why only rows can be searched for."""
        return self.problem or ("ready" if self.searcher.is_ready else "loading")

    def loading(self) -> Iterator[None]:
        """Loads what a query needs, a piece at a time: the columns of answers, then the model, for words first.

        What fails is kept as `problem`.
        """
        columns, encoder = self.searcher.columns, self.searcher.encoder
        if self.searcher.n_rows:
            columns.rows([0], columns.columns.kept)
        yield
        try:
            if not self.problem and encoder.resolved().has_text:
                encoder.texts()
                yield
            if not self.problem:
                encoder.images()
        except ClipRayError as error:
            self.problem = str(error)
        give_back()  # the model in fp32: 200 MB of a ViT-B-32

    def vector(self, parts: Sequence[Part]) -> np.ndarray:
        """The query (d,) of several parts. Raises as `Searcher.vector`."""
        return self.searcher.vector(parts, self._texts.vectors)

"""The runs of a server: their finished tables, and what is open for queries. Shared by all threads."""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from starlette.requests import HTTPConnection

from clipray.errors import ClipRayError, JobError, no_such
from clipray.report.run_tables import RunTable, RunTables, finished_tables, open_run
from clipray.serve.batched_searcher import BatchedSearcher
from clipray.serve.images import RunImages
from clipray.serve.responses import HttpError
from clipray.storage.folder import Folder, absolute

TABLES_S = 5.0  # how long tables are taken to be as they were


@dataclass(eq=False)
class ServedRun:
    """A run.

    Attributes:
        name: in addresses and on pages. index: the one that is searched where a run has several; "": the first.
        is_warming: whether a thread opens its index just now, for which no page needs to wait.
    """

    name: str
    output: Folder
    index: str = ""
    is_warming: bool = False
    _lock: threading.RLock = field(default_factory=threading.RLock)
    _opening: threading.RLock = field(default_factory=threading.RLock)
    _tables: tuple[float, RunTables] | None = None
    _searchers: dict[str, BatchedSearcher] = field(default_factory=dict)

    @property
    def tables(self) -> RunTables:
        """Its finished tables, read again after TABLES_S."""
        with self._lock:
            if self._tables is None or time.monotonic() - self._tables[0] > TABLES_S:
                self._tables = time.monotonic(), open_run(self.output, finished_tables(self.output), "label")
            return self._tables[1]

    def table(self, name: str) -> RunTable:
        """A finished table. Raises HttpError 404: there is none of this name."""
        tables = {table.name: table for table in self.tables.tables}
        if name not in tables:
            raise HttpError(404, f"run {self.name}: {no_such('finished table', name, list(tables))}")
        return tables[name]

    @property
    def indexes(self) -> list[RunTable]:
        return self.tables.of_type("index")

    def indexes_over(self, *, regions: bool) -> list[RunTable]:
        """The indexes over regions, or over whole rows."""
        return [table for table in self.indexes if ("region_id" in table.record.columns) == regions]

    def searcher(self, index: str = "", *, by_region: bool = False) -> BatchedSearcher:
        """The open index of this name, by default the first over whole rows; opened again where it was built anew.

        Raises:
            HttpError: there is none.
            SchemaError: it is damaged or stale.
        """
        table = self._index(index or self.index, by_region)
        with self._opening:
            if (opened := self._open(table)) is None:
                self._searchers[table.name] = opened = BatchedSearcher(self.output.url, table)
            return opened

    def state(self, index: str = "") -> tuple[str, BatchedSearcher | None]:
        """`ready`, `loading`, or why words cannot be searched for; and the open index, if it can be searched at all.

        Does not wait for what is being loaded.
        """
        try:
            opened = self._open(self._index(index or self.index, by_region=False))
            if opened is None and self.is_warming:
                return "loading", None
            opened = opened or self.searcher(index)
        except ClipRayError as error:
            return str(error), None
        return opened.state, opened

    def _open(self, index: RunTable) -> BatchedSearcher | None:
        """The index, if it is open, and as it is now."""
        opened = self._searchers.get(index.name)
        return opened if opened is not None and opened.built == index.record.finished_at else None

    def _index(self, name: str, by_region: bool) -> RunTable:
        indexes = {table.name: table for table in self.indexes}
        if name in indexes:
            return indexes[name]
        if name:
            raise HttpError(404, f"run {self.name}: {no_such('index', name, list(indexes))}")
        fitting = self.indexes_over(regions=by_region)
        if not indexes or (by_region and not fitting):
            what = "index over regions" if by_region else "index"
            raise HttpError(
                404, f"run {self.name} has no finished {what}: a job's step `index: {{input: images.clip}}` makes one"
            )
        return (fitting or list(indexes.values()))[0]

    @cached_property
    def images(self) -> RunImages:
        return RunImages(self.name, lambda: self.tables)

    def warm_up(self) -> Iterator[None]:
        """Opens the index and loads its model, a piece at a time. Problems are told to those who ask."""
        try:
            if self.indexes:
                yield from self.searcher().loading()
        except ClipRayError:
            return
        finally:
            self.is_warming = False


class ServedRuns:
    """The runs of a server, by name, in the order in which they were given."""

    def __init__(self, urls: Sequence[str], index: str = "") -> None:
        if not urls:
            raise JobError("expected the output folder of at least one run")
        self._runs: dict[str, ServedRun] = {}
        for url in urls:
            output = Folder(absolute(url))
            if not finished_tables(output):
                raise JobError(f"{url}: expected the output folder of a run with a finished table, found none")
            if output.url in (run.output.url for run in self):
                raise JobError(f"{url}: the run is named twice")
            name = _name(output.url, self._runs)
            run = ServedRun(name, output)
            run.index = index if index in (table.name for table in run.indexes) else ""
            self._runs[name] = run
        if index and not any(run.index for run in self):
            names = [table.name for run in self for table in run.indexes]
            raise JobError(f"--index: {no_such('index', index, names)}")

    def __iter__(self) -> Iterator[ServedRun]:
        return iter(self._runs.values())

    def __len__(self) -> int:
        return len(self._runs)

    def run(self, name: str | None) -> ServedRun:
        """The run of this name; the first, if None. Raises HttpError 404."""
        if not name:
            return next(iter(self))
        if name not in self._runs:
            raise HttpError(404, no_such("run", name, list(self._runs)))
        return self._runs[name]

    @contextlib.contextmanager
    def warming_up(self) -> Iterator[None]:
        """Gets all runs ready for queries in a thread, which ends with the block: soon, if it is not done."""
        for run in self:
            run.is_warming = True
        stopping = threading.Event()
        thread = threading.Thread(target=self._warm_up, args=(stopping,), name="warm-up", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stopping.set()
            thread.join()  # a process must not end in the middle of what it loads: that aborts it

    def _warm_up(self, stopping: threading.Event) -> None:
        for _ in itertools.chain.from_iterable(run.warm_up() for run in self):
            if stopping.is_set():
                return


def _name(url: str, taken: Container[str]) -> str:
    """The folder's name, with as many of those above it as tell it from other runs."""
    parts = [part for part in url.split("/") if part]
    names = ("/".join(parts[-depth:]) for depth in range(1, len(parts) + 1))
    return next((name for name in names if name not in taken), url)


def runs_of(connection: HTTPConnection) -> ServedRuns:
    runs = connection.app.state.runs
    assert isinstance(runs, ServedRuns)
    return runs


def run_of(connection: HTTPConnection) -> ServedRun:
    """The run that a request names with `run=`, or the first. Raises HttpError 404."""
    return runs_of(connection).run(connection.query_params.get("run"))

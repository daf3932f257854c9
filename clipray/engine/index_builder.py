"""The actor that holds an index while it is built: merges its parts, measures its recall, writes it."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from clipray.analysis import vector_index as vi
from clipray.analysis.recall import TOPS, Nearest, Queries, best_of, query_ms, recalls, tune
from clipray.engine.index_order import IndexSpec, Probes
from clipray.inputs.index_reader import read_faiss
from clipray.storage.folder import Folder

OURS = re.compile(r"(\d{6,}|index-[0-9a-f]{8})\.faiss(\.lists)?")  # files of a build


class Builder:
    """An actor that holds the index."""

    def __init__(self, order: IndexSpec, threads: int) -> None:
        self._order, self._threads = order, threads
        self._parts: list[Path] = []
        self._nearest: list[Nearest] = []
        self._index: Any = None
        self._trained_on = 0

    def begin(self, trained: np.ndarray, trained_on: int, probes: Probes) -> np.ndarray:
        """The empty index that parts are filled in, as bytes: `trained`, or of the kind that is extended.

        Comes first, in place of a constructor that fails: of an error there Ray hands on the text alone.
        """
        import faiss

        faiss.omp_set_num_threads(self._threads)
        self._faiss, self._aside = faiss, _aside(self._order.folder)
        self._trained_on, self._probes = trained_on, probes
        if self._order.grown_from is None:
            self._index = self._faiss.deserialize_index(trained)
        else:
            self._index = read_faiss(_local(self._order.folder, self._order.grown_from, self._aside))
            empty = self._faiss.clone_index(self._index)
            empty.reset()
            trained = self._faiss.serialize_index(empty)
        self._empty, self._last = trained, self._held_out(trained)
        self._sizes: Any = None if self._last is None else vi.list_sizes(self._last)
        return trained

    def _held_out(self, trained: np.ndarray) -> Any:
        """The part of the rows that are held out; None where parts are not merged."""
        part, probes = self._faiss.deserialize_index(trained), self._probes
        if not vi.mergeable(part):
            return None
        if len(probes.x):
            vi.fill(part, probes.x, probes.rows - len(probes.x))
        return part

    def merge(self, part: np.ndarray | None, nearest: Nearest, number: int) -> None:
        """Parts come in the order of their rows."""
        self._nearest = [best_of([*self._nearest, nearest], max(TOPS))]
        if part is None:
            return
        if not vi.mergeable(self._index):
            vi.fill(self._index, part, self._index.ntotal)
        elif self._sizes is None:
            self._index.merge_from(self._faiss.deserialize_index(part), 0)
        else:
            self._sizes = self._sizes + vi.list_sizes(self._faiss.deserialize_index(part))
            self._keep(part, number)

    def _keep(self, part: np.ndarray, number: int) -> None:
        self._parts.append(self._aside / f"{number:06d}.faiss")
        self._parts[-1].write_bytes(part.data)

    def _merge_lists(self) -> None:
        """Of the parts, which wait on disk until it is known how long each list becomes: lists that grow take twice the room."""
        if self._order.on_disk:
            self._merge_on_disk()
            return
        vi.reserve(self._index, self._sizes + vi.list_sizes(self._index))
        for part in self._parts:
            self._index.merge_from(self._faiss.read_index(str(part)), 0)
            part.unlink()

    def _merge_on_disk(self) -> None:
        from faiss.contrib.ondisk import merge_ondisk

        lists = self._aside / f"{self._order.name}.lists"
        self._index = self._faiss.deserialize_index(self._empty)
        lists.unlink(missing_ok=True)
        merge_ondisk(self._index, list(map(str, self._parts)), str(lists))

    def _add_held_out(self) -> None:
        if not len(self._probes.x):
            return
        if self._last is None:
            vi.fill(self._index, self._probes.x, self._index.ntotal)
        elif self._order.on_disk:  # faiss 1.15 mixes up lists on disk that grow
            self._keep(self._faiss.serialize_index(self._last), len(self._order.parts))
            self._merge_on_disk()
        else:
            self._index.merge_from(self._last, 0)

    def finish(self) -> dict[str, Any]:
        """Tune, add the rows that are held out, write the file, and say what is in it."""
        order, name = self._order, self._order.name
        if self._parts:
            self._merge_lists()
        measured = self._measured()
        self._add_held_out()
        vi.set_effort(self._index, measured.get("parameter", ""), measured.get("value", 0))
        figures: dict[str, Any] = {"type": order.index_type, "vectors": int(self._index.ntotal), **measured}
        if order.grown_from is None:
            figures["trained_on"] = self._trained_on
        path = self._aside / name
        self._faiss.write_index(self._index, str(path))
        files = [path, *self._aside.glob(f"{name}.lists")]
        figures["files"] = {file.name: file.stat().st_size for file in files}
        for file in files:
            _publish(file, order.folder)
        _clear(self._aside)
        return figures

    def _measured(self) -> dict[str, Any]:
        """Recall for the rows that are held out and for `IndexSpec.queries`, tuned for the latter where there are any."""
        order, probes, metric = self._order, self._probes, self._order.metric
        (nearest,), count = self._nearest, len(probes.x)
        held_out = Queries(probes.x, nearest.of(slice(count)))
        others = Queries(probes.others, nearest.of(slice(count, None)))
        target = others if len(others.x) else held_out
        if not len(target.x) or not nearest.top:
            return {}
        tuned = tune(self._index, target, metric, order.recall)
        figures: dict[str, Any] = {"parameter": tuned.parameter, "value": tuned.value}
        figures["query_ms"] = query_ms(self._index, target.x)
        if count:
            figures |= {**recalls(self._index, held_out, metric), "held_out": count}
        if order.queries:
            seen = recalls(self._index, others, metric)
            figures["queries"] = {"input": order.queries.name, "n": len(others.x), **seen}
        return figures


def _local(folder: Folder, name: str, aside: Path) -> str:
    if folder.local:
        return folder.path(name)
    folder.fs.get_file(folder.path(name), str(aside / name))
    return str(aside / name)


def _aside(folder: Folder) -> Path:
    """An empty folder for files that are not finished: on a local disk within `folder`, where a killed build's is found again."""
    if not folder.local:
        return Path(tempfile.mkdtemp(prefix="clipray-index-"))
    aside = Path(folder.path("_building"))
    _clear(aside)
    aside.mkdir(parents=True, exist_ok=True)
    return aside


def _clear(aside: Path) -> None:
    """Remove what builds keep in their folder, and the folder itself unless files of somebody else lie there."""
    for file in aside.glob("*"):
        if OURS.fullmatch(file.name):
            file.unlink()
    with contextlib.suppress(OSError):
        aside.rmdir()


def _publish(file: Path, folder: Folder) -> None:
    """Move a finished file into the folder, where it is seen whole or not at all."""
    if folder.local:
        os.replace(file, folder.path(file.name))
    else:
        folder.fs.put_file(str(file), folder.path(file.name))

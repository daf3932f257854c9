"""A finished index, opened for searching: the faiss index, memory-mapped where possible, and the ids of its rows.

FAISS trusts what it reads, so its files are checked first to be those that were built.
"""

from __future__ import annotations

import functools
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from clipray import tables
from clipray.analysis import vector_index as vi
from clipray.analysis.filtered_search import map_rows, search_among
from clipray.analysis.normalize import l2_normalize
from clipray.errors import DamagedError, SchemaError
from clipray.inputs.vector_column import VectorColumn, comparable
from clipray.storage.folder import Folder, explained
from clipray.storage.seals import file_hash
from clipray.tables.digests import files_digest


@dataclass(frozen=True, eq=False)
class OpenIndex:
    """An index in the memory of this process.

    Attributes:
        ids: identity columns of the indexed rows, in the order of their numbers.
        index: faiss's own.
    """

    name: str
    record: tables.Record
    ids: pa.Table
    index: Any

    @property
    def metric(self) -> str:
        return str(self.record.provenance["metric"])

    @property
    def space(self) -> dict[str, Any]:
        return dict(self.record.provenance["space"])

    def search(self, queries: np.ndarray, top: int, mask: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Scores (q, t) float32 and numbers (q, t) int64 of the nearest rows of each query (q, d), the best first.

        t = `top`, or all rows if there are fewer; a number is -1 where the index finds no more.

        Args:
            mask: (n,) bool, the rows that may answer; None: all.

        Raises:
            SchemaError: queries of another width.
        """
        if mask is not None:
            return search_among(self.index, self.prepared(queries), top, mask)
        return self.index.search(self.prepared(queries), min(top, len(self.ids)))

    def vector(self, number: int) -> np.ndarray:
        """The vector (d,) float32 of a row, as the index stores it: rounded, if it stores codes."""
        map_rows(self.index)
        return self.index.reconstruct(number)

    def vectors(self, numbers: np.ndarray) -> np.ndarray:
        """The vectors (q, t, d) float32 of rows `numbers` (q, t), as the index stores them; of -1, that of any row."""
        map_rows(self.index)
        return self.index.reconstruct_batch(np.maximum(numbers, 0).ravel()).reshape(*numbers.shape, -1)

    def others(self, numbers: np.ndarray, ids: pa.Array | pa.ChunkedArray) -> np.ndarray:
        """(q, t) bool: whether each of the rows `numbers` (q, t) is another than the row `ids` (q,) of its query."""
        names = self.ids.column(self.ids.column_names[-1]).to_numpy(zero_copy_only=False)
        return names[numbers] != np.array(ids.to_pylist(), object)[:, None]

    def prepared(self, queries: np.ndarray) -> np.ndarray:
        """Queries (q, d) float32 as the index compares them: of unit length if its metric is cosine."""
        if queries.shape[1] != self.index.d:
            raise SchemaError(f"index {self.name}: queries of {queries.shape[1]} values, expected {self.index.d}")
        return l2_normalize(queries) if self.metric == "cosine" else np.ascontiguousarray(queries, np.float32)


def ready_index(name: str, output: Folder, source: VectorColumn) -> tables.Record:
    """The record of the index that a job calls `name`, to be searched with vectors of `source`.

    Raises:
        SchemaError: it is not there, its table has changed since, or it holds vectors of another space or width.
    """
    record = index_record(name, output.named(name))
    refuse_stale_index(name, record, output)
    if reason := comparable(dict(record.provenance["space"]), source.space):
        raise SchemaError(f"index {name}: {source.name} cannot be searched for in {record.inputs['input']}: {reason}")
    width = record.provenance["width"]
    if source.n_features != width:
        raise SchemaError(f"{source.name} has vectors of {source.n_features}, index {name} of {width}")
    return record


@functools.lru_cache(2)
def _opened_once(name: str, url: str, _index_file: str) -> OpenIndex:
    return open_index(name, Folder(url))


def opened_in_worker(name: str, output: Folder, record: tables.Record) -> OpenIndex:
    """An index of the run at `output`, opened once in a worker, which searches it in one thread."""
    import faiss

    faiss.omp_set_num_threads(1)
    return _opened_once(name, output.named(name).url, record.provenance["index_file"])


def index_record(name: str, folder: Folder) -> tables.Record:
    """Raises SchemaError where there is no finished index."""
    record = tables.read_record(folder)
    if record is None or record.table != "index":
        raise SchemaError(
            f"index {name}: {folder.url} holds no finished index; `clipray run` of a job with an `index` step makes it"
        )
    return record


def open_index(name: str, folder: Folder) -> OpenIndex:
    """Open an index; local files are memory-mapped, those on object storage are fetched first.

    Raises:
        SchemaError: there is none, or its files are not those of its record.
    """
    import faiss

    record = index_record(name, folder)
    provenance, sizes = record.provenance, folder.sizes()
    wanted = {**provenance["sizes"], **{file["name"]: file["bytes"] for file in record.files}}
    for file, size in wanted.items():
        if sizes.get(file) != size:
            raise SchemaError(
                f"index {name}: {folder.path(file)} is missing or not whole; `clipray run` builds it anew"
            )
    ids = pa.concat_tables([tables.read_shard(folder, file["name"]) for file in record.files]).sort_by("vector_id")
    where = Path(folder.path("")) if folder.local else _fetched(folder, provenance["sizes"])
    # Lists are mapped by one flag, codes of other types by a later one, which faiss has since 1.11.
    mapped = faiss.IO_FLAG_MMAP if ",IVF" in f",{record.summary['type']}" else getattr(faiss, "IO_FLAG_MMAP_IFC", 0)
    flags = faiss.IO_FLAG_ONDISK_SAME_DIR if provenance["lists_file"] else mapped
    for file, sha256 in hashes(record).items():
        if not is_as_built(str(where / file), sha256):
            raise DamagedError(
                f"index {name}: {folder.path(file)} has changed since it was built; `clipray verify` notes it, "
                "and the next `clipray run` builds it anew"
            )
    index = read_faiss(str(where / provenance["index_file"]), flags)
    if (index.d, index.ntotal) != (provenance["width"], len(ids)):
        raise DamagedError(
            f"index {name}: {where / provenance['index_file']} holds {index.ntotal} vectors of {index.d}, "
            f"expected {len(ids)} of {provenance['width']}; `clipray run --fresh {name}` builds it anew"
        )
    vi.without_prefetch(index)
    vi.set_effort(index, record.summary.get("parameter", ""), record.summary.get("value", 0))
    pa.default_memory_pool().release_unused()  # what sorting took: 100 MB for 1,000,000 rows
    return OpenIndex(name, record, ids.drop_columns(["vector_id"]), index)


def read_faiss(path: str, flags: int = 0) -> Any:
    """FAISS's own index from a local file. Raises DamagedError: it is not an index, or not whole."""
    import faiss

    if not Path(path).is_file():  # faiss says so in a line of its source
        raise DamagedError(f"{path}: no such FAISS index")
    try:
        return faiss.read_index(path, flags)
    except (RuntimeError, MemoryError) as error:  # a torn one may ask for any amount of memory
        why = (str(error).split("Error: ")[-1].splitlines() or [""])[0]
        raise DamagedError(f"{path} is no FAISS index: {why[:200]}; make it anew with --fresh") from error


def _fetched(folder: Folder, files: dict[str, int]) -> Path:
    home = Path(tempfile.mkdtemp(prefix="clipray-index-"))
    for file in files:
        folder.fs.get_file(folder.path(file), str(home / file))
    return home


def refuse_stale_index(name: str, record: tables.Record, output: Folder) -> None:
    """Raises SchemaError where the table that the index was built from has changed since."""
    source = str(record.inputs["input"])
    table = source.rpartition(".")[0]
    if "table" not in record.provenance["input"]:
        return  # other Parquet has no record to compare with
    now = tables.read_record(output.named(table))
    if now is None or not files_digest(now.files).is_that(record.inputs["digest"]):
        raise SchemaError(f"index {name}: {source} has changed since it was built; `clipray run` brings it up to date")


def hashes(record: tables.Record) -> dict[str, str]:
    """SHA-256 of each file of the index; empty if an earlier version built it."""
    return dict(record.provenance.get("sha256") or {})


def hash_of(folder: Folder, name: str) -> str:
    """SHA-256 of a file, 64 hex digits."""
    with explained(folder.url), folder.fs.open(folder.path(name), "rb") as file:
        return file_hash(file)


def broken_files(folder: Folder, record: tables.Record) -> dict[str, str]:
    """File -> what is wrong with it: `missing`, `size`, or `content`."""
    sizes, broken = folder.sizes(), {}
    for name, size in record.provenance["sizes"].items():
        if name not in sizes:
            broken[name] = "missing"
        elif sizes[name] != size:
            broken[name] = "size"
        elif name in hashes(record) and hash_of(folder, name) != hashes(record)[name]:
            broken[name] = "content"
    return broken


def is_as_built(path: str, sha256: str) -> bool:
    """Whether a local file has this SHA-256. A process reads a file once, until it changes."""
    status = os.stat(path)
    return _hash_once(path, status.st_size, status.st_mtime_ns) == sha256


@functools.cache
def _hash_once(path: str, _size: int, _mtime_ns: int) -> str:
    with open(path, "rb") as file:
        return file_hash(file)

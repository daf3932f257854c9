"""Published ground truth of the Oxford and Paris buildings -> Parquet with a row for each query and image.

`gnd_*.pkl` of the revisited sets (Radenović et al. 2018) and of cirtorch, and folders of `*_query.txt`, `*_good.txt`, `*_ok.txt` and
`*_junk.txt` (Philbin et al. 2007).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import fsspec
import pyarrow as pa

from clipray.analysis.retrieval import RELATIONS
from clipray.errors import ManifestError
from clipray.inputs.plain_pickle import read_plain_pickle
from clipray.storage.folder import Folder, absolute, filesystem, refuse_irregular
from clipray.storage.parquet import write_parquet

SCHEMA = pa.schema(
    [
        pa.field("query_id", pa.string(), False),
        pa.field("image_id", pa.string(), False),
        pa.field("relation", pa.string(), False),
        pa.field("query_box_xyxy", pa.list_(pa.float32())),
    ]
)
OXFORD = {"good": "easy", "ok": "hard", "junk": "junk"}
"""So that `medium`, easy and hard together, is Oxford's own protocol: good and ok are right, junk is left out."""
PICKLED = {"easy": "easy", "ok": "easy", "hard": "hard", "junk": "junk"}
"""`ok` is of the older files, which do not say how hard an image is."""
OXFORD_PREFIX = "oxc1_"  # of the images in Oxford's query files


class _Row(NamedTuple):
    query_id: str
    image_id: str
    relation: str
    query_box_xyxy: tuple[float, ...] | None


def convert_ground_truth(source: str, out: str, *, prefix: str = "", suffix: str = ".jpg") -> tuple[int, int]:
    """Write published ground truth as Parquet: `query_id`, `image_id`, `relation`, and the query's box in px of its image.

    Args:
        source: a `gnd_*.pkl`, or a folder of Oxford's text files; local or any fsspec URL.
        prefix, suffix: what an `image_id` has before and after the name in the ground truth.

    Returns:
        The number of queries and of rows.

    Raises:
        ManifestError: there is no such file, or it is not what it should be.
        ClipRayError: a pickle of anything but plain values.
    """
    fs, path = filesystem(source)
    if not fs.exists(path):
        raise ManifestError(f"{source}: nothing there: expected gnd_*.pkl, or a folder with *_query.txt and *_good.txt")
    pairs = list(_from_folder(source)) if fs.isdir(path) else _from_pickle(source, fs, path)
    rows = list(dict.fromkeys(row for row in pairs if row.query_id != row.image_id))
    relations = {(row.query_id, row.image_id): row.relation for row in rows}
    torn = next((row for row in rows if relations[row.query_id, row.image_id] != row.relation), None)
    if torn:
        raise ManifestError(f"{source}: {torn.image_id!r} has two relations to {torn.query_id!r}")
    rows.sort(key=lambda row: (row.query_id, RELATIONS.index(row.relation), row.image_id))
    columns = {
        "query_id": [f"{prefix}{row.query_id}{suffix}" for row in rows],
        "image_id": [f"{prefix}{row.image_id}{suffix}" for row in rows],
        "relation": [row.relation for row in rows],
        "query_box_xyxy": [row.query_box_xyxy for row in rows],
    }
    write_parquet(pa.table(columns, SCHEMA), out)
    return len({row.query_id for row in rows}), len(rows)


def _from_pickle(source: str, fs: fsspec.AbstractFileSystem, path: str) -> list[_Row]:
    try:
        refuse_irregular(fs, path)
        value = read_plain_pickle(fs.cat_file(path), source)
    except OSError as error:
        raise ManifestError(f"{source}: cannot be read: {error}") from error
    if not isinstance(value, dict) or not {"gnd", "imlist", "qimlist"} <= value.keys():
        actual = ", ".join(map(str, value)) if isinstance(value, dict) else type(value).__name__
        raise ManifestError(f"{source}: expected a dict with gnd, imlist and qimlist, found {actual}")
    try:
        return list(_pickled_rows(*(value[name] for name in ("imlist", "qimlist", "gnd"))))
    except (TypeError, ValueError, AttributeError, IndexError) as error:
        raise ManifestError(f"{source}: not the ground truth of images: {error}") from error


def _pickled_rows(images: Sequence[str], queries: Sequence[str], gnd: Sequence[Mapping[str, Any]]) -> Iterator[_Row]:
    """Raises ValueError and its kin where the values are not what they should be."""
    for query, known in zip(queries, gnd, strict=True):
        box = tuple(float(v) for v in known["bbx"]) if "bbx" in known else None
        for name, relation in PICKLED.items():
            for number in known.get(name, ()):
                if not 0 <= int(number) < len(images):
                    raise ValueError(f"{name} of {query!r} names image {number} of {len(images)}")
                yield _Row(_stem(query), _stem(images[int(number)]), relation, box)


def _stem(name: object) -> str:
    return str(name).removesuffix(".jpg")


def _from_folder(source: str) -> Iterator[_Row]:
    folder = Folder(absolute(source))
    names = sorted(name for name in folder.sizes() if name.endswith("_query.txt"))
    if not names:
        raise ManifestError(f"{source}: no *_query.txt there; expected Oxford's text files, or gnd_*.pkl")
    for name in names:
        query, *box = _lines(folder, name)[0].split()
        try:
            _, _, _, _ = corners = tuple(float(v) for v in box)
        except ValueError as error:
            raise ManifestError(
                f"{folder.path(name)}: expected an image and x1 y1 x2 y2, found {' '.join(box)!r}"
            ) from error
        for suffix, relation in OXFORD.items():
            for image in _lines(folder, f"{name.removesuffix('_query.txt')}_{suffix}.txt", empty=True):
                yield _Row(_stem(query.removeprefix(OXFORD_PREFIX)), _stem(image), relation, corners)


def _lines(folder: Folder, name: str, *, empty: bool = False) -> list[str]:
    data = folder.read(name)
    if data is None:
        raise ManifestError(f"{folder.path(name)}: is missing; each *_query.txt needs its _good, _ok and _junk")
    lines = [line.strip() for line in data.decode("utf-8-sig", "replace").splitlines() if line.strip()]
    if not lines and not empty:
        raise ManifestError(f"{folder.path(name)}: is empty; expected an image and x1 y1 x2 y2")
    return lines

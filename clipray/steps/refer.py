"""Step `refer`: regions with captions -> the `referred` table: for each caption the box of its picture that it fits best.

The regions of a picture lie in one file, so each file of the input is a part of its own: a task encodes its captions and
goes from picture to picture.
"""

from __future__ import annotations

import functools
import itertools
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from clipray import __version__, tables
from clipray.analysis.referring import refer
from clipray.encoders.resolve import ResolvedModel
from clipray.errors import SchemaError
from clipray.job import fingerprint
from clipray.settings import Refer
from clipray.steps.metrics import Metric, write_metrics
from clipray.steps.parts import begin, make_parts
from clipray.steps.step import Given, Run, State, refuse_stale, standing
from clipray.storage import Folder
from clipray.vectors import Piece, Vectors, open_vectors, read_finite, refuse_another_model, unit

CAPTION, BOX = "caption", "box_xyxy"
IDS = ("image_id", "region_id")


@dataclass(frozen=True)
class ReferStep:
    """A `Step`; see `Step`. precision: of the text tower."""

    settings: Refer
    output: Folder
    source: Vectors
    model: ResolvedModel
    precision: str

    @property
    def name(self) -> str:
        return self.settings.name

    @property
    def total(self) -> int:
        """Regions, with and without a caption."""
        return self.source.n_samples

    @property
    def table(self) -> Folder:
        return self.output.sub(self.name)

    @property
    def identity(self) -> dict[str, Any]:
        settings, version = self.settings, tables.table_schema("referred")["version"]
        own = {"template": settings.template, "subtract": settings.subtract}
        model = {**self.model.identity(), "precision": self.precision}
        return {"step": "refer", "schema_version": version, "input": self.source.identity, "model": model, **own}

    def inspect(self, *, count: bool = True) -> State:  # noqa: ARG002 - whole files are made, none is counted
        return standing(self.table, self.identity, self.source.digest)

    def describe(self, cluster: Any) -> list[str]:  # noqa: ARG002 - of the protocol
        return [f"{self.name}: captions and boxes of {self.total} regions from {self.source.name}"]

    def run(self, run: Run) -> tables.Record:
        """Compare file by file, measure, commit.

        Raises:
            StaleTableError: the table was made with other settings.
            SchemaError: vectors that are not finite; no region has a caption.
        """
        refuse_stale(self.table, self.inspect())
        began = time.monotonic()
        run.events.write("step_started", step=self.name, rows=self.total, fingerprint=fingerprint(self.identity))
        begin(self, self.source.digest)
        files = [list(pieces) for _, pieces in itertools.groupby(self.source.pieces, lambda piece: piece.path)]
        parts = [(pieces, [f"part-{n:06d}.parquet"]) for n, pieces in enumerate(files)]
        shards = make_parts(self, parts, self._stamp, refer_file, run, "comparing", row_for_row=False)
        if not sum(shard.rows for shard in shards):
            raise SchemaError(
                f"input {self.source.name}: no region has a caption; `box_captions` of the manifest has them"
            )
        return self._commit(shards, time.monotonic() - began)

    @functools.cached_property
    def _stamp(self) -> dict[str, Any]:
        source = self.source
        return {
            "fingerprint": fingerprint(self.identity),
            "input": {"name": source.name, "digest": source.digest, **source.identity},
            "space": source.space,
            "versions": {"clipray": __version__},
        }

    def _commit(self, shards: list[tables.Shard], seconds: float) -> tables.Record:
        found = [tables.read_shard(self.table, shard.name, ["boxes", "correct"]) for shard in shards]
        data = pa.concat_tables(found)
        choice = data["boxes"].to_numpy() > 1  # with a single box there is nothing to find
        measured = [Metric("accuracy", _mean(data["correct"].to_numpy()), n=len(data))]
        if choice.any():
            boxes, correct = data["boxes"].to_numpy()[choice], data["correct"].to_numpy()[choice]
            n = int(choice.sum())
            measured.append(Metric("accuracy_of_several", _mean(correct), n=n))
            measured.append(Metric("chance_of_several", _mean(1 / boxes), n=n))
        write_metrics(self.output, self.name, measured, self._stamp)
        rows = sum(shard.rows for shard in shards)
        return tables.finish(
            self.table, "referred", tables.arrow_schema("referred"), shards, fingerprint=fingerprint(self.identity),
            inputs={"rows": self.total, "digest": self.source.digest, "input": self.source.name},
            settings=self.identity, provenance=self._stamp, finished_at=tables.now(),
            figures={metric.metric: round(metric.value, 6) for metric in measured},
            seconds=round(seconds, 2), rows_per_s=round(rows / max(seconds, 1e-9), 2),
        )  # fmt: skip


def _mean(values: np.ndarray) -> float:
    return float(values.astype(np.float64).mean())


def prepare(settings: Refer, given: Given) -> ReferStep:
    """Open the regions, hold the model against their vectors.

    Raises:
        JobError, SchemaError, ManifestError: no such input, one of another model, or one without captions.
    """
    source, model = open_vectors(settings.input, given.output), given.model()
    refuse_another_model(source, model.identity(), model.embed_dim)
    missing = [name for name in (*IDS, BOX, CAPTION) if name not in source.schema.names]
    if missing:
        raise SchemaError(
            f"input {source.name}: no column `{missing[0]}`; expected regions with captions: `embed_regions` writes them, "
            f"from a manifest with `boxes` and `box_captions`; found: {', '.join(source.schema.names)}"
        )
    asked = given.job.model.precision if given.job.model else "auto"
    return ReferStep(settings, given.output, source, model, "fp32" if asked == "auto" else asked)


def refer_file(item: tuple[ReferStep, list[Piece], list[str]]) -> list[tables.Shard]:
    """Runs in a worker: the captions of one file's pictures."""
    step, pieces, (name,) = item
    wanted = (*IDS, BOX, CAPTION)
    read = [read_finite(step.source, piece, wanted) for piece in pieces]
    regions, x = pa.concat_tables([ids for ids, _ in read]), unit(np.concatenate([x for _, x in read]))
    said = regions[CAPTION].to_pylist()
    texts = list(dict.fromkeys(text for text in said if text and text.strip()))
    encoder = _encoder(json.dumps(asdict(step.model)), step.precision)
    vectors = encoder.encode([step.settings.template.replace("{}", t) for t in texts])[0]
    place = {text: n for n, text in enumerate(texts)}
    rows = [
        row
        for picture in _pictures(regions["image_id"])
        for row in _of_picture(regions, x, picture, [place.get(said[n]) for n in picture], vectors, step.settings)
    ]
    data = pa.Table.from_pylist(rows, schema=tables.arrow_schema("referred"))
    return [tables.write_shard(step.table, name, "referred", data, step._stamp)]


@functools.lru_cache(maxsize=1)
def _encoder(model: str, precision: str) -> Any:
    """The text tower, once in a worker. model: a `ResolvedModel` as JSON."""
    from clipray.encoders.text_encoder import TextEncoder

    return TextEncoder(ResolvedModel(**json.loads(model)), precision=precision, batch_size=64)


def _pictures(ids: pa.ChunkedArray) -> Iterator[np.ndarray]:
    """Places of the rows of each picture, in the order in which pictures come."""
    codes = ids.combine_chunks().dictionary_encode().indices.to_numpy()
    order = np.argsort(codes, kind="stable")
    yield from np.split(order, np.flatnonzero(np.diff(codes[order])) + 1) if len(order) else ()


def _of_picture(
    regions: pa.Table, x: np.ndarray, rows: np.ndarray, captions: list[int | None], vectors: np.ndarray, how: Refer
) -> Iterator[dict[str, Any]]:
    """A row for each region that has a caption. captions: places in `vectors`."""
    own = [n for n, place in enumerate(captions) if place is not None]
    if not own:
        return
    picture = regions.take(pa.array(rows)).select([*IDS, BOX, CAPTION]).to_pylist()
    similarity = x[rows] @ vectors[[place for place in captions if place is not None]].T  # (boxes, captions)
    found = refer(similarity, subtract=how.subtract == "others")
    for m, n in enumerate(own):
        best = int(found.best[m])
        margin = float(found.margin[m])
        yield {
            **picture[best],
            CAPTION: picture[n][CAPTION],
            "similarity": float(similarity[best, m]),
            "score": float(found.scores[best, m]),
            "margin": None if np.isnan(margin) else margin,
            "boxes": len(rows),
            "truth": picture[n]["region_id"],
            "rank": found.rank(n, m),
            "correct": picture[best][CAPTION] == picture[n][CAPTION],
        }

"""Step `score_captions`: pairs of an image and a caption -> the `caption_scores` table, and their means in `metrics`."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from clipray import tables
from clipray.inputs.committed_rows import CommittedRows
from clipray.inputs.manifest import Manifest, is_texts, open_manifest
from clipray.inputs.vector_column import VectorColumn, open_vectors, refuse_another_model
from clipray.inputs.vector_lookup import Lookup, open_lookup
from clipray.job import ScoreCaptions
from clipray.job.row_spec import PAIRS
from clipray.pipelines.spec import CaptionSpec
from clipray.steps.base.encode_step import EncodeStep
from clipray.steps.base.step import StepContext
from clipray.tables.metrics import Metric, write_metrics
from clipray.tables.started import read_started

REFERENCES = "references"


@dataclass(frozen=True)
class ScoreStep(EncodeStep[ScoreCaptions]):
    """Captions are encoded here; the vectors of the images come with the rows."""

    source: VectorColumn

    @property
    def widths(self) -> dict[str, int]:
        return {}

    @property
    def input_fingerprint(self) -> dict[str, Any]:
        return {**super().input_fingerprint, "input": self.source.identity}

    @functools.cached_property
    def lookup_digest(self) -> str:
        return self.source.digest.like((read_started(self.table) or {}).get("rests_on"))

    def lookup(self) -> tuple[Lookup, str]:
        return open_lookup(self.source), "image_id"

    @property
    def schema(self) -> pa.Schema:
        return tables.arrow_schema("caption_scores", extra=self.kept_fields)

    @property
    def row_provenance(self) -> dict[str, Any]:
        source = self.source
        return {
            "input": {"name": source.name, "digest": self.lookup_digest, **source.identity},
            "prefix": self.settings.prefix,
        }

    def encoder(self) -> CaptionSpec:
        from clipray.engine.workers import GATHERED

        return CaptionSpec(
            model=self.model,
            schema=self.schema,
            prefix=self.settings.prefix,
            image_vectors=GATHERED,
            source=self.source.name,
        )

    def summarize(self, committed: CommittedRows, provenance: dict[str, Any]) -> dict[str, Any]:
        """Means, in one pass over the table's shards."""
        names = ("clipscore", "ref_clipscore")
        sums, counts = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0)
        for shard in committed.files:
            data = tables.read_shard(self.table, shard.name, names)
            for name in names:
                values = data[name].drop_null().to_numpy().astype(np.float64)
                sums[name] += float(values.sum())
                counts[name] += len(values)
        means = {name: sums[name] / counts[name] for name in names if counts[name]}
        write_metrics(
            self.output, self.name, [Metric(name, mean, n=counts[name]) for name, mean in means.items()], provenance
        )
        return {f"mean_{name}": round(mean, 6) for name, mean in means.items()}


def open_step(settings: ScoreCaptions, context: StepContext) -> ScoreStep:
    """Open the pairs and the images.

    Raises:
        ManifestError: no pairs there, or columns that are missing or of another type.
        SchemaError: the table of images is not finished, or of another model than the job's.
    """
    source, model = open_vectors(settings.input, context.output), context.model()
    refuse_another_model(source, model.identity(), model.embed_dim)
    manifest = open_manifest(settings.manifest, settings.keep, [REFERENCES], PAIRS)
    return ScoreStep.of(settings, context, manifest, (*_references(manifest), *settings.keep), source=source)


def _references(manifest: Manifest) -> list[str]:
    """The column of captions by people, where there is one."""
    if REFERENCES not in manifest.schema.names:
        return []
    manifest.expect(REFERENCES, is_texts, "list<string>: for each pair the captions to compare with")
    return [REFERENCES]

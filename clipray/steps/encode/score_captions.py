"""Step `score_captions`: pairs of an image and a caption -> the `caption_scores` table, and their means in `metrics`."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import polars as pl

from clipray.inputs.committed_rows import CommittedRows
from clipray.inputs.manifest import is_texts, open_manifest
from clipray.inputs.vector_column import VectorColumn, open_vectors, refuse_another_model
from clipray.inputs.vector_lookup import Lookup, open_lookup
from clipray.job import ScoreCaptions
from clipray.job.row_spec import PAIRS
from clipray.pipelines.spec import CaptionSpec
from clipray.steps.base.encode_step import EncodeStep
from clipray.steps.base.step import StepContext
from clipray.tables.metrics import Metric, write_metrics
from clipray.tables.scan import figures_of
from clipray.tables.started import read_started

REFERENCES = "references"


@dataclass(frozen=True)
class ScoreStep(EncodeStep[ScoreCaptions]):
    """Captions are encoded here; the vectors of the images come with the rows."""

    source: VectorColumn

    @property
    def input_fingerprint(self) -> dict[str, Any]:
        return {**super().input_fingerprint, "input": self.source.identity}

    @functools.cached_property
    def lookup_digest(self) -> str:
        return self.source.digest.like((read_started(self.table) or {}).get("rests_on"))

    def lookup(self) -> tuple[Lookup, str]:
        return open_lookup(self.source), "image_id"

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
        """Means of the rows that have a score."""
        scores = {name: pl.col(name).cast(pl.Float64) for name in ("clipscore", "ref_clipscore")}
        figures = {name: pl.struct(value=score.mean(), n=score.count()) for name, score in scores.items()}
        means = figures_of(self.table, committed.files, **figures)
        metrics = [Metric(name, **mean) for name, mean in means.items() if mean["n"]]
        write_metrics(self.output, self.name, metrics, provenance)
        return {f"mean_{metric.metric}": round(metric.value, 6) for metric in metrics}


def open_step(settings: ScoreCaptions, context: StepContext) -> ScoreStep:
    """Open the pairs and the images.

    Raises:
        ManifestError: no pairs there, or columns that are missing or of another type.
        SchemaError: the table of images is not finished, or of another model than the job's.
    """
    source, model = open_vectors(settings.input, context.output), context.model(settings)
    refuse_another_model(source, model.identity(), model.embed_dim)
    manifest = open_manifest(settings.manifest, settings.keep, [REFERENCES], PAIRS)
    expected = "list<string>: for each pair the captions to compare with"
    references = [REFERENCES] if manifest.has(REFERENCES, is_texts, expected) else []
    return ScoreStep.of(settings, context, manifest, (*references, *settings.keep), source=source)

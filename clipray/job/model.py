"""The model of a job."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from clipray.job.base import Settings


class Model(Settings):
    """An open_clip model.

    Attributes:
        name: an open_clip name (`ViT-B-32`), `hf-hub:org/model`, `local-dir:/path`, the path of an open_clip config
            (`*.json`), or the built-in `demo` (a ViT) or `demo-rn` (a ResNet).
        pretrained: a tag of that name, the path or URL of a checkpoint, or `random`.
        seed: the seed of the random weights, with `pretrained: random` only.
        precision: `auto` is bf16 where the hardware multiplies it natively, else fp32.
    """

    name: str
    pretrained: str | None = None
    seed: int | None = None
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"

    @model_validator(mode="after")
    def _random_needs_a_seed(self) -> Model:
        if self.pretrained == "random" and self.seed is None:
            raise ValueError("`pretrained: random` needs a `seed`, so that every worker draws the same weights")
        if self.pretrained != "random" and self.seed is not None:
            raise ValueError("`seed` goes with `pretrained: random` only")
        return self

"""What all settings share: frozen, typed, validated once, at the door.

A field marked `Execution` changes how fast or how patiently a step runs, never which values it writes for a row,
so it is no part of a table's fingerprint.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

Execution = "execution"
"""Marker in a field's `Annotated` metadata; see the module's docstring."""

TABLE_NAME = r"^[A-Za-z][A-Za-z0-9_-]*$"
Count = Annotated[int, Field(ge=1, strict=True)]
Actors = Literal["auto"] | Count | tuple[Count, Count]


class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, hide_input_in_errors=True)

    def identity(self) -> dict[str, Any]:
        """The settings that decide what is written: everything but `Execution` fields, as plain JSON values."""
        skip = {name for name, field in type(self).model_fields.items() if Execution in field.metadata}
        return self.model_dump(mode="json", exclude=skip)


class StepSettings(Settings):
    """Settings of one step of a job. `name` is that of its table, and of the step."""

    needs_model: ClassVar[bool] = False

    name: str = Field(pattern=TABLE_NAME)

    @property
    def tables(self) -> tuple[str, ...]:
        """The tables that the step writes, its own first."""
        return (self.name,)

    @property
    def sources(self) -> tuple[str, ...]:
        """The tables that it reads, as the job names them: `images`, or `runs/other/images` of another run."""
        return ()

    @property
    def looks_inside(self) -> bool:
        """Whether the driver must know the network's layers, and not only what it returns."""
        return False

"""The JSON Schema of job files (draft 2020-12), made from the settings: editors complete and check with it."""

from __future__ import annotations

import inspect
import re
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue, models_json_schema

from clipray.job import STEPS, Job

DIALECT = "https://json-schema.org/draft/2020-12/schema"
NUMBER = r"^[-+]?[0-9_]*\.?[0-9_]+([eE][-+]?[0-9]+)?$"
STEP_FIELDS = sorted({field for step in STEPS.values() for field in step.model_fields})
TRUTH = "^([Yy]es|YES|[Nn]o|NO|[Oo]n|ON|[Oo]ff|OFF)$"


def job_schema() -> dict[str, Any]:
    """The schema of a job file, as plain JSON values.

    Rules about several settings at once are not in it: `load_job` checks them.
    """
    classes: list[type[BaseModel]] = [Job, *STEPS.values()]
    refs, schema = models_json_schema([(cls, "validation") for cls in classes], schema_generator=_Schema)
    settings = schema["$defs"]
    job = settings.pop("Job")
    job["properties"]["steps"]["items"] = {
        "type": "object",
        "properties": {name: _may_be_empty(cls, refs[cls, "validation"]) for name, cls in STEPS.items()},
        "additionalProperties": False,
        "minProperties": 1,
        "maxProperties": 1,
    }
    return {"$schema": DIALECT, **job, "$defs": settings}


def _may_be_empty(cls: type[BaseModel], settings: JsonSchemaValue) -> JsonSchemaValue:
    """`- report:` is a step, too: a mapping of no settings."""
    required = any(field.is_required() for field in cls.model_fields.values())
    return settings if required else {"anyOf": [settings, {"type": "null"}]}


class _Schema(GenerateJsonSchema):
    """Pydantic's schema, with the descriptions of docstrings.

    Jobs are read as YAML 1.1, where `1_000` is a number, `yes` is true and `1e-5` is text that pydantic takes for a
    number. To editors, which read YAML 1.2, the first two are text. So numbers and truth values may be text here.
    """

    def int_schema(self, schema: Any) -> JsonSchemaValue:
        return {**super().int_schema(schema), "type": ["integer", "string"], "pattern": NUMBER}

    def float_schema(self, schema: Any) -> JsonSchemaValue:
        return {**super().float_schema(schema), "type": ["number", "string"], "pattern": NUMBER}

    def bool_schema(self, schema: Any) -> JsonSchemaValue:
        return {**super().bool_schema(schema), "type": ["boolean", "string"], "pattern": TRUTH}

    def field_title_should_be_set(self, schema: Any) -> bool:  # noqa: ARG002 - of the base class
        return False  # it would repeat the key

    def model_schema(self, schema: Any) -> JsonSchemaValue:
        cls = schema["cls"]
        described = super().model_schema(schema)
        described["description"] = _docstring(cls).partition("\n\n")[0]
        for base in reversed(cls.__mro__):
            for name, text in field_docs(base, [*cls.model_fields, *STEP_FIELDS]).items():
                if name in cls.model_fields:
                    described["properties"][cls.model_fields[name].alias or name]["description"] = text
        return described


def field_docs(cls: type, fields: list[str]) -> dict[str, str]:
    """What the docstring of a class says of `fields`, in its part `Attributes`: `levels, overlap: … p: …; or q: …`."""
    text = " ".join(_docstring(cls).partition("Attributes:\n")[2].split())
    names = "|".join(fields)
    entries = re.split(rf"(?:^|(?<=[.;] )|(?<=; or ))`?((?:{names})(?:, (?:{names}))*)`?: ", text)
    return {
        name: doc.removesuffix(" ").removesuffix("; or").removesuffix(";")
        for group, doc in zip(entries[1::2], entries[2::2], strict=True)
        for name in group.split(", ")
    }


def _docstring(cls: type) -> str:
    return inspect.cleandoc(cls.__doc__ or "")

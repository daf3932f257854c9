"""Settings of the steps that give names to vectors: `label`, `evaluate_labels` and `probe`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from clipray.job.base import (
    TABLE_NAME,
    ColumnInput,
    Execution,
    ModelStep,
    Reference,
    Settings,
    StepSettings,
    TableInput,
)
from clipray.job.vectors import Column

TEMPLATE_SETS = ("photo", "openai")
"""Built-in sets of templates: our own general ones, and the 80 that OpenAI used on ImageNet, as open_clip has them."""
CLASS_SETS = ("cifar100", "imagenet")
"""Built-in names of classes."""
Texts = str | list[str]


def distinct(names: list[str], what: str = "class") -> list[str]:
    """Raises ValueError where a name is empty or stands twice."""
    if not names:
        raise ValueError(f"no {what} is named")
    empty = [n for n, name in enumerate(names) if not name.strip()]
    if empty:
        raise ValueError(f"{what} {empty[0]} has an empty name")
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"{what} {twice[0]!r} stands twice{f', and {len(twice) - 1} others' if twice[1:] else ''}")
    return names


def with_place(templates: Texts | None) -> Texts | None:
    """Raises ValueError where a template has no place for the name."""
    if templates is None or templates in TEMPLATE_SETS:
        return templates
    texts: Sequence[str] = [templates] if isinstance(templates, str) else templates
    if not texts:
        raise ValueError("no template is given")
    bad = [text for text in texts if "{}" not in text]
    if bad:
        raise ValueError(
            f"the template {bad[0]!r} has no `{{}}` where the name goes; built-in sets: {', '.join(TEMPLATE_SETS)}"
        )
    return templates


Templates = Annotated[Texts | None, AfterValidator(with_place)]


class Classes(Settings):
    """Names of classes and the texts for them; a class file in YAML has the same content.

    Attributes:
        names: the names of the classes, all different.
        templates: texts with `{}` where the name goes, or a built-in set of them.
        descriptions: a text, or several, for each name.
    """

    names: Annotated[list[str], Field(min_length=1), AfterValidator(distinct)]
    templates: Templates = None
    descriptions: dict[str, Texts] | None = None


ClassesInput = Annotated[
    str | list[str] | Classes, Reference, AfterValidator(lambda c: distinct(c) if isinstance(c, list) else c)
]


class Style(Settings):
    """A prompt style: how classes become texts. `templates` and `descriptions` are those of the classes unless set here.

    Attributes:
        prompt: a class as a template with its name, as its description, or as `NAME is DESCRIPTION`.
        templates: texts with `{}` where the name goes, or a built-in set of them.
        descriptions: a text, or several, for each name, or the path of a YAML file with them.
    """

    prompt: Literal["template", "description", "name_is_description"] = "template"
    templates: Templates = None
    descriptions: str | dict[str, Texts] | None = None

    @model_validator(mode="after")
    def _of_its_kind(self) -> Style:
        if self.prompt == "template" and self.descriptions is not None:
            raise ValueError("`descriptions` goes with `prompt: description` or `prompt: name_is_description`")
        if self.prompt != "template" and self.templates is not None:
            raise ValueError(f"`templates` goes with `prompt: template`, found `prompt: {self.prompt}`")
        return self


class MultiLabel(Settings):
    """Each class is judged independently.

    Attributes:
        negative: a text for images that do not show the class, with or without `{}` for its name; required unless
            the model has a `logit_bias` of its own (SigLIP).
        threshold: the least probability of a label.
    """

    negative: str | None = None
    threshold: Annotated[float, Field(ge=0, le=1)] = 0.5


class Label(ModelStep):
    """CLIP vectors of images -> `labels` table: zero-shot labels, a row for each row of the input and each style.

    Attributes:
        classes: a file (YAML or Parquet), a built-in list (`cifar100`, `imagenet`), a list of names, or `Classes`.
        styles: prompt styles by name, or a list of kinds of prompts; by default `template`, or all of a Parquet file.
        top: the number of labels to keep for each row.
        multi_label: judge each class independently.
        precision: the precision of the product, see `clipray.analysis.zero_shot`. Class vectors are fp32 unless the
            model's is set.
    """

    needs_text: ClassVar[bool] = True
    companion: ClassVar[str] = "classes"

    name: str = Field("labels", pattern=TABLE_NAME)
    input: Annotated[str | Column, ColumnInput]
    classes: ClassesInput
    styles: Annotated[list[str] | dict[str, Style] | None, Reference] = None
    top: Annotated[int, Field(ge=1, le=1000)] = 5
    multi_label: MultiLabel | None = None
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    rows_per_file: Annotated[int, Execution, Field(ge=1)] = 131_072

    @field_validator("styles")
    @classmethod
    def _styles_have_names(cls, styles: Any) -> Any:
        distinct(list(styles or ["template"]), "style")
        bad = [name for name in styles or () if not name.replace("_", "").replace("-", "").isalnum()]
        if bad:
            raise ValueError(f"a style's name is of letters, digits, `_` and `-`: {bad[0]!r}")
        return styles


class LabelSet(Settings):
    """A data set that was labelled.

    Attributes:
        labels: a table of labels, of this run or of another (`runs/other/labels`).
        truth: `table.column` with the known labels.
        baseline: another table of labels of the same rows.
    """

    labels: Annotated[str, TableInput]
    truth: Annotated[str | Column, ColumnInput]
    baseline: Annotated[str | None, TableInput] = None


class EvaluateLabels(StepSettings):
    """Labels and known labels -> `label_figures` and its confusion: the accuracy of the labels, style by style.

    Attributes:
        labels, truth: a table of labels, and `table.column` with the known ones; or `sets`: several of both, by name.
        by: a column of the truth's table; each of its values becomes a data set of its own.
        baseline: the data set, or the style, with which the others are compared.
        bootstrap: the number of samples for the intervals. confidence: the level of the intervals.
    """

    companion: ClassVar[str] = "confusion"

    name: str = Field("label_figures", pattern=TABLE_NAME)
    labels: Annotated[str | None, TableInput] = None
    truth: Annotated[str | Column | None, ColumnInput] = None
    sets: Annotated[dict[str, LabelSet] | None, Reference] = Field(None, min_length=1)
    by: str | None = None
    baseline: str | None = None
    bootstrap: Annotated[int, Field(ge=100, le=100_000)] = 1_000
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95
    random_state: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _one_way(self) -> EvaluateLabels:
        if (self.sets is None) == (self.labels is None) or (self.labels is None) != (self.truth is None):
            raise ValueError("expected `labels` and `truth`, or `sets` with both for each data set")
        return self

    @property
    def data_sets(self) -> dict[str, LabelSet]:
        if self.sets is not None:
            return self.sets
        return {"all": LabelSet(labels=str(self.labels), truth=self.truth)}  # type: ignore[arg-type]

    @property
    def sources(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(table for labelled in self.data_sets.values() for table in labelled.sources))


class Probe(StepSettings):
    """Any vector column and known labels -> `probe`, a table of labels by logistic regression.

    Attributes:
        truth: `table.column` with the known labels; rows without one are only labelled.
        split: a column of the truth's table that says `train`, `validation` or `test`; without it rows are drawn, by
            their ids, so that a row stays in its split when others are added.
        validation_share, test_share: the shares of rows to draw if there is no `split`.
        c: inverse strengths of the penalty to try; the one that is best on the validation rows is trained again with
            them.
        fit: a finished probe that is applied unchanged: `runs/other/probe`.
        max_rows: labelled rows to use, drawn by their ids; they are held in a worker's memory.
    """

    companion: ClassVar[str] = "classes"

    name: str = Field("probe", pattern=TABLE_NAME)
    input: Annotated[str | Column, ColumnInput]
    truth: Annotated[str | Column | None, ColumnInput] = None
    split: str | None = None
    validation_share: Annotated[float, Field(gt=0, lt=1)] = 0.2
    test_share: Annotated[float, Field(ge=0, lt=1)] = 0.2
    c: list[Annotated[float, Field(gt=0)]] = Field([0.001, 0.01, 0.1, 1, 10, 100], min_length=1)
    max_iterations: Annotated[int, Field(ge=1)] = 1_000
    max_rows: Annotated[int, Field(ge=10)] = 200_000
    random_state: Annotated[int, Field(ge=0)] = 0
    fit: Annotated[str | None, TableInput] = None
    top: Annotated[int, Field(ge=1, le=1000)] = 5
    rows_per_file: Annotated[int, Execution, Field(ge=1)] = 131_072

    @model_validator(mode="after")
    def _one_way(self) -> Probe:
        if (self.truth is None) == (self.fit is None):
            raise ValueError(f"expected one of `truth` and `fit`, found {'both' if self.fit else 'none'}")
        if self.validation_share + self.test_share >= 1:
            raise ValueError("`validation_share` and `test_share` leave nothing to train on")
        return self

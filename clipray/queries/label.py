"""`clipray label IMAGE…`: labels a few images without Ray and without a table."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from clipray.analysis.prompts import PromptStyle
from clipray.errors import JobError, ManifestError
from clipray.inputs.classes import KNOWN_SUFFIXES, prompt_styles
from clipray.inputs.image_listing import list_images, utf8_name
from clipray.job import CLASS_SETS, SCHEMES, Classes, Model, Style, distinct, with_place
from clipray.queries.answer import Look
from clipray.storage.environment import environment_errors
from clipray.storage.folder import absolute, filesystem
from clipray.storage.folder_listing import is_glob
from clipray.storage.uris import is_local

if TYPE_CHECKING:
    from clipray.models.image_encoder import ImageEncoder
    from clipray.models.resolve import ResolvedModel
    from clipray.models.text_encoder import TextEncoder

AT_ONCE = 32  # images
FILE_LIKE = re.compile(r"\.[a-z][a-z0-9]{1,7}$", re.IGNORECASE)


class Towers(Protocol):
    """A model that is loaded, or will be when a tower is asked for."""

    def resolved(self) -> ResolvedModel: ...

    def texts(self) -> TextEncoder: ...

    def images(self) -> ImageEncoder: ...


@environment_errors()
def label(
    images: Sequence[str], classes: str, model: Model | Towers, *, template: str | None = None, top: int = 5
) -> Iterator[Look]:
    """Label images, in their order, in batches.

    Args:
        images: files, folders or globs, local or any URL.
        classes: `a dog, a cat`, each taken as it stands; or a class file or a built-in list, in templates.
        template: with `{}` where the name goes, or a built-in set.

    Raises:
        JobError, ManifestError, ModelError: no such images, classes or model.
    """
    style = _style(classes, template)
    paths = [path for place in images for path in _image_paths(place)]
    yield from _label(paths, style, _Loading(model) if isinstance(model, Model) else model, top)


def _style(classes: str, template: str | None) -> PromptStyle:
    try:
        styles = {"template": Style(templates=template)} if with_place(template) else None
    except ValueError as error:
        raise JobError(f"--template: {error}") from error
    return prompt_styles(_classes(classes, template), styles)[0]


def _classes(classes: str, template: str | None) -> str | Classes:
    if classes in CLASS_SETS or classes.lower().endswith(KNOWN_SUFFIXES):
        return classes
    if "," not in classes and (os.sep in classes or FILE_LIKE.search(classes)):  # a single class would be no choice
        raise JobError(
            f"--classes {classes}: expected a class file ({', '.join(KNOWN_SUFFIXES)}), {' or '.join(CLASS_SETS)}, or names, `a dog, a cat`"
        )
    try:
        names = distinct([name.strip() for name in classes.split(",")])
    except ValueError as error:
        raise JobError(f"--classes: {error}") from error
    return Classes(names=names, templates=template or "{}")


def _image_paths(place: str) -> list[str]:
    """The images in a folder or glob; a single file as it is."""
    fs, path = filesystem(place)
    if fs.isdir(path) or is_glob(fs, path):
        return [os.path.relpath(p) if is_local(place) else fs.unstrip_protocol(p) for p in list_images(place).paths]
    if not fs.exists(path):
        raise ManifestError(f"{place}: no such image")
    return [place]


class _Loading:
    """The towers of a model, each loaded when it is asked for. An index is not searched with them, so they are in fp32."""

    def __init__(self, model: Model) -> None:
        from clipray.models.resolve import resolve

        self._resolved = resolve(model)
        self._precision = "fp32" if model.precision == "auto" else model.precision

    def resolved(self) -> ResolvedModel:
        return self._resolved

    def texts(self) -> TextEncoder:
        from clipray.models.text_encoder import TextEncoder

        return TextEncoder(self._resolved, precision=self._precision, batch_size=64)

    def images(self) -> ImageEncoder:
        from clipray.models.image_encoder import ImageEncoder

        return ImageEncoder(self._resolved, precision=self._precision, batch_size=AT_ONCE)


def _label(paths: Sequence[str], style: PromptStyle, towers: Towers, top: int) -> Iterator[Look]:
    from clipray.analysis.zero_shot import ZeroShot
    from clipray.models.preprocess import preprocess_of
    from clipray.pipelines.class_texts import class_vectors_of
    from clipray.pipelines.decode import DecodedImage, load_image, prepare_pillow
    from clipray.pipelines.spec import Limits

    texts = towers.texts()
    vectors, _, _ = class_vectors_of(style, range(len(style.labels)), texts)
    classifier = ZeroShot(vectors, texts.logit_scale, top=top, precision="fp32")
    del texts
    encoder = towers.images()
    prepare_pillow()
    limits = Limits(schemes=SCHEMES)
    preprocess = preprocess_of(towers.resolved(), limits.max_pixels)
    for start in range(0, len(paths), AT_ONCE):
        batch = paths[start : start + AT_ONCE]
        loaded = [load_image(absolute(path), None, limits, preprocess) for path in batch]
        good = [image.pixels for image in loaded if isinstance(image, DecodedImage)]
        rows: Iterator[Any] = iter(())
        if good:
            x = encoder.encode(np.stack(good)).vectors["clip"]
            best = classifier.label(x)
            rows = zip(best.classes.tolist(), best.probabilities.tolist(), strict=True)
        for path, image in zip(batch, loaded, strict=True):
            if isinstance(image, DecodedImage):
                classes, p = next(rows)
                yield Look(utf8_name(path), tuple((style.labels[c], v) for c, v in zip(classes, p, strict=True)))
            else:
                yield Look(utf8_name(path), rejected=f"{image.reason}: {image.message}")

"""`clipray label PICTURE…`: labels for a few pictures, at once, without Ray and without a table."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from clipray.analysis.prompts import PromptStyle
from clipray.errors import JobError, ManifestError
from clipray.inputs.classes import KNOWN_SUFFIXES, prompt_styles
from clipray.inputs.image_listing import find_pictures, utf8_name
from clipray.job import CLASS_SETS, SCHEMES, Classes, Model, Style, distinct, with_place
from clipray.storage.environment import environment_errors
from clipray.storage.folder import absolute, filesystem
from clipray.storage.folder_listing import is_glob
from clipray.storage.uris import is_local

AT_ONCE = 32  # pictures
FILE_LIKE = re.compile(r"\.[a-z][a-z0-9]{1,7}$", re.IGNORECASE)


@dataclass(frozen=True)
class Look:
    """A picture's labels with their probabilities, the most probable first; or why there are none."""

    picture: str
    labels: tuple[tuple[str, float], ...] = ()
    refused: str = ""


@environment_errors()
def label(
    pictures: Sequence[str], classes: str, model: Model, *, template: str | None = None, top: int = 5
) -> Iterator[Look]:
    """Labels of pictures, in their order, as they are found.

    Args:
        pictures: files, folders or globs, local or any URL.
        classes: `a dog, a cat`, each taken as it stands; or a class file or a built-in list, in templates.
        template: with `{}` where the name goes, or a built-in set.

    Raises:
        JobError, ManifestError, ModelError: no such pictures, classes or model.
    """
    try:
        own = {"template": Style(templates=template)} if with_place(template) else None
    except ValueError as error:
        raise JobError(f"--template: {error}") from error
    style = prompt_styles(_classes(classes, template), own)[0]
    paths = [path for given in pictures for path in _found(given)]
    yield from _label(paths, style, model, top)


def _classes(given: str, template: str | None) -> str | Classes:
    if given in CLASS_SETS or given.lower().endswith(KNOWN_SUFFIXES):
        return given
    if "," not in given and (os.sep in given or FILE_LIKE.search(given)):  # a single class would be no choice
        raise JobError(
            f"--classes {given}: expected a class file ({', '.join(KNOWN_SUFFIXES)}), {' or '.join(CLASS_SETS)}, or names, `a dog, a cat`"
        )
    try:
        names = distinct([name.strip() for name in given.split(",")])
    except ValueError as error:
        raise JobError(f"--classes: {error}") from error
    return Classes(names=names, templates=template or "{}")


def _found(given: str) -> list[str]:
    """The pictures under a folder or glob; anything else as it stands."""
    fs, path = filesystem(given)
    if fs.isdir(path) or is_glob(fs, path):
        found = find_pictures(given)[1]
        return [os.path.relpath(p) if is_local(given) else fs.unstrip_protocol(p) for p in found]
    if not fs.exists(path):
        raise ManifestError(f"{given}: no such picture")
    return [given]


def _label(paths: Sequence[str], style: PromptStyle, model: Model, top: int) -> Iterator[Look]:
    from clipray.analysis.zero_shot import ZeroShot
    from clipray.models.class_vectors import class_vectors_of
    from clipray.models.image_encoder import ImageEncoder
    from clipray.models.load import split_transform
    from clipray.models.resolve import resolve
    from clipray.models.text_encoder import TextEncoder
    from clipray.pipelines.decode import DecodedImage, load_picture, prepare_pillow
    from clipray.pipelines.limits import Limits

    found = resolve(model)
    precision = "fp32" if model.precision == "auto" else model.precision
    texts = TextEncoder(found, precision=precision, batch_size=64)
    vectors, _, _ = class_vectors_of(style, range(len(style.labels)), texts)
    classifier = ZeroShot(vectors, texts.logit_scale, top=top, precision="fp32")
    del texts
    images = ImageEncoder(found, precision=precision, batch_size=AT_ONCE)
    prepare_pillow()
    limits = Limits(schemes=SCHEMES)
    preprocess = split_transform(found, limits.max_pixels)[0]
    for start in range(0, len(paths), AT_ONCE):
        some = [load_picture(absolute(path), None, limits, preprocess) for path in paths[start : start + AT_ONCE]]
        good = [picture.pixels for picture in some if isinstance(picture, DecodedImage)]
        rows: Iterator[Any] = iter(())
        if good:
            x = images.encode(np.stack(good)).vectors["clip"]
            best = classifier.label(x)
            rows = zip(best.classes.tolist(), best.probabilities.tolist(), strict=True)
        for path, picture in zip(paths[start : start + AT_ONCE], some, strict=True):
            if isinstance(picture, DecodedImage):
                classes, p = next(rows)
                yield Look(utf8_name(path), tuple((style.labels[c], v) for c, v in zip(classes, p, strict=True)))
            else:
                yield Look(utf8_name(path), refused=f"{picture.reason}: {picture.message}")

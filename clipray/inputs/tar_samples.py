"""The samples of a tar, as WebDataset has them: members whose path is the same up to the first dot of its last part."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import pyarrow as pa

from clipray.errors import ManifestError
from clipray.inputs.image_listing import IMAGE_SUFFIXES, is_hidden
from clipray.inputs.tar_listing import Tar
from clipray.inputs.tar_members import Member, TarBytes, open_tar, read_members
from clipray.storage.folder import explained

LONGEST_TEXT = 16 * 2**20  # in bytes, of a member in a column


@dataclass(frozen=True)
class Wanted:
    """What of a sample becomes a row.

    Attributes:
        image: what follows the first dot in the names of images; "" for the only image of each sample.
        columns: the same of the members that become columns of strings.
    """

    image: str = ""
    columns: tuple[str, ...] = ()

    def is_image(self, extension: str) -> bool:
        return extension == self.image if self.image else f".{extension}".endswith(IMAGE_SUFFIXES)


class Part(NamedTuple):
    """A member as a part of a sample. extension: in small letters, what follows the first dot."""

    key: str
    extension: str
    member: Member


@dataclass
class SampleRows:
    """The rows of a tar, or of several.

    Attributes:
        members: extension -> how many members have it.
    """

    table: pa.Table
    members: Counter[str] = field(default_factory=Counter)


def read_samples(tar: Tar, wanted: Wanted) -> SampleRows:
    """A row for each image of a tar: `image_id`, `uri`, `offset`, `size`, `version`, and the columns that are wanted.

    Raises:
        ManifestError: it is no plain tar, truncated or damaged, or a sample has several images and none is chosen.
        OSError, StorageError: it cannot be read.
    """
    images: list[Part] = []
    texts: dict[str, list[str | None]] = {name: [] for name in wanted.columns}
    members = Counter[str]()
    with explained(tar.url), open_tar(tar.url, tar.size) as data:
        for _, sample in itertools.groupby(_parts(data), key=lambda part: part.key):
            parts = list(sample)
            members.update(part.extension for part in parts)
            image = _image_of(parts, wanted, tar)
            if image is None:
                continue
            images.append(image)
            for name, column in texts.items():
                column.append(next((_text(data, part) for part in parts if part.extension == name), None))
    rows = len(images)
    columns = {
        "image_id": pa.array([f"{tar.name}/{image.key}" for image in images], pa.string()),
        "uri": pa.repeat(pa.scalar(tar.url, pa.string()), rows),
        "offset": pa.array([image.member.offset for image in images], pa.int64()),
        "size": pa.array([image.member.size for image in images], pa.int64()),
        "version": pa.repeat(pa.scalar(tar.version, pa.string()), rows),
        **{name: pa.array(column, pa.string()) for name, column in texts.items()},
    }
    return SampleRows(pa.table(columns), members)


def _parts(data: TarBytes) -> Iterator[Part]:
    """The members of samples: those that are not hidden, and have a dot in their names."""
    for member in read_members(data):
        path = member.name.removeprefix("./").lstrip("/")
        folder, slash, name = path.rpartition("/")
        stem, dot, extension = name.partition(".")
        if stem and dot and not any(map(is_hidden, path.split("/"))):
            yield Part(f"{folder}{slash}{stem}", extension.lower(), member)


def _image_of(parts: Sequence[Part], wanted: Wanted, tar: Tar) -> Part | None:
    images = [part for part in parts if wanted.is_image(part.extension)]
    if len(images) > 1:
        named = ", ".join(part.extension for part in images[:5])
        advice = f"choose one, such as `image: {images[0].extension}`" if not wanted.image else "expected one"
        raise ManifestError(f"{tar.url}: sample {images[0].key!r} has {len(images)} images, {named}: {advice}")
    return images[0] if images else None


def _text(data: TarBytes, part: Part) -> str:
    r"""A member as a string; bytes that are not UTF-8 as `\xe9`. Raises ManifestError: it is too long for a column."""
    _, offset, size = part.member
    if size > LONGEST_TEXT:
        raise ManifestError(
            f"{data.url}: {part.member.name!r} has {size} bytes; expected at most {LONGEST_TEXT} in a column"
        )
    return data.read(offset, size).decode("utf-8", "backslashreplace")

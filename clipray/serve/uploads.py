"""Images that clients sent, by the hash of their bytes, so that an address can name one. They are kept in memory only."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict

from clipray.serve.responses import HttpError

KEPT_BYTES = 128 * 2**20


class Uploads:
    """The latest uploaded images, up to KEPT_BYTES. Safe in several threads."""

    def __init__(self) -> None:
        self._images: OrderedDict[str, bytes] = OrderedDict()
        self._lock = threading.Lock()

    def add(self, data: bytes) -> str:
        """Keep an image. Returns its name, 32 hex digits."""
        name = hashlib.sha256(data).hexdigest()[:32]
        with self._lock:
            self._images[name] = data
            self._images.move_to_end(name)
            while sum(map(len, self._images.values())) > KEPT_BYTES and len(self._images) > 1:
                self._images.popitem(last=False)
        return name

    def get(self, name: str) -> bytes:
        """Its bytes. Raises HttpError 404: it was not sent to this server, or so long ago that it is forgotten."""
        with self._lock:
            if name not in self._images:
                raise HttpError(404, f"uploaded image {name[:40]!r} is not kept any more: drop it on the page again")
            self._images.move_to_end(name)
            return self._images[name]

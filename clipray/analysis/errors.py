"""What numerics say when the data do not admit what is asked of them."""

from __future__ import annotations


class DataError(ValueError):
    """These vectors cannot be worked on in this way: too few, not finite, not of the wanted length; the message says which."""

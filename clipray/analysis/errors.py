"""The error of numerics for data that do not fit the request."""

from __future__ import annotations


class DataError(ValueError):
    """These vectors do not fit the request: too few, not finite or of the wrong length; the message says which."""

"""Read by every Python that has this folder on its PYTHONPATH, Ray's workers among them."""

from fsspec.registry import known_implementations

known_implementations["slow"] = {"class": "testfs.SlowFileSystem"}

"""Filesystems for the tests: local files behind a slow line, and files that kill whoever reads them.

Found by fsspec through `testfs-0.dist-info`, in every Python that has this folder on its PYTHONPATH: Ray's workers too.
"""

import os
import signal
import time

from fsspec.spec import AbstractFileSystem


class SlowFileSystem(AbstractFileSystem):
    """`slow:///path`: a local file, after 0.15 s, or 5 s while the file named by TESTFS_HOLD is there.

    Files named poison* kill the process that asks for them.
    """

    protocol = "slow"

    def info(self, path, **kwargs):
        return {"name": path, "size": os.path.getsize(path), "type": "file"}

    def cat_file(self, path, start=None, end=None, **kwargs):
        if os.path.basename(path).startswith("poison"):
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(5 if os.path.exists(os.environ.get("TESTFS_HOLD", "")) else 0.15)
        with open(path, "rb") as file:
            return file.read()[start:end]

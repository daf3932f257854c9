"""`python -m clipray`: the command, also where its script is not on the path."""

import os
import sys

OUR_HOME = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def _leave_out_the_working_directory() -> None:
    """Python puts it on the module path: a `random.py` beside somebody's images must not run."""
    if sys.path and os.path.abspath(sys.path[0]) == os.getcwd() != OUR_HOME:
        del sys.path[0]


if __name__ == "__main__":
    _leave_out_the_working_directory()
    from clipray.cli import main

    main()

"""Entry point for a plain `ray job submit --working-dir . -- python jobs/run.py jobs/embed.yaml`."""

import sys

from clipray.cli import main

if __name__ == "__main__":
    sys.argv = ["clipray", "run", *sys.argv[1:]]
    main()

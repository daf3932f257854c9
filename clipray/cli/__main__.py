"""`python -m clipray.cli`."""

from clipray.cli import main

main()

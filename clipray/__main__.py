"""`python -m clipray`: the command, also where its script is not on the path."""

from clipray.cli import main

if __name__ == "__main__":
    main()

"""``python -m acqcore``: the command line."""

from acqcore.cli import main

if __name__ == "__main__":
    raise SystemExit(main())

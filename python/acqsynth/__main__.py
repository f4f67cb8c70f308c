"""``python -m acqsynth``, and the command ``acqsynth``: says in one sentence what is not installed."""

from __future__ import annotations

import sys


def main() -> int:
    """The exit code of :func:`acqsynth.cli.main`; 2 where a package that it needs is missing."""
    try:
        from acqsynth import cli
    except ModuleNotFoundError as error:
        print(
            f"acqsynth: error: {error.name} is not installed: run \"pip install 'acqcore[train]'\", "
            "for 'acqsynth serve' also [serve]",
            file=sys.stderr,
        )
        return 2
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())

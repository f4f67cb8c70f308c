"""Entry point of ``python -m acqsynth``, equivalent to the command ``acqsynth``."""

from __future__ import annotations

import sys

from acqsynth.cli import main

sys.exit(main())

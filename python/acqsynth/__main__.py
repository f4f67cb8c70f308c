"""``python -m acqsynth`` is the command ``acqsynth``."""

from __future__ import annotations

import sys

from acqsynth.cli import main

sys.exit(main())

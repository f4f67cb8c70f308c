from __future__ import annotations

import pytest

from acqsynth.domains import sandbox


@pytest.fixture
def contained():
    """Skips the test, with the reason, on machines where the sandbox does not work."""
    try:
        sandbox.require()
    except RuntimeError as error:
        pytest.skip(str(error))

"""The progress bar: silent unless asked for or slow, and also shown without tqdm."""

from __future__ import annotations

import sys

import pytest

from acqcore.progress import progress_bar


@pytest.fixture(params=["tqdm", "plain"])
def bar(request, monkeypatch):
    if request.param == "tqdm":
        pytest.importorskip("tqdm")
    else:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    return str(request.param)


def test_shown_when_asked(bar, capsys):
    with progress_bar(200, True, "rows") as progress:
        progress.update(150)
        progress.update(50)
    error = capsys.readouterr().err
    assert "200/200" in error
    assert "rows" in error


def test_silent_when_not_asked_or_no_terminal(bar, capsys):
    for show in (False, None):
        with progress_bar(2, show) as progress:
            progress.update(2)
    assert capsys.readouterr().err == ""


def test_on_a_terminal_only_what_takes_long(bar, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress_bar(2, None) as progress:
        progress.update(2)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("acqcore.progress._DELAY_S", 0.0)
    with progress_bar(2, None) as progress:
        progress.update(2)
    assert "scoring" in capsys.readouterr().err

from __future__ import annotations

import pytest

from acqsynth.serve.options import TOKEN_VARIABLE, Limits, is_loopback, token_from


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_samples": 0}, "max_samples: expected a finite number >= 1, got 0"),
        ({"max_length": 1}, "max_length: expected a finite number >= 2, got 1"),
        ({"wait": -1.0}, "wait: expected a finite number >= 0, got -1.0"),
        ({"wait": float("nan")}, "wait: expected a finite number >= 0, got nan"),
        ({"timeout": 0.0}, "timeout: expected a finite number >= 0.001, got 0.0"),
        ({"body_timeout": float("inf")}, "body_timeout: expected a finite number >= 0.001, got inf"),
        ({"max_bodies": 1}, r"max_bodies: expected at least max_body \(8388608 bytes\), got 1"),
    ],
)
def test_limits_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        Limits(**options)


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.8.0.1", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("", False),
        ("10.0.0.1", False),
        ("localhost.example.com", False),
    ],
)
def test_loopback(host, expected):
    assert is_loopback(host) is expected


def test_tokens_come_from_a_file_before_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    assert token_from(TOKEN_VARIABLE) is None
    monkeypatch.setenv(TOKEN_VARIABLE, "from-variable")
    assert token_from(TOKEN_VARIABLE) == "from-variable"
    (tmp_path / "token").write_text("from-file\n")
    assert token_from(TOKEN_VARIABLE, tmp_path / "token") == "from-file"
    with pytest.raises(FileNotFoundError):
        token_from(TOKEN_VARIABLE, tmp_path / "missing")


@pytest.mark.parametrize("token", ["", "  ", "two words", "naïve", "a\nb"])
def test_a_token_that_no_header_carries(token, tmp_path, monkeypatch):
    """An empty variable must not open the server."""
    expected = "expected a token of visible ASCII characters"
    monkeypatch.setenv(TOKEN_VARIABLE, token)
    with pytest.raises(ValueError, match=f"{TOKEN_VARIABLE}: {expected}"):
        token_from(TOKEN_VARIABLE)
    (tmp_path / "token").write_text(token, encoding="latin-1")
    with pytest.raises(ValueError, match=f"{tmp_path / 'token'}: {expected}"):
        token_from(TOKEN_VARIABLE, tmp_path / "token")

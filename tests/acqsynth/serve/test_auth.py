from __future__ import annotations

import base64
import hmac

import pytest

from acqsynth.serve.middleware import Access, ServiceError


def bearer(token):
    return [(b"authorization", f"Bearer {token}".encode())]


def basic(pair):
    return [(b"authorization", b"Basic " + base64.b64encode(pair.encode()))]


def test_the_right_token_passes():
    access = Access("secret", "admin")
    access.check("/score", bearer("secret"))
    access.check("/get_reward", basic("anybody:secret"))
    access.check("/student", bearer("admin"))
    access.check("/health", [])


@pytest.mark.parametrize("path", ["/score", "/student"])
@pytest.mark.parametrize(
    "headers",
    [
        [],
        bearer(""),
        bearer("secre"),
        bearer("secrets"),
        bearer("SECRET"),
        bearer("sécret"),
        basic("secret:"),
        basic("secret"),
        [(b"authorization", b"secret")],
        [(b"authorization", b"Basic !!!")],
        [(b"authorization", b"\xff\xfe")],
        bearer("secret") * 2,
        [(b"x-token", b"secret")],
    ],
)
def test_no_other_does(path, headers):
    with pytest.raises(ServiceError) as refused:
        Access("secret", "admin").check(path, headers)
    assert refused.value.status == 401


def test_one_token_does_not_open_the_others_routes():
    with pytest.raises(ServiceError, match="the token is wrong"):
        Access("secret", "admin").check("/student", bearer("secret"))
    with pytest.raises(ServiceError, match="the token is wrong"):
        Access("secret", "admin").check("/score", bearer("admin"))


def test_without_tokens_all_may_score_and_none_may_change_the_student():
    Access().check("/score", [])
    for headers in ([], bearer(""), bearer("None")):
        with pytest.raises(ServiceError, match="without an admin token") as refused:
            Access().check("/student", headers)
        assert refused.value.status == 403


def test_tokens_are_compared_in_constant_time(monkeypatch):
    compared = []
    compare = hmac.compare_digest

    def counted(a, b):
        compared.append((a, b))
        return compare(a, b)

    monkeypatch.setattr(hmac, "compare_digest", counted)
    Access("secret").check("/score", bearer("secret"))
    with pytest.raises(ServiceError):
        Access("secret").check("/score", bearer("wrong"))
    assert compared == [(b"secret", b"secret"), (b"wrong", b"secret")]


def test_tokens_are_not_printed():
    assert "secret" not in repr(Access("secret", "secret"))

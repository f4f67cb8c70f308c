"""The client retries, gives up in time and never makes up a value."""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import math
import pickle
import random
from types import MappingProxyType

import httpx
import numpy as np
import pandas
import pytest

from acqsynth.serve.client import CircuitBreaker, ScorerClient, ScorerError

URL = "http://scorer:8000/"


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Server:
    """Answers from a script, one per request, repeating the last one; records the requests."""

    def __init__(self, *script):
        self.script = list(script)
        self.asked = []

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        self.asked.append(request)
        step = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        if isinstance(step, Exception):
            raise step
        if callable(step):
            step = await step()
        if isinstance(step, httpx.Response):
            return step
        return (
            httpx.Response(step, json={"error": {"type": "t", "message": "words"}}) if step != 200 else scores(request)
        )


def scores(request: httpx.Request) -> httpx.Response:
    """Scores each text with its number, but 13 with null."""
    body = json.loads(request.content)
    numbers = [None if text == "13" else float(text) for text in body["samples"]]
    return httpx.Response(
        200, json={"values": dict.fromkeys(body["acquisitions"], numbers), "n_tokens": [7] * len(numbers)}
    )


@pytest.fixture
def reached(monkeypatch):
    """``reached(server)`` makes every client talk to this server from now on, and returns it."""
    monkeypatch.delenv("ACQSYNTH_TOKEN", raising=False)
    original = httpx.AsyncClient

    def put(server):
        monkeypatch.setattr(httpx, "AsyncClient", functools.partial(original, transport=httpx.MockTransport(server)))
        return server

    return put


def ask(client, texts, **options):
    return asyncio.run(client.score(texts, ["loss"], **options))[:2]


@pytest.mark.parametrize(
    "bad", ["c \ud83d d", "\udc00", {"text": "\ud800"}, {"text": float("nan")}, {"text": {1}}, object()]
)
def test_a_sample_that_is_no_json_costs_itself(reached, bad, caplog):
    reached(Server(200))
    values, n_tokens = ask(ScorerClient(URL, batch=2), ["1", bad, "2", "3", bad])
    assert values == {"loss": [1.0, None, 2.0, 3.0, None]}
    assert n_tokens == [7, 0, 7, 7, 0]
    assert "samples[1]: cannot be sent" in caplog.text


class TestProxies:
    NAMES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")

    @pytest.fixture(autouse=True)
    def _no_proxy(self, monkeypatch):
        for name in self.NAMES:
            monkeypatch.delenv(name, raising=False)
            monkeypatch.delenv(name.lower(), raising=False)

    @pytest.mark.parametrize("name", ["HTTP_PROXY", "http_proxy", "ALL_PROXY"])
    @pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "127.8.9.1"])
    def test_a_scorer_on_this_machine_is_asked_directly(self, monkeypatch, name, host, on_socket):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
        client = ScorerClient(f"http://{host}:8000", attempts=1)

        async def transports():
            async with client._client({}) as http:
                return any(http._mounts.values())

        assert not asyncio.run(transports())

    @pytest.mark.parametrize("proxy", ["http://user:secret@127.0.0.1:9", "http://127.0.0.1:9"])
    def test_a_proxy_that_fails_is_named(self, monkeypatch, caplog, proxy):
        monkeypatch.setenv("HTTP_PROXY", proxy)
        client = ScorerClient("http://scorer.example:8000", attempts=1)
        assert ask(client, ["1"]) == ({"loss": [None]}, [0])
        assert "through the proxy http://127.0.0.1:9 of the environment: ConnectError" in caplog.text
        assert "secret" not in caplog.text
        monkeypatch.setenv("NO_PROXY", "scorer.example")
        assert client._proxy() == ""

    @pytest.mark.parametrize("proxy", ["socks9://127.0.0.1:9", "http://user:a/secret@127.0.0.1:9"])
    def test_a_proxy_that_cannot_be_used_is_an_error_at_once(self, monkeypatch, proxy):
        monkeypatch.setenv("ALL_PROXY", proxy)
        shown = proxy.replace("user:a/secret@", "")
        with pytest.raises(RuntimeError, match=f"the proxy {shown} of the environment: cannot be used"):
            ScorerClient("http://scorer.example:8000")
        ScorerClient("http://127.0.0.1:8000")


def test_answers_come_back_in_order_however_they_are_split(reached):
    server = reached(Server(200))
    texts = [str(i) for i in range(20)]
    values, counts = ask(ScorerClient(URL, batch=3), texts)
    assert values == {"loss": [None if i == 13 else float(i) for i in range(20)]}
    assert counts == [7] * 20
    assert len(server.asked) == 7
    assert str(server.asked[0].url) == "http://scorer:8000/score"
    assert "authorization" not in server.asked[0].headers
    assert ask(ScorerClient(URL), []) == ({"loss": []}, [])
    assert len(server.asked) == 7


def test_one_acquisition_may_be_named_alone(reached):
    server = reached(Server(200))
    values = asyncio.run(ScorerClient(URL).score(["3"], "entropy")).values
    assert values == {"entropy": [3.0]}
    assert json.loads(server.asked[0].content)["acquisitions"] == ["entropy"]


def test_samples_may_be_a_table(reached):
    server = reached(Server(httpx.Response(200, json={"values": {"loss": [1.0, 2.0]}, "n_tokens": [1, 1]})))
    columns = {"text": ["a", "b"], "id": [1, 2]}
    for table in (columns, pandas.DataFrame(columns)):
        assert ask(ScorerClient(URL), table) == ({"loss": [1.0, 2.0]}, [1, 1])
        assert json.loads(server.asked[-1].content)["samples"] == [{"text": "a"}, {"text": "b"}]
    turn = {"role": "user", "content": "a"}
    nested = pandas.DataFrame({"messages": [np.array([turn]), np.array([turn | {"name": None}])]})  # as parquet is read
    assert ask(ScorerClient(URL), nested) == ({"loss": [1.0, 2.0]}, [1, 1])
    assert json.loads(server.asked[-1].content)["samples"] == [{"messages": [turn]}] * 2
    for other in ("abc", b"abc", None, iter("abc")):
        with pytest.raises(TypeError, match="samples: expected a list of strings"):
            ask(ScorerClient(URL), other)


@pytest.mark.parametrize("value", [object(), math.nan, "\ud83d"])
def test_arguments_are_text_and_numbers(reached, value):
    server = reached(Server(200))
    with pytest.raises(TypeError, match=r"^arguments: expected text and numbers: "):
        ask(ScorerClient(URL), ["1"], arguments={"influence": {"reference": value}})
    assert server.asked == []
    ask(ScorerClient(URL), ["1"], arguments=MappingProxyType({"a": {"b": 1}}))
    assert json.loads(server.asked[0].content)["acquisition_args"] == {"a": {"b": 1}}


def test_the_token_is_sent(reached, monkeypatch):
    server = reached(Server(200))
    ask(ScorerClient(URL, token="given"), ["1"])
    monkeypatch.setenv("ACQSYNTH_TOKEN", "of-environment")
    ask(ScorerClient(URL), ["1"])
    ask(ScorerClient(URL, token="given"), ["1"])
    sent = [request.headers["authorization"] for request in server.asked]
    assert sent == ["Bearer given", "Bearer of-environment", "Bearer given"]
    assert "given" not in repr(ScorerClient(URL, token="given"))


@pytest.mark.parametrize(
    "failure",
    [
        *(408, 429, 500, 502, 503, 504),
        *(httpx.ConnectError("refused"), httpx.RemoteProtocolError("cut off"), httpx.DecodingError("broken gzip")),
    ],
)
def test_what_may_get_better_is_asked_again(reached, failure, caplog):
    server = reached(Server(failure, failure, 200))
    assert ask(ScorerClient(URL, backoff=0.001), ["4"])[0] == {"loss": [4.0]}
    assert len(server.asked) == 3
    assert caplog.text.count("retrying in") == 2


@pytest.mark.parametrize("status", [301, 400, 401, 403, 404, 405, 413, 422])
def test_what_can_not_is_raised_at_once(reached, status):
    server = reached(Server(status))
    client = ScorerClient(URL)
    with pytest.raises(ScorerError, match=f"^http://scorer:8000: {status} words$"):
        ask(client, ["1"])
    assert len(server.asked) == 1
    assert not client.breaker.is_open


@pytest.mark.parametrize(
    "answer",
    [
        httpx.Response(200, text="<html>"),
        httpx.Response(200, json=[1]),
        httpx.Response(200, json={"rewards": [1.0]}),
        httpx.Response(200, json={"values": {"loss": [1.0, 2.0]}, "n_tokens": [1, 2]}),
        httpx.Response(200, json={"values": [1.0], "n_tokens": [1]}),
        httpx.Response(200, json={"values": {"loss": None}, "n_tokens": [1]}),
        httpx.Response(200, json={"values": {"loss": [1.0]}, "n_tokens": [1], "stderr": [0.1]}),
        httpx.Response(200, json={"values": {"loss": ["1.0"]}, "n_tokens": [1]}),
        httpx.Response(200, json={"values": {"loss": [True]}, "n_tokens": [1]}),
        httpx.Response(200, json={"values": {"loss": [1.0]}, "n_tokens": ["1"]}),
        httpx.Response(200, json={"values": {"loss": [1.0]}, "n_tokens": [1], "stderr": {"loss": [[0.1]]}}),
        httpx.Response(200, text="[" * 100_000),
    ],
)
def test_another_servers_answer_is_no_score(reached, answer):
    reached(Server(answer))
    with pytest.raises(ScorerError, match="expected"):
        ask(ScorerClient(URL), ["1"])


def test_a_value_that_is_not_finite_is_none(reached):
    numbers = f"[NaN, -Infinity, 1{'0' * 400}, 2]"
    answer = f'{{"values": {{"loss": {numbers}}}, "n_tokens": [1, 2, null, 4]}}'
    reached(Server(httpx.Response(200, text=answer)))
    assert ask(ScorerClient(URL), ["1"] * 4) == ({"loss": [None, None, None, 2]}, [1, 2, 0, 4])


@pytest.mark.parametrize("body", ["[" * 100_000, '{"error": {"message": "' + "x" * 100_000 + '"}}'])
def test_a_message_is_short(reached, body):
    reached(Server(httpx.Response(422, text=body)))
    with pytest.raises(ScorerError, match="scorer:8000: 422 ") as error:
        ask(ScorerClient(URL), ["1"])
    assert len(str(error.value)) < 600


def test_the_password_of_the_url_is_sent_but_not_shown(reached, caplog):
    server = reached(Server(503))
    client = ScorerClient("http://user:secret@scorer:8000/", attempts=1)
    ask(client, ["1"])
    assert server.asked[0].headers["authorization"] == "Basic dXNlcjpzZWNyZXQ="
    assert "http://scorer:8000: 503" in caplog.text
    assert "secret" not in caplog.text + repr(client)


def test_given_up_samples_are_none_and_told(reached, caplog):
    """Other samples of the call keep their values."""

    async def of_first(request: httpx.Request) -> httpx.Response:
        return httpx.Response(503) if b'"0"' in request.content else scores(request)

    reached(of_first)
    values, counts = ask(ScorerClient(URL, batch=2, attempts=3, backoff=0.001), ["0", "1", "2", "3"])
    assert values == {"loss": [None, None, 2.0, 3.0]}
    assert counts == [0, 0, 7, 7]
    assert "503 Service Unavailable; gave up after 3 tries" in caplog.text


def test_waits_grow_and_hold_what_the_server_asks_for(reached, monkeypatch):
    waits = []

    async def sleep(seconds):
        waits.append(seconds)

    reached(Server(503, 503, httpx.Response(429, headers={"retry-after": "9"}), 503, 200))
    monkeypatch.setattr(random, "uniform", lambda a, b: a)
    client = ScorerClient(URL, backoff=0.5)
    monkeypatch.setattr("acqsynth.serve.client.asyncio.sleep", sleep)
    assert ask(client, ["4"])[0] == {"loss": [4.0]}
    assert waits == [0.25, 0.5, 9.0, 2.0]


def test_the_time_of_a_call_is_kept(reached, caplog):
    async def slow(request: httpx.Request) -> httpx.Response:
        if b'"0"' in request.content:
            await asyncio.sleep(30)
        return scores(request)

    reached(slow)
    client = ScorerClient(URL, batch=1, timeout=0.3, breaker=CircuitBreaker(failures=1))
    assert ask(client, ["0", "1"])[0] == {"loss": [None, 1.0]}
    assert "no answer within 0.3 seconds to 1 requests" in caplog.text
    assert client.breaker.is_open


def test_the_breaker_stops_asking_and_tries_once_later(reached, caplog):
    clock = Clock()
    client = ScorerClient(URL, attempts=2, backoff=0.001, breaker=CircuitBreaker(2, 30.0, clock))
    server = reached(Server(503))
    for asked in (2, 4, 4, 4):  # opens after two requests of two tries each
        assert ask(client, ["1"])[0] == {"loss": [None]}
        assert len(server.asked) == asked
    assert "request not sent, as the last 2 requests failed" in caplog.text
    clock.now = 29.0
    ask(client, ["1"])
    assert len(server.asked) == 4
    clock.now = 31.0
    ask(client, ["1"])  # a single attempt, which fails
    ask(client, ["1"])
    assert len(server.asked) == 5
    clock.now = 62.0
    server.script = [200]
    assert ask(client, ["1"])[0] == ask(client, ["1"])[0] == {"loss": [1.0]}
    assert not client.breaker.is_open


def test_one_try_alone_while_it_is_open(reached):
    clock = Clock()
    client = ScorerClient(URL, batch=1, attempts=1, breaker=CircuitBreaker(1, 30.0, clock))
    server = reached(Server(503))
    ask(client, ["1"])
    clock.now = 31.0
    ask(client, ["1", "2", "3", "4"])
    assert len(server.asked) == 2


def test_a_busy_server_does_not_open_it(reached):
    client = ScorerClient(URL, attempts=2, backoff=0.001, breaker=CircuitBreaker(1))
    reached(Server(429))
    assert ask(client, ["1"])[0] == {"loss": [None]}
    assert not client.breaker.is_open


def test_a_short_absence_does_not_open_it(reached):
    """If the server restarts, all eight requests of a call fail together, and each is retried."""
    reached(Server(*[httpx.ConnectError("refused")] * 8, 200))
    client = ScorerClient(URL, batch=1, backoff=0.001)
    assert ask(client, [str(i) for i in range(8)])[0] == {"loss": [float(i) for i in range(8)]}


def test_a_copy_of_another_process_finds_out_for_itself(reached):
    client = ScorerClient(URL, attempts=1, breaker=CircuitBreaker(1))
    reached(Server(503))
    ask(client, ["1"])
    assert client.breaker.is_open
    assert not pickle.loads(pickle.dumps(client)).breaker.is_open


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "scorer:8000"}, "url: expected http://host:port, got 'scorer:8000'"),
        ({"url": "http://user:a/secret@scorer"}, "url: expected http://host:port, got 'http://scorer'"),
        *(
            ({"url": url}, "url: expected http://host:port, got")
            for url in (
                "http://",
                "http://:80",
                "http://host:port",
                "http://\u2603.example",
                "http://a:1/?b=1",
                "",
                "http://a:1?",
                "http://a:99999",
            )
        ),
        *(
            ({"url": URL, "token": token}, "token: expected a token of visible ASCII characters")
            for token in ("", "a\nb", "\xe9", 5)
        ),
        ({"url": URL, "batch": 0}, "batch: expected an int >= 1, got 0"),
        ({"url": URL, "batch": 1.5}, "batch: expected an int >= 1, got 1.5"),
        ({"url": URL, "batch": True}, "batch: expected an int >= 1, got True"),
        ({"url": URL, "attempts": 0}, "attempts: expected an int >= 1, got 0"),
        ({"url": URL, "attempts": "3"}, "attempts: expected an int >= 1, got '3'"),
        ({"url": URL, "timeout": 0.0}, "timeout: expected seconds above 0"),
        ({"url": URL, "timeout": None}, "timeout: expected seconds above 0, got None"),
        ({"url": URL, "backoff": -1.0}, "backoff: expected at least 0 seconds, got -1.0"),
        ({"url": URL, "backoff": math.nan}, "backoff: expected at least 0 seconds, got nan"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        ScorerClient(**options)


def test_bad_arguments_of_a_breaker():
    with pytest.raises(ValueError, match="failures: expected an int >= 1, got 0"):
        CircuitBreaker(0)
    with pytest.raises(ValueError, match="cooldown: expected at least 0 seconds, got '30'"):
        CircuitBreaker(cooldown="30")


@pytest.fixture(autouse=True)
def _all_logs(caplog):
    caplog.set_level(logging.WARNING)

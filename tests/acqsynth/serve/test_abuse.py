"""Requests that could block the server or exhaust its memory are answered at once and do not delay other clients."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
from urllib.parse import urlsplit

import httpx
import pytest

import acqcore
from acqsynth.serve.app import create_app
from acqsynth.serve.middleware import DEEPEST, ServiceError, check_structure
from acqsynth.serve.server import HEAD_BYTES, bounded_protocol

BEARER = {"Authorization": "Bearer secret"}
JSON = {"content-type": "application/json"}
SIZE = (8 << 20) - 100


def filled(begin, part, end):
    """A body of 8 MiB that repeats ``part``."""
    return begin + part * ((SIZE - len(begin) - len(end)) // len(part)) + end


@pytest.fixture(scope="module")
def bodies():
    """Name -> body of 8 MiB and its allowed statuses."""
    return {
        "numbers for samples": (filled(b'{"samples": [', b"1, ", b"1]}"), {413}),
        "nulls for samples": (filled(b'{"samples": [', b"null,", b"1]}"), {413}),
        "short samples": (filled(b'{"samples": [', b'"a",', b'"a"]}'), {413}),
        "empty objects": (filled(b'{"samples": [', b"{},", b"{}]}"), {413}),
        "messages without end": (filled(b'{"samples": [{"messages": [', b"{},", b"{}]}]}"), {413}),
        "unknown keys": (b"{" + b",".join(b'"k%06d": 1' % i for i in range(580_000)) + b"}", {413}),
        "one key again": (filled(b"{", b'"samples":[],', b'"samples":[]}'), {413}),
        "labels": (filled(b'{"query": ["a"], "prompts": ["a"], "labels": [', b"[],", b"1]}"), {413}),
        "depth": (filled(b'{"samples": ', b"[", b""), {400}),
        "depth in labels": (filled(b'{"labels": ', b'{"a":[', b""), {400}),
        "one text": (filled(b'{"samples": ["a fox", "', b"a", b'"]}'), {200}),
        "one text of words": (filled(b'{"samples": ["', b"a fox and a dog ", b'"]}'), {200}),
        "one text of escapes": (filled(b'{"samples": ["', b"\\n", b'"]}'), {200}),
        "one text of wide characters": (filled(b'{"samples": ["', "\U0001f98a".encode(), b'"]}'), {200}),
        "one turn": (filled(b'{"samples": [{"messages": [{"role": "user", "content": "', b"a ", b'"}]}]}'), {200}),
        "a role": (filled(b'{"samples": [{"messages": [{"role": "', b"a", b'", "content": "a"}]}]}'), {200}),
        "an acquisition": (filled(b'{"samples": ["a b"], "acquisitions": ["', b"a", b'"]}'), {413}),
        "a key": (filled(b'{"samples": ["a b"], "', b"a", b'": 1}'), {422}),
        "an unknown reduction": (filled(b'{"samples": ["a b"], "reduction": "', b"a", b'"}'), {422}),
        "an integer": (filled(b'{"samples": ["a b"], "max_length": ', b"9", b"}"), {400}),
        "a fraction": (filled(b'{"samples": ["a b"], "max_length": 0.', b"9", b"}"), {400, 422}),
        "spaces": (filled(b'{"samples": ["a b"]', b" ", b"}"), {200}),
        "no end": (filled(b'{"samples": ["a b', b"\\\\", b""), {400}),
        "quotes": (filled(b"", b'"', b""), {413}),
        "colons": (filled(b"", b":", b""), {413}),
        "long samples": (b'{"samples": [' + b",".join([b'"' + b"a b " * 8000 + b'"'] * 48) + b"]}", {200}),
    }  # fmt: skip


def test_bodies_of_8_mib_are_answered_at_once_beside_others(start, memory, bodies):
    process, url = start()
    small = json.dumps({"samples": ["a fox", "a dog"]}).encode()
    waits = []

    async def bystander(client, done):
        while not done.is_set():
            begin = time.monotonic()
            health = await client.get("/health")
            score = await client.post("/score", content=small, headers=JSON)
            waits.append(time.monotonic() - begin)
            assert (health.status_code, score.status_code) == (200, 200)
            await asyncio.sleep(0.01)

    async def main():
        found = {}
        async with httpx.AsyncClient(base_url=url, headers=BEARER, timeout=60) as client:
            await client.post("/score", content=small, headers=JSON)  # the first call starts threads
            done = asyncio.Event()
            beside = asyncio.create_task(bystander(client, done))
            for name, (body, _) in bodies.items():
                path = "/get_reward" if "labels" in name else "/score"
                begin = time.monotonic()
                response = await client.post(path, content=body, headers=JSON)
                found[name] = response.status_code, time.monotonic() - begin
                assert len(response.content) < 100_000, name
            done.set()
            await beside
        return found

    idle = memory(process, "VmRSS")
    found = asyncio.run(main())
    assert {name for name, (status, _) in found.items() if status not in bodies[name][1]} == set(), found
    assert {name: seconds for name, (_, seconds) in found.items() if seconds > 2 and name != "long samples"} == {}
    assert len(waits) >= len(bodies) / 2
    assert max(waits) < 2
    assert memory(process, "VmHWM") - idle < 1024


def test_many_large_bodies_at_once_are_bounded(start, memory, bodies):
    process, url = start("--max-bodies", str(24 << 20))
    body, _ = bodies["one text of wide characters"]

    async def main():
        async with httpx.AsyncClient(base_url=url, headers=BEARER, timeout=60) as client:
            posts = (client.post("/score", content=body, headers=JSON) for _ in range(24))
            responses = await asyncio.gather(*posts, return_exceptions=True)
            assert (await client.post("/score", json={"samples": ["a b"]})).status_code == 200  # quota released
            # The server closes the connection when it rejects a body, possibly while the client is still sending.
            assert all(isinstance(found, httpx.Response | httpx.TransportError) for found in responses)
            return [response.status_code for response in responses if isinstance(response, httpx.Response)]

    idle = memory(process, "VmRSS")
    statuses = asyncio.run(main())
    assert set(statuses) <= {200, 429}
    assert statuses.count(200) >= 1
    assert memory(process, "VmHWM") - idle < 512


class TestStructure:
    @pytest.mark.parametrize(
        "text", ['"' + "[{:,}]" * 1000 + '"', '"' + '\\"[' * 1000 + '"', '"' + "\\\\" * 1000 + '"']
    )
    def test_signs_in_strings_are_text(self, text):
        check_structure(text.encode(), 10)
        assert json.loads(text)
        with pytest.raises(ServiceError, match="more than 10 values"):
            check_structure(f"[{text},[],[],[],[],[],[]]".encode(), 10)

    def test_the_deepest_body_that_passes_is_one_that_pydantic_reads(self):
        deepest = b"[" * DEEPEST + b"]" * DEEPEST
        check_structure(deepest + b" " * 1000, 1000)
        with pytest.raises(ServiceError, match="Invalid JSON"):
            check_structure(b"[" + deepest + b"]" + b" " * 1000, 1000)

    def test_a_broken_text_is_counted_all_the_same(self):
        for text in (b'{"a": "', b"]]]}}}", b'"\\', b"\xff\x00" * 100):
            check_structure(text + b" " * 100, 50)


class TestSamples:
    def test_samples_of_several_chunks_keep_their_places(self, post, student):
        samples = ["a" * length for length in (48, 8, 40, 60, 16, 0, 61, 24)]
        answer = post("/score", {"samples": samples}, limits={"max_characters": 60}).json()
        assert [error["index"] for error in answer["errors"]] == [5, 6]
        assert answer["errors"][1]["message"] == "61 characters, at most 60 are tokenized"
        assert answer["n_tokens"] == [47, 7, 39, 59, 15, 0, 0, 23]
        scored = [0, 1, 2, 3, 4, 7]
        expected = acqcore.score(student, [samples[i] for i in scored], "entropy", progress=False)["entropy"].tolist()
        assert [answer["values"]["entropy"][i] for i in scored] == pytest.approx(expected, rel=2e-6)

    def test_samples_of_several_chunks_are_of_one_kind(self, post):
        pair = {"prompt": "a fox\n", "completion": "runs"}
        samples = [[pair, "b" * 50, pair], ["b" * 50, pair, "c" * 50]]
        answers = [post("/score", {"samples": each}, limits={"max_characters": 60}).json() for each in samples]
        told = "expected {} as in the samples before it, got {}"
        kinds = ["prompt and completion", "a string"]
        assert answers[0]["errors"] == [{"index": 1, "message": told.format(*kinds)}]
        assert answers[1]["errors"] == [{"index": 1, "message": told.format(*kinds[::-1])}]
        assert [answer["valid"] for answer in answers] == [[True, False, True]] * 2

    @pytest.mark.parametrize("error", [KeyError("x"), RecursionError(), AttributeError("strip"), ValueError("\ud800")])
    def test_whatever_one_sample_raises_is_its_own(self, post, tokenizing, error):
        def check(texts):
            if any("bad" in text for text in texts):
                raise error

        tokenizing(check)
        answer = post("/score", {"samples": ["a fox", "a bad dog", "a cat"]}).json()
        assert answer["valid"] == [True, False, True], answer["errors"]
        assert [found["index"] for found in answer["errors"]] == [1]
        assert type(error).__name__ in answer["errors"][0]["message"]


class TestConnections:
    @pytest.fixture
    def address(self, serve, on_socket):
        service = serve(limits={"max_body": 1 << 12, "max_bodies": 1 << 12, "body_timeout": 0.5})
        parts = urlsplit(on_socket(create_app(service), http=bounded_protocol(service.limits)))
        assert parts.hostname
        assert parts.port
        return parts.hostname, parts.port

    @staticmethod
    async def talk(address, pieces, pause=0.0):
        """The server's answer until it closes the connection, the seconds until then and the number of bytes sent."""
        reader, writer = await asyncio.open_connection(*address)
        begin, sent = time.monotonic(), 0
        answer = asyncio.ensure_future(reader.read())
        try:
            for piece in pieces:
                writer.write(piece)
                await asyncio.wait_for(writer.drain(), 5)
                sent += len(piece)
                await asyncio.sleep(pause)
                if answer.done():
                    break
        except (ConnectionError, TimeoutError):
            pass
        try:
            return await asyncio.wait_for(answer, 5), time.monotonic() - begin, sent
        except ConnectionError:
            return b"", time.monotonic() - begin, sent
        finally:
            writer.close()

    @pytest.mark.parametrize(
        "pieces",
        [
            [],
            [b"POST"],
            [b"\r\n"] * 100,
            [b"GET /health HTTP/1.1\r\n", *[b"X: y\r\n"] * 100],
            [b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n", *[b"\r\n"] * 100],
            [b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n", *[b"G"]],
        ],
        ids=["nothing", "a word", "line ends", "headers", "line ends after an answer", "a letter after an answer"],
    )
    def test_a_connection_without_a_request_is_closed(self, address, pieces):
        _, seconds, _ = asyncio.run(self.talk(address, pieces, pause=0.05))
        assert 0.4 < seconds < 2.5

    def test_a_client_that_reads_no_answers_is_cut_off(self, serve, on_socket):
        service = serve(limits={"body_timeout": 0.5, "max_requests": 2})
        parts = urlsplit(on_socket(create_app(service), http=bounded_protocol(service.limits)))
        asked = b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n" * 1500  # more than sockets buffer
        with contextlib.ExitStack() as stack:
            for _ in range(2):
                client = stack.enter_context(socket.socket())
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                client.connect((parts.hostname, parts.port))
                client.sendall(asked)
            status, deadline = 0, time.monotonic() + 30
            time.sleep(1)
            while status != 200 and time.monotonic() < deadline:
                status = httpx.post(f"{parts.geturl()}/score", json={"samples": ["a fox"]}, timeout=30).status_code
                time.sleep(0.1)
            assert status == 200
            while service.metrics.registry.get_sample_value("acqsynth_active_requests"):
                assert time.monotonic() < deadline
                time.sleep(0.1)

    @pytest.mark.parametrize(
        "pieces",
        [
            [b"GET /health HTTP/1.1\r\nX: ", *[b"y" * 65536] * 400],
            [b"GET /health HTTP/1.1\r\n", *[b"X: y\r\n" * 8192] * 400],
            [b"GET /", *[b"y" * 65536] * 400],
            [b"GET /health HTTP/1.1\r\n" + b"X" * 65536, *[b"X" * 65536] * 400],
        ],
        ids=["a value", "lines", "a path", "a name"],
    )
    def test_a_large_head_is_refused_before_it_is_read(self, address, pieces):
        answer, seconds, sent = asyncio.run(self.talk(address, pieces))
        assert answer.startswith((b"HTTP/1.1 431 ", b"HTTP/1.1 400 ")) or answer == b""
        assert sent < 16 << 20  # the sockets buffer some on both sides
        assert seconds < 2.5

    def test_trailers_and_chunk_marks_are_bounded(self, address):
        head = b"POST /score HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
        for flood in ([b"0\r\n", *[b"X: y\r\n" * 8192] * 400], [b"1;" + b"x" * 65536, *[b"x" * 65536] * 400]):
            _, seconds, sent = asyncio.run(self.talk(address, [head, *flood]))
            assert sent < 16 << 20
            assert seconds < 2.5

    def test_an_honest_client_goes_on(self, address):
        url = "http://{}:{}".format(*address)
        with httpx.Client(base_url=url, headers={"X-Long": "y" * (HEAD_BYTES // 2)}) as client:
            for _ in range(3):
                assert client.post("/score", json={"samples": ["a fox"]}).status_code == 200
                time.sleep(0.3)
            time.sleep(0.6)
            assert client.get("/health").status_code == 200  # on a new connection

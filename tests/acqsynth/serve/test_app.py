"""The service under load, its tokens, metrics and student, and the reward route."""

from __future__ import annotations

import asyncio
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from fakes import GOOD, LONGER, error_of

import acqcore
from acqsynth.parsing import parse_sample
from acqsynth.serve.middleware import Access
from acqsynth.serve.options import Limits
from acqsynth.serve.students import Loaded, Question, Students, Values


class Held:
    """Blocks the model until ``free`` is set; ``at_work`` signals that a batch has started."""

    def __init__(self, monkeypatch):
        self.at_work, self.free = threading.Event(), threading.Event()
        values = Question.values

        def held(*arguments):
            self.at_work.set()
            assert self.free.wait(20)
            return values(*arguments)

        monkeypatch.setattr(Question, "values", held)

    async def wait(self):
        assert await asyncio.to_thread(self.at_work.wait, 20)


@pytest.fixture
def held(monkeypatch):
    return Held(monkeypatch)


class TestPressure:
    def test_too_many_tokens_waiting_are_429_with_a_time(self, asked, serve, held):
        """Small requests may exceed a queue limit reached by others, by up to an eighth."""

        async def main():
            async with asked(serve(limits={"queue_tokens": 100, "wait": 0.0})) as client:

                def post(tokens):
                    return asyncio.create_task(client.post("/score", json={"samples": ["a" * tokens]}))

                accepted = [post(100)]
                await held.wait()
                for tokens, waiting in ((100, 100), (12, 112)):
                    accepted.append(post(tokens))
                    while f"acqsynth_queue_tokens {waiting}.0" not in (await client.get("/metrics")).text:
                        await asyncio.sleep(0.01)
                refused = [await post(tokens) for tokens in (13, 2)]
                held.free.set()
                return refused, await asyncio.gather(*accepted)

        refused, answered = asyncio.run(main())
        for response in refused:
            assert error_of(response) == (429, "busy", "112 tokens are queued, at most 100 are allowed")
            assert 1 <= int(response.headers["retry-after"]) <= 60
        assert [response.status_code for response in answered] == [200, 200, 200]

    def test_too_many_requests_are_429(self, asked, serve, held):
        async def main():
            async with asked(serve(limits={"max_requests": 1})) as client:
                first = asyncio.create_task(client.post("/score", json={"samples": ["a b"]}))
                await held.wait()
                refused, health = await client.post("/score", json={"samples": ["a b"]}), await client.get("/health")
                held.free.set()
                return await first, refused, health

        first, refused, health = asyncio.run(main())
        assert first.status_code == health.status_code == 200
        assert error_of(refused)[:2] == (429, "busy")
        assert refused.headers["retry-after"] == "1"

    def test_the_deadline_is_504_and_the_rest_is_not_scored(self, asked, serve, held, forwards):
        async def main():
            async with asked(serve(limits={"timeout": 0.3, "batch_tokens": 10})) as client:
                late = await client.post("/score", json={"samples": ["a" * 10, "b" * 10, "c" * 10]})
                held.free.set()
                following = await client.post("/score", json={"samples": ["d" * 10]})
                return late, following, (await client.get("/metrics")).text

        late, following, metrics = asyncio.run(main())
        assert error_of(late) == (504, "deadline_exceeded", "no answer within 0.3 seconds")
        assert following.status_code == 200
        assert len(forwards) == 2  # the first of the three samples was already running
        assert 'acqsynth_samples_total{outcome="scored"} 2.0' in metrics
        assert 'acqsynth_requests_total{route="/score",status="504"} 1.0' in metrics
        assert "acqsynth_queue_tokens 0.0" in metrics

    def test_a_stopping_server_answers_what_it_took(self, asked, serve, held, tokenizing):
        """Holds for requests in the model and for those still being tokenized."""
        begun, go_on = threading.Event(), threading.Event()

        def slow(texts):
            if "slow" in texts:
                begun.set()
                assert go_on.wait(20)

        tokenizing(slow)

        async def main():
            service = serve()
            async with asked(service) as client:
                taken = [asyncio.create_task(client.post("/score", json={"samples": ["a b"]}))]
                await held.wait()
                taken.append(asyncio.create_task(client.post("/score", json={"samples": ["slow"]})))
                assert await asyncio.to_thread(begun.wait, 20)
                service.stopping = True
                refused, health = await client.post("/score", json={"samples": ["a b"]}), await client.get("/health")
                go_on.set()
                held.free.set()
                return [refused, health, *await asyncio.gather(*taken)]

        refused, health, *taken = asyncio.run(main())
        assert [response.status_code for response in taken] == [200, 200]
        assert error_of(refused)[:2] == (503, "stopping")
        assert (health.status_code, health.json()) == (503, {"status": "stopping"})


class TestTokens:
    @pytest.mark.parametrize("path", ["/score", "/get_reward", "/student", "/metrics", "/openapi.json", "/nowhere"])
    def test_nothing_reaches_the_model_without_the_token(self, ask, serve, forwards, path, tokenizing):
        """Without the token nothing is tokenized either, and the body, which may be of any size, is not read."""
        bodies = {"/score": {"samples": ["a b"]}, "/get_reward": {"query": [GOOD], "prompts": [""]}}

        tokenized = []
        tokenizing(tokenized.append)
        wrong = [{}, *({"authorization": text} for text in ("Bearer wrong", "Bearer ", "secret", "Basic c2Vj"))]
        wrong += [{"Authorization": "Bearer admin" if path != "/student" else "Bearer secret"}]
        requests = [
            (method, path, {"headers": headers, "json": bodies.get(path)})
            for headers in wrong
            for method in ("POST", "GET", "PUT", "OPTIONS")
        ]
        for response in ask(serve(access=Access("secret", "admin")), *requests):
            assert error_of(response)[:2] == (401, "unauthorized")
            assert response.headers["www-authenticate"] == "Bearer"
        assert forwards == tokenized == []

    def test_health_tells_strangers_that_it_lives_and_no_more(self, ask, serve):
        told, head = ask(serve(access=Access("secret")), ("GET", "/health", {}), ("HEAD", "/health", {}))
        assert told.json() == {"status": "ok"}
        assert head.status_code == 200


class TestGetReward:
    def test_the_wire_format(self, post, student):
        prompt = f"<|user|>Like {LONGER}</s><|assistant|>"
        queries = [f"{prompt}{GOOD}</s>", f"{prompt}no sample</s>", f"elsewhere {GOOD}", f"{prompt}{LONGER}"]
        body = {"query": queries, "prompts": [prompt] * 4, "labels": [None, "x", 3, {"a": []}]}
        response = post("/get_reward", body)
        assert response.status_code == 200
        answer = response.json()
        scored = [parse_sample(GOOD), parse_sample(LONGER)]
        good, longer = acqcore.score(student, scored, progress=False)["entropy"].tolist()
        assert answer["rewards"] == [good, 0.0, pytest.approx((good + longer) / 2), longer]
        assert answer["scores"] == pytest.approx(torch.tensor(answer["rewards"]).sigmoid().tolist())
        assert answer["extra_logs"] == {"masked": [0, 0, 1, 0], "gated": [0, 1, 0, 0], "entropy": [good, 0, 0, longer]}

    def test_responses_without_the_form_are_told_once(self, ask, serve, caplog):
        def asking(*queries):
            bodies = ({"query": [query] * 2 * bool(query), "prompts": [""] * 2 * bool(query)} for query in queries)
            ask(serve(), *(("POST", "/get_reward", {"json": body}) for body in bodies))

        asking("", "What is 2 + 2? 4.", "What is 3 + 3? 6.")  # the first request is empty
        assert caplog.text.count("none of 2 responses has the form <question>") == 1
        caplog.clear()
        asking(GOOD, "no form")
        assert "has the form" not in caplog.text

    def test_a_masked_sample_gets_what_is_typical(self, ask, serve, monkeypatch):
        values = iter([[None], [2.0, 4.0], [None], [-1.0]])
        monkeypatch.setattr(Question, "values", lambda *_: [Values((value,), {}) for value in next(values)])

        asked = ([GOOD], [GOOD, GOOD], [GOOD], [GOOD], ["broken"])
        bodies = ({"query": queries, "prompts": [""] * len(queries)} for queries in asked)
        answers = ask(serve(acquisition="loss"), *(("POST", "/get_reward", {"json": body}) for body in bodies))
        # The last response does not parse, so it must not outrank the negative value before it.
        assert [answer.json()["rewards"] for answer in answers] == [[0.0], [2.0, 4.0], [3.0], [-1.0], [-1.0]]

    def test_lists_of_different_length(self, post):
        response = post("/get_reward", {"query": [GOOD], "prompts": []})
        assert error_of(response) == (422, "invalid_request", "prompts: expected 1, one per query, got 0")

    def test_an_acquisition_that_can_not_be_served(self, serve):
        with pytest.raises(ValueError, match="acquisition: unknown 'influence', expected one of"):
            serve(acquisition="influence")


class TestMetrics:
    def test_what_is_counted(self, ask, serve):
        scored = {"json": {"samples": ["a fox", "the dog", "x"]}}
        requests = ("POST", "/score", scored), ("POST", "/score", {"json": {}}), ("GET", "/nowhere/whatever", {})
        lines = ask(serve(), *requests, ("GET", "/metrics", {}))[-1].text.splitlines()
        for line in (
            'acqsynth_requests_total{route="/score",status="200"} 1.0',
            'acqsynth_requests_total{route="/score",status="422"} 1.0',
            'acqsynth_requests_total{route="other",status="404"} 1.0',
            'acqsynth_samples_total{outcome="scored"} 2.0',
            'acqsynth_samples_total{outcome="refused"} 1.0',
            "acqsynth_batch_tokens_total 12.0",
            "acqsynth_batch_samples_sum 2.0",
            "acqsynth_student_version 1.0",
            "acqsynth_queue_tokens 0.0",
            "acqsynth_active_requests 1.0",  # this request
        ):
            assert line in lines, line


class TestStudent:
    @pytest.fixture
    def root(self, root, model):
        """A student root with the student ``second``; another student lies outside it and must not be loaded."""
        (root / "one").rename(root.with_name("outside"))
        (root / "two").rename(root / "second")
        model.save_pretrained(root / "wordless")
        (root / "link").symlink_to(root.with_name("outside"))
        (root / "empty").mkdir()
        (root / "adapter").mkdir()
        for name in ("config.json", "adapter_config.json"):
            (root / "adapter" / name).write_text("{}")
        (root / "broken").mkdir()
        (root / "broken" / "config.json").write_text('{"model_type": "llama"}')
        return root

    @pytest.fixture
    def change(self, serve, ask):
        """``change(path, **options)`` returns the responses to a reload and to a later request, and the service."""

        def run(path, **options):
            service = serve(access=Access(None, "admin"), **options)
            requests = (
                ("POST", "/student", {"json": {"path": path}}),
                ("POST", "/score", {"json": {"samples": ["a fox"]}}),
            )
            response, answer = ask(service, *requests, authorization="Bearer admin")
            return response, answer.json(), service

        return run

    def test_another_student_scores_from_now_on(self, change, root):
        response, answer, service = change("second", root=root)
        assert response.status_code == 200
        assert response.json() == answer["student"] == service.students.current.described()
        assert response.json()["version"] == 2
        second = acqcore.Student.load(root / "second")
        assert answer["values"]["entropy"] == acqcore.score(second, ["a fox"], progress=False)["entropy"].tolist()
        assert 'acqsynth_reloads_total{outcome="done"} 1.0' in service.metrics.text().decode()

    @pytest.mark.parametrize(
        ("path", "message"),
        [
            ("../outside", "below the student root"),
            ("second/../../outside", "below the student root"),
            ("link", "below the student root"),
            ("/etc", "below the student root"),
            ("a\0b", "below the student root"),
            ("x" * 5000, "expected a folder"),
            ("nowhere", "with a complete model"),
            ("HuggingFaceTB/SmolLM2-135M", "with a complete model"),
            ("", "with a complete model"),
            ("empty", "with a complete model"),
            ("adapter", "with a complete model"),
            ("second/config.json", "with a complete model"),
            ("broken", "'broken' cannot be loaded: "),
            ("wordless", "'wordless' cannot be loaded: student: wordless has no tokenizer"),
        ],
    )
    def test_nothing_else_is_loaded_and_the_one_before_stays(self, change, root, path, message):
        response, answer, _ = change(path, root=root)
        status, kind, text = error_of(response)
        assert (status, kind) == (422, "invalid_request")
        assert message in text
        assert str(root) not in text
        assert answer["student"]["version"] == 1

    def test_without_a_root_or_an_admin_token_there_is_no_reload(self, change, post, root):
        assert error_of(change("second")[0])[:2] == (403, "forbidden")
        response = post("/student", {"path": "second"}, root=root)
        assert error_of(response)[:2] == (403, "forbidden")

    def test_requests_keep_the_student_they_were_taken_for(self, asked, serve, root, held, student):
        """Running and queued requests keep the old student, later ones get the new; a concurrent reload gets 409."""

        async def main():
            service = serve(access=Access(None, "admin"), root=root, limits={"wait": 0.0, "batch_tokens": 6})
            async with asked(service, authorization="Bearer admin") as client:
                early = [asyncio.create_task(client.post("/score", json={"samples": ["a fox", "b fox"]}))]
                await held.wait()
                early.append(asyncio.create_task(client.post("/score", json={"samples": ["the dog"]})))
                while service.batcher.waiting < 12:
                    await asyncio.sleep(0.005)
                both = await asyncio.gather(*(client.post("/student", json={"path": "second"}) for _ in range(2)))
                assert sorted(response.status_code for response in both) == [200, 409]
                late = asyncio.create_task(client.post("/score", json={"samples": ["a fox"]}))
                await asyncio.sleep(0.05)
                held.free.set()
                return [response.json() for response in await asyncio.gather(*early, late)]

        first, waiting, late = asyncio.run(main())
        second = acqcore.Student.load(root / "second")
        assert [answer["student"]["version"] for answer in (first, waiting, late)] == [1, 1, 2]
        for answer, scorer, texts in (
            (first, student, ["a fox", "b fox"]),
            (waiting, student, ["the dog"]),
            (late, second, ["a fox"]),
        ):
            expected = acqcore.score(scorer, texts, progress=False)["entropy"].tolist()
            assert answer["values"]["entropy"] == pytest.approx(expected, rel=2e-6)
        assert first["values"]["entropy"][0] != pytest.approx(late["values"]["entropy"][0], rel=1e-3)


def test_samples_are_tokenized_while_others_are_scored(student):
    loaded = Loaded("student", 1, "", student)
    expected, _ = loaded.encode(["a dog"], Limits(), None, ())
    with ThreadPoolExecutor(1) as pool, student.alone():
        rows, _ = pool.submit(loaded.encode, ["a dog"], Limits(), None, ()).result(timeout=20)
    assert [row.ids.tolist() for row in rows] == [row.ids.tolist() for row in expected]


def test_a_student_without_a_tokenizer_is_not_served(model):
    with pytest.raises(ValueError, match="student: wordless has no tokenizer"):
        Students(acqcore.Student.from_model(model.eval()), "wordless")


def test_errors_carry_json_that_every_client_reads(ask, serve):
    missing, *wrong_method = ask(serve(), ("GET", "/nowhere", {}), ("GET", "/score", {}), ("POST", "/health", {}))
    assert error_of(missing)[:2] == (404, "not_found")
    for response in wrong_method:
        assert error_of(response)[:2] == (405, "method_not_allowed")
        json.loads(response.content)

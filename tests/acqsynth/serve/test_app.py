"""The routes return the values of in-process scoring and reject bad requests with a typed error."""

from __future__ import annotations

import asyncio
import json
import threading

import pytest
import torch

import acqcore
from acqsynth.parsing import parse_sample
from acqsynth.serve.middleware import Access
from acqsynth.serve.schema import served_acquisitions
from acqsynth.serve.students import Question, Values

GOOD = "<question>What is 6 * 7?</question><answer>It is 42.</answer>"
LONGER = "<question>Name a prime.</question><reasoning>Seven has no divisor but 1.</reasoning><answer>7</answer>"
CHAT = [{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "It is 4."}]


def error_of(response):
    assert set(response.json()) == {"error"}
    assert set(response.json()["error"]) == {"type", "message"}
    return response.status_code, response.json()["error"]["type"], response.json()["error"]["message"]


class TestScore:
    def test_all_acquisitions_are_those_of_process(self, post, student, samples):
        names = served_acquisitions()
        response = post("/score", {"samples": samples, "acquisitions": names})
        assert response.status_code == 200
        answer = response.json()
        expected = acqcore.score(student, samples, names, progress=False)
        assert list(answer["values"]) == names
        for name in names:
            assert torch.equal(torch.tensor(answer["values"][name]), expected[name]), name
        assert answer["n_tokens"] == expected.n_tokens.tolist()
        assert answer["valid"] == [True] * len(samples)
        assert answer["errors"] == []
        assert answer["student"]["name"] == "first"
        assert answer["student"]["version"] == 1

    @pytest.mark.parametrize(
        "chosen",
        [
            ["What is 2 + 2?", "It is 4."],
            [{"text": "What is 2 + 2?"}, {"text": "It is 4."}],
            [{"messages": CHAT}, {"messages": [*CHAT, *CHAT]}],
            [{"prompt": CHAT[:1], "completion": CHAT[1:]}, {"prompt": "a", "completion": "b"}],
        ],
    )
    def test_every_kind_of_sample(self, post, student, chosen):
        answer = post("/score", {"samples": chosen, "acquisitions": ["loss"]}).json()
        expected = acqcore.score(student, chosen, "loss", progress=False)
        assert answer["values"]["loss"] == expected["loss"].tolist()
        assert answer["n_tokens"] == expected.n_tokens.tolist()

    def test_tools_and_tool_calls(self, post, student):
        call = {"id": "a", "type": "function", "function": {"name": "add", "arguments": {"x": 1, "y": [2]}}}
        turns = [
            CHAT[0],
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "4", "name": "add", "tool_call_id": "a"},
            CHAT[1],
        ]
        tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
        chosen = [
            {"messages": turns, "tools": tools},
            {"messages": CHAT, "chat_template_kwargs": {"enable_thinking": False}},
        ]
        answer = post("/score", {"samples": chosen, "acquisitions": ["loss"]}).json()
        expected = acqcore.score(student, chosen, "loss", progress=False)
        assert answer["values"]["loss"] == expected["loss"].tolist()

    @pytest.mark.parametrize(
        "options",
        [
            {"chat_template": "{{ 1 }}"},
            {"tokenize": True},
            {"add_generation_prompt": True},
            {"conversation": "x"},
            {"a b": 1},
            {"x": {"y": 1}},
        ],
    )
    def test_a_request_brings_no_template_of_its_own(self, post, forwards, options):
        body = {"samples": [{"messages": CHAT, "chat_template_kwargs": options}]}
        status, kind, text = error_of(post("/score", body))
        assert (status, kind) == (422, "invalid_request")
        assert "chat_template_kwargs" in text
        assert forwards == []

    def test_reduction_arguments_and_length(self, post, student, samples):
        arguments = {"mutual_information": {"layers": 1, "draws": 3, "seed": 5}, "grad_norm": {"parameters": "all"}}
        names = ["mutual_information", "grad_norm", "entropy"]
        body = {"samples": samples, "acquisitions": names, "acquisition_args": arguments}
        answer = post("/score", {**body, "reduction": "max", "max_length": 20}).json()
        expected = acqcore.score(
            student, samples, names, acquisition_args=arguments, reduction="max", max_length=20, progress=False
        )
        for name in names:
            assert answer["values"][name] == expected[name].tolist()

    def test_estimates_come_with_their_standard_errors(self, post, student, samples):
        arguments = {"mutual_information": {"form": "linear", "probes": 3, "seed": 5}}
        names = ["entropy", "mutual_information"]
        body = {"samples": samples, "acquisitions": names, "acquisition_args": arguments}
        answer = post("/score", body).json()
        expected = acqcore.score(student, samples, names, acquisition_args=arguments, progress=False)
        assert answer["values"]["mutual_information"] == expected["mutual_information"].tolist()
        assert answer["stderr"] == {"mutual_information": expected.stderr["mutual_information"].tolist()}
        single = {**arguments["mutual_information"], "probes": 1}
        answer = post("/score", {**body, "acquisition_args": {"mutual_information": single}}).json()
        assert answer["stderr"] == {"mutual_information": [None] * len(samples)}
        assert post("/score", {"samples": samples}).json()["stderr"] == {}

    def test_coalesced_requests_get_the_numbers_of_lone_ones(self, asked, serve, student, samples, forwards):
        """Values agree up to rounding, as matrix products of another shape sum in another order."""
        names = ["entropy", "loss", "grad_norm", "mutual_information"]

        async def main():
            async with asked(serve(limits={"wait": 0.2})) as client:
                bodies = [{"samples": [sample], "acquisitions": names} for sample in samples]
                return await asyncio.gather(*(client.post("/score", json=body) for body in bodies))

        answers = [response.json() for response in asyncio.run(main())]
        assert sum(size == len(samples) for size in forwards) <= 1
        assert len(forwards) < len(samples)
        for sample, answer in zip(samples, answers, strict=True):
            expected = acqcore.score(student, [sample], names, progress=False)
            for name in names:
                assert answer["values"][name] == pytest.approx(expected[name].tolist(), rel=2e-6)

    def test_a_sample_that_can_not_be_scored_is_told_alone(self, post, student):
        chosen = ["a fox", "x", "", "the dog " * 20, "the dog"]
        body = {"samples": chosen, "acquisitions": ["entropy"]}
        answer = post("/score", body, limits={"max_length": 64}).json()
        expected = acqcore.score(student, [chosen[0], chosen[4]], "entropy", progress=False)["entropy"].tolist()
        assert answer["values"]["entropy"] == [expected[0], None, None, None, expected[1]]
        assert answer["valid"] == [True, False, False, False, True]
        assert [error["index"] for error in answer["errors"]] == [1, 2, 3]
        assert answer["errors"][0]["message"].startswith("nothing to score")
        assert answer["errors"][2]["message"].startswith("160 tokens, the student takes at most 64")

    @pytest.mark.parametrize(
        ("bad", "message"),
        [
            (3, "expected strings, mappings with"),
            (None, "expected strings, mappings with"),
            ({"prompt": "a"}, "got a mapping with keys 'prompt'"),
            ({"text": ["a"]}, "text: expected a string, got list"),
            ({"text": None}, "text: expected a string, got no value"),
            ({"text": "\ud800 is half a character"}, "text: character 0 is the lone surrogate U+D800"),
            ({"messages": [{"role": "user", "content": "a"}]}, "expected text as in the samples before it"),
            ({"text": "a" * 70_000}, "70004 characters, at most 65536 are tokenized"),
        ],
    )
    def test_the_fault_of_a_sample_is_its_own(self, post, student, bad, message):
        good = [{"text": "a fox", "id": 1}, {"text": "the dog", "weight": 0.5}]
        body = json.dumps({"samples": [good[0], bad, good[1]], "acquisitions": "entropy"}).encode()
        answer = post("/score", body).json()
        expected = acqcore.score(student, good, "entropy", progress=False)["entropy"].tolist()
        assert answer["values"]["entropy"] == [pytest.approx(expected[0]), None, pytest.approx(expected[1])]
        assert answer["valid"] == [True, False, True]
        [error] = answer["errors"]
        assert error["index"] == 1
        assert message in error["message"]

    def test_rows_as_anywhere_else(self, post, student):
        """Question-answer rows, numeric answers and extra message keys that only chat templates use are accepted."""
        for chosen in (
            [{"question": "What is 2 + 2?", "answer": 40000}],
            [{"messages": [{**CHAT[0], "weight": 1}, CHAT[1]]}],
        ):
            answer = post("/score", {"samples": chosen, "acquisitions": "loss"}).json()
            assert answer["errors"] == []
            assert answer["values"]["loss"] == acqcore.score(student, chosen, "loss", progress=False)["loss"].tolist()

    def test_a_value_that_is_not_finite_is_null(self, post, student, monkeypatch):
        with torch.no_grad():
            student.head.weight[ord("?")] = torch.nan
        answer = post("/score", {"samples": ["a fox"], "acquisitions": ["entropy"]})
        assert answer.json()["values"] == {"entropy": [None]}
        assert answer.json()["valid"] == [False]

    def test_no_samples(self, post):
        answer = post("/score", {"samples": []}).json()
        assert answer["values"] == {"entropy": []}
        assert answer["valid"] == answer["n_tokens"] == answer["errors"] == []

    @pytest.mark.parametrize(
        ("body", "message"),
        [
            ({}, "samples: Field required"),
            ([], "body: "),
            ({"samples": "a"}, "samples: Input should be a valid array"),
            ({"samples": ["a"], "more": 1}, "more: Extra inputs are not permitted"),
            ({"samples": ["a"], "acquisitions": ["influence"]}, "unknown 'influence', expected one of"),
            ({"samples": ["a"], "acquisitions": []}, "acquisitions: List should have at least 1 item"),
            ({"samples": ["a b"], "reduction": "median"}, "reduction: Input should be 'mean'"),
            ({"samples": ["a b"], "max_length": 1}, "max_length: "),
            ({"samples": ["a b"], "max_length": "9"}, "max_length: Input should be a valid integer"),
            ({"samples": ["a b"], "max_length": 10**6}, "max_length: expected at most 2048"),
            ({"samples": ["a b"], "acquisition_args": {"grad_norm": {}}}, "not among the acquisitions asked for"),
            (
                {"samples": ["ab"], "acquisitions": ["mutual_information"],
                 "acquisition_args": {"mutual_information": {"members": ["x"]}}},
                "Extra inputs are not permitted",
            ),
            (
                {"samples": ["ab"], "acquisitions": ["mutual_information"],
                 "acquisition_args": {"mutual_information": {"layers": 3}}},
                "layers",
            ),
        ],
    )  # fmt: skip
    def test_bad_requests(self, post, forwards, body, message):
        status, kind, text = error_of(post("/score", body))
        assert (status, kind) == (422, "invalid_request")
        assert message in text
        assert sum(forwards) <= 1  # a few tokens are run to find the blocks that ``layers`` counts

    @pytest.mark.parametrize(
        ("body", "status"),
        [
            (b"", 400),
            (b"{", 400),
            (b'{"samples": ["a b"]', 400),
            (b"\xff\xfe", 400),
            (b'{"samples": ["\xff"]}', 400),
            (b'{"samples": ["\\ud800 is half a character"', 400),
            (b'{"samples": ["a b"], "reduction": "\\ud800"}', 422),
            (b'{"samples": NaN}', 422),
            (b'{"samples": ["a b"], "max_length": Infinity}', 422),
            (b'{"samples": ["a b"], "max_length": 1e999}', 422),
            (b'{"samples": ["a b"], "max_length": ' + b"9" * 400 + b"}", 422),
            (b'{"samples": ["a b"], "max_length": ' + b"9" * 5000 + b"}", 400),
            (b'{"samples": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400),
            (b'{"samples": ' + b'{"a":' * 50_000 + b"1" + b"}" * 50_000 + b"}", 400),
            (b"null", 422),
            (b'"samples"', 422),
        ],
    )
    def test_bodies_that_are_no_request(self, post, body, status):
        got, kind, _ = error_of(post("/score", body))
        assert got == status
        assert kind == {400: "bad_request", 422: "invalid_request"}[status]

    @pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded", "application/jsonp"])
    def test_what_a_web_page_may_send_elsewhere_is_no_request(self, post, forwards, kind):
        response = post("/score", b'{"samples": ["a b"]}', kind)
        assert error_of(response) == (422, "invalid_request", "content-type: expected application/json")
        assert forwards == []

    @pytest.mark.parametrize("kind", ["Application/JSON; charset=utf-8", "application/vnd.scores+json"])
    def test_json_by_its_other_names(self, post, kind):
        assert post("/score", b'{"samples": ["a b"]}', kind).json()["valid"] == [True]

    def test_control_characters_and_surrogate_pairs_are_text(self, post, student):
        texts = ["\x00\x01\x7f", "\U0001f642 日本", "\u202e\ufeff", "</s></s>"]
        answer = post("/score", {"samples": texts}).json()
        assert answer["values"]["entropy"] == acqcore.score(student, texts, progress=False)["entropy"].tolist()

    def test_limits_of_a_request(self, post, forwards):
        limits = {"max_samples": 2, "queue_tokens": 20, "max_body": 1000}
        for body, message in (
            ({"samples": ["a b"] * 3}, "samples: expected at most 2, got 3"),
            ({"samples": ["a b" * 8]}, "the request has 24 tokens, but the queue holds at most 20"),
            ({"samples": ["a" * 1000]}, "the body has 1016 bytes, at most 1000 are allowed"),
        ):
            status, kind, text = error_of(post("/score", body, limits=limits))
            assert (status, kind) == (413, "too_large")
            assert message in text
        assert forwards == []

    def test_a_failure_of_the_model_is_500_without_its_words(self, post, monkeypatch, caplog):
        def fail(*_):
            raise RuntimeError("out of memory at 0x7f")

        monkeypatch.setattr(Question, "values", fail)
        status, kind, text = error_of(post("/score", {"samples": ["a b"]}))
        assert (status, kind) == (500, "internal")
        assert "memory" not in text
        assert "out of memory" in caplog.text


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

    def test_a_stopping_server_answers_what_it_took(self, asked, serve, held, student):
        """Holds for requests in the model and for those still being tokenized."""
        tokenizer, tokenizing, go_on = student.tokenizer, threading.Event(), threading.Event()

        def slow(texts, **options):
            if "slow" in texts:
                tokenizing.set()
                assert go_on.wait(20)
            return tokenizer(texts, **options)

        slow.apply_chat_template = tokenizer.apply_chat_template
        slow.is_fast = True
        student.tokenizer = slow

        async def main():
            service = serve()
            async with asked(service) as client:
                taken = [asyncio.create_task(client.post("/score", json={"samples": ["a b"]}))]
                await held.wait()
                taken.append(asyncio.create_task(client.post("/score", json={"samples": ["slow"]})))
                assert await asyncio.to_thread(tokenizing.wait, 20)
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
    def test_nothing_reaches_the_model_without_the_token(self, ask, serve, forwards, path, student):
        """Without the token nothing is tokenized either, and the body, which may be of any size, is not read."""
        bodies = {"/score": {"samples": ["a b"]}, "/get_reward": {"query": [GOOD], "prompts": [""]}}

        def fail(*arguments, **options):
            raise AssertionError("tokenized")

        student.tokenizer = fail

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
        assert forwards == []

    def test_with_the_token_it_is_answered(self, ask, serve):
        requests = ("POST", "/score", {"json": {"samples": ["a b"]}}), ("GET", "/metrics", {})
        answers = ask(serve(access=Access("secret")), *requests, authorization="Bearer secret")
        assert [response.status_code for response in answers] == [200, 200]

    def test_health_tells_strangers_that_it_lives_and_no_more(self, ask, serve):
        assert ask(serve(access=Access("secret")), ("GET", "/health", {}))[0].json() == {"status": "ok"}


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
        assert answer["extra_logs"] == {
            "masked": [0, 0, 1, 0],
            "gated": [0, 1, 0, 0],
            "entropy": [good, 0, 0, longer],
        }

    def test_responses_without_the_form_are_told_once(self, ask, serve, caplog):
        def asking(*queries):
            bodies = ({"query": [query] * 2, "prompts": [""] * 2} for query in queries)
            ask(serve(), *(("POST", "/get_reward", {"json": body}) for body in bodies))

        asking("What is 2 + 2? 4.", "What is 3 + 3? 6.")
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
    def root(self, model, tokenizer, tmp_path):
        """A student root with the student ``second``; another student lies outside it and must not be loaded."""
        root = tmp_path / "root"
        with torch.no_grad():
            model.lm_head.weight.mul_(2)
        for folder in (root / "second", tmp_path / "outside"):
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        with torch.no_grad():
            model.lm_head.weight.div_(2)
        (root / "link").symlink_to(tmp_path / "outside")
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


def test_errors_carry_json_that_every_client_reads(ask, serve):
    missing, *wrong_method = ask(serve(), ("GET", "/nowhere", {}), ("GET", "/score", {}), ("POST", "/health", {}))
    assert error_of(missing)[:2] == (404, "not_found")
    for response in wrong_method:
        assert error_of(response)[:2] == (405, "method_not_allowed")
        json.loads(response.content)

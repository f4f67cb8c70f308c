"""Fixtures: a student of a few thousand parameters with a byte tokenizer, built without downloads, and other fakes.

Fixtures import what takes seconds themselves, so that tests without a model start at once.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from fakes import FakeEngine, Sums

from acqsynth.domains import Sample
from acqsynth.engines import Completion

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

SHARED = Path(os.environ.get("ACQCORE_DATA", Path(__file__).parents[2] / "../shared/data"))


@pytest.fixture(autouse=True)
def _one_thread():
    """Small matrices gain nothing from threads, and on a busy machine waiting for them takes 50 times longer."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    symbols = ["<pad>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    inner = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture
def model(tokenizer):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=4096,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config)


@pytest.fixture
def student_path(model, tokenizer, tmp_path):
    model.save_pretrained(tmp_path / "student")
    tokenizer.save_pretrained(tmp_path / "student")
    return tmp_path / "student"


@pytest.fixture(scope="session")
def shared_data():
    """``shared_data("code/mbpp.jsonl")`` returns the path of a real data set and skips the test if it is absent."""

    def path(name):
        if not (SHARED / name).is_file():
            pytest.skip(f"{name} is not at {SHARED}")
        return str(SHARED / name)

    return path


@pytest.fixture
def on_socket():
    """``on_socket(app, **uvicorn_options)`` serves an app in a thread until the test ends and returns its URL."""
    import uvicorn

    running = []

    def serve(app, **options):
        listener = socket.create_server(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", **options))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        running.append((server, thread))
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        return f"http://127.0.0.1:{listener.getsockname()[1]}"

    yield serve
    for server, thread in running:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


class Scripted(FakeEngine):
    """Returns ``says(prompt, draw, seed)`` as the completion; a text that ends in "..." counts as cut off."""

    def __init__(self, says):
        super().__init__()
        self.says = says

    def draw(self, prompt, i, sampling):
        text = self.says(prompt, i, sampling.seed)
        whole = text.removesuffix("...")
        return Completion(whole, list(whole.encode()), finished=whole == text)


@dataclass
class Scores:
    total: list[float | None]
    samples: list[Sample | None]
    components: dict[str, list[float | None]]
    gates: dict[str, list[bool]]


class AnswerReward:
    """Reward equal to the numeric answer; 13 cannot be scored, and texts that contain "bad" fail a gate.

    Called by TRL, it returns the share of "e" in the text plus a term that grows with the call count, its state."""

    def __init__(self):
        self.calls = 0
        self.groups = []

    def score(self, texts, groups):
        self.groups.append(list(groups))
        samples = [Sums().parse(text) for text in texts]
        values = [None if sample is None else float(sample.answer) for sample in samples]
        good = ["bad" not in text for text in texts]
        total = [
            0.0 if value is None or not passes else None if value == 13 else value
            for value, passes in zip(values, good, strict=True)
        ]
        return Scores(total, samples, {"value": values}, {"parses": [s is not None for s in samples], "good": good})

    def __call__(self, completions, log_extra, log_metric, **columns):
        self.calls += 1
        texts = [turns[-1]["content"] for turns in completions]
        shares = [text.count("e") / (len(text) + 1) for text in texts]
        log_extra("share", shares)
        log_metric("calls", self.calls)
        return [share + self.calls * i for i, share in enumerate(shares)]

    def state_dict(self):
        return {"calls": self.calls}

    def load_state_dict(self, state):
        self.calls = state["calls"]


@pytest.fixture
def fakes(monkeypatch):
    """Installs the fakes of a whole run and returns the counts of their calls."""
    import fake_run

    fake_run.install(monkeypatch.setattr)
    fake_run.calls.clear()
    return fake_run.calls


@pytest.fixture
def recipe(tmp_path):
    from fake_run import RECIPE

    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE + f"output: {tmp_path / 'out'}\n")
    return path


@pytest.fixture
def sums():
    return Sums()


@pytest.fixture
def scripted():
    return Scripted


@pytest.fixture
def answer_reward():
    return AnswerReward()

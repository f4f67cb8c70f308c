"""Every example runs on models of a few thousand parameters."""

from __future__ import annotations

import argparse
import asyncio
import importlib
import json
import math
import os
import re
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import PathFinder
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
ROWS = [
    *({"prompt": f"{a} * 3 =", "completion": f" {3 * a}."} for a in range(9)),
    *({"prompt": f"Coin {i}", "completion": " heads."} for i in range(4)),
    {"prompt": "The capital of Peru is", "completion": " Lima."},
]


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path, monkeypatch, set_threads):
    set_threads(1)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def folder(tmp_path, tiny_model, tokenizer):
    """The folder of a student that accepts long prompts."""
    path = tmp_path / "student"
    tiny_model("Llama", max_position_embeddings=4096).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture
def options(folder, tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return ["--student", folder, "--data", str(data)]


@pytest.fixture
def example(monkeypatch):
    """``example(path)``: the imported module, which finds the modules beside it."""

    def load(path):
        place = EXAMPLES / path
        monkeypatch.syspath_prepend(str(EXAMPLES))
        monkeypatch.syspath_prepend(str(place.parent))
        for name in ("common", place.stem):
            monkeypatch.delitem(sys.modules, name, raising=False)
        module = importlib.import_module(place.stem)
        assert module.__doc__
        return module

    return load


@pytest.fixture
def launched(tmp_path):
    """``launched(folder, **environment)`` runs ``run.sh`` of that example with a ``python`` that only records its
    arguments, and returns those of each ``python -m``."""

    def launch(folder, **environment):
        record, stub = tmp_path / "record", tmp_path / "bin" / "python"
        stub.parent.mkdir()
        stub.write_text('#!/bin/sh\nprintf "%s\\0" "$@" >> "$RECORD"\nprintf "\\n" >> "$RECORD"\n')
        stub.chmod(0o755)
        path = f"{stub.parent}:{os.environ['PATH']}"
        environment = {**os.environ, **environment, "PATH": path, "RECORD": str(record)}
        subprocess.run(["bash", "run.sh"], cwd=EXAMPLES / folder, env=environment, check=True)
        calls = [line.split("\0")[:-1] for line in record.read_text().splitlines()]
        return [call[1:] for call in calls if call[0] == "-m"]

    return launch


def test_benchmarks_find_the_examples_before_a_peers_package_of_that_name(tmp_path):
    """Opacus installs a package ``examples``, which wins over a folder without ``__init__.py``."""
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "__init__.py").touch()
    found = PathFinder.find_spec("examples", [str(EXAMPLES.parent), str(tmp_path)])
    assert found is not None
    assert found.origin == str(EXAMPLES / "__init__.py")


def test_score_dataset(example, options):
    kept = example("score_dataset.py").main([*options, "--keep", "3"])
    assert len(kept) == 3
    values = kept["mutual_information"][:]
    assert values == sorted(values, reverse=True)


def test_custom_acquisition(example, options):
    from acqcore.acquisitions import REGISTRY

    with mock.patch.dict(REGISTRY):
        scores = example("custom_acquisition.py").main(options)
    assert ((scores["unknown_share"] >= 0) & (scores["unknown_share"] <= 1)).all()


def test_influence_to_validation(example, options):
    found = example("influence_to_validation.py").main([*options, "--parameters", "1"])
    assert sum(found.values()) == len(ROWS) - 3  # three of the nine sums are the validation set


def test_select_and_finetune(example, options, tmp_path):
    plot = tmp_path / "chosen.png"
    line = [*options, "--n", "4", "--steps", "8", "--rounds", "2", "--lr", "1e-2", "--plot", str(plot)]
    curves = example("select_and_finetune.py").main(line)
    assert set(curves) == {"chosen", "random"}
    assert curves["chosen"][0] == curves["random"][0]  # the same base model
    assert curves["chosen"][1] != curves["random"][1]
    assert all(math.isfinite(value) for curve in curves.values() for value in curve)
    assert plot.stat().st_size > 5000


def test_fine_tuning_lowers_the_loss(example, folder):
    common = example("common.py")
    model, tokenizer = common.pair(folder)
    rows = ROWS[:4]
    before = common.loss(model, tokenizer, rows).item()
    common.fine_tune(model, tokenizer, rows, steps=10, lr=1e-2)
    assert common.loss(model, tokenizer, rows).item() < before - 0.5


def test_the_loss_is_that_of_the_completions(example, folder):
    import acqcore

    common = example("common.py")
    model, tokenizer = common.pair(folder)
    (row,) = acqcore.score(model.eval(), ROWS[:1], "loss", tokenizer=tokenizer)["loss"]
    assert common.loss(model, tokenizer, ROWS[:1]).item() == pytest.approx(row.item(), rel=1e-4)


@pytest.mark.parametrize("name", ["grpo_reward.py", "grpo_composed.py"])
def test_grpo(name, example, options):
    steps = example(name).main([*options, "--steps", "1", "--tokens", "8"])
    assert len(steps) == 1
    assert math.isfinite(steps[0]["reward"])


@pytest.mark.parametrize("path", sorted(path.name for path in EXAMPLES.glob("*.ipynb")))
def test_notebooks(path, folder, example, capsys):
    """Code cells run in order, with a small student instead of the notebook's."""
    example("common.py")
    cells = json.loads((EXAMPLES / path).read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert cells[0]["cell_type"] == "markdown"
    assert all(cell["outputs"] for cell in code if cell["metadata"].get("shows"))
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for cell in code:
        source = "".join(cell["source"]).replace("HuggingFaceTB/SmolLM2-135M-Instruct", folder)
        exec(compile(source, path, "exec"), namespace)
    for name in json.loads((EXAMPLES / path).read_text())["metadata"]["results"]:
        assert namespace[name]


@pytest.mark.parametrize(
    ("trainer", "module"), [("verl", "verl.trainer.main_ppo"), ("openrlhf", "openrlhf.cli.train_ppo_ray")]
)
def test_launch_scripts(trainer, module, launched):
    """The scripts reach their trainer with a reward, one GPU and every variable filled in."""
    *_, (start, *arguments) = launched(trainer, PROMPTS="prompts.jsonl")
    assert start == module
    assert "HuggingFaceTB/SmolLM2-135M-Instruct" in " ".join(arguments)
    assert not any("$" in argument for argument in arguments)
    text = " ".join(arguments)
    if trainer == "verl":
        assert "trainer.n_gpus_per_node=1" in text
        assert "custom_reward_function.path=pkg://acqsynth.integrations.verl" in text
    else:
        (reward,) = re.findall(r"--reward.remote_url (\S+)", text)
        assert Path(reward).is_file()
        assert text.count("num_gpus_per_node 1") == 2


TEXT = "<question>What is 12 + 30?</question>\n<answer>42</answer>"


@pytest.fixture
def named_reward(folder, monkeypatch):
    """Names the student and the example's reward in the environment, as for a trainer's workers."""
    from acqsynth.integrations import scorer

    monkeypatch.setenv("ACQSYNTH_STUDENT", folder)
    monkeypatch.setenv("ACQSYNTH_REWARD", "reward:build")
    scorer._make.cache_clear()


@pytest.mark.usefixtures("named_reward")
def test_verl(example, tmp_path):
    import datasets

    from acqsynth.integrations import verl

    example("verl/reward.py")
    found = asyncio.run(verl.compute_score("acqsynth", TEXT, "", {"index": 0}))
    assert found["masked"] == 0
    assert set(found) == {"score", "masked", "gated", "mutual_information", "diversity"}
    example("verl/prompts.py").main([str(tmp_path / "prompts.parquet")])
    row = datasets.Dataset.from_parquet(str(tmp_path / "prompts.parquet"))[3]
    assert row["extra_info"] == {"index": 3}
    assert row["prompt"][-1]["role"] == "user"


@pytest.mark.usefixtures("named_reward")
def test_openrlhf(example):
    module = example("openrlhf/reward.py")
    found = module.reward_func([f"Ask. {TEXT}"], ["Ask. "], [None])
    assert found["rewards"].shape == (1,)
    assert found["extra_logs"]["masked"].tolist() == [0.0]


def test_verifiers(example, folder, monkeypatch):
    monkeypatch.setenv("ACQSYNTH_STUDENT", folder)
    module = example("verifiers/reward.py")
    named = tomllib.loads((EXAMPLES / "verifiers" / "task.toml").read_text())["rewards"]["acquisition"]["fn"]
    assert named == "reward:acquisition"
    trace = SimpleNamespace(last_reply=TEXT)
    value = asyncio.run(module.acquisition(task=SimpleNamespace(id=0), trace=trace, runtime=None))
    assert 0 <= value <= 1


def test_remote_scorer(example, folder):
    import httpx
    import yaml

    names = {path.name for path in (EXAMPLES / "remote_scorer").iterdir()}
    services = yaml.safe_load((EXAMPLES / "remote_scorer" / "compose.yaml").read_text())["services"]
    for service in services.values():
        for volume in service.get("volumes", []):
            assert volume.startswith("models:") or volume.split(":")[0].removeprefix("./") in names
    panels = json.loads((EXAMPLES / "remote_scorer" / "dashboard.json").read_text())["panels"]

    with _served(folder) as url:
        scores, rewards = example("remote_scorer/client.py").main(["--url", url])
        measured = httpx.get(f"{url}/metrics").text
    assert all(score > 0 for score in scores)
    assert all(reward > 0 for reward in rewards)
    for panel in panels:  # the server has every metric of the dashboard
        for name in re.findall(r"acqsynth_\w+", panel["targets"][0]["expr"]):
            assert name in measured


@contextmanager
def _served(student: str) -> Iterator[str]:
    """The URL of a server that runs in a thread."""
    import uvicorn

    from acqsynth.serve.app import create_app
    from acqsynth.serve.options import add_arguments
    from acqsynth.serve.server import prepare

    parser = argparse.ArgumentParser()
    add_arguments(parser)
    service, listener = prepare(parser.parse_args(["--student", student, "--port", "0"]))
    server = uvicorn.Server(uvicorn.Config(create_app(service), log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield "http://{}:{}".format(*listener.getsockname())
    server.should_exit = True
    thread.join()

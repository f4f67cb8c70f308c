"""An acquisition with options that a third party registers is offered wherever acqcore's own are."""

from __future__ import annotations

from dataclasses import dataclass, replace
from unittest import mock

import pytest
import torch

import acqcore
from acqcore.acquisitions import REGISTRY, Options
from acqcore.cli import main
from acqcore.costs.shape import shape_of
from acqcore.costs.work import Work, passes

TEXTS = ["the fox", "a dog and a fox", "The answer is 5."]
NAME = "confidence_gap"
GIVEN = {NAME: {"power": 3}}


@dataclass(frozen=True)
class GapOptions(Options):
    power: float = 1.0


@dataclass(frozen=True)
class RequiredOptions(Options):
    power: float


class PlainOptions(Options):
    power: float = 1.0


@pytest.fixture
def register():
    """``register(scale, options)``: acts as a notebook cell that can be changed and run again."""

    def cell(scale, options=GapOptions):
        @acqcore.register(NAME, options=options)
        def confidence_gap(stats, options):
            """A power of 1 - p1."""
            return scale * stats.least_confidence**options.power

    with mock.patch.dict(REGISTRY):
        yield cell


@pytest.fixture
def loaded(tiny_model, tokenizer):
    return acqcore.Student.from_model(tiny_model("Llama"), tokenizer=tokenizer)


def expected(student: acqcore.Student, scale: float) -> torch.Tensor:
    tokens = acqcore.score(student, TEXTS, "least_confidence", keep_tokens=True).tokens["least_confidence"]
    return torch.stack([scale * (values**3).mean() for values in tokens])


def test_in_calls_and_streams(register, loaded):
    register(7.0)
    register(4.0)  # replaces the first
    values = acqcore.score(loaded, TEXTS, NAME, acquisition_args=GIVEN)[NAME]
    torch.testing.assert_close(values, expected(loaded, 4.0))
    stream = acqcore.score_stream(loaded, TEXTS, NAME, chunk=2, acquisition_args=GIVEN)
    torch.testing.assert_close(torch.cat([scores[NAME] for scores in stream]), values)


def test_on_the_command_line(register, command, capsys):
    register(1.0)
    with pytest.raises(SystemExit, match="0"):
        main(["score", "--help"])
    assert NAME in capsys.readouterr().out
    arguments = ["--acquisitions", NAME, "--acquisition-args", '{"confidence_gap": {"power": 3}}']
    assert main([*command([{"text": text} for text in TEXTS]), *arguments]) == 0
    assert NAME in capsys.readouterr().out


def test_in_plans(register, tiny_model):
    register(1.0, RequiredOptions)
    shape = shape_of(tiny_model("Llama").config, torch.float32)
    plan = [passes(shape, Work.checked(shape, 6, 12, None, 8192, (n,), a)) for n, a in ((NAME, GIVEN), ("margin", {}))]
    assert plan[0] == plan[1]
    with pytest.raises(ValueError, match="acquisition_args: 'confidence_gap' needs 'power'"):
        Work.checked(shape, 6, 12, None, 8192, (NAME,), {})


def test_in_the_service_where_a_request_can_ask_for_it(register):
    pytest.importorskip("pydantic")
    from acqsynth.serve.schema import ScoreRequest

    def offered():
        return ScoreRequest.model_json_schema()["properties"]["acquisitions"]["items"]["enum"]

    assert NAME not in offered()
    register(1.0)
    assert NAME in offered()
    register(1.0, RequiredOptions)  # a request cannot supply the required option
    assert NAME not in offered()


def test_as_a_reward(register, loaded, tokenizer, monkeypatch, student):
    from acqsynth import rewards
    from acqsynth.parsing import as_text

    register(2.0)
    reward = rewards.AcquisitionReward(loaded, NAME, parse=as_text, arguments=GIVEN[NAME], tokenizer=tokenizer)
    got = reward(prompts=[""] * 3, completions=TEXTS)
    torch.testing.assert_close(torch.tensor(got), expected(loaded, 2.0))
    monkeypatch.setenv("ACQSYNTH_STUDENT", str(student))
    assert NAME in dir(rewards)
    assert getattr(rewards, NAME).__name__ == f"acquisition_{NAME}"


@pytest.mark.parametrize("needs", ["x", None, acqcore.acquisitions.RowNeed, (acqcore.acquisitions.RowNeed(), "x")])
def test_wrong_needs(needs):
    with pytest.raises(TypeError, match="needs: expected needs"):
        acqcore.register("wrong", needs=needs)


@pytest.mark.parametrize("options", [dict, RequiredOptions(1.0), PlainOptions, None])
def test_wrong_options(options):
    with pytest.raises(TypeError, match="options: expected a dataclass that extends acqcore"):
        acqcore.register("wrong", options=options)


def test_an_unknown_over():
    with pytest.raises(ValueError, match="over: unknown 'tokens'"):
        acqcore.register("wrong", over="tokens")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"over": lambda options: "tokens"}, ValueError, "over: unknown 'tokens'"),
        ({"needs": lambda options: "rows"}, TypeError, "needs: expected needs, such as RowNeed"),
        ({"needs": lambda options: None}, TypeError, "needs: expected needs"),
    ],
)
def test_an_unknown_over_or_need_from_a_function(register, change, error, message):
    register(1.0)
    wrong = replace(REGISTRY[NAME], **change)
    with mock.patch.dict(REGISTRY, {NAME: wrong}), pytest.raises(error, match=message):
        acqcore.check_request(NAME)

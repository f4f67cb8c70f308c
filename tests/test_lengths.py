"""A sample's values do not depend on its batch, even where hidden states do."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import acqcore


def samples(*lengths: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 96, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return {"input_ids": ids * mask, "attention_mask": mask.long()}


def assert_as_alone(fresh: Callable[[], Any], lengths: tuple[int, ...], **options: Any) -> None:
    """Each loss in a batch equals that of a fresh student that scores the sample alone."""
    together, given = fresh(), samples(*lengths)
    found = acqcore.score(together, given, "loss", **options)["loss"]
    again = acqcore.score(together, given, "loss", **options)["loss"]
    for i, length in enumerate(lengths):
        alone = {"input_ids": given["input_ids"][i : i + 1, :length]}
        [expected] = acqcore.score(fresh(), alone, "loss", **options)["loss"].tolist()
        assert float(found[i]) == pytest.approx(expected, abs=1e-4)
        assert float(again[i]) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_rope_that_goes_by_the_longest_sequence(kind, small_model):
    """Covers Phi-3's two sets of frequencies and Llama's, which depend on the current and all earlier sequences."""
    rope = {"rope_type": kind, "rope_theta": 1e4}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
        model = small_model("phi3", original_max_position_embeddings=16, rope_parameters=rope)
    else:
        model = small_model("llama", max_position_embeddings=16, rope_parameters=rope | {"factor": 4.0})

    def fresh():
        student = acqcore.Student.from_model(copy.deepcopy(model))
        student.max_length = None
        return student

    assert_as_alone(fresh, (12, 24, 16, 17, 30, 8))
    grouped = fresh().length_groups([12, 16, 17, 24], 8192)
    assert grouped[0] == grouped[1] != grouped[2]
    assert (grouped[2] == grouped[3]) == (kind == "longrope")


def test_members_of_an_ensemble_go_by_their_own_lengths(small_model):
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    config = {"max_position_embeddings": 16, "rope_parameters": rope}
    members = [small_model("llama", **config), small_model("llama", **config)]
    with torch.no_grad():
        members[1].lm_head.weight.mul_(2)
    members = [acqcore.Student.from_model(member) for member in members]
    for member in members:
        member.max_length = None  # dynamic rope goes beyond the positions of the configuration
    student, given = small_model("llama", max_position_embeddings=64), samples(24, 60)
    score = lambda rows: acqcore.score(  # noqa: E731
        student, rows, "predictive_entropy", acquisition_args={"predictive_entropy": {"members": members}}
    )["predictive_entropy"]
    alone = [score({"input_ids": given["input_ids"][i : i + 1, :length]}) for i, length in enumerate((24, 60))]
    torch.testing.assert_close(score(given), torch.cat(alone), rtol=1e-5, atol=1e-6)


class Relative(nn.Module):
    """Adds positions relative to the padded length, but none up to a length of ``threshold``."""

    def __init__(self, threshold: int | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.threshold = nn.Embedding(96, 16), threshold

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        length = input_ids.shape[1]
        positions = torch.arange(length)[:, None] / length
        if self.threshold is not None and length <= self.threshold:
            positions = positions * 0
        return self.embedding(input_ids) + positions


def relative(hidden: torch.Tensor) -> torch.Tensor:
    return hidden + torch.arange(hidden.shape[1])[:, None] / hidden.shape[1]


class RelativeNorm(nn.Sequential):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return relative(super().forward(hidden))


class Capacity(nn.Module):
    """Each of four experts takes only the first ``limit`` tokens of a batch."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.router, self.limit = nn.Embedding(96, 16), nn.Linear(16, 4), limit
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        tokens = self.embedding(input_ids).flatten(0, 1)
        chosen, output = self.router(tokens).argmax(1), tokens.clone()
        for i, expert in enumerate(self.experts):
            places = (chosen == i).nonzero()[: self.limit, 0]
            output[places] += expert(tokens[places])
        return output.unflatten(0, input_ids.shape)


class Quantised(nn.Module):
    """Rounds activations to 8 bits by one scale for the batch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(96, 16)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(input_ids)
        scale = hidden.abs().max() / 127
        return (hidden / scale).round() * scale


@pytest.mark.parametrize("lengths", [(12, 24, 5, 24), (24, 24, 24), (6, 4, 5)])
@pytest.mark.parametrize(
    "trunk",
    [
        *(partial(Relative, threshold) for threshold in (None, 4, 20)),
        partial(Capacity, 3),
        partial(Capacity, 8),
        Quantised,
    ],
)
def test_any_forward_that_depends_on_its_batch(trunk, lengths):
    head = acqcore.Head(torch.randn(96, 16, generator=torch.Generator().manual_seed(1)))
    assert_as_alone(lambda: acqcore.Student(trunk(), head), lengths)


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_rope_hides_no_other_dependence(kind, small_model):
    """A model whose rope changes with the length may have positions relative to it, too."""
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    model = small_model("llama", original_max_position_embeddings=16, rope_parameters=rope)
    model.model.norm.register_forward_hook(lambda module, args, hidden: relative(hidden))
    assert_as_alone(lambda: acqcore.Student.from_model(copy.deepcopy(model)), (12, 24, 5, 14))


@pytest.mark.parametrize("alter", ["hook", "forward", "module"])
def test_a_model_altered_after_its_first_score(alter, tiny_model):
    model = tiny_model("Llama")
    acqcore.score(acqcore.Student.from_model(model), samples(12, 24), "loss")
    norm = model.model.norm
    whole = norm.forward
    if alter == "hook":
        norm.register_forward_hook(lambda module, args, hidden: relative(hidden))
    elif alter == "forward":
        norm.forward = lambda hidden: relative(whole(hidden))
    else:
        model.model.norm = RelativeNorm(norm)
    assert_as_alone(lambda: acqcore.Student.from_model(model), (12, 24, 5))


def test_a_trunk_of_unknown_length_runs_no_longer_row_than_given():
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.places = nn.Embedding(96, 16), nn.Embedding(24, 16)

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.tokens(input_ids) + self.places(torch.arange(input_ids.shape[1]))

    trunk = Positions()
    assert_as_alone(lambda: acqcore.Student(trunk, acqcore.Head(torch.ones(96, 16))), (20, 5, 24))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("trunk", [partial(Relative, None), partial(Capacity, 3), partial(Capacity, 8)])
def test_half_precision_hides_no_dependence(trunk, dtype):
    """The second row that decides there differs, too."""
    student = acqcore.Student(trunk().to(dtype), acqcore.Head(torch.ones(96, 16, dtype=dtype)))
    student.max_length = 64
    assert len(set(student.length_groups([3, 9, 40], 8192))) == 3


@pytest.mark.parametrize(
    "call",
    [partial(acqcore.score, acquisitions="loss"), acqcore.prompt_embedding],
    ids=["score", "prompt_embedding"],
)
def test_no_forward_exceeds_batch_tokens(call, tiny_model):
    """The check of a new student included, except for a longer row."""
    model, sizes = tiny_model("Llama"), []
    student = acqcore.Student.from_model(model)
    model.model.register_forward_pre_hook(lambda _, __, given: sizes.append(given["input_ids"].shape), with_kwargs=True)
    call(student, samples(60, 59, 20, 19), batch_tokens=48)
    assert torch.Size([2, 24]) in sizes  # the check
    assert max(shape.numel() for shape in sizes) == 60


def test_others_share_batches(tiny_model):
    student = acqcore.Student.from_model(tiny_model("Llama"))
    assert len(set(student.length_groups([3, 9, 40], 8192))) == 1

"""Acquisitions of acqcore as signals."""

from __future__ import annotations

import math

import pytest
import torch
from fakes import written

import acqcore
from acqsynth.rewards import AcquisitionSignal, ComposedReward, Scorer, Signal, acquisition_signals
from acqsynth.rewards.batch import Batch
from acqsynth.rewards.signals import ArchiveNovelty


def rows(samples):
    return [
        {
            "prompt": [{"role": "user", "content": s.question}],
            "completion": [{"role": "assistant", "content": "\n".join(filter(None, (s.reasoning, s.answer)))}],
        }
        for s in samples
    ]


@pytest.fixture
def samples(sample):
    return [sample(3, 4, reasoning="Three and four make seven."), sample(10, 20), sample(5, 5, answer="11")]


def test_values_are_those_of_the_chat_the_student_learns(domain, samples, model, tokenizer):
    for name, given in (("entropy", "entropy"), ("grad_norm", ["grad_norm"]), ("margin", {"margin": {}})):
        [signal] = acquisition_signals(model, given, domain, tokenizer=tokenizer)
        assert isinstance(signal, Signal)
        assert signal.name == name
        assert signal(samples) == acqcore.score(model, rows(samples), (name,), tokenizer=tokenizer)[name].tolist()


def test_a_tokenizer_without_template_scores_plain_text(domain, samples, model, tokenizer):
    [signal] = acquisition_signals(model, ["loss"], domain, tokenizer=tokenizer)
    template, tokenizer.chat_template = tokenizer.chat_template, None
    try:
        values = signal(samples)
    finally:
        tokenizer.chat_template = template
    plain = [{"prompt": s.question + "\n", "completion": domain.solution(s)} for s in samples]
    assert values == acqcore.score(model, plain, ("loss",), tokenizer=tokenizer)["loss"].tolist()


def test_signals_of_one_student_share_a_pass_within_a_call(domain, samples, model, tokenizer, counted):
    signals = acquisition_signals(model, ["loss", "entropy", "gini"], domain, tokenizer=tokenizer)
    batch = Batch(samples)
    values = [signal(batch) for signal in signals]
    assert counted == [(("loss", "entropy", "gini"), 3)]
    assert len({tuple(column) for column in values}) == 3
    signals[0](Batch(samples))
    assert len(counted) == 2  # nothing is cached between calls, as the student may have changed
    signals[0](samples)
    signals[0](samples)
    assert len(counted) == 4
    counted.clear()
    signals = acquisition_signals(model, ["loss", "gradient_diversity"], domain, tokenizer=tokenizer)  # of one, of all
    ComposedReward(domain, signals).score([written(s.question, s.answer) for s in samples], [0] * 3)
    assert counted == [(("loss", "gradient_diversity"), 3)]


def test_influence_of_reference_samples_follows_the_student(domain, samples, model, tokenizer):
    [signal] = acquisition_signals(model, {"influence": {"reference": samples[:1]}}, domain, tokenizer=tokenizer)
    values = signal(samples)
    reference = acqcore.influence_reference(model, rows(samples[:1]), tokenizer=tokenizer)
    expected = acqcore.influence(model, rows(samples), reference, tokenizer=tokenizer).tolist()
    assert values == pytest.approx(expected, abs=1e-6)
    assert values[0] == pytest.approx(1.0, abs=1e-4)
    with_reference = {"influence": {"reference": reference}}
    [signal] = acquisition_signals(model, with_reference, domain, tokenizer=tokenizer)
    assert signal(samples) == pytest.approx(expected, abs=1e-6)
    [signal] = acquisition_signals(model, {"influence": {"reference": samples[:1]}}, domain, tokenizer=tokenizer)
    signal(samples)
    other = type(model)(model.config)
    signal.refresh(other)
    reference = acqcore.influence_reference(other, rows(samples[:1]), tokenizer=tokenizer)
    expected = acqcore.influence(other, rows(samples), reference, tokenizer=tokenizer).tolist()
    assert signal(samples) == pytest.approx(expected, abs=1e-6)


def test_the_reference_is_made_as_the_arguments_say(domain, samples, model, tokenizer):
    made = {"parameters": 1, "dim": 64, "seed": 3}
    asked = {"influence": {"reference": samples[:1], "similarity": "dot", **made}}
    [signal] = acquisition_signals(model, asked, domain, tokenizer=tokenizer)
    reference = acqcore.influence_reference(model, rows(samples[:1]), tokenizer=tokenizer, **made)
    expected = acqcore.influence(model, rows(samples), reference, similarity="dot", tokenizer=tokenizer).tolist()
    assert signal(samples) == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_an_archive_of_gradients_grows_with_what_passes(domain, samples, model, tokenizer):
    def build():
        arguments = {"archive": acqcore.Archive(8), "parameters": 1, "dim": 64}
        [signal] = acquisition_signals(model, {"archive_novelty": arguments}, domain, tokenizer=tokenizer)
        assert isinstance(signal, ArchiveNovelty)
        return signal

    signal = build()
    assert signal(samples) == pytest.approx([math.log(2)] * 3)  # everything is novel to an empty archive
    signal.accept(samples[:2])
    signal.accept([])
    assert len(signal) == 2
    archive = acqcore.Archive(8)
    archive.add(acqcore.grad_sketch(model, rows(samples[:2]), 1, dim=64, tokenizer=tokenizer))
    sketches = acqcore.grad_sketch(model, rows(samples), 1, dim=64, tokenizer=tokenizer)
    assert signal(samples) == pytest.approx(archive.novelty(sketches).tolist(), abs=1e-5)
    assert max(signal(samples)[:2]) < 0.02
    resumed = build()
    resumed.load_state_dict(signal.state_dict())
    assert resumed(samples) == signal(samples)


def test_saved_references_and_archives_are_given_by_path(domain, samples, model, tokenizer, tmp_path):
    encoded = {"samples": rows(samples[:2]), "tokenizer": tokenizer}
    made = {"influence": acqcore.influence_reference(model, dim=64, **encoded)}
    made["epig"] = acqcore.epig_reference(model, dim=64, **encoded)
    for name, reference in made.items():
        path = tmp_path / name
        reference.save(path)
        given, saved = (
            acquisition_signals(model, {name: {"reference": value}}, domain, tokenizer=tokenizer)[0]
            for value in (reference, str(path))
        )
        path.unlink()  # read once
        assert saved(samples) == given(samples)
    archive = acqcore.Archive(8)
    archive.add(acqcore.grad_sketch(model, dim=64, **encoded))
    torch.save(archive.state_dict(), tmp_path / "archive")
    arguments = {"archive": str(tmp_path / "archive"), "dim": 64}
    [signal] = acquisition_signals(model, {"archive_novelty": arguments}, domain, tokenizer=tokenizer)
    before = signal(samples)
    signal.accept(samples)
    assert len(signal) == 3
    assert signal(samples)[2] < before[2]


def test_acquisitions_that_compare_samples_are_set_level(domain, samples, model, tokenizer):
    alone, among = acquisition_signals(model, ["entropy", "gradient_diversity"], domain, tokenizer=tokenizer)
    assert not alone.set_level
    assert among.set_level
    assert among([samples[0], samples[0]])[0] < 0.02 < among(samples)[0]


def test_wrong_arguments_are_named(domain, model, tokenizer):
    with pytest.raises(ValueError, match="acquisition: unknown 'entrpy'"):
        acquisition_signals(model, ["entrpy"], domain, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="acquisitions: expected at least one name"):
        acquisition_signals(model, [], domain, tokenizer=tokenizer)
    scorer = Scorer(model, ["loss"], domain=domain, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="acquisition: expected one of the scorer's"):
        AcquisitionSignal(scorer, "entropy")
    with pytest.raises(ValueError, match="scorer: expected one with a domain"):
        AcquisitionSignal(Scorer(model, ["loss"], tokenizer=tokenizer), "loss")
    for name, message in (("influence", "'reference'"), ("archive_novelty", "'archive'")):
        with pytest.raises(ValueError, match=f"acquisition_args: '{name}' needs {message}"):
            acquisition_signals(model, [name], domain, tokenizer=tokenizer)
    with pytest.raises(
        TypeError, match=r"^reference\[0\]: expected acqsynth\.domains\.Sample\(question, answer\), got dict"
    ):
        acquisition_signals(model, {"influence": {"reference": [{}]}}, domain, tokenizer=tokenizer)

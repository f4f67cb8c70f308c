"""Mutual information in its linear form: against brute force, across batches, bad arguments, and on a toy task."""

from __future__ import annotations

import statistics
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import acqcore
from acqcore.acquisitions import REGISTRY, LinearOptions
from acqcore.gradients import per_sample
from acqcore.gradients.per_sample import controlled
from acqcore.gradients.rules import is_linear
from acqcore.scoring.run import Runner
from benchmarks import toy_student

RHO = 0.05 / 0.95  # noise variance of the default dropout

SMALL = {"vocab_size": 24}  # brute force takes one backward per token of the vocabulary
PROBES = 1400  # for standard errors below 1 %


def _samples(*lengths: int, context: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    width = max(lengths)
    mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(3, 24, (len(lengths), width), generator=generator) * mask
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :context] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _pick(samples: dict[str, torch.Tensor], rows: list[int]) -> dict[str, torch.Tensor]:
    width = int(samples["attention_mask"][rows].sum(dim=1).max())
    return {key: value[rows, :width] for key, value in samples.items()}


def _score(student: Any, samples: Any, names: Any = "mutual_information", **options: Any) -> acqcore.Scores:
    arguments = {"mutual_information": {"form": "linear", **options}}
    return acqcore.score(student, samples, names, acquisition_args=arguments)


def _blocks(model: Any, last: int) -> list[Any]:
    trunk = model.transformer.h if hasattr(model, "transformer") else model.model.layers
    return list(trunk[-last:])


def _sites(model: Any, kind: str, last: int) -> list[Any]:
    names = ("attn", "mlp") if kind == "GPT2" else ("self_attn", "mlp")
    return [getattr(block, name) for block in _blocks(model, last) for name in names]


def _expected_squares(
    model: Any, samples: dict[str, torch.Tensor], sites: list[Any] | None, last: int, of_completions: bool = False
) -> torch.Tensor:
    """``sum_t sum_y p_y ||d log p_y / d theta||^2 / T``, ``[B]``, by one backward for every token t and y.

    theta are the weights of the linear layers in the last blocks or, if there are ``sites``, the logarithms of their
    outputs; with ``of_completions``, only those from the token that predicts the first scored one.
    """
    weights = [m.weight for block in _blocks(model, last) for m in block.modules() if is_linear(m)]
    totals = []
    for ids, mask, labels in zip(*(samples[key] for key in ("input_ids", "attention_mask", "labels")), strict=True):
        outputs: list[torch.Tensor] = []
        handles = [
            site.register_forward_hook(
                lambda _, __, output, seen=outputs: seen.append(output[0] if isinstance(output, tuple) else output)
            )
            for site in sites or ()
        ]
        log_p = model(input_ids=ids[None, : int(mask.sum())]).logits[0].double().log_softmax(dim=1)
        for handle in handles:
            handle.remove()
        scored = (labels != -100).nonzero()[:, 0].tolist()
        total = 0.0
        for t in scored:
            for log_p_y in log_p[t - 1]:
                gradients = torch.autograd.grad(log_p_y, outputs or weights, retain_graph=True)
                if outputs:
                    first = scored[0] - 1 if of_completions else 0
                    gradients = [(o.detach() * g)[:, first:] for o, g in zip(outputs, gradients, strict=True)]
                total += float(log_p_y.exp()) * sum(float(g.double().square().sum()) for g in gradients)
        totals.append(total / len(scored))
    return torch.tensor(totals)


def _assert_unbiased(scores: acqcore.Scores, expected: torch.Tensor) -> None:
    """Values are within three standard errors, which are below 1 %."""
    values, errors = scores["mutual_information"], scores.stderr["mutual_information"]
    assert float((errors / expected).max()) < 0.01
    assert bool(((values - expected).abs() < 3 * errors).all())


@pytest.mark.parametrize(("kind", "layers"), [("Llama", "all"), ("Gemma2", "all"), ("GPT2", 1)])
def test_unbiased_over_every_token_and_site(kind, layers, tiny_model):
    model = tiny_model(kind, **SMALL)
    samples = _samples(12, 10)
    sites = _sites(model, kind, 2 if layers == "all" else layers)
    expected = RHO / 2 * _expected_squares(model, samples, sites, 2)
    _assert_unbiased(_score(model, samples, layers=layers, probes=PROBES), expected)


@pytest.mark.parametrize(("kind", "layers"), [("Llama", "all"), ("GPT2", 1)])
def test_unbiased_over_every_token_and_weight(kind, layers, tiny_model):
    model = tiny_model(kind, **SMALL)
    samples = _samples(12, 10)
    expected = 1e-4 / 2 * _expected_squares(model, samples, None, 2 if layers == "all" else layers)
    scores = _score(model, samples, posterior="isotropic", layers=layers, variance=1e-4, probes=PROBES)
    _assert_unbiased(scores, expected)


def test_a_student_that_runs_without_gradients_is_refused(tiny_model):
    """As Reformer does in evaluation mode, or HRM in all but its last cycles. A value of 0 would be a rank, too."""
    model = tiny_model("Llama", **SMALL)
    own = model.model.forward
    model.model.forward = torch.no_grad()(own)
    for options in ({}, {"layers": 1, "positions": "completion"}):
        with pytest.raises(ValueError, match="layers: LlamaAttention runs without gradients"):
            _score(model, _samples(12, 10), **options)
    for call in (acqcore.laplace_posterior, acqcore.epig_reference, partial(_score, posterior="isotropic")):
        with pytest.raises(ValueError, match=r"layers: 'all': model\.layers\.0.*weight and the others have no grad"):
            call(model, _samples(12, 10))
    assert bool((_score(model, _samples(12, 10), layers=0)["mutual_information"] > 0).all())
    model.model.forward = own
    model.model.norm.register_forward_hook(lambda _, args, output: output.detach())
    with pytest.raises(ValueError, match="layers: the modules that dropout acts on got no gradient"):
        _score(model, _samples(12, 10))


def test_layers_that_also_run_without_gradients_are_refused(tiny_model):
    """As HRM's do in all but the last cycles: the variance of their weights acts in every cycle."""
    model = tiny_model("Llama", **SMALL)
    block = model.model.layers[0]
    own = block.forward

    def twice(hidden, *args, **kwargs):
        with torch.no_grad():
            hidden = own(hidden, *args, **kwargs)
        return own(hidden, *args, **kwargs)

    block.forward = twice
    for call in (acqcore.laplace_posterior, acqcore.epig_reference, partial(_score, posterior="isotropic")):
        with pytest.raises(ValueError, match=r"layers: model\.layers\.0\..* also runs without gradients"):
            call(model, _samples(12, 10))
    assert bool((acqcore.grad_norm(model, _samples(12, 10), "all") > 0).all())  # autograd's own gradient


def test_unbiased_over_the_positions_of_completions(tiny_model):
    """In a batch with prompts of two lengths, positions before each sample's own completion do not count."""
    model = tiny_model("Llama", **SMALL)
    samples = _samples(13, 12)
    samples["labels"][0, :6] = -100
    expected = RHO / 2 * _expected_squares(model, samples, _sites(model, "Llama", 2), 2, of_completions=True)
    _assert_unbiased(_score(model, samples, positions="completion", probes=PROBES), expected)


@pytest.mark.parametrize("cuts", [True, False])
def test_completions_where_dropout_acts_on_attention_weights(cuts, small_model, monkeypatch):
    """Their tokens come after the heads; a sample alone has the value that it has in a batch."""
    if not cuts:
        monkeypatch.setattr(acqcore.Student, "cuts_prompts", False)
    model = small_model("bloom", attention_dropout=0.1, hidden_dropout=0.0)
    samples, options = _samples(14, 14, context=4), {"layers": "own", "positions": "completion", "probes": 2}
    samples["labels"][0, :8] = -100
    found = _score(model, samples, **options)["mutual_information"]
    alone = [_score(model, _pick(samples, [i]), **options)["mutual_information"] for i in (0, 1)]
    torch.testing.assert_close(found, torch.cat(alone), rtol=1e-4, atol=0)
    monkeypatch.setattr(acqcore.Student, "cuts_prompts", not cuts)
    torch.testing.assert_close(found, _score(model, samples, **options)["mutual_information"], rtol=1e-3, atol=0)


def test_a_student_too_short_for_the_comparison_keeps_the_whole_graph(tiny_model):
    model, samples = tiny_model("GPT2", n_positions=4), _samples(4)
    assert not acqcore.Student.from_model(model).cuts_prompts
    assert _score(model, samples, positions="completion")["mutual_information"].isfinite().all()


class TimesLength(nn.Sequential):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden) * hidden.shape[1]


def test_changes_that_need_the_whole_prompt_keep_the_graph(tiny_model):
    """They may be made after the first score, and undone."""
    model = tiny_model("Llama", **SMALL)
    student = acqcore.Student.from_model(model)
    assert student.cuts_prompts
    hook = model.model.norm.register_forward_hook(lambda module, args, hidden: hidden * hidden.shape[1])
    assert not student.cuts_prompts
    hook.remove()
    assert student.cuts_prompts
    norm = model.model.norm
    model.model.norm = nn.Sequential(norm)
    assert student.cuts_prompts
    model.model.norm = norm
    model.model.norm = TimesLength(norm)  # often at the address of the one that was freed
    assert not student.cuts_prompts


def test_positions_left_by_a_call_with_images():
    """Qwen2-VL shifts tokens after a cache by what the last images took, also if these came with other samples."""
    t = pytest.importorskip("transformers")
    text = {
        "vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "initializer_range": 0.2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
    }  # fmt: skip
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 4}
    torch.manual_seed(0)
    model = t.Qwen2VLForConditionalGeneration(t.Qwen2VLConfig(text_config=text, vision_config=vision)).eval()
    samples = _samples(12, 9, context=5)
    expected = _score(model, samples, positions="completion")["mutual_information"]
    for shift in ([[5]], [[7], [1], [2]]):
        model.model.rope_deltas = torch.tensor(shift)
        found = _score(model, samples, positions="completion")["mutual_information"]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


def test_an_adapter_that_tokens_of_the_prompt_switch_on(tiny_model):
    """From the first token on, it is plain LoRA."""
    peft = pytest.importorskip("peft")
    samples, found = _samples(12, 12, context=6), []
    samples["input_ids"][:, :2] = torch.tensor([3, 4])
    for switch in (None, [3, 4]):
        torch.manual_seed(0)
        config = peft.LoraConfig(
            target_modules=["q_proj", "up_proj"], init_lora_weights=False, task_type="CAUSAL_LM",
            alora_invocation_tokens=switch,
        )  # fmt: skip
        model = peft.get_peft_model(tiny_model("Llama", **SMALL), config).eval()
        found.append(_score(model, samples, positions="completion")["mutual_information"])
    torch.testing.assert_close(*found, rtol=1e-4, atol=0)


@pytest.mark.parametrize("kind", ["Llama", "Gemma2", "GPT2"])
def test_prompts_without_a_graph_change_no_value(kind, tiny_model, monkeypatch):
    """Values match those of the whole graph, which is kept for a student whose forward cannot be cut."""
    model, samples = tiny_model(kind), _samples(12, 17, 9, context=5)
    student = acqcore.Student.from_model(model)
    assert student.cuts_prompts
    lengths = []
    _blocks(model, 1)[0].register_forward_pre_hook(
        lambda _, args: lengths.append((args[0].shape[1], torch.is_grad_enabled()))
    )
    cut = _score(student, samples, positions="completion")
    assert lengths[-2:] == [(4, False), (13, True)]
    monkeypatch.setattr(acqcore.Student, "cuts_prompts", False)
    whole = _score(student, samples, positions="completion")
    torch.testing.assert_close(cut["mutual_information"], whole["mutual_information"], rtol=1e-5, atol=0)
    monkeypatch.undo()
    shared = acqcore.score(
        student, samples, ["mutual_information", "grad_norm"],
        acquisition_args={"mutual_information": {"positions": "completion"}, "grad_norm": {"parameters": "all"}},
    )  # fmt: skip
    torch.testing.assert_close(shared["mutual_information"], whole["mutual_information"], rtol=1e-5, atol=0)


def test_dropout_on_the_last_hidden_state(tiny_model):
    """Without a graph: the closed form ``rho / 2 sum_d h_d^2 Var_y W_yd``, averaged over the tokens."""
    model = tiny_model("Qwen2", **SMALL)
    samples = _samples(9, 4)
    scores = _score(model, samples, layers=0, dropout=0.2, probes=PROBES)
    hidden = acqcore.Student.from_model(model).hidden(samples["input_ids"]).detach().double()
    weight = model.lm_head.weight.detach().double()
    p = (hidden @ weight.T).softmax(dim=2)  # [B, T, V]
    variance = p @ weight.square() - (p @ weight).square()
    of_tokens = 0.25 / 2 * (hidden.square() * variance).sum(dim=2)[:, :-1]  # [B, T - 1]
    scored = samples["labels"][:, 1:] != -100
    _assert_unbiased(scores, (of_tokens * scored).sum(dim=1) / scored.sum(dim=1))


def test_own_dropout_layers(tiny_model):
    """Each layer is perturbed at its own rate; layers of rate 0 are left out."""
    model = tiny_model("GPT2", resid_pdrop=0.2, embd_pdrop=0.0, attn_pdrop=0.0, **SMALL).eval()
    samples = _samples(6, 5)
    sites = [module for module in model.transformer.modules() if isinstance(module, torch.nn.Dropout) and module.p > 0]
    assert len(sites) == 4
    expected = 0.25 / 2 * _expected_squares(model, samples, sites, 2)
    _assert_unbiased(_score(model, samples, layers="own", probes=PROBES), expected)


class Dropped(torch.nn.Module):
    """Dropout on an MLP's output, as it is or with tokens folded into the batch."""

    def __init__(self, inner, folded):
        super().__init__()
        self.inner, self.folded, self.dropout = inner, folded, torch.nn.Dropout(0.1)

    def forward(self, x):
        y = self.inner(x)
        return self.dropout(y.reshape(-1, 2, y.shape[-1] // 2) if self.folded else y).reshape(y.shape)


@pytest.mark.parametrize("positions", ["all", "completion"])
def test_dropout_may_act_on_tokens_folded_into_the_batch(positions, tiny_model):
    values = []
    for folded in (False, True):
        model = tiny_model("Llama", **SMALL).eval()
        model.model.layers[0].mlp = Dropped(model.model.layers[0].mlp, folded)
        values.append(_score(model, _samples(9, 5, 9), layers="own", positions=positions)["mutual_information"])
    torch.testing.assert_close(values[1], values[0], rtol=1e-5, atol=1e-7)


class TokensFirst(Dropped):
    def forward(self, x):
        return self.dropout(self.inner(x).transpose(0, 1)).transpose(0, 1)


@pytest.mark.parametrize("options", [{}, {"draws": 2}])
def test_dropout_on_tokens_before_samples_is_refused(options, tiny_model):
    """With as many tokens as rows, the shape alone does not tell them apart."""
    model = tiny_model("Llama", **SMALL).eval()
    model.model.layers[0].mlp = TokensFirst(model.model.layers[0].mlp, False)
    samples = _samples(*[6] * 6) if not options else _samples(6, 6, 6)
    with pytest.raises(ValueError, match=r"layers: dropout acts on \[B, T, D\] or \[B \* T, D\], got .*\[5, 7, "):
        acqcore.score(
            model, samples, "mutual_information",
            acquisition_args={"mutual_information": {"layers": "own", **options}},
        )  # fmt: skip


class ChangesInput(Dropped):
    def forward(self, x):
        y = self.inner(x)
        doubled = self.dropout(y) * 2  # in evaluation mode, dropout returns its input
        y.add_(1)
        return doubled


def test_an_activation_that_changes_in_place_is_refused(tiny_model):
    model = tiny_model("Llama", **SMALL).eval()
    model.model.layers[0].mlp = ChangesInput(model.model.layers[0].mlp, False)
    with pytest.raises(ValueError, match="layers: the output of Dropout was changed in place"):
        _score(model, _samples(9, 5), layers="own")


def test_a_weight_that_blocks_share_with_the_head_is_refused(tiny_model):
    """Its noise would change the logits directly, too."""
    model = tiny_model("Llama", intermediate_size=24, **SMALL)
    model.lm_head.weight = model.model.layers[1].mlp.up_proj.weight
    for call in (acqcore.laplace_posterior, acqcore.epig_reference, partial(_score, posterior="isotropic")):
        with pytest.raises(ValueError, match=r"layers: the head shares .*up_proj\.weight"):
            call(model, _samples(12, 10))


def test_small_noise_is_what_draws_measure(tiny_model):
    """The linear form is the limit of mutual information under dropout of a small probability, over many draws."""
    model = tiny_model("Llama", initializer_range=0.1, **SMALL)
    samples = _samples(8, 6)
    linear = _score(model, samples, dropout=0.002, probes=1500)
    arguments = {"mutual_information": {"dropout": 0.002, "draws": 1500}}
    drawn = acqcore.score(model, samples, "mutual_information", acquisition_args=arguments)
    torch.testing.assert_close(linear["mutual_information"], drawn["mutual_information"], rtol=0.2, atol=0)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"positions": "completion"},
        {"layers": 1},
        {"layers": 0},
        {"posterior": "isotropic"},
        {"posterior": "isotropic", "layers": 1},
    ],
    ids=str,
)
def test_a_sample_does_not_depend_on_its_batch(options, tiny_model):
    model = tiny_model("Llama")
    samples = _samples(5, 9, 17, 9, 4)
    whole = _score(model, samples, **options)
    reverse = _score(model, _pick(samples, [4, 3, 2, 1, 0]), **options)
    for found, back in (
        (whole["mutual_information"], reverse["mutual_information"]),
        (whole.stderr["mutual_information"], reverse.stderr["mutual_information"]),
    ):
        torch.testing.assert_close(back.flip(0), found, rtol=1e-4, atol=0)
    for i in range(5):
        alone = _score(model, _pick(samples, [i]), **options)
        torch.testing.assert_close(alone["mutual_information"][0], whole["mutual_information"][i], rtol=1e-4, atol=0)
    twice = _score(model, _pick(samples, [1, 1]), **options)
    assert twice["mutual_information"][0] == twice["mutual_information"][1]
    other = _score(model, samples, seed=1, **options)
    assert not torch.equal(other["mutual_information"], whole["mutual_information"])
    shared = _score(model, samples, ["entropy", "mutual_information", "grad_norm"], **options)
    torch.testing.assert_close(shared["mutual_information"], whole["mutual_information"], rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("options", "coverage"),
    [({"probes": 2}, 0.705), ({"probes": 4}, 0.861), ({"probes": 4, "posterior": "isotropic"}, 0.861)],
    ids=str,
)
def test_standard_errors_are_those_of_other_seeds(options, coverage, tiny_model):
    """Twice an error covers the expectation as often as Student's t says."""
    model = tiny_model("Llama")
    samples = _samples(9, 7, 17)
    runs = [_score(model, samples, seed=seed, **options) for seed in range(60)]
    values = torch.stack([run["mutual_information"] for run in runs])
    errors = torch.stack([run.stderr["mutual_information"] for run in runs])
    torch.testing.assert_close(errors.square().mean(dim=0).sqrt(), values.std(dim=0), rtol=0.4, atol=0)
    expected = _score(model, samples, seed=100, **(options | {"probes": 256}))["mutual_information"]
    covered = ((values - expected).abs() <= 2 * errors).double().mean()
    assert float(covered) == pytest.approx(coverage, abs=0.1)


def test_the_control_is_unbiased_and_takes_noise_away():
    """Squares correlate with the size of their cotangents and carry noise of their own."""
    generator = torch.Generator().manual_seed(0)
    excess = torch.randn(100000, 3, generator=generator, dtype=torch.float64) * 0.3
    squares = (1 + excess) * (1 + 0.1 * torch.randn(100000, 3, generator=generator, dtype=torch.float64))
    for probes in (2, 3):
        mean = controlled(squares[:, :probes], excess[:, :probes]).mean(dim=1)
        assert abs(float(mean.mean()) - 1) < 3 * float(mean.std()) / 100000**0.5
        assert float(mean.var()) < 0.35 * float(squares[:, :probes].mean(dim=1).var())
    assert torch.equal(controlled(squares[:, :1], excess[:, :1]), squares[:, :1])


def test_an_estimate_below_zero_becomes_zero():
    found = torch.tensor([[0.5, -0.7], [3.0, -1.0], [torch.nan, 1.0]], dtype=torch.float64)
    values = REGISTRY["mutual_information"].value(found, LinearOptions(probes=2))
    torch.testing.assert_close(values, torch.tensor([0.0, 0.5, torch.nan], dtype=torch.float64), equal_nan=True)


def test_one_probe_has_no_standard_error(tiny_model):
    model, samples = tiny_model("Llama"), _samples(9, 7)
    one = _score(model, samples, probes=1)
    assert bool(one.stderr["mutual_information"].isnan().all())
    assert bool(one.valid.all())
    drawn = {"mutual_information": {"draws": 2}}
    assert not acqcore.score(model, samples, "mutual_information", acquisition_args=drawn).stderr


def test_standard_errors_have_a_column_even_if_no_sample_is_scored(tiny_model, tokenizer):
    student = acqcore.Student.from_model(tiny_model("Llama"), tokenizer=tokenizer)
    errors: dict[int, str] = {}
    scores = acqcore.score(student, [""], "mutual_information", errors=errors)
    assert list(errors) == [0]
    assert scores.stderr["mutual_information"].isnan().tolist() == [True]


def test_it_is_the_default(tiny_model):
    model, samples = tiny_model("Llama"), _samples(9, 7)
    named = _score(model, samples, probes=4)
    plain = acqcore.score(model, samples, "mutual_information")
    torch.testing.assert_close(plain["mutual_information"], named["mutual_information"], rtol=0, atol=0)
    few = acqcore.score(model, samples, "mutual_information", acquisition_args={"mutual_information": {"layers": 1}})
    assert "mutual_information" in few.stderr


@pytest.mark.parametrize("posterior", ["dropout", "isotropic"])
def test_a_sum_is_the_average_times_the_tokens(posterior, tiny_model):
    model, samples = tiny_model("Llama"), _samples(5, 9, 17)
    asked = {"mutual_information": {"form": "linear", "posterior": posterior}}
    mean, total = (
        acqcore.score(model, samples, "mutual_information", acquisition_args=asked, reduction=reduction)
        for reduction in ("mean", "sum")
    )
    for found, average in ((total, mean), (total.stderr, mean.stderr)):
        column, expected = found["mutual_information"], average["mutual_information"] * mean.n_tokens
        torch.testing.assert_close(column, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("reduction", ["max", "topk"])
def test_there_are_no_values_of_tokens_to_reduce(reduction, tiny_model):
    message = f"reduction: 'mutual_information' has no token values .* expected 'mean' or 'sum', got '{reduction}'"
    with pytest.raises(ValueError, match=message):
        acqcore.score(
            tiny_model("Llama"), _samples(5), "mutual_information",
            acquisition_args={"mutual_information": {"form": "linear"}}, reduction=reduction,
        )  # fmt: skip


def test_other_gradients_share_the_graph(tiny_model):
    """Backwards of several acquisitions share one graph without changing each other's values."""
    model = tiny_model("Llama")
    samples = _samples(9, 7)
    names = ["mutual_information", "grad_norm", "badge"]
    arguments = {
        "mutual_information": {"form": "linear"},
        "grad_norm": {"parameters": "all"},
        "badge": {"parameters": 1},
    }
    together = acqcore.score(model, samples, names, acquisition_args=arguments)
    for name in names:
        alone = acqcore.score(model, samples, name, acquisition_args={name: arguments[name]})
        torch.testing.assert_close(together[name], alone[name], rtol=1e-5, atol=0)


def test_needs_that_differ_in_their_probes_share_them(tiny_model, monkeypatch):
    student, samples = acqcore.Student.from_model(tiny_model("Llama")), _samples(9, 7)
    needs = [LinearOptions(of, probes=count).need for of in ("dropout", "isotropic") for count in (4, 1, 2)]
    made = 0

    class Counted(per_sample.SiteSquares):
        def __init__(self, *arguments):
            nonlocal made
            made += 1
            super().__init__(*arguments)

    monkeypatch.setattr(per_sample, "SiteSquares", Counted)
    together = _results(student, samples, needs)
    assert made == 4
    for need in needs:
        alone = _results(student, samples, [need])
        assert together[need].shape == (2, need.probes)
        torch.testing.assert_close(together[need], alone[need], rtol=1e-6, atol=0)


def _results(student, samples, needs):
    runner = Runner(student, needs, 8192, None)
    [found] = runner.batches(runner.encode(samples, None, None))
    return found.results


@pytest.mark.parametrize("posterior", ["dropout", "isotropic"])
def test_the_model_is_left_as_found(posterior, tiny_model):
    """Covers training mode, an embedding whose output requires a gradient, and existing gradients of the user."""
    model = tiny_model("Llama").train()
    model.enable_input_require_grads()  # as trainers do for gradient checkpointing
    hooks = {module: dict(module._forward_hooks) for module in model.modules()}
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(i % 2 == 0)
        parameter.grad = torch.ones_like(parameter) if i % 2 == 0 else None
    samples = _samples(6, 4)
    scores = _score(model, samples, posterior=posterior)
    plain = _score(tiny_model("Llama"), samples, posterior=posterior)
    torch.testing.assert_close(scores["mutual_information"], plain["mutual_information"])
    for i, parameter in enumerate(model.parameters()):
        assert parameter.requires_grad == (i % 2 == 0)
        assert (parameter.grad is None) == (i % 2 == 1)
        assert parameter.grad is None or bool((parameter.grad == 1).all())
    for module in model.modules():
        assert module.training
        assert dict(module._forward_hooks) == hooks[module]


def test_adapters(tiny_model):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], lora_dropout=0.5, init_lora_weights=False)
    model = peft.get_peft_model(tiny_model("Llama"), config).eval()
    samples = _samples(6, 9)
    for options in ({}, {"layers": "own"}, {"posterior": "isotropic"}):
        assert float(_score(model, samples, **options)["mutual_information"].min()) > 0


def test_rows_without_a_finite_logit_are_not_valid(tiny_model):
    model = tiny_model("Llama")
    model.model.embed_tokens.weight.data[7] = torch.nan
    samples = _samples(6, 6)
    samples["input_ids"][1, 4] = 7
    scores = _score(model, samples)
    assert scores.valid.tolist() == [True, False]
    assert bool(scores["mutual_information"][1].isnan())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"probes": 0}, ValueError, "probes: expected 1 to 65535, got 0"),
        ({"probes": True}, TypeError, "probes: expected an int, got bool"),
        ({"posterior": "cauchy"}, ValueError, "posterior: unknown 'cauchy'"),
        ({"variance": 1e-3}, ValueError, "variance: requires posterior='isotropic', got posterior='dropout'"),
        ({"posterior": "isotropic", "dropout": 0.1}, ValueError, "dropout: requires posterior='dropout', got"),
        ({"posterior": "isotropic", "positions": "all"}, ValueError, "positions: requires posterior='dropout', got"),
        ({"positions": "prompt"}, ValueError, "positions: unknown 'prompt'"),
        ({"posterior": "isotropic", "variance": 0.0}, ValueError, "variance"),
        (
            {"posterior": "isotropic", "layers": 0},
            ValueError,
            "perturbs weights of blocks, expected 'all' or at least 1",
        ),
        ({"posterior": "isotropic", "layers": "own"}, ValueError, "perturbs weights of blocks, expected 'all'"),
        ({"layers": 3}, ValueError, "layers: expected at most 2 transformer blocks, got 3"),
        ({"posterior": "isotropic", "layers": 3}, ValueError, "layers: expected at most 2 transformer blocks, got 3"),
        ({"layers": "some"}, ValueError, "layers: expected a number of blocks, 'all' or 'own', got 'some'"),
        ({"layers": "own"}, ValueError, "layers: 'own' needs a student with dropout layers"),
        ({"dropout": 1}, ValueError, "dropout: expected a probability"),
        ({"seed": -1}, ValueError, "seed: expected 0 to"),
        ({"draws": 8}, ValueError, r"acquisition_args\['mutual_information'\]: unknown 'draws'"),
        ({"form": "row"}, ValueError, "form: unknown 'row', expected one of linear, element, block"),
    ],
)
def test_bad_arguments(options, error, message, tiny_model):
    """Bad arguments are refused before any forward runs."""
    model = tiny_model("Llama")
    forwards = []
    model.model.register_forward_pre_hook(lambda *_: forwards.append(None))  # a hook added later is probed by a forward
    student = acqcore.Student.from_model(model)
    assert len(student.blocks) == 2  # found once per student, by a forward
    forwards.clear()
    with pytest.raises(error, match=message):
        _score(student, _samples(4), **options)
    assert not forwards


@pytest.mark.parametrize(
    "change", [nn.utils.parametrizations.weight_norm, partial(prune.l1_unstructured, name="weight", amount=0.5)]
)
def test_weights_computed_from_others_are_refused(change, tiny_model):
    model = tiny_model("Llama")
    change(model.model.layers[1].mlp.up_proj)
    message = r"layers: the weight of model.layers.1.mlp.up_proj is computed from other parameters"
    with pytest.raises(ValueError, match=message):
        _score(model, _samples(8), posterior="isotropic")
    with pytest.raises(ValueError, match=message):
        acqcore.epig_reference(model, _samples(8))


def test_linear_layers_with_a_forward_of_their_own_are_named(small_model):
    with pytest.raises(
        ValueError, match=r"layers: expected linear layers .* found only FalconLinear with a custom forward"
    ):
        _score(small_model("falcon"), _samples(8), posterior="isotropic")


@pytest.mark.parametrize("argument", ["probes", "posterior", "variance"])
def test_draws_take_no_arguments_of_the_linear_form(argument, tiny_model):
    with pytest.raises(ValueError, match=f"'{argument}' belongs to the linear form, but 'draws' requests draws"):
        acqcore.score(
            tiny_model("Llama"), _samples(4), "mutual_information",
            acquisition_args={"mutual_information": {argument: 2, "draws": 8}},
        )  # fmt: skip


def test_ready_made_options(tiny_model):
    model, samples = tiny_model("Llama"), _samples(6)
    options = LinearOptions(probes=3, seed=5)
    got = acqcore.score(model, samples, "mutual_information", acquisition_args={"mutual_information": options})
    torch.testing.assert_close(
        got["mutual_information"], _score(model, samples, probes=3, seed=5)["mutual_information"]
    )


@pytest.mark.parametrize("posterior", ["dropout", "isotropic"])
def test_tells_ignorance_from_ambiguity(posterior, informed_students):
    """Two probes rank unseen keys above keys with random answers, and above these and known keys together."""
    among_all, among_ambiguous = [], []
    for student in informed_students:
        generator = torch.Generator().manual_seed(0)
        found = {}
        for kind in toy_student.KINDS:
            asked = toy_student.samples(toy_student.questions(kind, 128, generator))
            found[kind] = _score(student, asked, posterior=posterior)["mutual_information"]
        among_all.append(toy_student.auroc(found["unseen"], torch.cat([found["easy"], found["ambiguous"]])))
        among_ambiguous.append(toy_student.auroc(found["unseen"], found["ambiguous"]))
    assert statistics.fmean(among_all) >= 0.95
    assert statistics.fmean(among_ambiguous) >= 0.93


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("options", "factor"),
    [({}, 20), ({"positions": "completion"}, 20), ({"probes": 8}, 1), ({"posterior": "isotropic", "probes": 8}, 1)],
)
def test_half_precision_has_the_values_of_float32(options, factor, dtype, tiny_model):
    """Each sample's gradient is scaled by its own size for the backward; the trunk itself rounds to eight bits."""
    model, samples = tiny_model("Llama"), _samples(9, 7)
    with torch.no_grad():
        model.lm_head.weight.mul_(factor)
    exact, got = (_score(model.to(of), samples, **options)["mutual_information"] for of in (torch.float32, dtype))
    # Rounded to bfloat16, large logits are off by so much that even the entropy changes by an eighth.
    rounded = dtype == torch.bfloat16 and factor > 1
    torch.testing.assert_close(got, exact, rtol=0.25 if rounded else 0.1, atol=0)

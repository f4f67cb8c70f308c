"""Planning creates every object that a recipe configures, so it rejects what a run would reject hours later."""

from __future__ import annotations

import importlib.util
import json
import re
from dataclasses import replace

import pytest
import torch
from transformers import GPT2Config, OPTConfig, Qwen3MoeConfig, trainer_optimizer
from transformers.integrations import integration_utils

import acqcore
from acqsynth import models, preflight, train_options
from acqsynth.config import ConfigError, load, recipes
from acqsynth.domains import sandbox
from acqsynth.pipeline import plan

#: Overrides, separated by " & ", and what is said of the first one's key.
REFUSED = {
    "engine.options.device=gpu": "engine.options.device: expected cpu, cuda or cuda:1, got 'gpu'",
    "engine.options.dtype=foo": "engine.options.dtype: unknown 'foo'",
    "engine.options.batch_tokens=0": "engine.options.batch_tokens: expected an int >= 1, got 0",
    "reward.scoring.device=gpu": "reward.scoring: device: expected cpu",
    "reward.scoring.batch_tokens=0": "reward.scoring: batch_tokens: expected an int >= 1",
    "reward.scoring.reduction=median": "reward.scoring: reduction: unknown 'median'",
    "reward.scoring.backend=gpu": "reward.scoring: backend: unknown 'gpu'",
    "reward.answers.max_tokens=0": "reward.answers: max_tokens: expected at least 1, got 0",
    "reward.answers.temperature=-1": "reward.answers: temperature: expected at least 0, got -1",
    "reward.answers.key=1": "reward.answers: got an unexpected keyword argument 'key'",
    "reward.answers.seed=-1": "reward.answers: seed: expected at least 0",
    "reward.signals={mutual_information: {draws: 1}}": "draws",
    "reward.signals={mutual_information: {foo: 1}}": "foo",
    "reward.signals={influence: {similarity: l2}}": "similarity: unknown 'l2'",
    "reward.signals={influence: {dim: -8}}": "dim: expected an int >= 1, got -8",
    "reward.signals={grad_norm: {parameters: some}}": "parameters: unknown 'some'",
    "reward.signals={entropy: {x: 1}}": "'entropy' takes no arguments",
    "reward.signals={diversity: {capacity: -1}}": "reward.signals.diversity: capacity: expected an int >= 1",
    "reward.signals={diversity: {ridge: -1}}": "reward.signals.diversity: ridge: expected",
    "reward.weights={margin: 1}": "reward.weights: unknown ['margin'], known signals",
    "reward.embedder=minilm": "reward.embedder: all-MiniLM-L6-v2 comes with the package",
    "generator.options.lora={r: x}": "generator.options.lora: r: expected an integer, got 'x'",
    "generator.options.lora={r: 0}": "generator.options.lora: r: expected an integer at least 1, got 0",
    "generator.options.lora=[8]": "generator.options.lora: expected fields of peft.LoraConfig, got [8]",
    "student.options.lora={target_modules: 5}": "target_modules: expected a pattern or names, got 5",
    "student.options.lora={target_modules: [q_proj, 5]}": "target_modules: expected a pattern or names, got",
    "student.others={student: gpt2}": "student.others.student: expected another name",
    "student.others={held-out: gpt2}": "student.others.held-out: expected another name",
    "evaluation.others={in_distribution: {source: 'world:2'}}": "in_distribution: expected another name",
    "generator.options.temperature=-1": "generator.options: temperature: expected a number above 0, got -1",
    "generator.options.top_p=5": "generator.options: top_p: expected a number above 0 and at most 1, got 5",
    "generator.options.learning_rate=-1": "generator.options: learning_rate: expected a number at least 0, got -1",
    "reward.refresh_steps=60": "reward.refresh_steps: expected below the generator's 60 steps, got 60",
    "generator.options={bf16: 'yes'}": "generator.options: bf16: expected bool | None, got 'yes'",
    "generator.options.use_vllm=1": "generator.options: use_vllm: expected bool, got 1",
    "student.options.neftune_noise_alpha=x": "student.options: neftune_noise_alpha: expected a number, got 'x'",
    "student.options.neftune_noise_alpha=-1": "options: neftune_noise_alpha: expected a number at least 0, got -1",
    "generator.options.adam_beta1=1": "generator.options: adam_beta1, adam_beta2: Invalid beta parameter at index 0",
    "student.options.top_entropy_quantile=x": "student.options: SFTConfig has no field 'top_entropy_quantile'",
    "student.options.lora={use_dora: 'yes'}": "student.options.lora: use_dora: expected bool, got 'yes'",
    "engine.options.dtype=5": "engine.options.dtype: unknown 5",
    "generator.options.max_steps=0": "generator.options: max_steps: expected at least 1, or -1 for all of "
    "num_train_epochs, got 0",
    "generator.options.eval_strategy=steps": "generator.options: eval_strategy: expected no, as training has no",
    "student.options.eval_on_start=true": "student.options: eval_strategy: expected no, as training has no",
    "generator.options.loss_type=foo": "generator.options: loss_type: unknown 'foo', expected one of grpo, dr_grpo, "
    "dapo, bnpo, cispo, sapo, luspo, vespo",
    "generator.options.vllm_mode=use_vllm": "generator.options: vllm_mode: unknown 'use_vllm', expected one of",
    "generator.options.scale_rewards=foo": "scale_rewards: unknown 'foo', expected one of True, group, batch, False",
    "generator.options.importance_sampling_level=word": "level: unknown 'word', expected one of token, sequence",
    "generator.options.report_to=foo": "generator.options: report_to: foo is not supported, only",
    "generator.options.save_strategy=best": "save_strategy: expected no, steps or epoch, as training has no evaluation",
    "generator.options.adam_beta1=2": "generator.options: adam_beta1: expected a number at least 0 and at most 1, got",
    "generator={model: m, method: dpo, options: {loss_type: [sigmoid, foo]}}": "loss_type: unknown 'foo', expected one",
    "student.options.loss_type=foo": "student.options: loss_type: unknown 'foo', expected one of nll, dft",
    "student.options.dataset_num_proc=-1": "dataset_num_proc: expected an integer at least 0, got -1",
    "student.options.loss_type=null": "student.options: loss_type: unknown None, expected one of nll, dft",
    "student.options.loss_type=[nll]": "student.options: loss_type: unknown ['nll'], expected one of nll, dft",
    "student.options.gradient_checkpointing_kwargs={use_rentrant: true}": "unexpected keyword argument 'use_rentrant'",
    "student.options.gradient_checkpointing_kwargs=abc": "gradient_checkpointing_kwargs: 'str' object is not a mapping",
    "student.options.model_init_kwargs=abc": "options: model_init_kwargs: dict() argument after ** must be a mapping",
    "generator.options.dataloader_persistent_workers=true": "persistent_workers option needs num_workers > 0",
    "student.options.pad_to_multiple_of=0": "pad_to_multiple_of: expected an integer at least 1, got 0",
    "student.options.model_init_kwargs={dtype: fp16}": "model_init_kwargs.dtype: expected one of auto, float32",
    "student.options.warmup_steps=228": "student.options: warmup_steps: expected fewer than all 228 steps, got 228",
    "evaluation.validity.options.warmup_steps=16": "validity.options: warmup_steps: expected fewer than all 16 steps",
    "generator.options.warmup_steps=60": "generator.options: warmup_steps: expected fewer than all 60 steps, got 60",
    "student.options.torch_compile_backend=foo": "torch_compile_backend, torch_compile_mode: Invalid backend: 'foo'",
    "student.options.torch_compile_mode=foo": "torch_compile_backend, torch_compile_mode: Unrecognized mode=foo",
    "evaluation.validity.options.data_seed=4294967296": "data_seed: expected an integer at least 0 and at most 4294967",
    "student.options.padding_free=true": "student.options: padding_free: expected packing with it, as rows would",
    "student.options={lr_scheduler_type: polynomial, lr_scheduler_kwargs: {lr_end: 1}}": "lr_scheduler_kwargs: lr_end",
    "student.options.optim=foo": "student.options: foo is not a valid OptimizerNames, please select one of",
    "student.options.lr_scheduler_type=cosine_with_min_lr": "student.options: lr_scheduler_kwargs: ",
    "evaluation.validity.options.report_to=foo": "evaluation.validity.options: report_to: foo is not supported",
    "student.options.num_train_epochs=null": "student.options: num_train_epochs: expected float, got None",
    "student.options.learning_rate=null": "student.options: learning_rate: expected float, got None",
    "student.options.lora={bias: foo}": "student.options.lora: bias: unknown 'foo', expected one of none, all",
    "generator.options.num_generations=null": "generator.options: unsupported operand",
    "generator.options.max_completion_length=0": "max_completion_length: expected an integer at least 1, got 0",
    "generator.options.reward_weights=[1, 2]": "generator.options: reward_weights: expected one weight",
    "generator.options.reward_weights=[0]": "generator.options: reward_weights: expected one weight other than 0",
    "generator.options.reward_weights=5": "generator.options: reward_weights: expected list[float] | None, got 5",
    "generator.options.chat_template_kwargs=abc": "generator.options: chat_template_kwargs: dict() argument after **",
    "generator.options.generation_kwargs={num_beam: 2}": "generation_kwargs: GenerationConfig has no field 'num_beam'; "
    "did you mean 'num_beams'?",
    "generator.options.generation_kwargs=[top_k]": "options: generation_kwargs: ",
    "generator.options.generation_kwargs={cache_implementation: foo}": "generation_kwargs: Invalid `cache_impl",
    "student.options.accelerator_config=5": "student.options: accelerator_config: expected dict | str | None, got 5",
    "student.options.accelerator_config=true": "student.options: accelerator_config: expected dict | str | None, got T",
    "student.options.parallelism_config={cp_size: 2}": "student.options: parallelism_config: expected none; accelerate",
    "student.options.run_name=2026": "student.options: run_name: expected str | None, got 2026",
    "student.options.dataset_kwargs={skip_prepare_dataset: true}": "student.options: dataset_kwargs: expected none",
    "student.options.assistant_only_loss=true": "student.options: assistant_only_loss: expected false",
    "student.options.resume_from_checkpoint=x": "student.options: resume_from_checkpoint: expected none",
    "evaluation.validity.options.do_train=true": "evaluation.validity.options: do_train: expected false",
    "generator.options.num_generatoins=8": "no field 'num_generatoins'; did you mean 'num_generations'?",
    "generator={model: world:base, method: best_of_n, candidates: 1}": "generator.candidates: expected at least 2",
    "generator.prompts=7": "generator.prompts: expected at least 8, as many as a generation takes, got 7",
    "generator.shown=281": "generator.shown: expected at most data.seeds.limit = 280, got 281",
    "student.options.num_train_epochs=0": "student.options: num_train_epochs: expected a number above 0, got 0",
    "student.options.per_device_train_batch_size=0": "per_device_train_batch_size: expected an integer at least 1",
    "student.options.max_length=0": "student.options: max_length: expected an integer at least 1, got 0",
    "evaluation.validity.options={learning_rate: x}": "evaluation.validity.options: learning_rate: expected a number",
    "labelling={method: majority, options: {max_tokens: 0}}": "labelling.max_tokens: expected at least 1, got 0",
    "labelling={method: majority, options: {max_tokens: x}}": "labelling.max_tokens: expected an integer, got 'x'",
    "reward.labelling={method: majority, options: {max_tokens: 1.5}}": "max_tokens: expected an integer, got 1.5",
    "reward.answers={k: x}": "reward.answers: k: expected an int >= 1, got 'x'",
    "reward.answers={max_tokens: x}": "reward.answers: max_tokens: expected an integer, got 'x'",
    "reward.labelling={method: majority, options: {foo: 1}}": "reward.labelling.options: unknown 'foo'",
    "data.seeds.source=bundled:poems": "data.seeds.source",
    "generator.seeds=[0, 0]": "generator.seeds: expected distinct entries, got 0, 0",
    "generator.seeds=[-1]": "generator.seeds[0]: expected at least 0, got -1",
    "domain=sum": "domain: unknown 'sum', expected one of math, medical, code, classification, arithmetic",
    "evaluation.others={more: {source: x, domain: y}}": "evaluation.others.more.domain: unknown 'y'",
    "generator.options.learning_rat=1": "generator.options: GRPOConfig has no field 'learning_rat'; did you mean",
    "generator.options.num_generations=3": "generator.options: generation_batch_size (64) must be divisible",
    "generator.options.lora={rank: 2}": "generator.options.lora: LoraConfig has no field 'rank'",
    "generator={model: m, method: dpo, options: {bet: 1}}": "generator.options: DPOConfig has no field 'bet'",
    "student.options.epochs=1": "student.options: SFTConfig has no field 'epochs'",
    "evaluation.validity.options.epochs=1": "evaluation.validity.options: SFTConfig has no field 'epochs'",
    "engine.options.batch_token=1": "engine.options: unknown 'batch_token', expected one of device, dtype",
    "labelling={method: majority, options: {kk: 1}}": "labelling.options: unknown 'kk', expected max_tokens",
    "data.replay={source: world}": "data.replay: these rows are not used without student.replay, their share",
    "data.held_out.source=bundled:mathematics": "bundled:mathematics has no rows of the domain arithmetic: no question",
    "data.real={source: 'bundled:word_problems', skip: 96}": "has no rows after the first 96",
    "evaluation.validity={batches: 2, rows: 1401}": "validity.rows: expected at most the 1400 rows of data.real, got",
    "reward.signals={entropi: {}}": "reward.signals: unknown 'entropi', expected one of confidence",
    "reward.signals.diversity.ridg=1": "reward.signals.diversity: got an unexpected keyword argument 'ridg'",
    "reward.gates=[sond]": "reward.gates: unknown 'sond', expected one of sound",
    "reward.scoring={max_length: 1}": "reward.scoring: max_length: expected at least 2 tokens, got 1",
    "reward.scoring={max_length: 99.5}": "reward.scoring: max_length: expected at least 2 tokens, got 99.5",
    "reward.scoring={max_lenth: 1}": "reward.scoring: unknown 'max_lenth', expected some of reduction, backend",
    "reward.scoring={domain: x}": "reward.scoring: unknown 'domain', expected some of reduction, backend",
    "reward.scoring={tokenizer: x}": "reward.scoring: unknown 'tokenizer', expected some of reduction, backend",
    "reward.signals={proximity: {clusters: a}}": "reward.signals.proximity: clusters: expected an int >= 1, got 'a'",
    "reward={signals: {diversity: {}}, embedder: ngramm}": "reward.embedder: unknown 'ngramm', did you mean ngram?",
    "reward.answers={temperature: 0}": "reward.answers: temperature: expected more than 0",
    "labelling={method: majority, temperature: 0}": "labelling.temperature: expected more than 0",
    "reward.labelling={method: majority, temperature: 0}": "reward.labelling.temperature: expected more than 0",
    "generator={model: world:base, method: best_of_n, sampling: {temperature: 0}}": (
        "generator.sampling.temperature: expected more than 0"
    ),
    "student.options.seed=5": "student.options: seed is set by student.seeds",
    "generator.options.seed=5": "generator.options: seed is set by generator.seeds",
    "evaluation.likelihood=true & engine={name: vllm}": "likelihood: expected engine.name transformers with it, got",
    "reward.refresh_from=student": "reward.refresh_from: expected reward.refresh_steps of at least 1 with it, got 0",
    **{
        f"reward.refresh_steps=10 & generator.method={method}": "reward.refresh_steps: expected 0, as only "
        f"generator.method grpo scores while it trains, got 10 with {method}"
        for method in ("dpo", "best_of_n", "none")
    },
    "reward.answers={k: 0}": "reward.answers: k: expected an int >= 1, got 0",
}


@pytest.mark.parametrize(("override", "message"), REFUSED.items())
def test_refused_before_anything_runs(override, message):
    if "minilm" in override:
        pytest.importorskip("sklearn")
    with pytest.raises(ConfigError) as caught:
        plan(load("arithmetic", override.split(" & ")))
    said = str(caught.value)
    assert message in said
    assert said.removeprefix("arithmetic: ").startswith(override.partition("=")[0].partition(".")[0])
    assert "\n" not in said


ACCEPTED = [
    "labelling={method: majority, temperature: 0, k: 1}",
    "reward.answers={temperature: 0, k: 1}",
    "reward={signals: {confidence: {}}, answers: {temperature: 0}}",
    "generator={model: world:base, method: none, sampling: {temperature: 0}}",
    "domain=arithmetic-skewed & labelling.method=computed & reward.labelling={method: computed}",
    "student.options.warmup_steps=227",  # more steps than the fits that test signals have
    *(f"generator.options={{scale_rewards: {scale}, loss_type: dr_grpo}}" for scale in ("true", "'none'", "batch")),
    *(
        f"generator={{model: m, method: dpo, options: {options}}}"
        for options in (
            "{loss_type: [sigmoid, ipo], f_divergence_type: js_divergence}",
            "{lr_scheduler_type: cosine_with_min_lr, lr_scheduler_kwargs: {min_lr: 1e-7}}",
            "{report_to: [tensorboard], save_steps: 0.5, log_level: info}",
            "{save_strategy: 'no', save_steps: 0, dataset_num_proc: 0, fsdp: false}",
        )
    ),
]


@pytest.mark.parametrize("overrides", ACCEPTED)
def test_accepted_before_a_run(overrides):
    plan(load("arithmetic", overrides.split(" & ")))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["labelling.method=computed"], "labelling.method: expected any but computed, as the domain math computes"),
        (["reward.labelling={method: computed}"], "reward.labelling.method: expected any but computed"),
        (["evaluation.validity={batches: 2, rows: 49}"], "expected at most the 48 rows of data.real, got 49"),
        (["evaluation.validity={batches: 2, rows: 48}"], None),
        (["evaluation.validity.rows=1000"], None),  # no batches
        (["evaluation.validity={batches: 1, rows: 61}", "data.real=null"], "rows of data.seeds, got 61"),
        (["student.replay=0.1", "data.replay={source: world, domain: y}"], "data.replay.domain: unknown 'y'"),
        (["domain=code"], "data.seeds.source: bundled:mathematics has no rows of the domain code: the answer"),
        (["evaluation.others={m: {source: 'bundled:word_problems', domain: medical}}"], "evaluation.others.m.source"),
        (["evaluation.others={m: {source: 'bundled:mathematics'}}"], None),
    ],
)
def test_packaged_rows_and_the_domain_are_known_before_a_run(overrides, message):
    config = load("smollm2-math", overrides)
    if message is None:
        plan(config)
    else:
        with pytest.raises(ConfigError, match=re.escape(message)):
            plan(config)


@pytest.mark.parametrize("option", ["save_strategy='no'", "save_strategy=epoch", "save_steps=60", "save_steps=0"])
def test_a_refresh_needs_checkpoints(option, tmp_path):
    refreshed, saves_nothing = "reward.refresh_steps=10", f"generator.options.{option}"
    with pytest.raises(ConfigError, match=r"reward\.refresh_steps: expected 0 or generator\.options that save a check"):
        plan(load("arithmetic", [refreshed, saves_nothing]))
    plan(load("arithmetic", [refreshed]))
    plan(load("arithmetic", [refreshed, "generator.options.save_steps=59"]))
    plan(load("arithmetic", [refreshed, "generator.options={save_strategy: epoch, num_train_epochs: 2}"]))
    plan(load("arithmetic", [saves_nothing]))
    plan(load("arithmetic", [refreshed, saves_nothing, f"reward.refresh_from={tmp_path}"]))


@pytest.mark.parametrize(
    ("overrides", "needed"),
    [
        (["reward.signals={diversity: {}}"], True),
        (["reward.signals={proximity: {}}"], True),
        (["reward.signals=null"], True),
        (["reward.signals={entropy: {}}"], False),
        (["reward.signals={entropy: {}}", "evaluation.validity={batches: 2, signals: [diversity]}"], True),
        (["reward.signals={entropy: {}}", "evaluation.validity={batches: 0, signals: [diversity]}"], False),
        (["reward.signals={answer_variance: {}}"], False),
        (["reward.signals={answer_variance: {}}", "reward.paper_compat=true", "reward.labelling=null"], True),
    ],
)
def test_a_sentence_model_is_looked_for_only_if_a_signal_uses_it(overrides, needed, monkeypatch):
    asked = []
    monkeypatch.setattr(models, "find", asked.append)
    preflight.on_this_machine(load("arithmetic", ["reward.embedder=./sentences", "reward.weights={}", *overrides]))
    assert ("./sentences" in asked) == needed


def test_a_file_of_rows_is_no_key(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").touch()
    with pytest.raises(ConfigError, match=r"^data\.seeds: rows\.jsonl: no rows$"):
        preflight.on_this_machine(load("arithmetic", ["data.seeds.source=rows.jsonl"]))


def test_a_missing_chat_template_is_said_before_a_run():
    with pytest.raises(ConfigError, match=r"^student\.options: chat_template_path: chat\.jinja: no such file$"):
        preflight.on_this_machine(load("arithmetic", ["student.options.chat_template_path=chat.jinja"]))


def test_a_backend_that_does_not_run_here_is_said_before_a_run(monkeypatch):
    found = [replace(backend, available=False, reason="no such processor") for backend in acqcore.backends()]
    monkeypatch.setattr(acqcore, "backends", lambda: found)
    with pytest.raises(ConfigError, match=r"^reward\.scoring\.backend: cpu is not available: no such processor$"):
        preflight.on_this_machine(load("arithmetic", ["reward.scoring.backend=cpu"]))
    preflight.on_this_machine(load("arithmetic"))


CODE = "evaluation.others={c: {source: openai/openai_humaneval, domain: code}}"
BITSANDBYTES = (trainer_optimizer, "is_bitsandbytes_available")


@pytest.mark.parametrize(
    ("tested", "override", "message"),
    [
        ((sandbox.shutil, "which"), "domain=code", "domain: bwrap is not on PATH; "),
        ((sandbox.shutil, "which"), CODE, "evaluation.others.c.domain: bwrap is not on PATH; "),
        ((importlib.util, "find_spec"), "domain=math", "domain: math-verify is not installed: run pip install"),
        (
            (importlib.util, "find_spec"),
            "student.options.use_liger_kernel=true",
            "student.options: use_liger_kernel: liger-kernel is not installed",
        ),
        (BITSANDBYTES, "student.options={optim: adamw_bnb_8bit}", "student.options: "),
        (BITSANDBYTES, "student.options={optim_args: foo}", "student.options: "),
        *(
            (
                (integration_utils, "is_wandb_available"),
                f"{key}.options.report_to=wandb",
                f"{key}.options: WandbCallback requires wandb to be installed",
            )
            for key in ("generator", "student", "evaluation.validity")
        ),
    ],
)
def test_what_this_machine_lacks_is_said_before_a_run(tested, override, message, monkeypatch):
    name = override.partition("domain=")[2] or "arithmetic"
    config = load(name, [override, "engine={name: transformers}", "generator.options.use_vllm=false"])
    monkeypatch.setattr(*tested, lambda _=None: None)
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        preflight.on_this_machine(config)


@pytest.mark.parametrize(
    ("key", "options", "message"),
    [
        ("student", "{eos_token: <|im_end|>}", "eos_token: expected a token of {path}, got '<|im_end|>'"),
        ("evaluation.validity", "{pad_token: '[PAD]'}", "pad_token: expected a token of {path}, got '[PAD]'"),
        ("student", "{lora: {target_modules: [c_attn]}}", "lora: Target modules {'c_attn'} not found in the"),
        ("generator", "{lora: {target_modules: [q_proj, v_prj]}}", "lora: target_modules: {path} has no 'v_prj'"),
        ("student", "{lora: {modules_to_save: [lm_head, norms]}}", "lora: modules_to_save: {path} has no 'norms'"),
        ("student", "{lora: {layers_to_transform: [2], target_modules: [q_proj]}}", "Target modules {'q_proj'} not"),
        ("student", "{lora: {target_modules: '(q_proj'}}", "lora: missing ), unterminated subpattern"),
        ("student", "{model_init_kwargs: {attn_implementation: flash_attention_9}}", "attn_implementation"),
        ("student", "{model_init_kwargs: {attn_implementation: sdpa}}", None),
        ("student", "{eos_token: </s>, lora: {target_modules: [q_proj, layers.0.mlp.up_proj]}}", None),
        ("student", "{lora: {init_lora_weights: loftq, loftq_config: {loftq_bits: 4, loftq_iter: 1}}}", None),
        ("student", "{lora: {target_modules: '.*_proj'}}", None),
    ],
)
def test_options_that_do_not_fit_the_model_are_refused_before_a_run(key, options, message, student_path):
    models_of = [f"{part}.model={student_path}" for part in ("generator", "student")]
    config = load("arithmetic", [*models_of, f"{key}.options={options}"])
    if message is None:
        preflight.on_this_machine(config)
    else:
        with pytest.raises(ConfigError) as caught:
            preflight.on_this_machine(config)
        assert str(caught.value).startswith(f"{key}.options")
        assert message.replace("{path}", str(student_path)) in str(caught.value)


@pytest.mark.parametrize(
    ("other", "modules"),
    [
        (GPT2Config(n_layer=1), "all-linear"),
        (GPT2Config(n_layer=1), "null"),  # peft's own choice
        (Qwen3MoeConfig(num_hidden_layers=1), "[gate_proj, up_proj, down_proj]"),  # fused in the experts
        (OPTConfig(num_hidden_layers=2), "all-linear, exclude_modules: '.*layers[.]0[.].*'"),
    ],
)
def test_options_fit_each_student(other, modules, student_path, tmp_path):
    other.save_pretrained(tmp_path / "other")
    students = [f"student.model={student_path}", f"student.others={{other: {tmp_path}/other}}"]
    preflight.on_this_machine(load("arithmetic", [*students, f"student.options.lora={{target_modules: {modules}}}"]))
    with pytest.raises(ConfigError, match=r"^student\.options\.lora: "):
        preflight.on_this_machine(load("arithmetic", [*students, "student.options.lora={target_modules: [k_prj]}"]))


def test_modules_may_be_those_of_one_student_each(student_path, tmp_path):
    GPT2Config(n_layer=1).save_pretrained(tmp_path / "other")
    students = [f"student.model={student_path}", f"student.others={{other: {tmp_path}/other}}"]
    preflight.on_this_machine(
        load("arithmetic", [*students, "student.options.lora={target_modules: [q_proj, c_attn]}"])
    )
    with pytest.raises(ConfigError, match=r"lora: target_modules: .*student and .*other has no 'k_prj'$"):
        preflight.on_this_machine(
            load("arithmetic", [*students, "student.options.lora={target_modules: [q_proj, c_attn, k_prj]}"])
        )


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("dpo", {"sync_ref_model": True, "lora": {}}, "You passed `sync_ref_model=True` while using a PEFT model"),
        ("dpo", {"loss_type": "exo_pair"}, "Label smoothing must be greater than 0.0 when using 'exo_pair' loss"),
        ("dpo", {"loss_type": "aot", "f_divergence_type": "forward_kl"}, "only supported for the following loss types"),
        ("grpo", {"cache_implementation": "foo"}, "Invalid `cache_implementation` (foo)"),
        ("grpo", {"push_to_hub": True, "model_init_kwargs": {"dtype": "bfloat16"}}, None),
        ("dpo", {"lora": {"target_modules": ["q_proj"]}, "precompute_ref_log_probs": True}, None),
    ],
)
def test_options_that_the_trainer_rejects_are_refused_before_a_run(method, options, message, capfd):
    generator = {"model": "world:base", "method": method, "options": options}
    config = load("arithmetic", [f"generator={json.dumps(generator)}"])
    if message is None:
        preflight.on_this_machine(config)
        assert capfd.readouterr().out == ""
    else:
        with pytest.raises(ConfigError, match=rf"^generator\.options: .*{re.escape(message)}"):
            preflight.on_this_machine(config)


def test_replayed_rows_count_as_steps():
    given = ["student.replay=0.5", "evaluation.validity.batches=0"]
    plan(load("arithmetic", [*given, "student.options.warmup_steps=451"]))
    with pytest.raises(ConfigError, match="warmup_steps: expected fewer than all 452 steps, got 452"):
        plan(load("arithmetic", [*given, "student.options.warmup_steps=452"]))


def test_rows_of_a_batch_left_out_are_no_step():
    config, _ = train_options.configuration("sft", {"num_train_epochs": 2, "dataloader_drop_last": True}, "unused")
    assert [train_options.optimizer_steps(config, rows) for rows in (32, 35, 36, 37)] == [4, 4, 6, 6]
    for steps in (-1, 3):  # a trainer that is given its steps would learn nothing, and say so nowhere
        few = ["rows=[15]", "options.dataloader_drop_last=true", f"options.max_steps={steps}"]
        with pytest.raises(
            ConfigError,
            match=r"student\.options\.dataloader_drop_last: expected at least the 16 rows of one batch, got 15",
        ):
            plan(load("arithmetic", [f"student.{option}" for option in few]))


def test_each_trainer_has_its_own_precision_and_leaves_the_process_as_it_was(capfd):
    options = {"bf16": True, "full_determinism": True, "dataset_num_proc": 2}
    config = load("arithmetic", ["generator.options={bf16: false}", f"student.options={json.dumps(options)}"])
    preflight.on_this_machine(config)
    assert not torch.are_deterministic_algorithms_enabled()
    assert "num_proc" not in capfd.readouterr().err


def test_a_check_of_lora_allocates_no_weights(student_path, monkeypatch):
    """Those of 128 experts in each layer would take minutes."""
    made = []
    monkeypatch.setattr(torch.nn.init, "kaiming_uniform_", lambda weight, **_: made.append(weight))
    trainer = train_options.configuration("sft", {"lora": {"target_modules": "all-linear"}}, "unused")
    train_options.check_model(*trainer, str(student_path))
    assert {weight.device.type for weight in made if weight.numel() > 1} == {"meta"}


def test_a_model_that_does_not_load_is_named(student_path):
    (student_path / "config.json").write_text("{")
    config = load("arithmetic", [f"student.model={student_path}", "student.options.lora={r: 2}"])
    with pytest.raises(ConfigError, match=rf"^student\.options: {student_path} does not load: "):
        preflight.on_this_machine(config)


@pytest.mark.parametrize("name", recipes())
def test_every_recipe_of_the_package_has_a_plan(name):
    found = plan(load(name))
    assert str(found.report) == "06-report/report"
    assert found.main in found.arms


@pytest.mark.parametrize("recipe", ["arithmetic", "arithmetic-skewed", "code", "math", "medical", "smollm2-math"])
def test_recipes_of_the_package_aim_at_rows_of_their_own(recipe):
    config = load(recipe)
    assert config.data.reference is not None
    assert config.data.reference != config.data.seeds
    assert len(config.student.seeds) >= (3 if recipe != "smollm2-math" else 1)

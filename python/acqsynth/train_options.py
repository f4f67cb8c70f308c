"""Trainer options: the fields of TRL's configurations, validated early, with the published recipe as defaults."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import difflib
import importlib.util
import io
import math
import os
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import torch
from datasets import Dataset
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, Trainer, get_scheduler
from transformers.integrations import get_reporting_integration_callbacks
from trl import DPOConfig, GRPOConfig, SFTConfig

from acqsynth.models import load_tokenizer, resolve

T = TypeVar("T")

_DEFAULTS: dict[type, dict[str, Any]] = {
    # The published recipe. Rows longer than max_length tokens are truncated.
    SFTConfig: {
        "num_train_epochs": 5,
        "learning_rate": 2e-5,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.05,  # below 1: a share of the steps
        "per_device_train_batch_size": 4,
        "max_length": 2048,
        "completion_only_loss": True,
        "save_strategy": "epoch",
    },
    # The published learning rate (1e-6), group size (8) and lack of a KL term are TRL's defaults.
    GRPOConfig: {
        "num_train_epochs": 1,
        "max_completion_length": 1024,
        "save_steps": 10,
        "log_completions": True,
        "num_completions_to_print": 0,
    },
    DPOConfig: {"num_train_epochs": 1, "max_length": 2048, "save_steps": 10},
}
_SHARED = {
    "report_to": "none",
    "logging_steps": 1,
    "save_strategy": "steps",
    "save_total_limit": 2,  # the older checkpoint is deleted before the newer one is complete
}
EFFECTIVE_BATCH = 16  #: rows per optimiser step of ``sft``, for any ``per_device_train_batch_size``
METHODS = {"sft": SFTConfig, "grpo": GRPOConfig, "dpo": DPOConfig}


def configuration(method: str, options: Mapping[str, Any], output: str | Path) -> tuple[Any, Any]:
    """The configurations of the trainer and of LoRA; the latter is None without the option ``lora``.

    Args:
        method: a key of ``METHODS``.
        options: fields of TRL's configuration; ``lora``: fields of ``peft.LoraConfig``.
        output: the trainer's folder.

    Raises:
        ValueError: an unknown option, a value that TRL rejects, or ``output_dir``.
    """
    kind = METHODS[method]
    if "output_dir" in options:
        raise ValueError("options: output_dir is set by the argument output")
    if refused := next((name for name in _REFUSED if options.get(name)), None):
        raise ValueError(f"options: {refused}: {_REFUSED[refused]}")
    bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported() and not options.get("fp16")
    fields = {**_SHARED, "bf16": bf16, **_DEFAULTS[kind], **options}
    if fields["bf16"] and not torch.cuda.is_available():
        fields.setdefault("use_cpu", True)  # transformers rejects bfloat16 without a GPU otherwise
    lora = fields.pop("lora", None)
    if method == "sft" and "gradient_accumulation_steps" not in options:
        per_device = fields["per_device_train_batch_size"]
        _check_range("options: per_device_train_batch_size", per_device, *_RANGES["per_device_train_batch_size"])
        per_step = per_device * int(os.environ.get("WORLD_SIZE", "1"))
        fields["gradient_accumulation_steps"] = max(1, EFFECTIVE_BATCH // per_step)
    config = _build(kind, {**fields, "output_dir": str(output)}, "options")
    if config.max_steps == 0:
        raise ValueError("options: max_steps: expected at least 1, or -1 for all of num_train_epochs, got 0")
    if config.eval_strategy != "no" or config.eval_on_start:
        raise ValueError("options: eval_strategy: expected no, as training has no evaluation rows")
    if config.save_strategy == "best":
        raise ValueError("options: save_strategy: expected no, steps or epoch, as training has no evaluation rows")
    _check_late(config)
    if lora is None:
        return config, None
    if not isinstance(lora, Mapping):
        raise ValueError(f"options.lora: expected fields of peft.LoraConfig, got {lora!r}")
    modules = lora.get("target_modules")
    names = isinstance(modules, list) and bool(modules) and all(isinstance(name, str) for name in modules)
    if not (modules is None or isinstance(modules, str) or names):
        raise ValueError(f"options.lora: target_modules: expected a pattern or names, got {modules!r}")
    from peft import LoraConfig

    return config, _build(LoraConfig, {"task_type": "CAUSAL_LM", **lora}, "options.lora")


def _check_late(config: Any) -> None:
    """Raises ValueError for options that a trainer would reject only once its model is loaded, or in its first step."""
    zero = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([zero], config.learning_rate)
    checks: dict[str, Callable[[], Any]] = {
        "model_init_kwargs": lambda: dict(**(config.model_init_kwargs or {})),
        "chat_template_kwargs": lambda: dict(**(getattr(config, "chat_template_kwargs", None) or {})),
        "generation_kwargs": lambda: _check_generation(config),
        "adam_beta1, adam_beta2": lambda: torch.optim.AdamW([zero], betas=(config.adam_beta1, config.adam_beta2)),
        "report_to": lambda: get_reporting_integration_callbacks(config.report_to),
        "lr_scheduler_kwargs": lambda: get_scheduler(
            config.lr_scheduler_type, optimizer, 1, 2, config.lr_scheduler_kwargs
        ),
        "gradient_checkpointing_kwargs": lambda: checkpoint(
            torch.nn.Identity(), zero, **{"use_reentrant": False, **(config.gradient_checkpointing_kwargs or {})}
        ),
        "torch_compile_backend, torch_compile_mode": lambda: (
            config.torch_compile
            and torch.compile(torch.nn.Identity(), backend=config.torch_compile_backend, mode=config.torch_compile_mode)
        ),
    }
    for names, make in checks.items():
        try:
            make()
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"options: {names}: {error}") from error
    dtype, known = (config.model_init_kwargs or {}).get("dtype"), ("auto", "float32", "float16", "bfloat16")
    if not (dtype is None or isinstance(dtype, torch.dtype) or dtype in known):
        raise ValueError(f"options: model_init_kwargs.dtype: expected one of {', '.join(known)}, got {dtype!r}")
    if config.dataloader_persistent_workers and not config.dataloader_num_workers:
        raise ValueError("options: dataloader_persistent_workers: persistent_workers option needs num_workers > 0")
    if getattr(config, "padding_free", False) and not getattr(config, "packing", True):
        raise ValueError("options: padding_free: expected packing with it, as rows would not be cut to max_length")


def _check_generation(config: Any) -> None:
    """Raises ValueError for unknown arguments of transformers' generation, which ignores them, and for invalid ones."""
    given = getattr(config, "generation_kwargs", None) or {}
    unknown = GenerationConfig().update(**given) if not getattr(config, "use_vllm", False) else {}
    for name in unknown:
        near = difflib.get_close_matches(name, vars(GenerationConfig()), 1)
        raise ValueError(f"GenerationConfig has no field {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))


def require(config: Any, lora: Any) -> None:
    """Raises ImportError, RuntimeError or ValueError if a tracker, kernel or optimizer is not installed or lacks
    options, or the trainer rejects options that do not go together; FileNotFoundError if there is no such chat
    template."""
    for tracker in get_reporting_integration_callbacks(config.report_to):
        tracker()
    if config.use_liger_kernel and importlib.util.find_spec("liger_kernel") is None:
        raise ImportError('use_liger_kernel: liger-kernel is not installed: run pip install "liger-kernel"')
    template = getattr(config, "chat_template_path", None) or ""  # a file, or a model
    if template.endswith((".jinja", ".j2")) and not os.path.isfile(template):
        raise FileNotFoundError(f"chat_template_path: {template}: no such file")
    if config.optim_target_modules is None:  # otherwise it looks for modules of the model
        Trainer.get_optimizer_cls_and_kwargs(config, torch.nn.Linear(1, 1))
    _construct(config, lora)


def _construct(config: Any, lora: Any) -> None:
    """Runs most of the trainer's own checks by constructing it with a tiny model and one row."""
    from accelerate.state import AcceleratorState
    from peft import LoraConfig
    from trl import DPOTrainer, GRPOTrainer, SFTTrainer

    from acqsynth import world

    user, assistant = ([{"role": role, "content": "copy 1"}] for role in ("user", "assistant"))
    row = {"prompt": user}
    given: dict[str, Any] = {"peft_config": None if lora is None else LoraConfig(target_modules="all-linear")}
    own = copy.copy(config)
    # Determinism would outlast the trial, and dataset_num_proc would start processes for one row.
    own.report_to, own.push_to_hub, own.full_determinism = [], False, False
    for name in (_OF_MODEL | {"dataset_num_proc"}) & vars(own).keys():
        setattr(own, name, None)
    if isinstance(config, GRPOConfig):
        own.use_vllm = False
        given["reward_funcs"] = [len]
    elif isinstance(config, DPOConfig):
        row |= {"chosen": assistant, "rejected": assistant}
    else:
        row["completion"] = assistant
    kind = {SFTConfig: SFTTrainer, GRPOConfig: GRPOTrainer, DPOConfig: DPOTrainer}[type(config)]
    tokenizer = world.build_tokenizer()
    tiny = world.Settings(hidden_size=4, layers=1, heads=1, intermediate_size=4)
    AcceleratorState._reset_state()  # it keeps the precision of the previous trainer
    # The trainers show progress of the row's preparation.
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        own.output_dir = folder
        tokenizer.save_pretrained(folder)
        world.untrained(tiny, tokenizer).save_pretrained(folder)
        kind(model=folder, args=own, train_dataset=Dataset.from_list([row]), **given)


def check_model(config: Any, lora: Any, model: str) -> set[tuple[str, str]]:
    """Checks the options that depend on the model, of which only the configuration and tokenizer are read.

    Returns:
        LoRA's option and the name for each module that it names and the model lacks.

    Raises:
        OSError, ValueError: these cannot be loaded, the model has no module for LoRA or its tokenizer no such token.
        ImportError: the kernels of its attention are not installed.
    """
    tokens = {name: token for name in ("eos_token", "pad_token") if (token := getattr(config, name, None)) is not None}
    attention = (config.model_init_kwargs or {}).get("attn_implementation")
    if lora is None and attention is None and not tokens:
        return set()
    try:
        described = AutoConfig.from_pretrained(resolve(model))
    except OSError as error:
        raise OSError(f"{model} does not load: {error}") from error
    vocabulary = load_tokenizer(resolve(model)).get_vocab() if tokens else {}
    for name, token in tokens.items():
        if token not in vocabulary:
            raise ValueError(f"{name}: expected a token of {model}, got {token!r}")
    from peft import get_peft_model

    with torch.device("meta"):  # on a CPU, LoRA's weights for many experts would take minutes
        bare = AutoModelForCausalLM.from_config(described, attn_implementation=attention)
        if lora is None:
            return set()
        own = copy.deepcopy(lora)  # peft writes the model's modules into it
        own.init_lora_weights = True  # other initialisations need the weights
        modules = [f".{name}" for name, _ in bare.named_modules()]
        try:
            get_peft_model(bare, own)
        except (ValueError, re.error) as error:
            raise ValueError(f"lora: {error}") from error
    named = {"modules_to_save": set(lora.modules_to_save or ())}
    if isinstance(lora.target_modules, set):
        named["target_modules"] = lora.target_modules & own.target_modules  # without those of fused experts
    return {
        (option, name)
        for option, names in named.items()
        for name in names
        if not any(module.endswith(f".{name}") for module in modules)
    }


def check_prompts(config: GRPOConfig, prompts: int) -> None:
    """Raises ValueError if the prompts do not fill a generation: TRL leaves incomplete ones out."""
    least = (config.generation_batch_size or 0) // config.num_generations
    if prompts < least:
        raise ValueError(f"prompts: expected at least {least}, as many as a generation takes, got {prompts}")


def grpo_steps(config: GRPOConfig, prompts: int) -> int:
    """The optimizer steps of a run over the prompts."""
    generated = config.generation_batch_size or 1
    return optimizer_steps(config, prompts * config.num_generations // generated * generated * config.num_iterations)


def optimizer_steps(config: Any, rows: int) -> int:
    """The optimizer steps of a run over the rows. Raises ValueError if these fill no batch and incomplete ones are
    dropped."""
    size = config.per_device_train_batch_size * config.world_size
    batches = rows // size if config.dataloader_drop_last else -(-rows // size)
    if not batches:
        raise ValueError(f"dataloader_drop_last: expected at least the {size} rows of one batch, got {rows}")
    if config.max_steps > 0:
        return int(config.max_steps)
    return math.ceil(config.num_train_epochs * -(-batches // config.gradient_accumulation_steps))


def _build(kind: type[T], options: Mapping[str, Any], table: str) -> T:
    """Builds the dataclass ``kind(**options)``; errors name ``table`` and the field closest to an unknown one.

    HfArgumentParser.parse_dict fails on the annotations of LoraConfig and suggests no names.
    """
    entries = {entry.name: entry for entry in dataclasses.fields(kind) if entry.init}  # type: ignore[arg-type]
    hints = get_type_hints(kind)
    if "fsdp" in hints:
        hints["fsdp"] |= bool  # true is the documented form, which the annotation lacks
    for name, value in options.items():
        if name not in entries:
            near = difflib.get_close_matches(name, entries, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{table}: {kind.__name__} has no field {name!r}{hint}")
        known = [choice for choice in _choices(entries[name], hints[name]) if choice not in entries]
        single = hints[name] is str
        for each in value if isinstance(value, list) and not single else [value]:
            if known and (single or each is not None) and str(each) not in known:
                raise ValueError(f"{table}: {name}: unknown {each!r}, expected one of {', '.join(known)}")
        if name in _RANGES and value is not None:
            _check_range(f"{table}: {name}", value, *_RANGES[name])
        elif not known and not _fits(value, hints[name]):
            wanted = getattr(hints[name], "__name__", None) if isinstance(hints[name], type) else hints[name]
            raise ValueError(f"{table}: {name}: expected {str(wanted).replace('typing.', '')}, got {value!r}")
    try:
        return kind(**options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{table}: {error}") from error


def _choices(entry: dataclasses.Field[Any], hint: Any) -> list[str]:
    """The values that a field allows. Some fields of TRL list them only in their description, beside names of other
    fields."""
    if get_origin(hint) is Literal:
        return list(get_args(hint))
    if entry.name in _DESCRIBED and "choices" not in entry.metadata:
        return list(dict.fromkeys(re.findall(r"(?<!=)['`](\w+)['`]", entry.metadata.get("help", ""))))
    return list(entry.metadata.get("choices") or ())


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value fits its field, checked if either is of booleans or numbers. Other annotations do not cover all
    that the libraries accept, such as lists for tuples and mappings for configurations."""
    kinds = set(get_args(hint) or (hint,))
    if not (kinds <= {bool, int, float, type(None)} or type(value) in (bool, int, float)):
        return True
    return type(value) in kinds or (type(value) is int and float in kinds)


#: Fields whose values TRL quotes in its description instead of listing them.
_DESCRIBED = {
    *("loss_type", "scale_rewards", "importance_sampling_level", "multi_objective_aggregation", "f_divergence_type"),
    *("vllm_mode", "vllm_importance_sampling_mode"),
}

#: Fields that would have no effect or fail once the model is loaded.
_REFUSED = {
    "assistant_only_loss": "expected false; completion_only_loss, true by default, has the same effect",
    "dataset_kwargs": "expected none, as rows need preparation",
    "parallelism_config": "expected none; accelerate launch sets it",
    "resume_from_checkpoint": "expected none, as a run resumes from its own checkpoints",
    **dict.fromkeys(("do_train", "do_eval", "do_predict"), "expected false, as it has no effect"),
}

#: Fields that only the model or its tokenizer can check.
_OF_MODEL = {"model_init_kwargs", "eos_token", "pad_token", "chat_template_path"}

#: Fields that no library validates early: type, minimum, maximum, whether the minimum itself is allowed.
_RANGES: dict[str, tuple[type, float, float, bool]] = {
    name: limits
    for limits, names in {
        (int, 1, math.inf, True): "per_device_train_batch_size gradient_accumulation_steps num_generations "
        "num_iterations max_length max_completion_length max_prompt_length r lora_alpha steps_per_generation "
        "precompute_ref_batch_size ref_model_sync_steps pad_to_multiple_of",
        (int, 0, math.inf, True): "top_k dataloader_num_workers dataset_num_proc",
        (int, 0, 2**32 - 1, True): "seed data_seed",  # of NumPy
        (float, 0, math.inf, False): "num_train_epochs temperature repetition_penalty",
        (float, 0, math.inf, True): "learning_rate weight_decay max_grad_norm beta epsilon epsilon_high delta "
        "adam_epsilon warmup_steps neftune_noise_alpha",
        (float, 0, 1, True): "warmup_ratio min_p lora_dropout adam_beta1 adam_beta2 ref_model_mixup_alpha "
        "label_smoothing label_smoothing_factor top_entropy_quantile",
        (float, 0, 1, False): "top_p",
    }.items()
    for name in names.split()
}


def _check_range(name: str, value: Any, kind: type, least: float, most: float, closed: bool) -> None:
    word = "an integer" if kind is int else "a number"
    if isinstance(value, bool) or not isinstance(value, int if kind is int else int | float):
        raise ValueError(f"{name}: expected {word}, got {value!r}")
    if not (least <= value if closed else least < value) or value > most:
        low = f"{'at least' if closed else 'above'} {least:g}"
        high = "" if most == math.inf else f" and at most {most}"
        raise ValueError(f"{name}: expected {word} {low}{high}, got {value}")

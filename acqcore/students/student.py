"""The student: a trunk that gives hidden states, and the head on top of it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias
from weakref import WeakSet

import torch

from acqcore import checks
from acqcore.head import Head, compute_dtype
from acqcore.students.loading import check_request, load_tokenizer
from acqcore.students.sharding import (
    DataParallel,
    data_parallel,
    gathered,
    is_dtensor,
    loading_whole,
    replaced_forward,
    unwrapped,
    vocabulary_shard,
)
from acqcore.vocab_parallel import summed

#: Configuration entries that scale the logits -> factor for a value.
LOGIT_SCALES: dict[str, Callable[[float], float]] = {
    "logit_scale": lambda value: value,  # Cohere
    "lm_head_multiplier": lambda value: value,  # Falcon H1
    "logits_scaling": lambda value: 1 / value,  # Granite
}

#: Largest difference between the model's logits and ours in the probe, relative to the largest logit. Both sides see
#: the same hidden states, so only the model's product and logits are rounded differently.
PROBE_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}

# Models that passed the probe: a reward called with the model at each step pays for it once.
_VERIFIED: WeakSet[torch.nn.Module] = WeakSet()


class Student:
    """A causal language model split into a trunk, which gives hidden states, and the head, which gives logits.

    Args:
        trunk: maps ``input_ids [B, T]`` int64 to hidden states ``[B, T, D]``, or to an object with them as
            ``last_hidden_state``, after the final norm. Must be causal: it gets no attention mask.
        head: the last layer.
        tokenizer: default for ``score``.
        max_length: maximum tokens per sample; None for no limit.

    Raises:
        TypeError: trunk is not callable, head is not a Head. ValueError: max_length below 1.
    """

    def __init__(
        self, trunk: Callable[..., Any], head: Head, *, tokenizer: Any = None, max_length: int | None = None
    ) -> None:
        if not callable(trunk):
            raise TypeError(f"trunk: expected a callable input_ids [B, T] -> [B, T, D], got {checks.describe(trunk)}")
        checks.instance("head", head, Head, "acqcore.Head")
        if max_length is not None:
            checks.positive_int("max_length", max_length)
        self.trunk = trunk
        self.tokenizer = tokenizer
        self.max_length = max_length
        self._find_head: Callable[[], Head] = lambda: head
        self._module = trunk if isinstance(trunk, torch.nn.Module) else None
        self._data_parallel: DataParallel | None = None

    @classmethod
    def from_model(cls, model: torch.nn.Module, *, tokenizer: Any = None, verify: bool = True) -> Student:
        """The student inside a transformers causal language model, or a PEFT model around one.

        Parameters are shared with the model: the student follows it in training. Sharded models stay sharded:

        - Tensor parallel (transformers' ``tp_plan``, DTensors): all ranks score the same samples. A head sharded along
          the vocabulary is not gathered.
        - FSDP2, FSDP1 and ZeRO-3, as the trainer wraps them: each rank scores its own samples, any number of them, and
          all ranks call together. The head is gathered once per call.

        Args:
            model: any ``...ForCausalLM``; LoRA layers and ``modules_to_save`` are applied, on the head too.
            tokenizer: default for ``score``.
            verify: compare the model's logits with those of trunk and head on a few tokens, once per model object.

        Raises:
            TypeError: not a module with a base model and an output embedding.
            ValueError: an encoder-decoder, an unknown adapter on the head, or logits that differ.
        """
        checks.module("model", model)
        causal = _unwrap(model)
        name = type(causal).__name__
        embeddings = getattr(causal, "get_output_embeddings", None)
        if not hasattr(causal, "config") or embeddings is None or embeddings() is None:
            raise TypeError(
                f"model: expected a transformers causal language model with an output embedding, got {name}; "
                "acqcore.Student(trunk, head) takes any other"
            )
        if getattr(causal.config, "is_encoder_decoder", False):
            raise ValueError(f"model: expected a decoder-only language model, {name} is an encoder-decoder")
        config = causal.config.get_text_config()
        student = cls.__new__(cls)
        student.trunk = _find_trunk(causal)
        student.tokenizer = tokenizer
        student.max_length = getattr(config, "max_position_embeddings", None)
        student._module = model
        student._data_parallel = data_parallel(model)
        student._find_head = lambda: _find_head(causal, student._data_parallel)
        if verify and model not in _VERIFIED:
            _probe(student, model)
            _VERIFIED.add(model)
        return student

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> Student:
        """Load the student and its tokenizer from a local directory or the hub. It is never sharded, even in a run that
        shards its models.

        Args:
            path: as in transformers' ``from_pretrained``.
            dtype: of the weights; by default as stored.
            device: by default the CPU.

        Raises:
            ModuleNotFoundError: transformers is not installed. OSError: no such model (from transformers).
            ValueError: a path without a model, an unknown dtype, a device that is not here, a broken tokenizer.
        """
        try:
            from transformers import AutoModelForCausalLM
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"loading {str(path)!r} needs transformers: run 'pip install acqcore[train]'"
            ) from error
        path = os.fspath(path)
        check_request(path, dtype, device)
        with loading_whole():
            model = AutoModelForCausalLM.from_pretrained(path, dtype="auto" if dtype is None else dtype)
        if device is not None:
            model = model.to(device)
        return cls.from_model(model.eval(), tokenizer=load_tokenizer(path))

    @property
    def head(self) -> Head:
        """The current head. An unmerged adapter is added to its weight, in a ``[V, D]`` copy. Under FSDP and ZeRO-3 the
        head is gathered, a collective."""
        return self._find_head()

    @property
    def sharded(self) -> bool:
        """Whether parameters are sharded over processes: DTensors, FSDP, ZeRO-3."""
        return self._data_parallel is not None or (
            self._module is not None and any(is_dtensor(parameter) for parameter in self._module.parameters())
        )

    @property
    def forwards_are_collective(self) -> bool:
        """Whether ranks with different samples run each forward together (FSDP, ZeRO-3)."""
        return self._data_parallel is not None

    @property
    def device(self) -> torch.device:
        """Device of the token ids: that of the trunk's first parameter, else of the head."""
        for module in (self.trunk, self._module):
            if isinstance(module, torch.nn.Module):
                for parameter in module.parameters():
                    return parameter.device
        return self.head.weight.device

    @property
    def blocks(self) -> list[torch.nn.Module]:
        """The trunk's transformer blocks: the longest list of modules that is not inside another; may be empty."""
        longest: list[torch.nn.Module] = []
        nested: set[torch.nn.Module] = set()
        modules = self.trunk.modules() if isinstance(self.trunk, torch.nn.Module) else ()
        for module in modules:  # an outer module comes before those inside it
            if isinstance(module, torch.nn.ModuleList) and module not in nested:
                nested.update(module.modules())
                longest = max(longest, list(module), key=len)
        return [unwrapped(block) for block in longest]

    def hidden(
        self,
        input_ids: torch.Tensor,  # [B, T] int64
    ) -> torch.Tensor:
        """Final hidden states ``[B, T, D]`` of one trunk forward.

        Raises:
            TypeError: the trunk gave neither a tensor nor an object with ``last_hidden_state``.
            ValueError: its shape is not ``[B, T, D]``.
        """
        config = getattr(self.trunk, "config", None)
        # A key-value cache would keep every layer's keys and values for nothing.
        options = {"use_cache": False} if hasattr(config, "use_cache") else {}
        if self._data_parallel is None:
            output = self.trunk(input_ids, **options)
        else:
            self._data_parallel.step(True)
            output = self._through_root(input_ids, options)
        hidden = output if isinstance(output, torch.Tensor) else getattr(output, "last_hidden_state", None)
        if not isinstance(hidden, torch.Tensor):
            raise TypeError(
                "trunk: expected it to give a tensor [B, T, D] or an object with last_hidden_state, "
                f"got {checks.describe(output)}"
            )
        if hidden.dim() != 3 or hidden.shape[:2] != input_ids.shape:
            raise ValueError(
                f"trunk: expected hidden states [B, T, D] for input_ids {list(input_ids.shape)}, "
                f"got {checks.describe(hidden)}"
            )
        return gathered(hidden)

    def _through_root(
        self,
        input_ids: torch.Tensor,  # [B, T] int64
        options: dict[str, Any],
    ) -> torch.Tensor:
        """Hidden states ``[B, T, D]`` of a forward of the whole model, whose wrappers gather parameters. The head is
        replaced by a function that keeps its input."""
        assert self._module is not None
        seen: list[torch.Tensor] = []

        def keep(hidden: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            seen.append(hidden)
            return hidden[..., :1]

        with replaced_forward(unwrapped(_unwrap(self._module).get_output_embeddings()), keep):
            self._module(input_ids=input_ids, **options)
        return seen[0]

    @contextmanager
    def in_step(self) -> Iterator[None]:
        """Context for all forwards of a call. Under FSDP and ZeRO-3 every rank runs equally many; ranks that are done
        run them on one token. A rank that raises waits for the others."""
        if self._data_parallel is None:
            yield
            return
        token = torch.zeros((1, 1), dtype=torch.int64, device=self.device)

        def idle() -> None:
            with self.scoring():
                self._through_root(token, {})

        with self._data_parallel.in_step(idle):
            yield

    @contextmanager
    def scoring(self) -> Iterator[None]:
        """Context in evaluation mode without gradients; each module's training flag is restored."""
        modules = list(self._module.modules()) if self._module is not None else []
        flags = [module.training for module in modules]
        # Set one by one: eval() and train() give every submodule the root's mode, and some classes override them.
        for module in modules:
            module.training = False
        try:
            with torch.no_grad():
                yield
        finally:
            for module, flag in zip(modules, flags, strict=True):
                module.training = flag


StudentLike: TypeAlias = Student | torch.nn.Module | str | os.PathLike[str]


def as_student(student: StudentLike) -> Student:
    """The Student of a Student, a model, or a path or hub id.

    Raises:
        TypeError: none of these. Otherwise as ``Student.from_model`` and ``Student.load``.
    """
    if isinstance(student, Student):
        return student
    if isinstance(student, (str, os.PathLike)):
        return Student.load(student)
    checks.module("student", student)
    return Student.from_model(student)


def _unwrap(model: Any) -> Any:
    """The transformers model inside torch.compile, DataParallel, FSDP1, DeepSpeed and PEFT wrappers."""
    while True:
        model = unwrapped(model)
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif isinstance(model, (torch.nn.parallel.DistributedDataParallel, torch.nn.DataParallel)):
            model = model.module
        elif hasattr(model, "get_base_model"):
            model = model.get_base_model()
        else:
            return model


def _find_trunk(model: Any) -> torch.nn.Module:
    """The module below the head: ``base_model_prefix``, else ``get_decoder()``."""
    trunk = getattr(model, getattr(model, "base_model_prefix", ""), None)
    if trunk is None:
        trunk = model.get_decoder()
    if not isinstance(trunk, torch.nn.Module) or trunk is model:
        raise ValueError(
            f"model: {type(model).__name__} has no base model that gives hidden states; "
            "use acqcore.Student(trunk, head)"
        )
    return trunk


def _find_head(model: Any, spread: DataParallel | None) -> Head:
    config = model.config.get_text_config()
    layer = unwrapped(model.get_output_embeddings())
    if spread is None:
        weight, bias = _projection(layer)
        placed = vocabulary_shard(weight.detach(), None if bias is None else bias.detach())
    else:
        with torch.no_grad(), spread.whole(layer):
            # A copy: the gathered tensors are freed on exit.
            weight, bias = _projection(layer)
            bias = None if bias is None else gathered(bias.detach()).clone()
            placed = {"weight": gathered(weight.detach()).clone(), "bias": bias}
    scale = 1.0
    for name, factor in LOGIT_SCALES.items():
        value = getattr(config, name, None)
        if value is not None:
            scale *= factor(float(value))
    return Head(**placed, softcap=getattr(config, "final_logit_softcapping", None), scale=scale)


def _projection(layer: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight ``[V, D]`` and bias ``[V]`` of the output embedding, with PEFT adapters applied."""
    if type(layer).__module__.partition(".")[0] == "peft":
        return _adapted_projection(layer)
    if not isinstance(layer, torch.nn.Linear):
        raise ValueError(
            f"model: expected its output embedding to be torch.nn.Linear, got {checks.describe(layer)}; "
            "use acqcore.Student(trunk, head)"
        )
    return layer.weight, layer.bias


def _adapted_projection(layer: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    from peft.tuners.lora import Linear as LoraLinear
    from peft.utils import ModulesToSaveWrapper

    if isinstance(layer, ModulesToSaveWrapper):
        if layer.disable_adapters or not layer.active_adapters:
            return _projection(layer.original_module)
        return _projection(layer.modules_to_save[layer.active_adapters[0]])
    if not isinstance(layer, LoraLinear):
        raise ValueError(
            f"model: the adapter on the output embedding is {checks.describe(layer)}; expected LoRA or "
            "modules_to_save, merge it first"
        )
    variants = [name for name in layer.active_adapters if name in layer.lora_variant]
    if variants:
        kind = type(layer.lora_variant[variants[0]]).__name__
        raise ValueError(
            f"model: the adapter on the output embedding is a LoRA variant ({kind}); expected plain LoRA, "
            "merge it first"
        )
    if layer.merged and layer.disable_adapters:
        raise ValueError(
            "model: the adapter on the output embedding is both merged and disabled; call model.unmerge_adapter() first"
        )
    weight, bias = _projection(layer.base_layer)
    if layer.disable_adapters or layer.merged:
        return weight, bias
    for adapter in layer.active_adapters:
        if adapter not in layer.lora_A:
            continue
        # Half precision would round away most of a small update; the model never forms this sum.
        dtype = compute_dtype(weight.dtype)
        weight = weight.to(dtype) + layer.get_delta_weight(adapter).to(dtype)
        extra = layer.lora_B[adapter].bias
        if extra is not None:
            extra = extra.to(dtype) * layer.scaling[adapter]
            bias = extra if bias is None else bias.to(dtype) + extra
    return weight, bias


def _probe(student: Student, model: torch.nn.Module) -> None:
    """Compare trunk and head with the model's own logits, and check causality, on two rows of four tokens."""
    head = student.head
    vocab_size = head.vocab_size
    ids = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 5]]) * max(1, vocab_size // 7) % vocab_size  # differ at the end
    ids = ids.to(student.device)
    with student.scoring(), student.in_step():
        own = gathered(model(input_ids=ids).logits)
        hidden = student.hidden(ids)
        ours = head.logits(hidden.to(head.weight.device).flatten(0, 1)).view(*ids.shape, -1)
        if head.group is not None:  # logits of eight tokens, once a model: all ranks must agree on the verdict
            ours = _in_vocabulary(ours, head)
            own = own if own.shape[-1] == vocab_size else _in_vocabulary(own, head)
    tolerance = PROBE_TOLERANCE[hidden.dtype]
    name = type(unwrapped(model)).__name__
    advice = "it changes them in a way that acqcore does not know; use acqcore.Student(trunk, head)"
    if own.shape != ours.shape:
        raise ValueError(
            f"model: {name} gives logits {list(own.shape)} where its trunk and head give {list(ours.shape)}: {advice}"
        )
    own = own.to(ours)
    error, largest = float((own - ours).abs().max()), float(own.abs().max())
    if not error <= tolerance * largest:
        raise ValueError(
            f"model: the logits of {name} differ from those of its trunk and head by {error:.3g} (largest logit "
            f"{largest:.3g}): {advice}"
        )
    before = hidden[:, :-1].double()
    if not float((before[0] - before[1]).abs().max()) <= tolerance * float(before.abs().max()):
        raise ValueError(f"model: expected a causal language model, in {name} a token sees those after it")


def _in_vocabulary(
    logits: torch.Tensor,  # [B, T, v] of the head's own rows
    head: Head,
) -> torch.Tensor:
    """The logits of all ranks, ``[B, T, V]``."""
    whole = logits.new_zeros((*logits.shape[:-1], head.vocab_size))
    whole[..., head.vocab_start : head.vocab_start + len(head.weight)] = logits
    return summed(whole, head.group)

"""The student: a trunk that gives hidden states and the head on top of it, from whatever the user holds."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias
from weakref import WeakSet

import torch

from acqcore import checks
from acqcore.head import Head, compute_dtype
from acqcore.students.sharding import (
    DataParallel,
    data_parallel,
    full,
    inside,
    is_dtensor,
    loading_whole,
    replaced_forward,
    vocabulary_shard,
)
from acqcore.vocab_parallel import summed

#: Entries of a model's configuration that scale its logits -> what they multiply them by.
LOGIT_SCALES: dict[str, Callable[[float], float]] = {
    "logit_scale": lambda value: value,  # Cohere
    "lm_head_multiplier": lambda value: value,  # Falcon H1
    "logits_scaling": lambda value: 1 / value,  # Granite
}

#: Largest difference between the model's own logits and ours in the probe, relative to the largest logit.
#: Both sides see the same hidden states; what is left is the rounding of the model's product and of its
#: logits.
PROBE_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}

# Models whose probe has passed: a reward that is called with the model itself at each step pays for one
# probe.
_VERIFIED: WeakSet[torch.nn.Module] = WeakSet()


class Student:
    """A causal language model as ``score`` needs it: hidden states, and the head that turns them into logits.

    Args:
        trunk: called with ``input_ids [B, T]`` int64; gives hidden states ``[B, T, D]`` or an object with
            them as ``last_hidden_state``, the final norm included. Must be causal. Called without an
            attention mask.
        head: the last layer.
        tokenizer: used where ``score`` is given none.
        max_length: most tokens a sample may have; None for no limit.

    Raises:
        TypeError: trunk is not callable, head is not a Head.
        ValueError: max_length below 1.
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
        self._spread: DataParallel | None = None

    @classmethod
    def from_model(cls, model: torch.nn.Module, *, tokenizer: Any = None, verify: bool = True) -> Student:
        """The student inside a transformers causal language model or a PEFT model around one.

        The parameters are the model's own and stay live: a student made once follows the model as it is
        trained.

        Models sharded before are taken as they are. Tensor parallel (transformers' ``tp_plan``, DTensors): all ranks
        score the same samples, and a head cut along the vocabulary stays so. FSDP2, FSDP1 and ZeRO-3, given as the
        trainer wraps them: each rank scores samples of its own, any number, and all call together; the head is gathered
        once a call.

        Args:
            model: any ``...ForCausalLM``; LoRA layers and ``modules_to_save`` are honoured, on the head too.
            tokenizer: used where ``score`` is given none.
            verify: run a probe of a few tokens through the model and through trunk and head, and compare the
                logits. A model object that has passed is not probed again.

        Raises:
            TypeError: not a module with a base model and an output embedding.
            ValueError: an encoder-decoder, a head adapter that acqcore does not know, or a probe that
                differs.
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
        student._spread = data_parallel(model)
        student._find_head = lambda: _find_head(causal, student._spread)
        if verify and model not in _VERIFIED:
            _probe(student, model)
            _VERIFIED.add(model)
        return student

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> Student:
        """The student and its tokenizer from a local directory or a hub id, whole also in a run that shards its models.

        Args:
            path: what transformers' ``from_pretrained`` takes.
            dtype: of the weights; by default the one they are stored in.
            device: where they go; by default the CPU.

        Raises:
            ModuleNotFoundError: transformers is not installed.
            OSError: there is no such model (from transformers).
        """
        try:
            from transformers import AutoModelForCausalLM, AutoTokenizer
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"loading {str(path)!r} needs transformers: run 'pip install acqcore[train]'"
            ) from error
        path = os.fspath(path)
        with loading_whole():
            model = AutoModelForCausalLM.from_pretrained(path, dtype="auto" if dtype is None else dtype)
        if device is not None:
            model = model.to(device)
        return cls.from_model(model.eval(), tokenizer=AutoTokenizer.from_pretrained(path))

    @property
    def head(self) -> Head:
        """The head as it is now; with an unmerged adapter on it, the sum of its weights (a ``[V, D]``
        copy). Of FSDP or ZeRO-3 it is gathered: all ranks ask together."""
        return self._find_head()

    @property
    def sharded(self) -> bool:
        """Whether parameters are spread over processes: DTensors, FSDP, ZeRO-3."""
        return self._spread is not None or (
            self._module is not None and any(is_dtensor(parameter) for parameter in self._module.parameters())
        )

    @property
    def forwards_are_collective(self) -> bool:
        """Whether ranks with samples of their own run each forward together (FSDP, ZeRO-3)."""
        return self._spread is not None

    @property
    def device(self) -> torch.device:
        """Where token ids go: the device of the trunk's first parameter, else of the head."""
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
        return [inside(block) for block in longest]

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
        # A key-value cache would hold every layer's keys and values for nothing.
        options = {"use_cache": False} if hasattr(config, "use_cache") else {}
        if self._spread is None:
            output = self.trunk(input_ids, **options)
        else:
            self._spread.step(True)
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
        return full(hidden)

    def _through_root(
        self,
        input_ids: torch.Tensor,  # [B, T] int64
        options: dict[str, Any],
    ) -> torch.Tensor:
        """Hidden states ``[B, T, D]`` of a forward of the whole model, whose wrappers gather what it uses.

        In the head's place a function keeps what the head would see.
        """
        assert self._module is not None
        seen: list[torch.Tensor] = []

        def keep(hidden: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            seen.append(hidden)
            return hidden[..., :1]

        with replaced_forward(inside(_unwrap(self._module).get_output_embeddings()), keep):
            self._module(input_ids=input_ids, **options)
        return seen[0]

    @contextmanager
    def in_step(self) -> Iterator[None]:
        """Around all forwards of a call: of FSDP and ZeRO-3 every rank runs as many, those that are done on one token.

        A rank that raises leaves when the others are done, not before.
        """
        if self._spread is None:
            yield
            return
        token = torch.zeros((1, 1), dtype=torch.int64, device=self.device)

        def idle() -> None:
            with self.scoring():
                self._through_root(token, {})

        with self._spread.in_step(idle):
            yield

    @contextmanager
    def scoring(self) -> Iterator[None]:
        """Evaluation mode without gradients; on leaving, each module's training flag is as it was."""
        modules = list(self._module.modules()) if self._module is not None else []
        flags = [module.training for module in modules]
        # Flags are set one by one: train() and eval() would give every submodule the root's mode, and some
        # classes override them to do more.
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
    """The Student behind what a user gave: itself, a model, or a path or hub id to load.

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
        model = inside(model)
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif isinstance(model, (torch.nn.parallel.DistributedDataParallel, torch.nn.DataParallel)):
            model = model.module
        elif hasattr(model, "get_base_model"):
            model = model.get_base_model()
        else:
            return model


def _find_trunk(model: Any) -> torch.nn.Module:
    """The module below the head: named by ``base_model_prefix``, else what ``get_decoder`` gives."""
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
    layer = inside(model.get_output_embeddings())
    if spread is None:
        weight, bias = _projection(layer)
        placed = vocabulary_shard(weight.detach(), None if bias is None else bias.detach())
    else:
        with torch.no_grad(), spread.whole(layer):
            # A copy: what was gathered for the moment goes when it ends.
            weight, bias = _projection(layer)
            bias = None if bias is None else full(bias.detach()).clone()
            placed = {"weight": full(weight.detach()).clone(), "bias": bias}
    scale = 1.0
    for name, factor in LOGIT_SCALES.items():
        value = getattr(config, name, None)
        if value is not None:
            scale *= factor(float(value))
    return Head(**placed, softcap=getattr(config, "final_logit_softcapping", None), scale=scale)


def _projection(layer: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight ``[V, D]`` and bias ``[V]`` of the output embedding, adapters of PEFT included."""
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
        # In half precision the sum would round away most of a small update; the model itself never forms it.
        dtype = compute_dtype(weight.dtype)
        weight = weight.to(dtype) + layer.get_delta_weight(adapter).to(dtype)
        extra = layer.lora_B[adapter].bias
        if extra is not None:
            extra = extra.to(dtype) * layer.scaling[adapter]
            bias = extra if bias is None else bias.to(dtype) + extra
    return weight, bias


def _probe(student: Student, model: torch.nn.Module) -> None:
    """Hold trunk and head to the model's own logits, and the trunk to causality, on two rows of four
    tokens."""
    head = student.head
    vocab_size = head.vocab_size
    ids = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 5]]) * max(1, vocab_size // 7) % vocab_size  # differ at the end
    ids = ids.to(student.device)
    with student.scoring(), student.in_step():
        own = full(model(input_ids=ids).logits)
        hidden = student.hidden(ids)
        ours = head.logits(hidden.to(head.weight.device).flatten(0, 1)).view(*ids.shape, -1)
        if head.group is not None:  # eight tokens' logits, once a model, so that all ranks come to one verdict
            ours = _in_vocabulary(ours, head)
            own = own if own.shape[-1] == vocab_size else _in_vocabulary(own, head)
    tolerance = PROBE_TOLERANCE[hidden.dtype]
    name = type(inside(model)).__name__
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
    """Those of every rank, ``[B, T, V]``."""
    whole = logits.new_zeros((*logits.shape[:-1], head.vocab_size))
    whole[..., head.vocab_start : head.vocab_start + len(head.weight)] = logits
    return summed(whole, head.group)

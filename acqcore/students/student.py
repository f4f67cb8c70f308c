"""The student: a trunk that computes hidden states, and the head on top of it."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import torch

from acqcore import checks
from acqcore.defaults import ProcessSetting, standard_defaults
from acqcore.head import Head
from acqcore.students.blocks import blocks_of, branches_of
from acqcore.students.causal_lm import CausalLM, innermost
from acqcore.students.findings import altered, remembered
from acqcore.students.loading import checked_source, load_model, load_tokenizer
from acqcore.students.packing import Lengths
from acqcore.students.sharding import DataParallel, gathered, is_dtensor

#: Length of the test row that decides whether prompts may run separately, and the position of its cut.
CUT_LENGTH, CUT = 8, 3

#: Largest allowed difference between its two parts and one forward, relative to the largest hidden state.
CUT_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 8e-2}

# By innermost model, as a model and its wrappers share modules. Not an attribute: a student may be copied.
_LOCKS: WeakKeyDictionary[torch.nn.Module, threading.RLock] = WeakKeyDictionary()


class Student:
    """A causal language model split into a trunk, which computes hidden states, and a head, which computes logits.

    Args:
        trunk: maps ``input_ids [B, T]`` int64 to hidden states ``[B, T, D]`` after the final norm, or to an object
            with them as ``last_hidden_state``. Must be causal, as it gets no attention mask.
        head: the last layer.
        tokenizer: default for ``score``.
        max_length: maximum tokens per sample; None for no limit.

    Deep copies and pickles contain the model, or the trunk and the head.

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
            max_length = checks.positive_int("max_length", max_length)
        self.tokenizer = tokenizer
        self.max_length = max_length
        self._source: _Parts | CausalLM = _Parts(trunk, head)
        self._module = trunk if isinstance(trunk, torch.nn.Module) else None
        self._lengths = Lengths(self._module)

    @classmethod
    @standard_defaults()
    def from_model(cls, model: torch.nn.Module, *, tokenizer: Any = None, verify: bool = True) -> Student:
        """The student inside a transformers causal language model, or a PEFT model around one.

        Its hidden states are the output embedding's input when the model runs, PEFT wrapper included. The scale and
        softcap of the logits are determined by one forward in which the output embedding returns known values. It is
        repeated after changes to the model that may affect them.

        Parameters are shared with the model, so the student follows its training. Sharded models stay sharded:

        - Tensor parallel (transformers' ``tp_plan``, DTensors): all ranks score the same samples. A head sharded along
          the vocabulary is not gathered.
        - FSDP2, FSDP1 and ZeRO-3, as the trainer wraps them: each rank scores its own samples, any number of them, but
          all ranks must call together. The head is gathered once per call.

        Args:
            model: any ``...ForCausalLM``; LoRA layers and ``modules_to_save`` are applied, including those of the head.
            tokenizer: default for ``score``.
            verify: compare the model's logits with those of trunk and head on a few tokens, once per state of it.

        Raises:
            TypeError: not a module with an output embedding.
            ValueError: an encoder-decoder, an unknown adapter on the head, a quantised or offloaded output
                embedding, logits that are not a scaled and capped product, a model that is not causal.
        """
        checks.module("model", model)
        model = getattr(model, "_orig_mod", model)  # of torch.compile and accelerate's compile_regions
        student = cls.__new__(cls)
        student._source = CausalLM(model, verify)
        student.tokenizer = tokenizer
        student.max_length = student._source.max_length
        student._module = model
        student._lengths = Lengths(model)
        with student.in_step():
            student.head  # noqa: B018
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
            ValueError: a path without a model, an unknown dtype, an unavailable device, a broken tokenizer.
            TypeError: path is neither text nor a path.
        """
        checks.installed("transformers", f"loading {str(path)!r}", "train")
        path = checked_source(path)
        checks.device("device", device)
        model = load_model(path, dtype)
        if device is not None:
            model = model.to(device)
        return cls.from_model(model.eval(), tokenizer=load_tokenizer(path))

    @property
    def trunk(self) -> Callable[..., Any]:
        """The current trunk: the one given, or the model's."""
        return self._source.trunk

    @property
    def head(self) -> Head:
        """The current head. An unmerged adapter is added to a ``[V, D]`` copy of its weight. Under FSDP and ZeRO-3 the
        head is gathered by a collective."""
        with self.scoring():
            return self._source.head()

    @property
    def _vocab_size(self) -> int:
        """Valid token ids are below this."""
        return self._source.token_ids

    @property
    def sharded(self) -> bool:
        """Whether parameters are sharded over processes: DTensors, FSDP, ZeRO-3."""
        return self.forwards_are_collective or (
            self._module is not None and any(is_dtensor(parameter) for parameter in self._module.parameters())
        )

    @property
    def forwards_are_collective(self) -> bool:
        """Whether ranks with different samples run each forward together (FSDP, ZeRO-3)."""
        return self._source.data_parallel is not None

    @property
    def device(self) -> torch.device:
        """Device of the token ids: that of the trunk's first parameter that is not offloaded, else the head's."""
        modules = [module for module in (self.trunk, self._module) if isinstance(module, torch.nn.Module)]
        devices = (p.device for module in modules for p in module.parameters() if not p.is_meta)
        return next(devices, None) or self.head.weight.device

    @property
    def blocks(self) -> list[torch.nn.Module]:
        """The transformer blocks in execution order; may be empty. They are the list members that take and return the
        residual stream, found by a forward of a few tokens, once per model."""
        with self.alone():
            return [] if self._module is None else blocks_of(self._module, self._few_tokens)

    @property
    def branches(self) -> list[list[torch.nn.Module]]:
        """For each block, the modules whose outputs it adds to the residual stream, found with the blocks.

        Raises:
            ValueError: a block adds something to the stream that is not a module's output.
        """
        with self.alone():
            return [] if self._module is None else branches_of(self._module, self._few_tokens)

    def verdict(self, question: str, check: Callable[[], bool], *subjects: Any) -> bool:
        """The result of ``check``, which runs once per ``question`` and its subjects (hashable) until the model is
        altered."""
        assert self._module is not None
        with self.scoring(), torch.inference_mode(False), torch.no_grad():
            return remembered(self._module, question, (subjects, altered(self._module)), check)

    def _few_tokens(self) -> None:
        """A forward without gradients that visits every block."""
        with self.scoring(), torch.inference_mode(False), torch.no_grad():
            self.hidden(torch.arange(4, device=self.device)[None] % self._vocab_size)

    def hidden(
        self,
        input_ids: torch.Tensor,  # [B, T] int64
    ) -> torch.Tensor:
        """Final hidden states ``[B, T, D]`` of one forward.

        Raises:
            TypeError: the trunk returned neither a tensor nor an object with ``last_hidden_state``.
            ValueError: its shape is not ``[B, T, D]``.
        """
        if self._source.data_parallel is not None:
            self._source.data_parallel.step(True)
        self._lengths.reset()
        output = self._source.hidden(input_ids)
        hidden = output if isinstance(output, torch.Tensor) else getattr(output, "last_hidden_state", None)
        if not isinstance(hidden, torch.Tensor):
            raise TypeError(
                "trunk: expected it to return a tensor [B, T, D] or an object with last_hidden_state, "
                f"got {checks.describe(output)}"
            )
        if hidden.dim() != 3 or hidden.shape[:2] != input_ids.shape:
            raise ValueError(
                f"trunk: expected hidden states [B, T, D] for input_ids {list(input_ids.shape)}, "
                f"got {checks.describe(hidden)}"
            )
        return gathered(hidden)

    def hidden_after(
        self,
        input_ids: torch.Tensor,  # [B, T] int64
        start: int,
        within: AbstractContextManager[Any],
    ) -> torch.Tensor:
        """Final hidden states ``[B, T, D]``. Tokens before ``start`` run without a graph, the rest in ``within``.

        For noise in completions only: a student is causal, so a gradient in a completion's activations never passes
        through its prompt. The prompt fills a key-value cache, and the completion runs on that cache.
        """
        assert isinstance(self._source, CausalLM)
        self._lengths.reset()
        with torch.no_grad():
            before, cache = self._source.continued(input_ids[:, :start], None)
        with within:
            after, _ = self._source.continued(input_ids[:, start:], cache)
            return torch.cat([before, after], dim=1)

    @property
    def cuts_prompts(self) -> bool:
        """Whether :meth:`hidden_after` gives the same values as :meth:`hidden`, tested on a few tokens until the model
        is altered. False for a trunk without a cache, and if hidden states depend on the length of a forward."""
        if self._source.cache is None or self._module is None or not self._lengths.plain:
            return False
        modules = list(self._module.modules())
        if any(getattr(module, "rope_deltas", None) is not None for module in modules):
            return False  # left by a call with images, it would shift the positions of tokens after a cache
        adapters = [c for module in modules for c in getattr(module, "peft_config", {}).values()]
        if any(getattr(adapter, "alora_invocation_tokens", None) for adapter in adapters):
            return False  # it acts from certain tokens on, which the prompt may hold
        if self.max_length is not None and self.max_length < CUT_LENGTH:
            return False
        return self.verdict("cuts prompts", self._cut_agrees)

    def _cut_agrees(self) -> bool:
        ids = torch.arange(CUT_LENGTH, device=self.device)[None]
        ids = (ids + self._vocab_size // 2) % self._vocab_size  # ordinary tokens, as in Lengths.check
        expected = self.hidden(ids)
        try:
            found = self.hidden_after(ids, CUT, nullcontext())
        except torch.OutOfMemoryError:
            raise
        except Exception:  # from the student's own code, which may not accept its own cache
            return False
        error = (found.double() - expected.double()).abs().max()
        return bool(error <= CUT_TOLERANCE[expected.dtype] * expected.double().abs().max())

    def length_groups(self, lengths: Sequence[int], batch_tokens: int) -> list[int]:
        """Group of each sample; those of equal groups may share a batch of ``batch_tokens`` padded tokens, which is
        also the most that the check of new lengths runs."""
        most = batch_tokens // 2  # longer samples share no batch
        shared = [length for length in lengths if length <= most]
        if len(shared) > 1:
            longest = max(shared)
            if self.max_length is not None:  # rounded up if the student takes it, so that few lengths are checked
                rounded = 1 << (longest - 1).bit_length() if longest < 1024 else -(-longest // 1024) * 1024
                longest = max(longest, min(rounded, self.max_length, most))
            with self.scoring(), torch.inference_mode(False), torch.no_grad():
                self._lengths.check(longest, self._vocab_size, lambda ids: self.hidden(ids.to(self.device)))
        return self._lengths.groups(lengths)

    @contextmanager
    def in_step(self) -> Iterator[None]:
        """Context for all forwards of a call. Under FSDP and ZeRO-3 all ranks run the same number; ranks that finish
        early run the rest on one token. A rank that raises waits for the others."""
        if self._source.data_parallel is None:
            yield
            return
        token = torch.zeros((1, 1), dtype=torch.int64, device=self.device)

        def idle() -> None:
            with self.scoring():
                self._source.hidden(token)

        with self._source.data_parallel.in_step(idle):
            yield

    def alone(self) -> AbstractContextManager[Any]:
        """Re-entrant context in which no other thread scores with this model. All changes to a model (modes, hooks,
        forwards, ``requires_grad``) are made within it, lest threads restore each other's.

        A thread must not wait for a second model within it: another thread may hold that one and wait for this one. A
        student made from a part of another's model has its own lock.
        """
        return nullcontext() if self._module is None else _LOCKS.setdefault(innermost(self._module), threading.RLock())

    @contextmanager
    def scoring(self) -> Iterator[None]:
        """Context in evaluation mode without gradients, :meth:`alone` and uncompiled; each module's training flag is
        restored afterwards."""
        with self.alone(), uncompiled():
            modules = [] if self._module is None else [module for module in self._module.modules() if module.training]
            # Set one by one: eval() and train() give every submodule the root's mode, and some classes override them.
            for module in modules:
                module.training = False
            try:
                with torch.no_grad():
                    yield
            finally:
                for module in modules:
                    module.training = True


class _Parts:
    """A trunk and a head given separately; the interface is that of :class:`CausalLM`."""

    data_parallel: DataParallel | None = None
    cache: str | None = None

    def __init__(self, trunk: Callable[..., Any], head: Head) -> None:
        self.trunk = trunk
        self.token_ids = head.vocab_size
        self._head = head
        # A key-value cache would only waste memory.
        self._options = {"use_cache": False} if hasattr(getattr(trunk, "config", None), "use_cache") else {}

    def head(self) -> Head:
        return self._head

    def hidden(
        self,
        input_ids: torch.Tensor,  # [B, T] int64
    ) -> Any:
        return self.trunk(input_ids, **self._options)


def _force_eager() -> Callable[[], None]:
    stance = torch.compiler.set_stance("force_eager")
    return lambda: stance.__exit__(None, None, None)


_eager = ProcessSetting(_force_eager)


def uncompiled() -> AbstractContextManager[None]:
    """Re-entrant context in which compiled code runs eagerly: once compiled, a module ignores hooks added to it."""
    # Without torch._dynamo nothing is compiled, and importing it takes a second.
    return _eager() if "torch._dynamo" in sys.modules else nullcontext()


StudentLike: TypeAlias = Student | torch.nn.Module | str | os.PathLike[str]


def as_student(student: StudentLike) -> Student:
    """Convert a Student, a model, a path or a hub id to a Student."""
    if isinstance(student, Student):
        return student
    if isinstance(student, (str, os.PathLike)):
        return Student.load(student)
    checks.module("student", student)
    return Student.from_model(student)

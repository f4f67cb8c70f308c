"""A transformers causal language model, split at its output embedding."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from typing import Any

import torch

from acqcore.head import Head
from acqcore.students.findings import alterations, remembered
from acqcore.students.heads import KNOWN_LOGITS, MAP_TOLERANCE, LogitMap, placed_projection
from acqcore.students.sharding import DataParallel, data_parallel, gathered, is_dtensor, replaced_forward, unwrapped
from acqcore.vocab_parallel import summed

#: Largest allowed difference between the model's logits and ours, relative to the largest without bias. Both use the
#: same hidden states, so only the product and the logit map are rounded differently.
PROBE_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}

#: Names of the key-value cache in a model's arguments and outputs, across versions of transformers.
CACHES = ("past_key_values", "cache")

#: Config entries that hold the maximum number of tokens, across models.
LIMITS = ("max_position_embeddings", "max_target_positions", "max_seq_len")

ADVICE = "use acqcore.Student(trunk, head)"

#: About this many entries of each parameter outside the trunk, such as a logit scale, are part of a model's state.
FEW = 16


class CausalLM:
    """The hidden states and the head of a model; errors are those of :meth:`acqcore.Student.from_model`."""

    def __init__(self, model: torch.nn.Module, verify: bool) -> None:
        self._model = model
        self._verifies = verify
        self._causal = causal = innermost(model)
        self.name = type(causal).__name__
        embeddings = getattr(causal, "get_output_embeddings", None)
        if not hasattr(causal, "config") or embeddings is None or embeddings() is None:
            raise TypeError(
                f"model: expected a transformers causal language model with an output embedding, got {self.name}; "
                "for any other use acqcore.Student(trunk, head)"
            )
        if getattr(causal.config, "is_encoder_decoder", False):
            raise ValueError(f"model: expected a decoder-only language model, {self.name} is an encoder-decoder")
        self.config = causal.config.get_text_config()
        self.data_parallel: DataParallel | None = data_parallel(model)
        # Wrappers that gather parameters must run; torch.compile and DistributedDataParallel can be bypassed.
        self._root = model if self.data_parallel is not None else runnable(model)
        # A key-value cache would only waste memory.
        accepted = inspect.signature(type(causal).forward).parameters
        self._options = {"use_cache": False} if "use_cache" in accepted else {}
        named = [name for name in CACHES if name in accepted and "use_cache" in accepted]
        #: Name of the key-value cache argument; None if there is none, or if ranks run each forward together.
        self.cache = named[0] if named and self.data_parallel is None else None
        self._map = LogitMap()
        #: Dtype of the model's own product with the head; accelerate's mixed precision sets it by autocast.
        self._product = torch.float32

    @property
    def trunk(self) -> torch.nn.Module:
        """The current trunk; the whole model if it names none."""
        found: torch.nn.Module = getattr(self._causal, getattr(self._causal, "base_model_prefix", ""), self._causal)
        return found

    @property
    def max_length(self) -> int | None:
        """Maximum tokens per sample, None if the model has no limit."""
        limits = [limit for name in LIMITS if (limit := getattr(self.config, name, None)) is not None][:1]
        for name, table in self._causal.named_modules():
            # RoBERTa and its descendants number positions from the padding index on.
            embedding = name.endswith("position_embeddings") and isinstance(table, torch.nn.Embedding)
            if embedding and table.padding_idx is not None:
                limits.append(table.num_embeddings - table.padding_idx - 1)
        return min(limits, default=None)

    @property
    def _device(self) -> torch.device:
        """Device of the first parameter that is not offloaded."""
        found = next((parameter.device for parameter in self._model.parameters() if not parameter.is_meta), None)
        if found is None:
            raise ValueError(f"model: {self.name} has no weights, all parameters are on the meta device")
        return found

    def hidden(
        self,
        input_ids: torch.Tensor,  # [B, T] int64
    ) -> torch.Tensor:
        """Input of the output embedding, ``[B, T, D]``."""
        return self._run(input_ids)[0]

    def continued(
        self,
        input_ids: torch.Tensor,  # [B, T] int64
        cache: Any,
    ) -> tuple[torch.Tensor, Any]:
        """Like :meth:`hidden` for tokens that follow ``cache``, None for none; also returns the extended cache."""
        hidden, output = self._run(input_ids, options={"use_cache": True, str(self.cache): cache})
        return hidden, getattr(output, str(self.cache))

    def logits(
        self,
        input_ids: torch.Tensor,  # [B, T] int64
    ) -> torch.Tensor:
        """The model's own logits, ``[B, T, V]``; only this rank's part if the head is sharded."""
        return self._logits_of(self._root(input_ids=input_ids, **self._options))

    def _logits_of(self, output: Any) -> torch.Tensor:
        logits = getattr(output, "logits", None)
        if not isinstance(logits, torch.Tensor):
            raise ValueError(f"model: expected {self.name} to return an object with logits")
        return gathered(logits)

    def head(self) -> Head:
        """The current head, with the scale and softcap of the model's logits. These are determined, and the head
        verified, once per state of the model. A collective under FSDP and ZeRO-3."""
        placed = placed_projection(self._causal, self.data_parallel)
        self._read_logit_map(placed)
        if self._map.columns is not None:
            placed["vocab_size"] = self._map.columns
        head = Head(**placed, softcap=self._map.softcap, scale=self._map.scale)
        if self._verifies:
            remembered(self._model, "verified", self._state(), lambda: self._verify(head))
        return head

    def _read_logit_map(self, placed: dict[str, Any]) -> None:
        weight = placed["weight"]
        self.vocab_size: int = placed.get("vocab_size", len(weight))
        embedding = None
        with suppress(AttributeError, NotImplementedError):  # some models name none
            embedding = self._causal.get_input_embeddings()
        rows = getattr(embedding, "num_embeddings", self.vocab_size)
        #: Valid token ids are below this.
        self.token_ids = min(self.vocab_size, rows)
        if weight.is_meta:  # no values to probe
            if any(hasattr(module, "_hf_hook") for module in self._model.modules()):  # of accelerate
                raise ValueError(
                    f"model: the output embedding of {self.name} is offloaded; load the model without a device_map, or "
                    "with one that keeps the output embedding on a device"
                )
            return
        self._map = remembered(self._model, "logit map", self._state(), lambda: self._logit_map(Head(**placed)))
        self.vocab_size = self._map.columns or self.vocab_size

    def _logit_map(self, head: Head) -> LogitMap:
        known = torch.tensor(KNOWN_LOGITS, device=head.weight.device)
        if head.weight.dtype == torch.float64:
            known = known.double()
        if self.data_parallel is None:
            columns = torch.arange(self.vocab_size, device=known.device)
        else:  # the head's hooks, which gather its logits, run
            columns = torch.arange(len(head.weight), device=known.device) + head.vocab_start
        given = known[columns % len(known)]  # [v]
        ids = torch.arange(4, device=self._device)[None] % self.token_ids
        try:
            output = self._run(ids, lambda hidden: given.to(hidden.device).expand(*hidden.shape[:-1], -1))[1]
        except torch.OutOfMemoryError:
            raise
        except Exception as cause:  # from the model's own code
            if isinstance(cause, ValueError) and str(cause).startswith("model: "):
                raise
            kind = type(cause).__name__  # a KeyError's text is only the key
            raise ValueError(f"model: {self.name} does not run on token ids alone: {kind}: {cause}") from cause
        logits = _whole(self._logits_of(output), head)  # [1, 4, V]
        refused = ValueError(
            f"model: {self.name} changes the logits of its output embedding by more than a scale and a softcap; "
            f"{ADVICE}"
        )
        count = logits.shape[-1]
        if count != self.vocab_size and (count > self.vocab_size or head.group is not None):
            raise refused
        found = LogitMap.fitted(logits[0, 0, : len(known)]) if count >= len(known) else LogitMap()
        if found is None:
            raise refused
        expected = found(known[torch.arange(count, device=known.device) % len(known)].double())
        error = (logits.to(expected) - expected).abs() / expected.abs().clamp_min(1e-12)
        if not bool((error <= MAP_TOLERANCE[logits.dtype]).all()):
            raise refused
        return found if count == self.vocab_size else replace(found, columns=count)

    def _verify(self, head: Head) -> None:
        """Compare trunk and head with the model's own logits, and check causality.

        Raises:
            ValueError: the logits differ or are not finite, or a token sees later tokens.
        """
        ids = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 5]]) * max(1, self.token_ids // 7) % self.token_ids
        ids = ids.to(self._device)
        with torch.no_grad():
            own = _whole(self.logits(ids), head)
            hidden = gathered(self.hidden(ids)).to(head.weight.device)
            ours = _whole(head.logits(hidden), head)
            product = ours if head.bias is None else _whole(replace(head, bias=None).logits(hidden), head)
        tolerance = max(PROBE_TOLERANCE[dtype] for dtype in (self._product, hidden.dtype, head.weight.dtype))
        self._check_product(hidden)
        advice = f"acqcore does not know how it changes them; {ADVICE}"
        if own.shape != ours.shape:
            raise ValueError(
                f"model: {self.name} returns logits {list(own.shape)} but its trunk and head give "
                f"{list(ours.shape)}: {advice}"
            )
        own = own.to(ours)
        largest = float(product.abs().max())
        error = _excess(own, ours, tolerance, largest)
        if error is not None and not bool(product.isfinite().all()):
            raise ValueError(f"model: the logits of {self.name} are not finite; its weights may be damaged")
        if error is not None:
            raise ValueError(
                f"model: the logits of {self.name} differ from those of its trunk and head by {error:.3g} (largest "
                f"logit without bias {largest:.3g}): {advice}"
            )
        before = hidden[:, :-1].double()
        if not float((before[0] - before[1]).abs().max()) <= tolerance * float(before.abs().max()):
            raise ValueError(f"model: expected a causal language model, in {self.name} a token sees later tokens")

    def _state(self) -> tuple[Any, ...]:
        """State that may change how the logits follow from the hidden states: numbers of the configuration and of the
        modules outside the trunk (of the model itself if it names no trunk), including learned ones, and alterations of
        these modules. A few entries stand for a large parameter; the weight and bias of the output embedding itself do
        not count, as the head follows them."""
        if self.trunk is self._causal:  # any other module may belong to the trunk
            modules, outside, own = list(self._model.modules()), [self._causal], [self._causal]
        else:
            modules, own = (
                [module for _, module in model.named_modules(memo={self.trunk})]
                for model in (self._model, self._causal)
            )
            outside = modules
        head = set(self._causal.get_output_embeddings().modules())
        state: list[Any] = [self.vocab_size, *map(alterations, modules)]
        for module in outside:
            own_tensors = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
            for key, t in own_tensors:
                followed = module in head and key in ("weight", "bias")
                counts = t.numel() <= FEW or (not followed and self.data_parallel is None)
                if counts and not is_dtensor(t) and not t.is_meta:
                    state += t.detach().reshape(-1)[:: max(1, t.numel() // FEW)].tolist()
        for owner in (self.config, *own):
            state += [(k, v) for k, v in vars(owner).items() if isinstance(v, int | float | None)]
        return tuple(state)

    def _check_product(
        self,
        hidden: torch.Tensor,  # [B, T, D]
    ) -> None:
        """Check the product of an output embedding that has hooks or a custom forward: in half precision, the logits'
        tolerance would miss a factor of 1.03."""
        layer = unwrapped(self._causal.get_output_embeddings())
        altered = layer._forward_hooks or type(layer).forward is not torch.nn.Linear.forward or "forward" in vars(layer)
        if self.data_parallel is not None or not isinstance(layer, torch.nn.Linear) or not altered:
            return
        if is_dtensor(layer.weight):  # the hooks are those of tensor parallelism
            return
        hidden = hidden.to(layer.weight)
        product = torch.nn.functional.linear(hidden, layer.weight, layer.bias).double()
        largest = float(torch.nn.functional.linear(hidden, layer.weight).abs().max())
        error = _excess(layer(hidden).double(), product, torch.finfo(hidden.dtype).eps, largest)
        if error is not None:
            raise ValueError(
                f"model: the output embedding of {self.name} differs from the product with its weight by "
                f"{error:.3g}; {ADVICE}"
            )

    def _run(
        self,
        input_ids: torch.Tensor,  # [B, T] int64
        give: Callable[[torch.Tensor], torch.Tensor] = lambda hidden: hidden[..., :1],
        options: Mapping[str, Any] | None = None,
    ) -> tuple[torch.Tensor, Any]:
        """Input of the output embedding, and the model's output if the embedding returns ``give(hidden)``: by default
        one column instead of logits, which the model may scale or cap."""
        seen: list[torch.Tensor] = []

        def keep(hidden: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            seen.append(hidden)
            kind = hidden.device.type
            self._product = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
            return give(hidden)

        layer = unwrapped(self._causal.get_output_embeddings())
        with replaced_forward(layer, keep), nullcontext() if self.data_parallel is not None else _unhooked(layer):
            output = self._root(input_ids=input_ids, **(self._options if options is None else options))
        if len(seen) != 1:
            raise ValueError(
                f"model: {self.name} calls its output embedding {len(seen)} times in a forward, expected once; {ADVICE}"
            )
        if seen[0].dim() != 3 or seen[0].shape[:2] != input_ids.shape:
            raise ValueError(
                f"model: the output embedding of {self.name} gets {list(seen[0].shape)} for input_ids "
                f"{list(input_ids.shape)}, expected [B, T, D]: virtual tokens are not scored"
            )
        return seen[0], output


@contextmanager
def _unhooked(layer: torch.nn.Module) -> Iterator[None]:
    """Context that disables a layer's output hooks: those of tensor parallelism expect its own logits."""
    hooks = layer._forward_hooks
    layer._forward_hooks = type(hooks)()
    try:
        yield
    finally:
        layer._forward_hooks = hooks


def innermost(model: Any) -> Any:
    """The transformers model inside torch.compile, DataParallel, FSDP1, DeepSpeed and PEFT wrappers."""
    while True:
        model = runnable(model)
        if not hasattr(model, "get_base_model"):
            return model
        model = model.get_base_model()


def runnable(model: Any) -> Any:
    """Like :func:`innermost`, but keeps PEFT's wrapper, whose forward may switch adapters per token."""
    while True:
        model = unwrapped(model)
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif isinstance(model, (torch.nn.parallel.DistributedDataParallel, torch.nn.DataParallel)):
            model = model.module
        else:
            return model


def _excess(a: torch.Tensor, b: torch.Tensor, tolerance: float, largest: float) -> float | None:
    """The largest difference of two logits beyond ``tolerance``, or None. The tolerance is relative to ``largest``, or
    to the two logits if both are larger, as under a bias that masks tokens. Equal infinities do not differ."""
    error = (a - b).abs().where(a != b, 0)
    allowed = tolerance * torch.minimum(a.abs(), b.abs()).clamp_min(largest)
    return None if bool((error <= allowed).all()) else float(error.where(~(error <= allowed), 0).max())


def _whole(
    logits: torch.Tensor,  # [B, T, V], or [B, T, v] for the head's own rows
    head: Head,
) -> torch.Tensor:
    """The logits of all ranks, ``[B, T, V]``, from which all must draw the same conclusion."""
    if head.group is None or logits.shape[-1] == head.vocab_size:
        return logits
    whole = logits.new_zeros((*logits.shape[:-1], head.vocab_size))
    whole[..., head.vocab_start : head.vocab_start + len(head.weight)] = logits
    return summed(whole, head.group)

"""Generation with transformers, for any causal LM on any device, including the model in training."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.cache_utils import DynamicLayer

import acqcore
from acqsynth import checks
from acqsynth.domains import Messages
from acqsynth.engines import (
    Completion,
    Engine,
    Sampling,
    check_ids,
    completion,
    derived_seed,
    encode,
    eos_ids,
    leave_room,
    where_room,
)
from acqsynth.models import load_tokenizer


class TransformersEngine(Engine):
    """Runs left-padded batches of prompts of similar length through ``model.generate``.

    A completion ends at any end-of-sequence token of the model's generation configuration or the tokenizer, at
    ``max_tokens``, or at the model's maximum position.

    Args:
        model: a local path or hub id, or a causal LM (a PEFT model too), which stays on its device; its mode, gradients
            and the random state are left unchanged.
        tokenizer: by default the one at the path; required for a model object.
        device: where a path is loaded; by default the first GPU, else the CPU.
        dtype: dtype of a loaded path's weights; by default the saved one.
        batch_tokens: maximum tokens per batch, with completions and padding; a longer row gets its own batch.

    Raises:
        ValueError: a model without a tokenizer; a device or dtype for a model that is already loaded.
    """

    name = "transformers"

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        batch_tokens: int = 16384,
    ) -> None:
        if isinstance(model, torch.nn.Module):
            if tokenizer is None:
                raise ValueError("tokenizer: expected the model's tokenizer, as model is an object without one")
            if device is not None or dtype is not None:
                raise ValueError("device, dtype: expected None, as the model is already loaded")
        else:
            path = os.fspath(model)
            place = device or ("cuda" if torch.cuda.is_available() else "cpu")
            model = acqcore.load_model(path, dtype).to(place).eval()
            tokenizer = tokenizer or load_tokenizer(path)
        checks.positive_int("batch_tokens", batch_tokens)
        self.model = model
        self.tokenizer = tokenizer
        self.batch_tokens = batch_tokens

    def generate(self, prompts: Sequence[str | Messages], sampling: Sampling) -> list[list[Completion]]:
        """As in :class:`Engine`.

        Raises:
            ValueError: an empty prompt, or a token outside the model's vocabulary.
        """
        limit = self._limit()
        return where_room(self._encoded(prompts), limit, sampling, partial(self._draw, limit))

    def _encoded(self, prompts: Sequence[str | Messages]) -> list[list[int]]:
        ids = encode(self.tokenizer, prompts)
        check_ids("prompts", ids, self.tokenizer, self.model.config)
        return ids

    def _limit(self) -> int | None:
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def _draw(self, limit: int | None, ids: list[list[int]], sampling: Sampling) -> list[list[Completion]]:
        rows = [row for row in ids for _ in range(sampling.n)]
        room = [min(sampling.max_tokens, limit - len(row)) if limit else sampling.max_tokens for row in rows]
        eos = eos_ids(self.tokenizer, self.model.generation_config)
        done: dict[int, Completion] = {}
        with self._generating():
            for number, batch in enumerate(batches([len(row) for row in rows], room, self.batch_tokens)):
                torch.manual_seed(derived_seed(sampling.seed, number))
                drawn = self._batch([rows[i] for i in batch], room[batch[0]], sampling, eos)
                done.update(zip(batch, drawn, strict=True))
        return [[done[i * sampling.n + draw] for draw in range(sampling.n)] for i in range(len(ids))]

    def logprobs(self, prompts: Sequence[str | Messages], texts: Sequence[str], at_once: int = 32) -> list[list[float]]:
        """Log-probability of each of m texts, including the end token, as the completion of each of n prompts. The end
        token makes a text comparable with longer texts that begin with it.

        Args:
            prompts: as in :meth:`generate`.
            texts: non-empty texts, tokenized separately from the prompt, as completions are generated.
            at_once: texts per forward pass.

        Returns:
            n lists of m numbers, nats; -inf for a prompt that leaves no room for the longest text, which is logged.

        Raises:
            ValueError: an empty prompt, a token of one outside the model's vocabulary, an empty or too long text, or a
                tokenizer without an end-of-sequence token.
        """
        ids = self._encoded(prompts)
        ends = eos_ids(self.tokenizer, self.model.generation_config)
        pieces = [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        if not ends or not all(pieces):
            raise ValueError(
                "texts: expected texts of at least one token, and a tokenizer with an end-of-sequence token"
            )
        end = self.tokenizer.eos_token_id if self.tokenizer.eos_token_id is not None else ends[0]
        rows = [[*piece, end] for piece in pieces]
        limit, longest = self._limit(), max(map(len, rows), default=0)
        if limit and longest >= limit:
            raise ValueError(f"texts: expected fewer than {limit} tokens, the model's limit, got {longest}")
        fits = leave_room(ids, longest, limit)
        parts = [self._padded(rows[i : i + at_once]) for i in range(0, len(rows), at_once)]
        with self._generating():
            return [
                self._continued(prompt, parts) if fit else [-math.inf] * len(rows)
                for prompt, fit in zip(ids, fits, strict=True)
            ]

    def _padded(self, rows: list[list[int]], side: str = "right", pad: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids ``[m, T]`` and the mask of real tokens."""
        ids = [torch.tensor(row) for row in rows]
        tokens = pad_sequence(ids, batch_first=True, padding_value=pad, padding_side=side)
        masks = [torch.ones_like(row, dtype=torch.bool) for row in ids]
        there = pad_sequence(masks, batch_first=True, padding_side=side)
        return tokens.to(self.model.device), there.to(self.model.device)

    def _continued(self, prompt: list[int], parts: list[tuple[torch.Tensor, torch.Tensor]]) -> list[float]:
        """The log-probability of each row of the parts after the prompt."""
        before = torch.tensor([prompt], device=self.model.device)
        # Without logits of the prompt's other tokens, which take V numbers each.
        last = ["logits_to_keep"] if self.model._supports_logits_to_keep() else []
        first = self.model(input_ids=before, use_cache=True, **dict.fromkeys(last, 1))
        name = "cache" if "cache" in first else "past_key_values"  # before transformers 5.24
        # Recurrent and convolutional states may take only one token at a time, so other models read the prompt again.
        layers = getattr(first.get(name), "layers", [None])
        shared = not self.model._is_stateful and all(isinstance(layer, DynamicLayer) for layer in layers)
        found: list[float] = []
        for tokens, there in parts:
            if shared:
                cache = copy.deepcopy(first[name])
                cache.batch_repeat_interleave(len(tokens))
                later = self.model(input_ids=tokens[:, :-1], use_cache=True, **{name: cache}).logits  # [m, T - 1, V]
            else:
                whole = torch.cat([before.expand(len(tokens), -1), tokens[:, :-1]], dim=1)
                kept = dict.fromkeys(last, tokens.shape[1] - 1)
                later = self.model(input_ids=whole, use_cache=False, **kept).logits[:, 1 - tokens.shape[1] :]
            logits = torch.cat([first.logits[:, -1:].expand(len(tokens), -1, -1), later], dim=1).float()
            own = logits.gather(2, tokens[:, :, None])[:, :, 0] - logits.logsumexp(dim=2)
            found += own.where(there, 0).sum(dim=1).tolist()
        return found

    def reload(self, weights: str | os.PathLike[str] | Mapping[str, torch.Tensor]) -> None:
        """As in :class:`Engine`; a path is a folder that ``from_pretrained`` reads. Weights are copied in place.

        Raises:
            FileNotFoundError: no such folder. ValueError: tensors are missing, unknown or of another shape; the
                model is left unchanged.
        """
        if isinstance(weights, Mapping):
            state = dict(weights)
        else:
            if not Path(weights).is_dir():
                raise FileNotFoundError(f"weights: expected a folder with a model, {weights} is not one")
            state = acqcore.load_model(weights).state_dict()
        own = self.model.state_dict()
        tied = set(getattr(self.model, "all_tied_weights_keys", ()))
        faults = {
            "missing": own.keys() - state.keys() - tied,
            "unknown": state.keys() - own.keys(),
            "of another shape": {n for n in own.keys() & state.keys() if own[n].shape != state[n].shape},
        }
        if any(faults.values()):
            said = "; ".join(f"{what}: {', '.join(sorted(names)[:4])}" for what, names in faults.items() if names)
            raise ValueError(f"weights: expected those of {type(self.model).__name__}, {said}")
        self.model.load_state_dict(state, strict=False)

    def _batch(self, rows: list[list[int]], room: int, sampling: Sampling, eos: list[int]) -> list[Completion]:
        pad = self.tokenizer.pad_token_id
        if pad is None:
            pad = eos[0] if eos else 0  # masked, so any token will do
        tokens, mask = self._padded(rows, "left", pad)
        kept = _Logprobs() if sampling.top2 else None
        output = self.model.generate(
            input_ids=tokens,
            attention_mask=mask.long(),
            logits_processor=LogitsProcessorList([] if kept is None else [kept]),
            generation_config=GenerationConfig(
                do_sample=sampling.temperature > 0,
                temperature=sampling.temperature or 1.0,
                top_p=sampling.top_p,
                top_k=0,
                max_new_tokens=room,
                eos_token_id=eos or None,
                pad_token_id=pad,
                use_cache=True,
            ),
        )
        drawn = output[:, tokens.shape[1] :].tolist()
        if kept is None:
            return [completion(self.tokenizer, row, eos) for row in drawn]
        top2, own = kept.table(output)
        return [
            completion(self.tokenizer, row, eos, [(first, second) for first, second in top2[i]], own[i])
            for i, row in enumerate(drawn)
        ]

    @contextmanager
    def _generating(self) -> Iterator[None]:
        """Evaluation mode without gradients, with a forked random state and a plain generation configuration: the
        model's own would fill in what Sampling does not set, such as ``min_p``. Restores everything on exit."""
        modules = list(self.model.modules())
        flags = [module.training for module in modules]
        configured = [(module, module.generation_config) for module in modules if "generation_config" in vars(module)]
        device = self.model.device
        for module in modules:
            module.training = False
        for module, _ in configured:
            module.generation_config = GenerationConfig()
        try:
            with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
                yield
        finally:
            for module, flag in zip(modules, flags, strict=True):
                module.training = flag
            for module, own in configured:
                module.generation_config = own


def batches(lengths: Sequence[int], room: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Row indices of each batch, longest prompts first, given prompt lengths, room for completions and the maximum
    tokens of a batch, padding included. Rows of a batch have equal room, so that a row's limit does not depend on its
    neighbours."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batch:
            first = batch[0]
            if room[i] != room[first] or (len(batch) + 1) * (lengths[first] + room[first]) > budget:
                yield batch
                batch = []
        batch.append(i)
    if batch:
        yield batch


class _Logprobs(LogitsProcessor):
    """Log-probabilities of the two most likely tokens and the drawn one; holds the logits of only one step."""

    def __init__(self) -> None:
        self.top2: list[torch.Tensor] = []  # [B, 2] each
        self.drawn: list[torch.Tensor] = []  # [B, 1] each
        self.logprobs: torch.Tensor | None = None  # [B, V] of the previous step

    def __call__(
        self,
        input_ids: torch.Tensor,  # [B, T]
        scores: torch.Tensor,  # [B, V]
    ) -> torch.Tensor:
        if self.logprobs is not None:  # the token drawn at that step is known now
            self.drawn.append(self.logprobs.gather(1, input_ids[:, -1:]))
        self.logprobs = scores.log_softmax(dim=-1)
        self.top2.append(self.logprobs.topk(2, dim=-1).values)
        return scores

    def table(
        self,
        output: torch.Tensor,  # [B, T]
    ) -> tuple[list[list[list[float]]], list[list[float]]]:
        """The two largest values and the drawn token's value, for each row and step."""
        assert self.logprobs is not None
        drawn = torch.cat([*self.drawn, self.logprobs.gather(1, output[:, -1:])], dim=1)
        return torch.stack(self.top2, dim=1).tolist(), drawn.tolist()

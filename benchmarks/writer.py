"""A generator of short texts that draws many completions at once and takes GRPO steps.

Both use the Llama forward of :mod:`benchmarks.pool_fit`. Drawing computes the keys and values of a prompt once for all
its completions; a decoding step is then about twelve kernels per block, for any number of rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F  # noqa: N812
from torch.nn.attention import sdpa_kernel

from benchmarks.pool_fit import ATTENTION, CLIP, Llama

BETAS = (0.9, 0.95)


@dataclass(frozen=True)
class Draws:
    """n completions of each of U prompts, grouped by prompt.

    Attributes:
        prompts: ``[U n, P]`` int64, padded on the left.
        within: ``[U n, P]`` bool, False at padding.
        ids: ``[U n, N]`` int64, the completion and its stop token.
        kept: ``[U n, N]`` bool, False after the stop token.
        finished: ``[U n]`` bool, whether a stop token ended the completion.
    """

    prompts: torch.Tensor
    within: torch.Tensor
    ids: torch.Tensor
    kept: torch.Tensor
    finished: torch.Tensor

    def texts(self, tokenizer: Any) -> list[str]:
        """Each completion up to its stop token, stripped."""
        lengths = (self.kept.sum(dim=1) - self.finished.long()).tolist()
        rows = [row[:length] for row, length in zip(self.ids.tolist(), lengths, strict=True)]
        return [text.strip() for text in tokenizer.batch_decode(rows)]


class Writer:
    """A Llama that writes completions and learns from their advantages.

    Args:
        model: a transformers model in float32 on its device.
        stops: tokens that end a completion.
        prompt_length, new_tokens: maximum tokens of a prompt, and of a completion including its stop token.
        rows_at_once: rows per decoding batch; a backward uses a quarter.
        dtype: dtype of the forward's weights (default: bfloat16 on a GPU, else float32).
    """

    def __init__(
        self,
        model: Any,
        stops: Sequence[int],
        *,
        prompt_length: int,
        new_tokens: int,
        rows_at_once: int = 1024,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.device = next(model.parameters()).device
        self.prompt_length, self.new_tokens, self.rows_at_once = prompt_length, new_tokens, rows_at_once
        self._stops = torch.tensor(sorted(stops), device=self.device)
        if dtype is None:
            dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.masters = [p.detach().clone().requires_grad_() for p in model.parameters()]
        self._weights = [p.detach().to(dtype, copy=True).requires_grad_() for p in self.masters]
        self._forward = Llama.of(model, self._weights, prompt_length + new_tokens)
        self._optimizer = torch.optim.AdamW(self.masters, betas=BETAS, weight_decay=0.0, fused=True)

    def weights(self) -> list[torch.Tensor]:
        """A copy of the float32 weights."""
        return [p.detach().clone() for p in self.masters]

    @torch.no_grad()
    def restore(self, weights: Sequence[torch.Tensor]) -> None:
        """Restores weights and clears the optimizer's moments."""
        torch._foreach_copy_(self.masters, list(weights))
        torch._foreach_copy_(self._weights, self.masters)
        self._optimizer.state.clear()

    def draw(self, prompts: Sequence[Sequence[int]], n: int, *, temperature: float, seed: int) -> Draws:
        """Draws n completions of each prompt.

        Raises:
            ValueError: a prompt is longer than ``prompt_length``.
        """
        longest = max(map(len, prompts))
        if longest > self.prompt_length:
            raise ValueError(f"prompts: expected at most {self.prompt_length} tokens, got {longest}")
        ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
        within = torch.zeros(len(prompts), longest, dtype=torch.bool)
        for i, prompt in enumerate(prompts):
            ids[i, longest - len(prompt) :] = torch.tensor(prompt)
            within[i, longest - len(prompt) :] = True
        ids, within = ids.to(self.device), within.to(self.device)
        generator = torch.Generator(self.device).manual_seed(seed)
        share = max(1, self.rows_at_once // n)
        with sdpa_kernel(ATTENTION):  # cuDNN's would build a plan for each length
            parts = [
                self._draw(ids[i : i + share], within[i : i + share], n, temperature, generator)
                for i in range(0, len(ids), share)
            ]
        written, kept, finished = (torch.cat(column) for column in zip(*parts, strict=True))
        return Draws(ids.repeat_interleave(n, 0), within.repeat_interleave(n, 0), written, kept, finished)

    @torch.no_grad()
    def _draw(
        self,
        ids: torch.Tensor,  # [U, P]
        within: torch.Tensor,  # [U, P]
        n: int,
        temperature: float,
        generator: torch.Generator,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Completions ``[U n, N]``, a mask of their tokens, and ``[U n]``, whether a stop token ended each."""
        rows, p = len(ids) * n, ids.shape[1]
        pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
        x = _masked(self._forward, ids, within, pairs)
        shape = (rows, pairs[0][0].shape[1], p + self.new_tokens, pairs[0][0].shape[3])
        caches = []
        for pair in pairs:
            cache = tuple(torch.empty(shape, dtype=x.dtype, device=x.device) for _ in pair)
            for held, new in zip(cache, pair, strict=True):
                held[:, :, :p] = new.repeat_interleave(n, dim=0)
            caches.append(cache)
        open_keys = torch.ones(rows, p + self.new_tokens, dtype=torch.bool, device=x.device)
        open_keys[:, :p] = within.repeat_interleave(n, dim=0)
        written = torch.zeros(rows, self.new_tokens, dtype=torch.int64, device=x.device)
        kept = torch.zeros_like(written, dtype=torch.bool)
        going = torch.ones(rows, dtype=torch.bool, device=x.device)
        state = x[:, -1].repeat_interleave(n, dim=0)
        for j in range(self.new_tokens):
            p_next = (F.linear(state, self._forward.head).float() / temperature).softmax(dim=1)
            # argmax of p / Exp(1) is a draw from p, without multinomial's host synchronization
            token = (p_next / torch.empty_like(p_next).exponential_(generator=generator)).argmax(dim=1)
            written[:, j], kept[:, j] = token, going
            going = going & ~torch.isin(token, self._stops)
            if j + 1 == self.new_tokens or (j % 4 == 3 and not bool(going.any())):
                break
            state = _decode(self._forward, token, caches, p + j, open_keys)
        return written, kept, ~going

    def learn(self, draws: Draws, advantages: torch.Tensor, *, temperature: float, rate: float) -> float:
        """Takes one step on ``-mean_i A_i sum_t log p(token_t) / N`` at the temperature of the draws.

        Each batch is used once, by the policy that wrote it, so GRPO's ratio is 1 and nothing is clipped. As in Dr.
        GRPO (Liu et al. 2025), the sum over tokens is divided by a constant, not by the length. There is no penalty for
        moving away from the initial policy.

        Args:
            draws: draws of this writer.
            advantages: ``[rows]`` float32; rows with 0 are skipped.

        Returns:
            The norm of the gradient; 0, without a step, if every advantage is 0.
        """
        ids = torch.cat([draws.prompts, draws.ids], dim=1)
        total = [torch.zeros_like(p) for p in self._weights]
        used = advantages.to(self.device).nonzero()[:, 0]
        if not len(used):
            return 0.0  # nothing to learn
        p = draws.prompts.shape[1]
        for rows in used.split(max(1, self.rows_at_once // 4)):
            with sdpa_kernel(ATTENTION):
                hidden = _masked(self._forward, ids[rows, :-1], draws.within[rows])
            logits = F.linear(hidden[:, p - 1 :], self._forward.head).float() / temperature
            losses = F.cross_entropy(logits.flatten(0, 1), draws.ids[rows].flatten(), reduction="none")
            of_rows = (losses.view(len(rows), -1) * draws.kept[rows]).sum(dim=1) / self.new_tokens
            loss = (of_rows * advantages.to(self.device)[rows]).sum() / len(advantages)
            torch._foreach_add_(total, torch.autograd.grad(loss, self._weights))
        for master, gradient in zip(self.masters, total, strict=True):
            master.grad = gradient.to(master.dtype)
        norm = float(torch.nn.utils.clip_grad_norm_(self.masters, CLIP))
        self._optimizer.param_groups[0]["lr"] = rate
        self._optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(self._weights, self.masters)
        return norm


def _masked(
    llama: Llama,
    ids: torch.Tensor,  # [B, T], padded on the left of its first P columns
    within: torch.Tensor,  # [B, P]
    pairs: list[tuple[torch.Tensor, torch.Tensor]] | None = None,
) -> torch.Tensor:
    """Hidden states ``[B, T, D]``; appends each block's rotated keys and values ``[B, kv heads, T, d]`` to ``pairs``.

    Positions count padding tokens: rotations are relative, so the shift does not matter.
    """
    t = ids.shape[1]
    keys = torch.ones(ids.shape, dtype=torch.bool, device=ids.device)
    keys[:, : within.shape[1]] = within
    causal = torch.ones(t, t, dtype=torch.bool, device=ids.device).tril()
    # A padding token attends to itself, since a row without any key would give NaN.
    mask = (causal & keys[:, None, :]) | torch.eye(t, dtype=torch.bool, device=ids.device)

    def attend(
        query: torch.Tensor,  # [B, T, heads, d]
        key: torch.Tensor,  # [B, T, kv heads, d]
        value: torch.Tensor,  # [B, T, kv heads, d]
    ) -> torch.Tensor:  # [B, T, heads * d]
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        if pairs is not None:
            pairs.append((key, value))
        groups = query.shape[1] // key.shape[1]
        key, value = (y.repeat_interleave(groups, dim=1) for y in (key, value))
        y = F.scaled_dot_product_attention(query, key, value, attn_mask=mask[:, None])
        return y.transpose(1, 2).flatten(2)

    x = F.embedding(ids, llama.embedding)
    for block in llama.blocks:
        x = llama.after(block, x, llama.cosine[:t, None], llama.sine[:t, None], attend)
    return llama.normed(x, llama.norm)


def _decode(
    llama: Llama,
    token: torch.Tensor,  # [B] int64
    caches: Sequence[tuple[torch.Tensor, ...]],  # per block keys and values [B, kv heads, S, d]
    at: int,
    open_keys: torch.Tensor,  # [B, S] bool
) -> torch.Tensor:
    """The hidden state ``[B, D]`` after a token at position ``at``; adds its keys and values to the caches."""
    cosine, sine = llama.cosine[at], llama.sine[at]
    mask = open_keys[:, None, None, : at + 1]
    left = iter(caches)

    def attend(
        query: torch.Tensor,  # [B, heads, d]
        key: torch.Tensor,  # [B, kv heads, d]
        value: torch.Tensor,  # [B, kv heads, d]
    ) -> torch.Tensor:  # [B, heads * d]
        keys, values = next(left)
        keys[:, :, at], values[:, :, at] = key, value
        # Heads that share a key become query positions, so that keys need not be repeated.
        grouped = query.unflatten(1, (key.shape[1], -1))
        y = F.scaled_dot_product_attention(grouped, keys[:, :, : at + 1], values[:, :, : at + 1], attn_mask=mask)
        return y.flatten(1)

    x = F.embedding(token, llama.embedding)
    for block in llama.blocks:
        x = llama.after(block, x, cosine, sine, attend)
    return llama.normed(x, llama.norm)

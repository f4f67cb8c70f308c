"""Fits and tests a Llama student on short rows of one shape: a CUDA graph, or the same calls on the same buffers.

Fitting a few hundred short rows is bound by kernel launches, not arithmetic. All batches therefore have one shape, the
training step (forward, backward, clipping, AdamW) is captured once and replayed for every fit, and weights and moments
are restored in place. On a GPU, the weights of the forward are bfloat16, masters and moments float32; on a CPU all are
float32.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn import functional as F  # noqa: N812
from torch.nn.attention import SDPBackend, sdpa_kernel

IGNORED = -100
#: Excludes cuDNN's attention, whose first calls build plans, which would delay a capture.
ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
BETAS, CLIP, WARM_UP = (0.9, 0.98), 1.0, 0.1


@dataclass(frozen=True)
class Rows:
    """n rows padded to one length.

    Attributes:
        ids: ``[n, T]`` int64, padded on the right.
        places: ``[n, L]`` int64, the position that predicts each token of the label.
        targets: ``[n, L]`` int64, the label's tokens, -100 beyond its end.
        prompt: ``[n]`` int64, number of tokens before the label.
    """

    ids: torch.Tensor
    places: torch.Tensor
    targets: torch.Tensor
    prompt: torch.Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: Any) -> Rows:
        return Rows(*(x[index] for x in self._columns))

    def to(self, device: torch.device | str) -> Rows:
        return Rows(*(x.to(device) for x in self._columns))

    def __add__(self, other: Rows) -> Rows:
        return Rows(*map(torch.cat, zip(self._columns, other._columns, strict=True)))

    @property
    def _columns(self) -> tuple[torch.Tensor, ...]:
        return self.ids, self.places, self.targets, self.prompt


def pad(pairs: Sequence[tuple[Sequence[int], Sequence[int]]], length: int, label_length: int) -> Rows:
    """Rows of (prompt, label) token ids; each must fit."""
    n = len(pairs)
    ids = torch.zeros(n, length, dtype=torch.int64)
    places = torch.zeros(n, label_length, dtype=torch.int64)
    targets = torch.full((n, label_length), IGNORED)
    for i, (prompt, label) in enumerate(pairs):
        ids[i, : len(prompt) + len(label)] = torch.tensor([*prompt, *label])
        places[i, : len(label)] = torch.arange(len(label)) + len(prompt) - 1
        targets[i, : len(label)] = torch.tensor(label)
    return Rows(ids, places, targets, torch.tensor([len(prompt) for prompt, _ in pairs], dtype=torch.int64))


@dataclass(frozen=True)
class Llama:
    """The weights of a Llama in the form its forward needs, and the rotation of each position.

    Attributes:
        embedding, head, norm: ``[V, D]``, ``[V, D]``, ``[D]``.
        blocks: weights of norm, q, k, v, o, norm, gate, up, down for each block.
        cosine, sine: ``[T, d]`` for attention heads of dimension d.
        eps: epsilon of the norms.
    """

    embedding: torch.Tensor
    head: torch.Tensor
    norm: torch.Tensor
    blocks: tuple[tuple[torch.Tensor, ...], ...]
    cosine: torch.Tensor
    sine: torch.Tensor
    eps: float

    @classmethod
    def of(cls, model: Any, weights: Sequence[torch.Tensor], length: int) -> Llama:
        """Builds the forward from ``weights``, in the order of ``model.parameters()``, instead of the model's own."""
        own = dict(zip(model.parameters(), weights, strict=True))
        trunk = model.model
        blocks = []
        for block in trunk.layers:
            a, m = block.self_attn, block.mlp
            linear = (a.q_proj, a.k_proj, a.v_proj, a.o_proj, m.gate_proj, m.up_proj, m.down_proj)
            if any(module.bias is not None for module in linear):
                raise ValueError("model: expected a Llama without biases")
            q, k, v, o, gate, up, down = (own[module.weight] for module in linear)
            blocks.append(
                (own[block.input_layernorm.weight], q, k, v, o, own[block.post_attention_layernorm.weight], gate, up,
                 down)
            )  # fmt: skip
        embedding = own[trunk.embed_tokens.weight]
        positions = torch.arange(length, device=embedding.device)[None]
        cosine, sine = trunk.rotary_emb(embedding[:1].float(), positions)
        return cls(
            embedding, own[model.lm_head.weight], own[trunk.norm.weight], tuple(blocks),
            cosine[0].to(embedding.dtype), sine[0].to(embedding.dtype), model.config.rms_norm_eps,
        )  # fmt: skip

    def hidden(
        self,
        ids: torch.Tensor,  # [B, T] int64
        kept: torch.Tensor | None = None,  # [N] int64
    ) -> torch.Tensor:
        """Hidden states after the final norm, ``[B, T, D]``.

        ``kept``: indices of ``ids.flatten()`` that are not padding. Only these are computed; other states are 0.
        """
        at = torch.arange(ids.numel(), device=ids.device) if kept is None else kept
        cosine, sine = (table[at % ids.shape[1], None] for table in (self.cosine, self.sine))

        def spread(
            x: torch.Tensor,  # [N, ...]
        ) -> torch.Tensor:  # [B, T, ...]
            if kept is not None:
                x = x.new_zeros(ids.numel(), *x.shape[1:]).index_copy(0, kept, x)
            return x.unflatten(0, ids.shape)

        def attend(
            query: torch.Tensor,  # [N, heads, d]
            key: torch.Tensor,  # [N, kv heads, d]
            value: torch.Tensor,  # [N, kv heads, d]
        ) -> torch.Tensor:  # [N, heads * d]
            groups = query.shape[1] // key.shape[1]
            query, key, value = (spread(z).transpose(1, 2) for z in (query, key, value))
            key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
            y = F.scaled_dot_product_attention(query, key, value, is_causal=True)
            y = y.transpose(1, 2).flatten(2).flatten(0, 1)
            return y if kept is None else y[kept]

        x = F.embedding(ids.flatten()[at], self.embedding)  # [N, D]
        with sdpa_kernel(ATTENTION if ids.is_cuda else SDPBackend.MATH):
            for block in self.blocks:
                x = self.after(block, x, cosine, sine, attend)
        return spread(self.normed(x, self.norm))

    def after(
        self,
        block: tuple[torch.Tensor, ...],
        x: torch.Tensor,  # [..., D]
        cosine: torch.Tensor,  # [..., 1, d] or broadcast to it
        sine: torch.Tensor,  # as cosine
        attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """The states after a block, ``[..., D]``. ``attend`` maps rotated queries ``[..., heads, d]``, rotated keys and
        values ``[..., kv heads, d]`` to ``[..., heads * d]``."""
        first, q, k, v, o, second, gate, up, down = block
        y = self.normed(x, first)
        query, key, value = (F.linear(y, w).unflatten(-1, (-1, self.cosine.shape[1])) for w in (q, k, v))
        x = x + F.linear(attend(rotated(query, cosine, sine), rotated(key, cosine, sine), value), o)
        y = self.normed(x, second)
        return x + F.linear(F.silu(F.linear(y, gate)) * F.linear(y, up), down)

    def normed(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, weight.shape, weight, self.eps)

    def token_losses(
        self,
        ids: torch.Tensor,  # [B, T]
        places: torch.Tensor,  # [B, L]
        targets: torch.Tensor,  # [B, L]
        kept: torch.Tensor | None = None,  # [N]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``-log p`` of each token of the label (0 past its end) and the most likely token: ``[B, L]`` each."""
        hidden = self.hidden(ids, kept)
        picked = hidden.gather(1, places[:, :, None].expand(-1, -1, hidden.shape[2]))
        logits = self.logits(picked)
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none")
        return losses.view_as(targets), logits.detach().argmax(dim=2)

    def logits(
        self,
        hidden: torch.Tensor,  # [..., D]
    ) -> torch.Tensor:
        """``[..., V]`` float32. Without gradients the product runs in float32: in bfloat16, logits would tie."""
        if torch.is_grad_enabled():
            return F.linear(hidden, self.head).float()
        return F.linear(hidden.float(), self.head.float())


def rotated(
    x: torch.Tensor,  # [..., d]
    cosine: torch.Tensor,  # [..., d], as x or broadcast to it
    sine: torch.Tensor,  # as cosine
) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cosine + torch.cat((-second, first), dim=-1) * sine


@dataclass(frozen=True)
class Tested:
    """Share of rows whose label greedy decoding writes exactly, and the mean ``-log p`` of a label's tokens."""

    accuracy: float
    loss: float


class Fitter:
    """A student that is fitted repeatedly from stored weights.

    Args:
        model: a Llama of transformers in float32 on its device; on a GPU its weights become bfloat16. It remains the
            student: after :meth:`fit` it can be scored.
        batch, length, label_length: the shape of all training batches, ``[batch, length]`` with labels of at most
            ``label_length`` tokens.
        dtype: dtype of the forward's weights, which are then separate from the masters; by default bfloat16 on a GPU,
            and on a CPU the masters themselves.

    Raises:
        ValueError: the model's logits differ from those of :class:`Llama`.
    """

    def __init__(
        self, model: Any, *, batch: int, length: int, label_length: int, dtype: torch.dtype | None = None
    ) -> None:
        self.model = model.eval()
        self.length = length
        self.batch = batch
        self.device = next(model.parameters()).device
        on_gpu = self.device.type == "cuda"
        own = list(model.parameters())
        if dtype is None and on_gpu:
            dtype = torch.bfloat16
        #: float32 weights that the optimizer updates.
        self.masters = [p.detach() if dtype is None else p.detach().clone() for p in own]
        self.exact = Llama.of(model, self.masters, length)  # float32
        _check(model, self.exact)
        if dtype is not None:
            for p in own:  # only parameters: rounding rotary frequencies would misrotate distant positions
                p.data = p.data.to(dtype)
        self._weights = [p.detach().requires_grad_() for p in model.parameters()]
        self._forward = Llama.of(model, self._weights, length)
        for p in model.parameters():
            p.requires_grad_(False)
        self._grads = [torch.zeros_like(p) for p in self.masters]
        for p, grad in zip(self.masters, self._grads, strict=True):
            p.requires_grad_()
            p.grad = grad
        self._rate = torch.tensor(0.0, device=self.device)
        self._optimizer = torch.optim.AdamW(
            self.masters, lr=self._rate, betas=BETAS, weight_decay=0.0, fused=True, capturable=on_gpu
        )
        self._ids = torch.zeros(batch, length, dtype=torch.int64, device=self.device)
        self._places = torch.zeros(batch, label_length, dtype=torch.int64, device=self.device)
        self._targets = torch.zeros(batch, label_length, dtype=torch.int64, device=self.device)
        self._graph: Any = None
        if on_gpu:
            self._capture()

    @property
    def captured(self) -> bool:
        """Whether steps replay a CUDA graph."""
        return self._graph is not None

    def weights(self) -> list[torch.Tensor]:
        """A copy of the float32 weights."""
        return [p.detach().clone() for p in self.masters]

    @torch.no_grad()
    def restore(self, weights: Sequence[torch.Tensor]) -> None:
        """Restores weights in place; moments and step counts become 0."""
        torch._foreach_copy_(self.masters, list(weights))
        self._publish()
        for state in self._optimizer.state.values():
            for value in state.values():
                value.zero_()

    def fit(self, rows: Rows, *, epochs: float, rate: float, seed: int) -> int:
        """Trains the current weights on the rows; the rate warms up over a tenth of the steps and decays as a cosine.

        Batches are cut from concatenated shuffled epochs, so every batch is full. Returns the number of steps.
        """
        rng = random.Random(seed)
        order: list[int] = []
        total = round(epochs * len(rows))
        while len(order) < total or len(order) < self.batch:
            order += rng.sample(range(len(rows)), len(rows))
        steps = max(1, total // self.batch)
        index = torch.tensor(order[: steps * self.batch], device=self.device).view(steps, self.batch)
        warm = max(1, round(WARM_UP * steps))
        for step in range(steps):
            batch = rows[index[step]]
            self._ids.copy_(batch.ids)
            self._places.copy_(batch.places)
            self._targets.copy_(batch.targets)
            fall = 0.5 * (1 + math.cos(math.pi * max(0, step - warm) / max(1, steps - warm)))
            self._rate.fill_(rate * min((step + 1) / warm, fall))
            self._step(batch)
        return steps

    def test(self, rows: Rows, at_once: int = 250) -> Tested:
        """Accuracy without generation: greedy decoding writes the label if and only if each of its tokens is the most
        likely one after the true preceding tokens."""
        losses, right = self.losses(rows, at_once)
        counted = rows.targets.ne(IGNORED).sum(dim=1)
        return Tested(float(right.double().mean()), float(losses.sum() / counted.sum()))

    @torch.no_grad()
    def losses(self, rows: Rows, at_once: int = 250, exact: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """``-log p`` of each row's label, ``[n]`` float32, and whether greedy decoding writes it, ``[n]`` bool.

        ``exact`` uses the float32 weights.
        """
        forward = self.exact if exact else self._forward
        found = torch.zeros(len(rows), device=self.device)
        right = torch.zeros(len(rows), dtype=torch.bool, device=self.device)
        for index, part in _parts(rows, at_once):
            losses, likeliest = forward.token_losses(part.ids, part.places, part.targets)
            found[index] = losses.sum(dim=1)
            right[index] = ((likeliest == part.targets) | part.targets.eq(IGNORED)).all(dim=1)
        return found, right

    @torch.no_grad()
    def states(self, rows: Rows, at_once: int = 250) -> tuple[torch.Tensor, torch.Tensor]:
        """The last and the mean of the prompt's final hidden states: ``[n, D]`` float32 each."""
        last = torch.zeros(len(rows), self._forward.norm.shape[0], device=self.device)
        mean = torch.zeros_like(last)
        for index, part in _parts(rows, at_once):
            hidden = self._forward.hidden(part.ids).float()
            within = torch.arange(hidden.shape[1], device=self.device) < part.prompt[:, None]
            mean[index] = (hidden * within[:, :, None]).sum(dim=1) / part.prompt[:, None]
            last[index] = hidden[torch.arange(len(part), device=self.device), part.prompt - 1]
        return last, mean

    def along(self, reference: Rows, rows: Rows, relative: float = 1e-3) -> torch.Tensor:
        """Inner product of each row's gradient with the reference rows' mean gradient, ``[n]``, over all parameters.

        A central difference of the rows' losses along that mean, in float32: exact except for curvature and rounding,
        at the cost of two forward passes. Losses are means over a row's tokens. ``relative`` is the norm of the step
        relative to that of the weights.
        """
        losses, _ = self.exact.token_losses(reference.ids, reference.places, reference.targets)
        of_rows = losses.sum(dim=1) / reference.targets.ne(IGNORED).sum(dim=1)
        direction = torch.autograd.grad(of_rows.mean(), self.masters)
        with torch.no_grad():
            norm = torch.stack(torch._foreach_norm(direction)).norm()
            step = float(relative * torch.stack(torch._foreach_norm(self.masters)).norm() / norm)
            kept = self.weights()
            torch._foreach_add_(self.masters, direction, alpha=step)
            above, _ = self.losses(rows, exact=True)
            torch._foreach_add_(self.masters, direction, alpha=-2 * step)
            below, _ = self.losses(rows, exact=True)
            torch._foreach_copy_(self.masters, kept)
        return (above - below) / (2 * step) / rows.targets.ne(IGNORED).sum(dim=1)

    def greedy(self, rows: Rows, stop: int, at_once: int = 250) -> torch.Tensor:
        """Mean ``-log p`` of the tokens that greedy decoding writes after each prompt, ``[n]``. Decoding ends with
        ``stop`` or at the length of the longest label."""
        found = torch.zeros(len(rows), device=self.device)
        for index, part in _parts(rows, at_once, rows.targets.shape[1]):
            found[index] = self._greedy(part, stop)
        return found

    @torch.no_grad()
    def _greedy(self, rows: Rows, stop: int) -> torch.Tensor:
        n, label_length = rows.targets.shape
        ids = rows.ids.clone()
        ids[torch.arange(ids.shape[1], device=self.device) >= rows.prompt[:, None]] = 0
        every = torch.arange(n, device=self.device)
        total = torch.zeros(n, device=self.device)
        count = torch.zeros(n, device=self.device)
        going = torch.ones(n, dtype=torch.bool, device=self.device)
        for j in range(label_length):
            at = (rows.prompt + j - 1).clamp_max(ids.shape[1] - 1)
            logp = self._forward.logits(self._forward.hidden(ids)[every, at]).log_softmax(dim=1)
            best, token = logp.max(dim=1)
            total -= best.where(going, 0)
            count += going
            going = going & (token != stop) & (at + 1 < ids.shape[1])
            ids[every, (at + 1).clamp_max(ids.shape[1] - 1)] = token
            if not bool(going.any()):
                break
        return total / count

    def _step(self, batch: Rows) -> None:
        if self._graph is not None:
            self._graph.replay()
        else:  # without a graph the shape may vary, so padding is skipped
            place = torch.arange(batch.ids.shape[1], device=self.device)
            ends = batch.prompt + batch.targets.ne(IGNORED).sum(dim=1)
            self._compute((place < ends[:, None]).flatten().nonzero()[:, 0])

    def _compute(
        self,
        kept: torch.Tensor | None = None,  # [N]
    ) -> None:
        """One training step on the buffers, without lasting allocations or host synchronization."""
        losses, _ = self._forward.token_losses(self._ids, self._places, self._targets, kept)
        loss = losses.sum() / self._targets.ne(IGNORED).sum()
        gradients = torch.autograd.grad(loss, self._weights)
        with torch.no_grad():
            torch._foreach_copy_(self._grads, gradients)
            norm = torch.stack(torch._foreach_norm(self._grads)).norm()
            torch._foreach_mul_(self._grads, (CLIP / (norm + 1e-6)).clamp_max(1.0))
        self._optimizer.step()
        self._publish()

    @torch.no_grad()
    def _publish(self) -> None:
        """Copies the masters to the forward's weights, rounded to their dtype."""
        if self._weights[0].data_ptr() != self.masters[0].data_ptr():
            torch._foreach_copy_(self._weights, self.masters)

    def _rehearse(self) -> None:
        """Runs three steps, so that the optimizer's state and every kernel exist before a capture."""
        self._targets.fill_(1)
        for _ in range(3):
            self._compute()

    def _capture(self) -> None:
        """Rehearses on a side stream, as torch requires, then captures; restores weights and moments."""
        before = self.weights()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._rehearse()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._compute()
        self._graph = graph
        self.restore(before)


def _parts(rows: Rows, at_once: int, room: int = 0) -> Iterator[tuple[torch.Tensor, Rows]]:
    """Indices and rows of similar length, cut to the longest of each part; ``room``: tokens to write after prompts."""
    ends = rows.prompt + (room or rows.targets.ne(IGNORED).sum(dim=1))
    order = ends.argsort(descending=True)
    for part, longest in zip(order.split(at_once), ends[order[::at_once]].tolist(), strict=True):
        held = rows[part]
        yield part, replace(held, ids=held.ids[:, :longest])


@torch.no_grad()
def _check(model: Any, forward: Llama) -> None:
    """Raises ValueError unless the forward reproduces the model's logits."""
    ids = torch.arange(2 * 8, device=forward.embedding.device).view(2, 8) % len(forward.embedding)
    expected = model(input_ids=ids, use_cache=False).logits.float()
    error = (forward.logits(forward.hidden(ids)) - expected).abs().max() / expected.abs().max()
    if not bool(error < 1e-3):
        raise ValueError(f"model: its logits are not those of the Llama forward: they differ by {float(error):.1e}")

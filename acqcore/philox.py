"""Dropout masks from counters: Philox 4x32-10, the same on every backend, machine and batch.

A mask is a function of (seed, draw, site, sample, position in the sample, column). It is found again where it is
needed, not stored. The compiled backends have the same function in csrc/philox.h and kernels/philox.py.

Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
"""

from __future__ import annotations

import math

import torch

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_WORD = 0xFFFFFFFF


def philox4x32(
    counter: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],  # four words, broadcastable, int64
    key: tuple[int, int],
) -> torch.Tensor:
    """Four random words ``[..., 4]`` of each counter, int64 in ``[0, 2^32)``."""
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = key
    for _ in range(_ROUNDS):
        even, odd = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]  # modulo 2^64, as the low and high word need
        c0, c1, c2, c3 = (odd >> 32) & _WORD ^ c1 ^ k0, odd & _WORD, (even >> 32) & _WORD ^ c3 ^ k1, even & _WORD
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return torch.stack([c0, c1, c2, c3], dim=-1)


def threshold(p: float) -> int:
    """``floor(p 2^32)``: a unit is kept where its word is at least this."""
    return math.floor(p * 2**32)


def keep_mask(
    samples: torch.Tensor,  # [N] int64
    positions: torch.Tensor,  # [N] int64
    units: int,
    p: float,
    seed: int,
    draw: int,
    site: int = 0,
) -> torch.Tensor:
    """Which of a row's units (columns, or blocks of them) dropout with probability ``p`` keeps, ``[N, units]`` bool.

    Word ``unit % 4`` of the counter ``(unit // 4, position, sample, draw | site << 16)`` under the seed's two halves.
    ``site`` tells the layers of a model apart; 0 is the last hidden state.
    """
    group = torch.arange((units + 3) // 4, device=samples.device)
    last = torch.tensor(draw | site << 16, device=samples.device)
    counter = (group, positions[:, None] & _WORD, samples[:, None] & _WORD, last)
    words = philox4x32(counter, (seed & _WORD, seed >> 32 & _WORD))  # [N, units / 4, 4]
    return words.flatten(1)[:, :units] >= threshold(p)

"""Counter-based dropout masks and signs (Philox 4x32-10), the same on every backend, machine and batch.

A mask is a function of (seed, draw, site, sample, position in the sample, column), a sign of (seed, probe, sample,
position, column). Both are recomputed where needed, not stored. The compiled backends implement the same functions
in csrc/philox.h and kernels/philox.py.

Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
"""

from __future__ import annotations

import math

import torch

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_WORD = 0xFFFFFFFF

#: The site of signs in a counter; sites of masks number a model's layers from 0.
SIGN_SITE = 0xFFFF
_SIGNS_PER_COUNTER = 128


def philox4x32(
    counter: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],  # four words, broadcastable, int64
    key: tuple[int, int],
) -> torch.Tensor:
    """Four random words ``[..., 4]`` of each counter, int64 in ``[0, 2^32)``."""
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = key
    for _ in range(_ROUNDS):
        even, odd = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]  # wrapping modulo 2^64 keeps both 32-bit words
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
    """``[N, units]`` bool: units (columns, or blocks of columns) of each row kept by dropout with probability ``p``.

    A unit uses word ``unit % 4`` of the counter ``(unit // 4, position, sample, draw | site << 16)``; the key is the
    seed's two halves. ``site`` identifies the layer of a model; 0 is the last hidden state.
    """
    group = torch.arange((units + 3) // 4, device=samples.device)
    return _words(group, samples, positions, draw | site << 16, seed)[:, :units] >= threshold(p)


def signs(
    samples: torch.Tensor,  # [N] int64
    positions: torch.Tensor,  # [N] int64
    columns: slice,
    seed: int,
    probe: int,
) -> torch.Tensor:
    """Independent fair signs of the columns of each row, ``[N, columns]`` bool, True for +1.

    Column v uses bit ``v % 32`` of word ``v // 32 % 4`` of the counter ``(v // 128, position, sample,
    probe | 0xFFFF << 16)``; the key is the seed's two halves.
    """
    return signs_in(sign_words(samples, positions, columns, seed, probe), columns.start, columns)


def sign_words(
    samples: torch.Tensor,  # [N] int64
    positions: torch.Tensor,  # [N] int64
    columns: slice,
    seed: int,
    probe: int,
) -> torch.Tensor:
    """Counter words that hold the signs of these columns, ``[N, words]`` int64."""
    first, last = columns.start // _SIGNS_PER_COUNTER, -(-columns.stop // _SIGNS_PER_COUNTER)
    group = torch.arange(first, last, device=samples.device)
    return _words(group, samples, positions, probe | SIGN_SITE << 16, seed)


def _words(
    group: torch.Tensor,  # [C] int64, first word of each counter
    samples: torch.Tensor,  # [N] int64
    positions: torch.Tensor,  # [N] int64
    last: int,
    seed: int,
) -> torch.Tensor:
    """The words of the counters ``(group, position, sample, last)``, ``[N, 4 C]`` int64."""
    last_word = torch.full((), last, dtype=torch.int64, device=samples.device)  # avoids a copy that blocks the host
    counter = (group, positions[:, None] & _WORD, samples[:, None] & _WORD, last_word)
    return philox4x32(counter, (seed & _WORD, seed >> 32 & _WORD)).flatten(1)


def signs_in(
    words: torch.Tensor,  # [N, words] int64, from sign_words, starting at column ``begin``
    begin: int,
    columns: slice,
) -> torch.Tensor:
    """Signs of some of the columns that ``words`` cover, ``[N, columns]`` bool."""
    base = begin // _SIGNS_PER_COUNTER * _SIGNS_PER_COUNTER
    first, last = (columns.start - base) // 32, -(-(columns.stop - base) // 32)
    bits = words[:, first:last, None] >> torch.arange(32, device=words.device) & 1
    skipped = columns.start - base - 32 * first
    return bits.flatten(1)[:, skipped : skipped + columns.stop - columns.start].bool()


def signs_of(
    samples: torch.Tensor,  # [N] int64
    positions: torch.Tensor,  # [N] int64
    columns: torch.Tensor,  # [N] int64
    seed: int,
    probes: int,
) -> torch.Tensor:
    """Sign of one column per row under each of P probes, ``[P, N]`` int64, +1 or -1."""
    last = torch.arange(probes, device=samples.device)[:, None] | SIGN_SITE << 16
    counter = (columns // _SIGNS_PER_COUNTER, positions & _WORD, samples & _WORD, last)
    words = philox4x32(counter, (seed & _WORD, seed >> 32 & _WORD))  # [P, N, 4]
    word = words.gather(2, (columns // 32 % 4).expand(probes, -1)[:, :, None])[:, :, 0]
    return (word >> columns % 32 & 1) * 2 - 1

"""Masks of Philox 4x32-10, in Triton's interpreter, against the vectors published with Random123."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from acqcore.kernels.philox import dropout_keep_mask, keep_mask

# (counter, key) -> words; Random123, tests/kat_vectors, philox 4x32 10
VECTORS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@triton.jit
def _words_at_least(counter, seed, thresholds, out):
    """Bits of the words of one counter, found by asking which thresholds they reach."""
    group = tl.load(counter + tl.arange(0, 1))[None, :]
    position, sample, draw = tl.load(counter + 1), tl.load(counter + 2), tl.load(counter + 3)
    for i in range(32):
        threshold = tl.load(thresholds + tl.arange(0, 4))[None, :] + (1 << (31 - i))
        keep = keep_mask(group, position, sample, draw, seed.to(tl.uint64), threshold.to(tl.uint32))
        tl.store(thresholds + tl.arange(0, 4)[None, :], tl.where(keep, threshold, threshold - (1 << (31 - i))))
    tl.store(out + tl.arange(0, 4), tl.load(thresholds + tl.arange(0, 4)))


@pytest.mark.parametrize(("counter", "key", "words"), VECTORS)
def test_known_answers(counter: tuple[int, ...], key: tuple[int, ...], words: tuple[int, ...]) -> None:
    """Each word is the largest threshold that keeps it: found by bisection, so the mask itself is what is tested."""
    as_int32 = torch.from_numpy(np.array(counter, dtype=np.uint32).view(np.int32))
    thresholds, out = torch.zeros(4, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)
    _words_at_least[(1,)](as_int32, key[0] | key[1] << 32, thresholds, out)
    assert out.tolist() == list(words)


def _philox(counter: tuple[int, int, int, int], seed: int) -> list[int]:
    """The definition, in Python's integers."""
    c, k = list(counter), [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [b >> 32 ^ c[1] ^ k[0], b & 0xFFFFFFFF, a >> 32 ^ c[3] ^ k[1], a & 0xFFFFFFFF]
        k = [k[0] + 0x9E3779B9 & 0xFFFFFFFF, k[1] + 0xBB67AE85 & 0xFFFFFFFF]
    return c


@pytest.mark.parametrize(("counter", "key", "words"), VECTORS)
def test_the_definition_here_is_right(counter: tuple, key: tuple, words: tuple) -> None:
    assert _philox(counter, key[0] | key[1] << 32) == list(words)


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**63 + 12345, 2**64 - 1])
def test_mask(seed: int) -> None:
    positions = torch.tensor([0, 7, 7, 1023, 2**31 - 1], dtype=torch.int32)
    samples = torch.tensor([0, 3, 4, 3, 2], dtype=torch.int32)
    draws = torch.tensor([0, 1, 1, 65535, 5], dtype=torch.int32)
    p, site, columns = 0.3, 9, 301
    mask = dropout_keep_mask(positions, samples, draws, site, columns, seed, p)
    for row in range(5):
        key = (positions[row].item(), samples[row].item(), draws[row].item() | site << 16)
        words = [word for group in range(76) for word in _philox((group, *key), seed)]  # type: ignore[arg-type]
        assert mask[row].tolist() == [word >= int(p * 2**32) for word in words[:columns]]


def test_share_kept() -> None:
    rows = torch.arange(64, dtype=torch.int32)
    for p in (0.0, 0.1, 0.5):
        mask = dropout_keep_mask(rows, rows, rows, 0, 1024, 5, p)
        assert mask.float().mean().item() == pytest.approx(1 - p, abs=4 * (p * (1 - p) / 65536) ** 0.5)

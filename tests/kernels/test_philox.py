"""Masks of Philox 4x32-10, in Triton's interpreter, against the vectors published with Random123."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from acqcore.kernels.philox import dropout_mask, keep_mask
from acqcore.philox import keep_mask as reference, threshold

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
    """Finds the words of one counter bit by bit, from the thresholds they reach."""
    group = tl.load(counter + tl.arange(0, 1))[None, :]
    position, sample, draw = tl.load(counter + 1), tl.load(counter + 2), tl.load(counter + 3)
    for i in range(32):
        threshold = tl.load(thresholds + tl.arange(0, 4))[None, :] + (1 << (31 - i))
        keep = keep_mask(group, position, sample, draw, seed.to(tl.uint64), threshold.to(tl.uint32))
        tl.store(thresholds + tl.arange(0, 4)[None, :], tl.where(keep, threshold, threshold - (1 << (31 - i))))
    tl.store(out + tl.arange(0, 4), tl.load(thresholds + tl.arange(0, 4)))


@pytest.mark.parametrize(("counter", "key", "words"), VECTORS)
def test_known_answers(counter, key, words):
    """Each word is the largest threshold that keeps it, found by bisection, so the mask itself is tested."""
    as_int32 = torch.from_numpy(np.array(counter, dtype=np.uint32).view(np.int32))
    thresholds, out = torch.zeros(4, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)
    _words_at_least[(1,)](as_int32, key[0] | key[1] << 32, thresholds, out)
    assert out.tolist() == list(words)


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**63 + 12345, 2**64 - 1])
def test_masks(seed):
    """Every draw's mask matches the torch reference, for any high bits of the seed and the counters."""
    positions = torch.tensor([0, 7, 7, 1023, 2**32 - 1])
    samples = torch.tensor([0, 3, 4, 2**32 - 1, 2])
    keep = torch.empty(3, 5, 301, dtype=torch.bool)
    dropout_mask(samples, positions, 65535, seed, threshold(0.3), keep)
    for draw in range(3):
        assert torch.equal(keep[draw], reference(samples, positions, 301, 0.3, seed, draw, 65535))


def test_empty():
    none, whole = torch.empty(0, dtype=torch.int64), torch.ones(2, 3, 5, dtype=torch.bool)
    dropout_mask(none, none, 0, 0, 0, whole[:, :0])
    assert whole.all()  # nothing is written

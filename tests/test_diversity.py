"""Set-level signals against written-out determinants and eigenvalues."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch

import acqcore

RIDGE = 0.01


def vectors(n: int, d: int, seed: int = 0) -> torch.Tensor:
    """Correlated directions of very different lengths, ``[n, d]``."""
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(n, d, generator=g) + 0.7) * torch.logspace(-3, 2, n)[:, None]


def gain(x: torch.Tensor, i: int, rest: list[int], ridge: float = RIDGE) -> float:
    """The gain by its definition, from two determinants."""
    x = x.double() / x.double().norm(dim=1, keepdim=True)

    def log_det(indices: list[int]) -> torch.Tensor:
        part = x[indices] @ x[indices].T
        return torch.logdet(part + ridge * torch.eye(len(indices), dtype=torch.float64))

    return math.log1p(math.exp(log_det([*rest, i]) - log_det(rest)) - ridge)


class TestGradientDiversity:
    @pytest.mark.parametrize("shape", [(1, 8), (6, 20), (8, 8), (15, 5)])
    @pytest.mark.parametrize("ridge", [RIDGE, 1.0])
    def test_leave_one_out(self, shape, ridge):
        x = vectors(*shape)
        n = shape[0]
        expected = [gain(x, i, [j for j in range(n) if j != i], ridge) for i in range(n)]
        values = acqcore.gradient_diversity(x, ridge=ridge)
        assert values.dtype == torch.float32
        torch.testing.assert_close(values, torch.tensor(expected), rtol=1e-5, atol=1e-7)

    @pytest.mark.parametrize("shape", [(6, 20), (12, 5)])
    def test_ordered(self, shape):
        x = vectors(*shape)
        expected = [gain(x, i, list(range(i))) for i in range(shape[0])]
        values = acqcore.gradient_diversity(x, ordered=True)
        torch.testing.assert_close(values, torch.tensor(expected), rtol=1e-5, atol=1e-7)

    @pytest.mark.parametrize("shape", [(10, 40), (40, 10)])
    def test_order_and_length_do_not_matter(self, shape):
        x = vectors(*shape).double()
        values = acqcore.gradient_diversity(x)
        assert values.dtype == torch.float64
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(acqcore.gradient_diversity(x[order]), values[order], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(acqcore.gradient_diversity(x * 7), values, rtol=1e-9, atol=1e-12)

    def test_copies_score_next_to_nothing(self):
        x = torch.eye(6)[[0, 1, 2, 2, 3, 4, 4, 4]] * torch.arange(1.0, 9.0)[:, None]
        values = acqcore.gradient_diversity(x)
        alone = torch.tensor([0, 1, 4])
        torch.testing.assert_close(values[alone], torch.full((3,), math.log(2)))
        copies = torch.tensor([2, 3, 5, 6, 7])
        assert (values[copies] <= RIDGE).all()
        first = acqcore.gradient_diversity(x, ordered=True)
        assert (first > RIDGE).tolist() == [True, True, True, False, True, True, False, False]

    def test_a_zero_vector_adds_nothing(self):
        assert acqcore.gradient_diversity(torch.tensor([[0.0, 0.0], [1.0, 0.0]])).tolist()[0] == 0

    @pytest.mark.parametrize("scale", [1e-30, 1e30])
    def test_extreme_lengths(self, scale):
        x = vectors(5, 9)
        torch.testing.assert_close(
            acqcore.gradient_diversity(x * scale), acqcore.gradient_diversity(x), rtol=1e-4, atol=1e-6
        )

    def test_empty_batch(self):
        assert acqcore.gradient_diversity(torch.zeros(0, 3)).shape == (0,)

    def test_half_precision(self):
        x = vectors(6, 20).bfloat16()
        values = acqcore.gradient_diversity(x)
        assert values.dtype == torch.float32
        torch.testing.assert_close(values, acqcore.gradient_diversity(x.float()))


class TestVendiScore:
    @pytest.mark.parametrize("shape", [(1, 4), (7, 20), (20, 7)])
    def test_definition(self, shape):
        x = vectors(*shape).double()
        unit = x / x.norm(dim=1, keepdim=True)
        eigenvalues = torch.linalg.eigvalsh(unit @ unit.T / len(x))
        eigenvalues = eigenvalues[eigenvalues > 1e-14]
        expected = (-(eigenvalues * eigenvalues.log()).sum()).exp()
        torch.testing.assert_close(acqcore.vendi_score(x), expected)

    def test_counts_different_directions(self):
        assert acqcore.vendi_score(torch.eye(5) * 3).item() == pytest.approx(5)
        assert acqcore.vendi_score(torch.ones(5, 3)).item() == pytest.approx(1)
        assert acqcore.vendi_score(torch.eye(4).repeat(3, 1)).item() == pytest.approx(4)

    def test_bad_input(self):
        with pytest.raises(
            ValueError, match=r"vectors: expected at least one row, got float32 tensor of shape \[0, 3\]"
        ):
            acqcore.vendi_score(torch.zeros(0, 3))
        with pytest.raises(ValueError, match="vectors: row 1 is zero, expected vectors with a direction"):
            acqcore.vendi_score(torch.tensor([[1.0], [0.0]]))


class TestArchive:
    def test_novelty_is_the_gain_over_what_was_added(self):
        x = vectors(12, 30)
        archive = acqcore.Archive()
        torch.testing.assert_close(archive.novelty(x), torch.full((12,), math.log(2)))
        archive.add(x[:4])
        archive.add(x[4:7])
        assert len(archive) == 7
        expected = [gain(x, i, list(range(7))) for i in range(7, 12)]
        torch.testing.assert_close(archive.novelty(x[7:]), torch.tensor(expected), rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("ridge", [RIDGE, 1e-6])
    def test_copies_are_not_novel_and_take_no_room(self, ridge):
        x = torch.randn(20, 64, generator=torch.Generator().manual_seed(0))
        archive = acqcore.Archive(ridge=ridge)
        archive.add(x)
        assert (archive.novelty(x * 3) <= ridge).all()
        archive.add(torch.cat([x * 3.7, x, torch.zeros(1, 64)]))
        assert len(archive) == 20
        assert archive.novelty(torch.zeros(1, 64)).item() == 0

    def test_capacity_keeps_the_most_spread_out(self):
        near = torch.eye(8)[:1] + 0.2 * torch.eye(8)[1:4]  # three directions close to each other
        far = torch.eye(8)[4:]
        archive = acqcore.Archive(capacity=5)
        archive.add(near)
        assert len(archive) == 3
        archive.add(far)
        assert len(archive) == 5
        assert (archive.novelty(far) <= RIDGE).all()
        assert sum(archive.novelty(near) <= RIDGE) == 1

    def test_the_oldest_comes_first(self):
        x = torch.randn(20, 64, generator=torch.Generator().manual_seed(0))
        archive = acqcore.Archive(capacity=1)
        archive.add(x[:10])
        archive.add(x[10:])
        torch.testing.assert_close(archive.state_dict()["vectors"], x[:1] / x[0].norm())

    def test_novelty_falls_as_the_archive_grows(self):
        x = vectors(20, 30)
        archive = acqcore.Archive()
        archive.add(x[:5])
        before = archive.novelty(x[10:])
        archive.add(x[5:10])
        assert (archive.novelty(x[10:]) <= before + 1e-6).all()

    def test_state(self):
        x = vectors(12, 30)
        archive = acqcore.Archive(capacity=8, ridge=0.1)
        archive.add(x[:6])
        file = io.BytesIO()
        torch.save(archive.state_dict(), file)
        file.seek(0)
        other = acqcore.Archive()
        other.load_state_dict(torch.load(file))
        assert repr(other) == "Archive(6 of 8, ridge=0.1)"
        for held in (archive, other):
            held.add(x[6:9])
        assert torch.equal(other.novelty(x), archive.novelty(x))

    def test_a_saved_state_does_not_follow_the_archive(self):
        x = vectors(12, 30)
        archive = acqcore.Archive(capacity=4)
        empty = archive.state_dict()
        archive.add(x[:4])
        state = archive.state_dict()
        kept = copy.deepcopy(state)
        archive.add(x[4:])
        assert torch.equal(state["vectors"], kept["vectors"])
        archive.load_state_dict(empty)
        assert len(archive) == 0

    def test_bad_input(self):
        archive = acqcore.Archive(capacity=2)
        archive.add(torch.eye(3)[:2])
        with pytest.raises(
            ValueError, match=r"vectors: expected \[n, d\] with d = 3 as in the archive, got .*\[1, 4\]"
        ):
            archive.novelty(torch.zeros(1, 4))
        with pytest.raises(ValueError, match="vectors: is on meta but the archive is on cpu"):
            archive.novelty(torch.zeros(1, 3, device="meta"))
        with pytest.raises(ValueError, match="capacity: expected an int >= 1, got 0"):
            acqcore.Archive(capacity=0)
        with pytest.raises(ValueError, match="state: no entry 'ridge'"):
            archive.load_state_dict({"capacity": 2})
        with pytest.raises(TypeError, match="state: expected a mapping, got list"):
            archive.load_state_dict([])
        with pytest.raises(ValueError, match=r"state: vectors: expected at most 2 \(the capacity\), got 3"):
            archive.load_state_dict({"capacity": 2, "ridge": 0.1, "vectors": torch.eye(3)})


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(3), ValueError, r"vectors: expected shape \[n, d\], got float32 tensor of shape \[3\]"),
        (torch.zeros(3, 2, dtype=torch.int64), TypeError, r"vectors: expected float32, .* got int64"),
        (None, TypeError, r"vectors: expected a tensor \[n, d\], got NoneType"),
        (torch.tensor([[0.0], [torch.nan]]), ValueError, "vectors: expected finite vectors, row 1 has NaN"),
    ],
)
def test_bad_vectors(x, error, message):
    for call in (acqcore.gradient_diversity, acqcore.vendi_score, acqcore.Archive().novelty, acqcore.Archive().add):
        with pytest.raises(error, match=message):
            call(x)


@pytest.mark.parametrize(
    "call", [acqcore.gradient_diversity, lambda v, **o: acqcore.acquisitions.gradient_diversity.DiversityOptions(**o)]
)
def test_ordered_is_a_bool(call):
    with pytest.raises(TypeError, match="ordered: expected True or False, got 'false'"):
        call(torch.eye(2), ordered="false")


def test_bad_ridge():
    for call in (lambda: acqcore.gradient_diversity(torch.eye(2), ridge=-1.0), lambda: acqcore.Archive(ridge=-1.0)):
        with pytest.raises(ValueError, match=r"ridge: expected a number >= 1e-9, got -1\.0"):
            call()

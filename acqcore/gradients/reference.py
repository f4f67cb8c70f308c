"""Sketched gradients of a reference set, against which influence and EPIG compare samples.

To first order, a gradient step on sample i changes the loss of a reference set by ``-lr <g_i, g_ref>``. Sketches
preserve inner products (:func:`acqcore.grad_sketch`), so the reference set is scored once, and each sample costs one
product with the mean sketch.

Sources: Pruthi et al. 2020 (TracIn, one checkpoint); Xia et al. 2024 (LESS: cosine, sketches, Adam); Park et al. 2023
(TRAK, sketches).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Self

import torch

from acqcore import checks
from acqcore.gradients.need import ProbeNeed
from acqcore.gradients.selection import same_student, select_linear, select_parameters, shapes_of
from acqcore.head import Head
from acqcore.literals import Layers, Loss, Parameters, Similarity
from acqcore.students.student import Student

# Added to the root of a coordinate's second moment, relative to the root mean square over all coordinates. A coordinate
# that a small reference set hardly moves weighs at most ten times the average; with Adam's 1e-8 it would dominate.
_DAMPING = 0.1

# Numbers of each of the two sketches that are converted to float64 at a time, 32 MiB in all.
_CONVERTED = 1 << 21


class Saved:
    """Base of dataclasses of tensors and plain values that can be saved.

    Attributes:
        maker: acqcore function that creates an instance.
        written_by: writer of its files, for messages.
    """

    maker: ClassVar[str]
    written_by: ClassVar[str]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it to a file, for ``acqcore score --acquisition-args``."""
        with open(path, "wb") as file:  # given a path, torch would put its name into the file
            torch.save({field.name: getattr(self, field.name) for field in fields(self)}, file)  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a file written by :meth:`save`.

        Raises:
            OSError: the file cannot be read. ValueError: the file is not a saved reference.
        """
        try:
            return cls(**torch.load(path, weights_only=True))
        except OSError:
            raise
        except Exception as error:  # torch's reader raises whatever its parsing does, such as KeyError for text
            raise ValueError(f"reference: expected a file from {cls.written_by}, got {os.fspath(path)}") from error

    @classmethod
    def given(cls, reference: Any) -> Self:
        """Return ``reference``, loaded first if it is a path. Raises TypeError for other types."""
        if isinstance(reference, str | os.PathLike):
            return cls.load(reference)
        checks.instance("reference", reference, cls, f"a result of acqcore.{cls.maker}()")
        return reference


@dataclass(frozen=True, eq=False)
class Reference(Saved):
    """The mean gradient of a reference set, sketched; made by :func:`acqcore.influence_reference`.

    Attributes:
        mean: ``[dim]`` float32, mean of the samples' sketches.
        n: number of samples.
        parameters, seed, loss: settings of the sketches.
        shapes: name -> shape of each differentiated parameter; ``head`` is the last layer.
        second_moments: ``[dim]`` float32, second moments of the preconditioner, or None.
    """

    maker: ClassVar[str] = "influence_reference"
    written_by: ClassVar[str] = "Reference.save or 'acqcore reference'"

    mean: torch.Tensor
    n: int
    parameters: Parameters
    seed: int
    loss: Loss
    shapes: Mapping[str, tuple[int, ...]] = field(repr=False)
    second_moments: torch.Tensor | None = None

    @property
    def dim(self) -> int:
        """Length of a sketch."""
        return len(self.mean)

    @torch.no_grad()
    def similarity(self, sketches: torch.Tensor, similarity: Similarity = "cosine") -> torch.Tensor:
        """Cosine or dot product of each sketch with the mean, preconditioned if there are second moments.

        Args:
            sketches: ``[n, dim]`` floating point, made with the same student, parameters, dim, seed and loss. A row
                with NaN gives NaN.
            similarity: ``cosine`` (0 for a zero gradient) or ``dot``.

        Returns:
            ``[n]`` float32.

        Raises:
            TypeError: not a floating-point tensor.
            ValueError: a wrong shape, a different device, an unknown similarity.
        """
        checks.literal("similarity", similarity, Similarity)
        checks.like_vector("sketches", sketches, self.mean, "the reference")
        x, mean = sketches.double(), self.mean.double()
        if self.second_moments is not None:
            # <a, b> = sum_j a_j b_j / (sqrt(v_j) + damping). Each side takes its root, so a self-cosine is 1.
            root = self.second_moments.double().sqrt()
            half = (root + _DAMPING * root.square().mean().sqrt()).rsqrt()
            x, mean = x * half, mean * half
        dot = x @ mean
        if similarity == "dot":
            return dot.float()
        length = x.norm(dim=1) * mean.norm()
        return (dot / length.where(length != 0, 1.0)).float()

    def check(self, student: Student, head: Head) -> None:
        """Raise ValueError if the reference was made with another student (names the difference)."""
        same_student(self.shapes, parameter_shapes(student, head, self.parameters))


def parameter_shapes(student: Student, head: Head, parameters: Parameters) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the head and of the selected parameters, on which the signs of a sketch depend."""
    head_shape = (head.vocab_size, head.weight.shape[1])
    return {"head": head_shape, **shapes_of(select_parameters(student, head, parameters))}


@dataclass(frozen=True, eq=False)
class EpigReference(Saved):
    """Sketched gradients of a reference set under random cotangents; made by :func:`epig_reference`.

    Attributes:
        sketches: ``[2, m, dim]`` float32, two independent sketches of m gradients (one per sample and probe), each
            gradient divided by the square root of its sample's scored-token count.
        layers, seed: settings of the gradients.
        shapes: name -> shape of each differentiated weight.
    """

    maker: ClassVar[str] = "epig_reference"
    written_by: ClassVar[str] = "EpigReference.save"

    sketches: torch.Tensor
    layers: Layers
    seed: int
    shapes: Mapping[str, tuple[int, ...]] = field(repr=False)

    @property
    def dim(self) -> int:
        """Length of a sketch."""
        return self.sketches.shape[2]

    def check(self, student: Student) -> None:
        """Raise ValueError if the reference was made with another student (names the difference)."""
        same_student(self.shapes, shapes_of(select_linear(student, self.layers)))

    def needs(self, probes: int) -> tuple[ProbeNeed, ProbeNeed]:
        """Needs for sketches comparable with the reference's, under independent cotangents."""
        return sketch_needs(self.layers, probes, (self.seed + 1) % 2**63, self.dim, self.seed)

    def squares(
        self,
        first: torch.Tensor,  # [B, P, dim]
        second: torch.Tensor,  # [B, P, dim]
    ) -> torch.Tensor:
        """Mean squared inner product with the reference set's gradients, ``[B, P]`` float64.

        Unbiased: the two factors of each square come from independent sketches.
        """
        both = torch.stack([first, second]).double()
        found = both.new_zeros(first.shape[:2])
        for part in self.sketches.split(max(1, _CONVERTED // self.dim), dim=1):
            found += torch.einsum("hnpd,hmd->hnpm", both, part.double()).prod(dim=0).sum(dim=2)
        return found / self.sketches.shape[1]


def sketch_needs(layers: Layers, probes: int, seed: int, dim: int, sketch_seed: int) -> tuple[ProbeNeed, ProbeNeed]:
    """Needs for two independent sketches of the same gradients."""
    first, second = (
        ProbeNeed("weights", layers, probes, seed, dim=dim, sketch_seed=(2 * sketch_seed + i) % 2**63) for i in (0, 1)
    )
    return first, second

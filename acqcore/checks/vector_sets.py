"""Sets of vectors: sketches, embeddings, references."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from acqcore.checks.basic import at_most, describe, finite, float_tensor, one_of, positive_int, same_device


def vectors(name: str, value: object, like: torch.Tensor | None = None, like_name: str = "") -> None:
    """Finite vectors ``[n, d]``, with the columns and on the device of ``like``. Reads values."""
    float_tensor(name, value, "[n, d]", 2)
    assert isinstance(value, torch.Tensor)
    if like is not None:
        like_vector(name, value, like, like_name)
    bad = ~value.isfinite().all(dim=1)
    if bool(bad.any()):
        raise ValueError(f"{name}: expected finite vectors, row {int(bad.nonzero()[0])} has NaN or infinity")


def not_empty(name: str, value: torch.Tensor) -> None:
    if len(value) == 0:
        raise ValueError(f"{name}: expected at least one row, got {describe(value)}")


def nonzero_rows(name: str, value: torch.Tensor) -> None:
    zero = ~value.any(dim=1)
    if bool(zero.any()):
        raise ValueError(f"{name}: row {int(zero.nonzero()[0])} is zero, expected vectors with a direction")


def ridge(value: object) -> None:
    """Noise on a kernel with ones on its diagonal; below 1e-9 its factorisation in float64 may fail."""
    finite("ridge", value)
    if value < 1e-9:  # type: ignore[operator]
        raise ValueError(f"ridge: expected a number >= 1e-9, got {value}")


def one_column(name: str, values: Mapping[str, torch.Tensor], column: str | None) -> torch.Tensor:
    """The entry called ``column``; the only one where that is None."""
    if column is not None:
        one_of("acquisition", column, values)
        return values[column]
    if len(values) != 1:
        raise ValueError(
            f"{name}: expected scores of one acquisition, got {', '.join(values) or 'none'}; acquisition= names one"
        )
    return next(iter(values.values()))


def archive_state(state: object) -> None:
    """What ``Archive.state_dict`` gives."""
    if not isinstance(state, Mapping):
        raise TypeError(f"state: expected a mapping, got {describe(state)}")
    for key in ("capacity", "ridge", "vectors"):
        if key not in state:
            raise ValueError(f"state: no entry {key!r}, expected what Archive.state_dict() gives")
    positive_int("state: capacity", state["capacity"])
    ridge(state["ridge"])
    if state["vectors"] is not None:
        vectors("state: vectors", state["vectors"])
        at_most("state: vectors", len(state["vectors"]), state["capacity"], "the capacity")


def like_vector(name: str, value: object, like: torch.Tensor, like_name: str) -> None:
    """Vectors ``[n, d]`` with the columns and on the device of ``like [..., d]``."""
    float_tensor(name, value, "[n, d]", 2)
    assert isinstance(value, torch.Tensor)
    if value.shape[1] != like.shape[-1]:
        raise ValueError(f"{name}: expected [n, d] with d = {like.shape[-1]} as in {like_name}, got {describe(value)}")
    same_device(name, value, like_name, like)


def preconditioner(value: object, dim: int) -> None:
    """``"reference"`` or second moments ``[dim]``. Reads values."""
    if not isinstance(value, torch.Tensor):
        one_of("precondition", value, ("reference",))
        return
    float_tensor("precondition", value, "[dim]", 1)
    if len(value) != dim:
        raise ValueError(f"precondition: expected [dim] with dim = {dim}, got {describe(value)}")
    if not bool((value.isfinite() & (value >= 0)).all()) or not bool(value.any()):
        raise ValueError("precondition: expected finite second moments >= 0, not all of them 0")


def reference_sketches(sketches: torch.Tensor) -> None:
    """Sketches ``[n, dim]`` of a reference set."""
    if len(sketches) == 0:
        raise ValueError("samples: expected at least one reference sample, got none")
    bad = ~sketches.isfinite().all(dim=1)
    if bool(bad.any()):
        raise ValueError(f"samples[{int(bad.nonzero()[0])}]: expected a finite gradient, got NaN or infinity")
    if not bool(sketches.any()):
        raise ValueError("samples: expected a reference set with a gradient, all of its gradients are zero")


def same_student(made: Mapping[str, Sequence[int]], now: Mapping[str, Sequence[int]]) -> None:
    """Names and shapes of the parameters of a reference's student are those of this one."""
    for name in (*made, *now):
        there, here = made.get(name), now.get(name)
        if there != here:
            shapes = ["no such parameter" if shape is None else str(list(shape)) for shape in (there, here)]
            raise ValueError(f"reference: made with another student: {name} is {shapes[0]} there, {shapes[1]} here")

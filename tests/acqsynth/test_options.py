from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from acqsynth.options import build


@dataclass
class Config:
    learning_rate: float = 1.0
    computed: int = field(init=False, default=0)


def test_options_become_fields() -> None:
    assert build(Config, {"learning_rate": 2.0}) == Config(2.0)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("learning_rat", "options: expected fields of Config, got 'learning_rat'; did you mean 'learning_rate'"),
        ("zzz", "options: expected fields of Config, got 'zzz'$"),
        ("computed", "options: expected fields of Config, got 'computed'$"),
    ],
)
def test_unknown_options_are_named(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(Config, {name: 1})


def test_the_table_is_named() -> None:
    with pytest.raises(ValueError, match=r"options\.lora: expected fields"):
        build(Config, {"r": 1}, table="options.lora")

"""``python -m acqsynth.world``: makes the base model where it is not cached yet, and prints what it can do."""

from __future__ import annotations

import argparse
import json
import logging
import time

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from acqsynth import engines
from acqsynth.domains.arithmetic import SKILLS
from acqsynth.world.pretrain import Settings, base_model
from acqsynth.world.profile import Profile, profile


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m acqsynth.world", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="of the model's weights and data (default: 0)")
    parser.add_argument("--model", help="profile this folder or hub id instead of the base model")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("acqsynth.world").setLevel(logging.INFO)
    console = Console()
    path = arguments.model
    if path is None:
        begin = time.perf_counter()
        folder = base_model(Settings(seed=arguments.seed))
        console.print(f"base model of seed {arguments.seed}: {folder} ({time.perf_counter() - begin:.0f} s)")
        curve = json.loads((folder / "pretrain.json").read_text())["loss"]
        console.print(f"loss at the end: practice {curve[-1]['practice']:.3f}, writing {curve[-1]['writing']:.3f}")
        path = str(folder)
    show(console, profile(engines.load("transformers", path)))


def show(console: Console, measured: Profile) -> None:
    table = Table(box=SIMPLE_HEAD)
    for heading in ("skill", "kind", "accuracy", "share of written", "written right"):
        table.add_column(heading, justify="left" if heading in ("skill", "kind") else "right")
    for name, skill in SKILLS.items():
        right = f"{measured.right[name]:.0%}" if name in measured.right else "-"
        table.add_row(name, skill.kind, f"{measured.accuracy[name]:.0%}", f"{measured.mix[name]:.0%}", right)
    console.print(table)
    console.print(f"Of the samples written, {measured.parsed:.0%} parse and {measured.valid:.0%} are valid questions.")


if __name__ == "__main__":
    main()

"""Arms over seeds, resumed after a stop: what ``bench_pool`` and ``bench_write`` share, from rows to stages."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from benchmarks import harness, real_rows
from benchmarks.pool_data import Message
from benchmarks.pool_fit import Fitter, Rows, pad

TUNED_ON, REPORTED_ON = "clinc150", "banking77"
WARM_EPOCHS = 8.0
LENGTH, LABEL_LENGTH = 48, 11  # tokens of a row, and of its label

Found = TypeVar("Found")


class Log:
    """Finished units, one JSON line each, identified by their keys."""

    KEYS = ("stage", "seed", "pool", "arm")

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    self.rows.append(json.loads(line))
                except json.JSONDecodeError:  # a line left incomplete by a killed process
                    continue
        self._done = {self._key(row): row for row in self.rows}

    def _key(self, row: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(row.get(key) for key in self.KEYS)

    def get(self, **key: Any) -> dict[str, Any] | None:
        return self._done.get(self._key(key))

    def add(self, **row: Any) -> None:
        harness.append(self.path, **row)
        self.rows.append(row)
        self._done[self._key(row)] = row

    def best(self, stage: str, pool: str, names: Sequence[str], seeds: Sequence[int]) -> str:
        """The name with the highest mean accuracy; ties go to the first; names that failed on a seed are excluded."""
        means: dict[str, float] = {}
        for name in names:
            found = [self.get(stage=stage, seed=seed, pool=pool, arm=name) or {} for seed in seeds]
            if all("accuracy" in row for row in found):
                means[name] = statistics.fmean(row["accuracy"] for row in found)
        return max(means, key=lambda name: means[name]) if means else names[0]


class Stopped(Exception):  # noqa: N818
    """The time is up; all finished units are in the log."""


class Encoder:
    """Messages as rows of token ids, ``length`` of them with labels of at most ``label_length``."""

    def __init__(self, tokenizer: Any, length: int, label_length: int) -> None:
        self.tokenizer = tokenizer
        self._length, self._label_length = length, label_length

    def tokens(self, message: Message) -> tuple[list[int], list[int]]:
        """Token ids of the prompt and of the label, including its end token."""
        prompt = self.tokenizer(f"Message: {message.text}\nIntent:", add_special_tokens=False).input_ids
        label = self.tokenizer(" " + message.intent.replace("_", " "), add_special_tokens=False).input_ids
        return prompt, [*label, self.tokenizer.eos_token_id]

    def fits(self, message: Message) -> bool:
        """Whether the message fits with any label, so that a new label cannot make the row too long."""
        return len(self.tokens(message)[0]) + self._label_length <= self._length

    def __call__(self, messages: Sequence[Message]) -> Rows:
        return pad([self.tokens(message) for message in messages], self._length, self._label_length)


@dataclass
class Bench:
    """A student on one folder of data; no unit starts after ``deadline``, a time of ``time.monotonic``."""

    fitter: Fitter
    encode: Encoder
    folder: Path
    scale: Any
    log: Log
    deadline: float
    base: list[torch.Tensor] = field(init=False)  #: weights of the untrained student

    def __post_init__(self) -> None:
        self.base = self.fitter.weights()

    def placed(self, messages: Sequence[Message]) -> Rows:
        return self.encode(messages).to(self.fitter.device)

    def tested(self, rows: Rows) -> dict[str, float]:
        """Accuracy and loss of the current weights."""
        return asdict(self.fitter.test(rows))

    def warmed(self, rows: Rows, rate: float, seed: int) -> list[torch.Tensor]:
        """The warm student's weights: the untrained one, fitted to ``rows``."""
        self.fitter.restore(self.base)
        self.fitter.fit(rows, epochs=self.scale.warm_epochs, rate=rate, seed=seed)
        return self.fitter.weights()

    def outcome(
        self, rows: Rows, test: Rows, choices: Any, warm: Sequence[torch.Tensor], seed: int
    ) -> dict[str, float]:
        """Accuracy and loss of a student that learnt ``rows``; the warm student is restored afterwards."""
        self.fitter.restore(self.base if choices.start == "anew" else warm)
        self.fitter.fit(rows, epochs=choices.epochs, rate=choices.rate, seed=seed)
        found = self.tested(test)
        self.fitter.restore(warm)
        return found

    def check_time(self) -> None:
        if time.monotonic() > self.deadline:
            raise Stopped

    def done(self, key: dict[str, Any]) -> bool:
        """Whether a unit is in the log; if not, there must be time for it."""
        if self.log.get(**key) is not None:
            return True
        self.check_time()
        return False

    def attempt(self, key: dict[str, Any], warm: Sequence[torch.Tensor], work: Callable[[], Found]) -> Found | None:
        """The result of ``work``; if it fails, its error is logged and the warm student restored."""
        try:
            return work()
        except Stopped:
            raise
        except Exception as error:  # one arm's failure must not cost the others their only run
            self.fitter.restore(warm)
            self.log.add(**key, failed=harness.first_line(error))
            return None


def options(description: str, name: str, seeds: int) -> argparse.ArgumentParser:
    """The options that both benches have."""
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    add = parser.add_argument
    add("--student", default=None, help="folder or hub id (default: the packaged SmolLM2)")
    add("--data", type=Path, default=real_rows.FOLDER / "intents", help="folder of the intent files")
    add("--out", type=Path, default=Path(f"bench-{name}"), help="folder of the log (default: %(default)s)")
    add("--stage", choices=("all", "tune", "report", "table"), default="all")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--seconds", type=float, default=float("inf"), help="stop cleanly after this time")
    add("--seeds", type=int, default=seeds, help="seeds of the report (default: %(default)s)")
    add("--small", action="store_true", help="tiny sizes, only to test that the code runs")
    return parser


def run_stages(
    arguments: argparse.Namespace, choices: Path, bench: Bench, tune: Callable[[], Any], report: Callable[[], None]
) -> None:
    """Runs the stages asked for; ``tune`` returns the choices, a dataclass, and ``report`` reads them from the file."""
    bench.log.add(stage="machine", machine={**harness.machine(), "graph": bench.fitter.captured})
    try:
        if arguments.stage in ("all", "tune"):
            harness.write(choices, {"tuned_on": TUNED_ON, "choices": asdict(tune())})
        if arguments.stage in ("all", "report"):
            report()
    except Stopped:
        print(f"stopped after {arguments.seconds:g} s; the same command resumes")

"""A demonstration on a laptop, ``make demo``.

1. SmolLM2-135M-Instruct scores the bundled seeds with all acquisitions of row statistics in one call.
2. The same model learns, in a few steps of TRL's GRPO, to write samples that its frozen copy is unsure about.
3. The full loop in a small world with known skills (recipe ``arithmetic``): a generator trained on the default reward,
   its questions labelled and learned by a student, baselines at equal rows, and a report.

All numbers are measured in this run and saved in ``demo-output/``: ``scores.parquet``, ``demo.json``, ``loop/``.
"""

from __future__ import annotations

import json
import os
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import datasets
import pandas
import torch
import transformers
import trl
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

import acqcore
from acqsynth import cli, train
from acqsynth.callbacks import Progress
from acqsynth.models import smollm2_path
from acqsynth.rewards import AcquisitionReward
from acqsynth.seeds import DOMAINS, KINDS, load_seeds

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
OUTPUT = Path("demo-output")
STEPS = 4
PROMPTS_PER_STEP = 2
GROUP = 4
COMPLETION_TOKENS = 96
SHOTS = 2  # with one, a 135M model follows the format in a third of its completions; with two, in two thirds

ACQUISITIONS = (
    "loss", "perplexity", "entropy", "varentropy", "least_confidence", "margin", "gini", "el2n",
    "expected_gradient_length", "token_grad_norm",
)  # fmt: skip

console = Console(highlight=False)


def main() -> None:
    """Runs the three parts and writes ``demo-output/``."""
    quiet()
    begin = time.perf_counter()
    OUTPUT.mkdir(exist_ok=True)
    path, backend = find_model(), next(row for row in acqcore.backends() if row.available)
    measured: dict[str, Any] = {
        "model": path,
        "versions": {module.__name__: module.__version__ for module in (acqcore, torch, transformers, trl)},
        "backend": {"name": backend.name, "instruction_set": backend.instruction_set},
    }
    console.print(
        f"[bold]acqcore {acqcore.__version__}[/]: backend {backend.name} ({backend.instruction_set}), "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    student = acqcore.Student.load(path, dtype=torch.float32)
    measured["scoring"] = score(student)
    measured["grpo"] = teach(path, AcquisitionReward(student, "entropy"))
    measured["loop"] = run_loop()
    measured["seconds"] = time.perf_counter() - begin
    (OUTPUT / "demo.json").write_text(json.dumps(measured, indent=2) + "\n")
    console.print(f"\n{measured['seconds']:.0f} s in total; results in {OUTPUT}", soft_wrap=True)
    console.print(f"Report of the loop: {report()}", soft_wrap=True)


def quiet() -> None:
    """Silences the libraries' progress bars and notices."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.simplefilter("ignore", FutureWarning)


def find_model() -> str:
    """The path of the packaged model, or else its hub id."""
    try:
        with console.status("SmolLM2-135M-Instruct: converting the packaged weights (once, half a minute)"):
            return str(smollm2_path())
    except FileNotFoundError as error:
        console.print(f"[yellow]{error}[/]\nUsing {HUB_ID} from the hub.")
        return HUB_ID


def score(student: acqcore.Student) -> dict[str, float]:
    """Scores the seeds; shows both ends of the entropy ranking and each acquisition's mean by kind."""
    seeds = load_seeds()
    console.rule(f"1. {len(seeds)} seeds, {len(ACQUISITIONS)} acquisitions, one call")
    begin = time.perf_counter()
    with console.status("scoring"):
        scores = acqcore.score(student, list(seeds), ACQUISITIONS, progress=False)
    seconds = time.perf_counter() - begin
    table = pandas.concat([pandas.DataFrame(seeds), scores.to_pandas()], axis=1)
    table.to_parquet(OUTPUT / "scores.parquet", index=False)
    table = table.sort_values("entropy", ascending=False).reset_index(drop=True)
    table["question"] = table["prompt"].str.strip().str.slice(0, 48)
    ends = table.drop(index=range(8, len(table) - 8))
    numbers = ends[["entropy", "loss"]].map("{:.3f}".format)
    ranked = pandas.concat([numbers, ends[["kind", "domain", "question"]]], axis=1)
    show("Ranked by entropy, nats per token (both ends)", ranked)
    means = table.groupby("kind")[list(ACQUISITIONS)].mean().loc[list(KINDS)].T
    show("Mean by kind", means.map("{:.4g}".format).reset_index(names="acquisition"))
    tokens = int(table["n_tokens"].sum())
    console.print(f"{tokens} tokens scored in {seconds:.2f} s")
    return {"tokens": tokens, "seconds": seconds}


def show(title: str, frame: pandas.DataFrame) -> None:
    """Prints a table."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for name, column in frame.items():
        width = None if name == "question" else max(len(str(name)), *column.map(len))
        table.add_column(str(name), no_wrap=True, min_width=width)
    for row in frame.itertuples(index=False):
        table.add_row(*map(str, row))
    console.print(table)


def prompts() -> list[list[dict[str, str]]]:
    """Chat prompts that ask for a new sample, with seeds as examples; the domains alternate."""
    shortest = {d: sorted(load_seeds(d, "ordinary"), key=lambda seed: len(seed["completion"])) for d in DOMAINS}
    asked = []
    for i in range(STEPS * PROMPTS_PER_STEP):
        turn, place = divmod(i, len(DOMAINS))
        domain, request = DOMAINS[place], "Write a new exercise in {} with its answer, in the same format."
        ask = {"role": "user", "content": request.format(domain)}
        messages = []
        for shot in range(SHOTS):
            seed = shortest[domain][(turn + shot) % len(shortest[domain])]
            text = f"<question>{seed['prompt'].strip()}</question>\n<answer>{seed['completion']}</answer>"
            messages += [ask, {"role": "assistant", "content": text}]
        asked.append([*messages, ask])
    return asked


def teach(path: str, reward: AcquisitionReward) -> dict[str, Any]:
    """A few steps of GRPO, one group per prompt; reports their cost and the samples with most and least reward."""
    console.rule(f"2. {STEPS} steps of GRPO, rewarded by {reward.acquisition} of a frozen copy")
    console.print(f"{PROMPTS_PER_STEP} prompts x {GROUP} completions of at most {COMPLETION_TOKENS} tokens per step")
    output = OUTPUT / "grpo" / reward.acquisition
    options = {
        "max_steps": STEPS,
        "per_device_train_batch_size": PROMPTS_PER_STEP * GROUP,
        "num_generations": GROUP,
        "max_completion_length": COMPLETION_TOKENS,
        "temperature": 0.7,
        "learning_rate": 1e-5,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 0,
    }
    with console.status("training") as status:
        train.grpo(path, prompts(), reward, output, options, callbacks=[Progress(console.print, status.update)])
    keys = {key: key for key in ("seconds", "reward_seconds", "reward_share", "reward")}
    keys["parsed"] = f"{reward.__name__}/parsed"
    steps = [{key: row[name] for key, name in keys.items()} for row in train.read_log(output) if "reward" in row]
    share = sum(step["reward_seconds"] for step in steps) / sum(step["seconds"] for step in steps)
    parsed = statistics.fmean(step["parsed"] for step in steps)
    console.print(f"[bold]The reward took {share:.1%} of the steps' time[/]; {parsed:.0%} of the completions parsed.")
    written = pandas.concat(map(pandas.read_parquet, sorted(output.glob("completions/*.parquet"))))
    written = written[written[reward.__name__] > 0].sort_values(reward.__name__, ascending=False)
    for _, row in [*written.iterrows()][:2] + [*written.iterrows()][-1:]:
        console.print(f"[dim]reward {row[reward.__name__]:.3f}[/]")
        console.print(row["completion"][-1]["content"], markup=False, soft_wrap=True)
    return {"steps": steps, "reward_share": share, "parsed": parsed, "masked": reward.masked}


def run_loop() -> dict[str, Any]:
    """Runs the recipe ``arithmetic``."""
    console.rule("3. the full loop in a world of arithmetic")
    begin = time.perf_counter()
    status = cli.main(["run", "arithmetic", f"output={OUTPUT / 'loop'}"])
    if status:
        raise SystemExit(status)
    metrics = json.loads(report().with_name("metrics.json").read_text())
    return {"seconds": time.perf_counter() - begin, "verdict": metrics["verdict"]}


def report() -> Path:
    """The path of the loop's report."""
    return OUTPUT / "loop" / "06-report" / "report" / "report.html"


if __name__ == "__main__":
    main()

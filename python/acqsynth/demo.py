"""The product on a laptop, ``python -m acqsynth.demo``: score, compare, and a short GRPO with the score as
reward.

1. SmolLM2-135M-Instruct scores the bundled seeds with every acquisition of row statistics in one call.
2. The same numbers the usual way, from full logits in plain torch, timed in turn with the first.
3. The same model learns, for a few steps of TRL's GRPO, to write samples that a frozen copy of it is unsure
of.
4. The whole loop, in a small world whose skills are known (recipe ``arithmetic``): a generator taught by the default
reward, its questions labelled and learnt by a student, against baselines at equal rows, with a report.

Every number printed is measured in this run; ``demo-output/`` keeps them (``scores.parquet``, ``demo.json``,
``loop/``).
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import datasets
import torch
import transformers
import trl
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback

import acqcore
from acqsynth import cli
from acqsynth.models import smollm2_path
from acqsynth.rewards import AcquisitionReward, completion_text
from acqsynth.seeds import DOMAINS, KINDS, load_seeds

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
OUTPUT = Path("demo-output")
STEPS = 4
PROMPTS_PER_STEP = 2
GROUP = 4
COMPLETION_TOKENS = 96
RUNS = 3  # of each side of a comparison
SHOTS = 2  # with one, a 135M model keeps to the format in a third of its completions; with two, in two thirds

ACQUISITIONS = (
    "loss", "perplexity", "entropy", "varentropy", "least_confidence", "margin", "gini", "el2n",
    "expected_gradient_length", "token_grad_norm",
)  # fmt: skip

console = Console()


def main() -> None:
    """Run the four parts and write ``demo-output/``."""
    quiet()
    begin = time.perf_counter()
    OUTPUT.mkdir(exist_ok=True)
    path = find_model()
    with console.status("loading the student"):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(path)
        student = acqcore.Student.from_model(model, tokenizer=tokenizer)
    used = next(row for row in acqcore.backends() if row.available)
    console.print(
        f"[bold]acqcore {acqcore.__version__}[/]: backend {used.name} ({used.instruction_set}), "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    measured: dict[str, Any] = {
        "model": str(path),
        "versions": {module.__name__: module.__version__ for module in (acqcore, torch, transformers, trl)},
        "machine": {"processor": platform.machine(), "threads": torch.get_num_threads()},
        "backend": {"name": used.name, "instruction_set": used.instruction_set},
    }
    seeds = load_seeds()
    console.rule(f"1. {len(seeds)} seeds, {len(ACQUISITIONS)} acquisitions, one call")
    with console.status("scoring"):
        scores = score(student, seeds)
    show_scores(seeds, scores)
    write_scores(seeds, scores)
    console.rule("2. beside eager torch")
    measured["scoring"] = compare(student, model, tokenizer, seeds, scores)
    console.rule(f"3. {STEPS} steps of GRPO, entropy of a frozen copy as reward")
    with console.status("loading the generator"):
        generator = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    measured["grpo"] = train(generator, tokenizer, RecordedReward(student, "entropy"))
    console.rule("4. the whole loop, in a world of arithmetic")
    measured["loop"] = run_loop()
    measured["seconds"] = time.perf_counter() - begin
    (OUTPUT / "demo.json").write_text(json.dumps(measured, indent=2) + "\n")
    console.print(f"\n{measured['seconds']:.0f} s in all; {OUTPUT}/scores.parquet and {OUTPUT}/demo.json written")
    console.print(f"The report of the loop: {report()}")


def run_loop() -> dict[str, Any]:
    """Runs the recipe ``arithmetic``; its seconds and what its report concludes."""
    begin = time.perf_counter()
    status = cli.main(["run", "arithmetic", f"output={OUTPUT / 'loop'}"])
    if status:
        raise SystemExit(status)
    metrics = json.loads(report().with_name("metrics.json").read_text())
    return {"seconds": time.perf_counter() - begin, "verdict": metrics["verdict"]}


def report() -> Path:
    """Where the loop's report is."""
    return OUTPUT / "loop" / "06-report" / "report" / "report.html"


def quiet() -> None:
    """Progress is shown here, once; the libraries' own bars and notices are off."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.simplefilter("ignore", FutureWarning)


def find_model() -> str:
    """Path of the packaged model, else the hub id; says which."""
    try:
        with console.status("SmolLM2-135M-Instruct: converting the packaged weights (once, half a minute)"):
            path = str(smollm2_path())
    except FileNotFoundError as error:
        console.print(f"[yellow]{error}[/]\nTaking {HUB_ID} from the hub.")
        return HUB_ID
    console.print("SmolLM2-135M-Instruct, from the package that carries it")
    return path


def score(student: acqcore.Student, seeds: Sequence[dict[str, str]]) -> acqcore.Scores:
    """Every acquisition of row statistics, of every seed, in one call."""
    return acqcore.score(student, list(seeds), ACQUISITIONS, progress=False)


def show_scores(seeds: Sequence[dict[str, str]], scores: acqcore.Scores) -> None:
    """The ends of the ranking by entropy, and each acquisition's mean by kind."""
    entropy, loss = scores["entropy"].tolist(), scores["loss"].tolist()
    order = sorted(range(len(seeds)), key=lambda i: -entropy[i])
    ranked = Table(title="Ranked by entropy, nats per token (both ends)", title_justify="left", box=SIMPLE_HEAD)
    widths = {"rank": 4, "entropy": 7, "loss": 5, "kind": 9, "domain": 11, "question": None}
    for heading, width in widths.items():
        number = heading in ("rank", "entropy", "loss")
        ranked.add_column(heading, justify="right" if number else "left", no_wrap=True, min_width=width)
    for rank, i in enumerate(order, 1):
        if 8 < rank <= len(order) - 8:
            continue
        seed = seeds[i]
        ranked.add_row(
            str(rank), f"{entropy[i]:.3f}", f"{loss[i]:.3f}", seed["kind"], seed["domain"],
            seed["prompt"].strip()[:48], end_section=rank == 8,
        )  # fmt: skip
    console.print(ranked)
    means = Table(title="Mean by kind", title_justify="left", box=SIMPLE_HEAD)
    means.add_column("acquisition")
    for kind in KINDS:
        means.add_column(kind, justify="right")
    for name in ACQUISITIONS:
        cells = []
        for kind in KINDS:
            rows = [i for i, seed in enumerate(seeds) if seed["kind"] == kind]
            cells.append(f"{scores[name][rows].mean().item():.4g}")
        means.add_row(name, *cells)
    console.print(means)


def write_scores(seeds: Sequence[dict[str, str]], scores: acqcore.Scores) -> None:
    """``scores.parquet``: the seeds' columns beside the scores'."""
    table = scores.to_pandas()
    for column in ("completion", "prompt", "kind", "domain", "id"):
        table.insert(0, column, [seed[column] for seed in seeds])
    table.to_parquet(OUTPUT / "scores.parquet", index=False)


def compare(
    student: acqcore.Student,
    model: torch.nn.Module,
    tokenizer: Any,
    seeds: Sequence[dict[str, str]],
    scores: acqcore.Scores,
) -> dict[str, float]:
    """Seconds of ``score`` and of its head pass beside eager torch's, and how far the entropies differ."""
    with torch.no_grad():
        batches = [scored_rows(student, tokenizer, seed) for seed in seeds]
    hidden = torch.cat([rows for rows, _ in batches])
    targets = torch.cat([ids for _, ids in batches])
    with console.status(f"timing: {RUNS} runs each, taken in turn"):
        whole = interleaved(
            {"score": lambda: score(student, seeds), "eager": lambda: eager_scores(model, tokenizer, seeds)}
        )
        head = interleaved(
            {
                "row_stats": lambda: acqcore.row_stats(hidden, student.head, targets),
                "eager": lambda: eager_statistics(hidden @ student.head.weight.T, hidden, targets),
            }
        )
        eager = eager_scores(model, tokenizer, seeds)["entropy"]
    difference = (torch.tensor(eager) - scores["entropy"]).abs().max().item()
    table = Table(box=SIMPLE_HEAD)
    for heading in (f"{len(targets)} scored tokens, seconds", "acqcore", "eager torch", "ratio"):
        table.add_column(heading, justify="left" if heading[0].isdigit() else "right")
    for label, ours, theirs in (
        ("trunk and head, from text", whole["score"], whole["eager"]),
        ("head pass alone", head["row_stats"], head["eager"]),
    ):
        table.add_row(label, f"{ours:.2f}", f"{theirs:.2f}", f"{ours / theirs:.2f}")
    console.print(table)
    console.print(f"Largest difference between the two entropies of a seed: {difference:.1e} nats.")
    return {
        "scored_tokens": len(targets),
        "score_seconds": whole["score"],
        "eager_seconds": whole["eager"],
        "head_seconds": head["row_stats"],
        "eager_head_seconds": head["eager"],
        "largest_entropy_difference": difference,
    }


def interleaved(sides: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median seconds of each side, run in turn so that both see the same machine; one warm-up each."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for run in range(RUNS + 1):
        for name, function in sides.items():
            begin = time.perf_counter()
            function()
            if run > 0:
                seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in seconds.items()}


def first_scored(tokenizer: Any, seed: dict[str, str]) -> tuple[list[int], int]:
    """Token ids of prompt and completion, and the index of the first token of the completion."""
    encoded = tokenizer(seed["prompt"] + seed["completion"], return_offsets_mapping=True)
    ends = [end for _, end in encoded["offset_mapping"]]
    start = next(i for i, end in enumerate(ends) if end > len(seed["prompt"]))
    return encoded["input_ids"], start


def scored_rows(student: acqcore.Student, tokenizer: Any, seed: dict[str, str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states ``[T, D]`` that predict the completion's tokens, and these ``[T]``."""
    ids, start = first_scored(tokenizer, seed)
    tokens = torch.tensor([ids])
    return student.hidden(tokens)[0, start - 1 : -1], tokens[0, start:]


@torch.no_grad()
def eager_scores(
    model: torch.nn.Module, tokenizer: Any, seeds: Sequence[dict[str, str]], batch: int = 8
) -> dict[str, list[float]]:
    """What ``score`` gives, the usual way: padded batches by length, the model's own logits, statistics in
    torch."""
    encoded = [first_scored(tokenizer, seed) for seed in seeds]
    order = sorted(range(len(seeds)), key=lambda i: -len(encoded[i][0]))
    result: dict[str, list[float]] = {}
    for begin in range(0, len(order), batch):
        picked = order[begin : begin + batch]
        ids = [torch.tensor(encoded[i][0]) for i in picked]
        tokens = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
        output = model(input_ids=tokens, attention_mask=mask, output_hidden_states=True, use_cache=False)
        for row, i in enumerate(picked):
            rows = slice(encoded[i][1] - 1, len(ids[row]) - 1)
            values = eager_statistics(
                output.logits[row, rows].float(),
                output.hidden_states[-1][row, rows],
                ids[row][encoded[i][1] :],
            )
            for name, value in values.items():
                result.setdefault(name, [0.0] * len(seeds))[i] = value.mean().item()
    return result


def eager_statistics(
    z: torch.Tensor,  # [T, V] logits
    hidden: torch.Tensor,  # [T, D]
    targets: torch.Tensor,  # [T]
) -> dict[str, torch.Tensor]:
    """The token values behind all ten acquisitions (perplexity is a mean of the loss), each ``[T]``."""
    logp = z.log_softmax(dim=-1)
    p = logp.exp()
    entropy = -(p * logp).sum(dim=-1)
    top = p.topk(2, dim=-1).values
    gini = 1 - p.square().sum(dim=-1)
    loss = -logp.gather(-1, targets[:, None])[:, 0]
    residual = p.scatter_add(-1, targets[:, None], -torch.ones_like(loss)[:, None]).norm(dim=-1)
    length = hidden.norm(dim=-1)
    return {
        "loss": loss,
        "entropy": entropy,
        "varentropy": (p * (logp + entropy[:, None]).square()).sum(dim=-1),
        "least_confidence": 1 - top[:, 0],
        "margin": 1 - (top[:, 0] - top[:, 1]),
        "gini": gini,
        "el2n": residual,
        "expected_gradient_length": length.square() * gini,
        "token_grad_norm": residual * length,
    }


def prompts() -> list[dict[str, Any]]:
    """Chat prompts that ask for a new sample: the seeds are the examples, the domains take turns."""
    rows = []
    shortest = {d: sorted(load_seeds(d, "ordinary"), key=lambda seed: len(seed["completion"])) for d in DOMAINS}
    for start in range(STEPS * PROMPTS_PER_STEP):
        domain = DOMAINS[start % len(DOMAINS)]
        ask = {
            "role": "user",
            "content": f"Write a new exercise in {domain} with its answer, in the same format.",
        }
        messages = []
        for shot in range(SHOTS):
            seed = shortest[domain][(start // len(DOMAINS) + shot) % len(shortest[domain])]
            text = f"<question>{seed['prompt'].strip()}</question>\n<answer>{seed['completion']}</answer>"
            messages += [ask, {"role": "assistant", "content": text}]
        rows.append({"prompt": [*messages, ask], "domain": domain})
    return rows


class RecordedReward(AcquisitionReward):
    """The reward, keeping what it saw: the demo shows samples beside their rewards."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.seen: list[tuple[str, float | None]] = []

    def __call__(self, prompts: Any, completions: Any, *args: Any, **columns: Any) -> list[float | None]:
        rewards = super().__call__(prompts, completions, *args, **columns)
        self.seen += zip([completion_text(c) or "" for c in completions], rewards, strict=True)
        return rewards


class StepReport(TrainerCallback):
    """Prints a line a step: what the step cost and how much of that was the reward."""

    def __init__(self, reward: AcquisitionReward) -> None:
        self.reward = reward
        self.steps: list[dict[str, float]] = []
        self._begin = 0.0
        self._status = console.status("")

    def on_step_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        self._begin = time.perf_counter()
        self._status.update(f"step {state.global_step + 1} of {STEPS}: {PROMPTS_PER_STEP * GROUP} completions")
        self._status.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        seconds = time.perf_counter() - self._begin
        self.steps.append(
            {
                "seconds": seconds,
                "reward_seconds": self.reward.seconds,
                "reward_share": self.reward.seconds / seconds,
            }
        )
        self._status.stop()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **rest: Any) -> None:
        if "reward" not in logs:
            return
        step = self.steps[-1]
        step.update(reward=logs["reward"], parsed=logs[f"{self.reward.__name__}/parsed"])
        console.print(
            f"step {state.global_step}: reward {step['reward']:.3f}, parsed {step['parsed']:.0%}, "
            f"{step['seconds']:.1f} s, of which the reward took {step['reward_seconds']:.2f} s = "
            f"{step['reward_share']:.1%}",
            soft_wrap=True,
        )


def train(generator: torch.nn.Module, tokenizer: Any, reward: RecordedReward) -> dict[str, Any]:
    """A few steps of GRPO of ``generator``, one group a prompt: what each took, and what the reward saw."""
    report = StepReport(reward)
    config = trl.GRPOConfig(
        output_dir=str(OUTPUT / "grpo"),
        max_steps=STEPS,
        per_device_train_batch_size=PROMPTS_PER_STEP * GROUP,
        num_generations=GROUP,
        max_completion_length=COMPLETION_TOKENS,
        temperature=0.7,
        learning_rate=1e-5,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=0,
    )
    trainer = trl.GRPOTrainer(
        model=generator,
        reward_funcs=[reward],
        args=config,
        train_dataset=datasets.Dataset.from_list(prompts()),
        processing_class=tokenizer,
        callbacks=[report],
    )
    trainer.remove_callback(PrinterCallback)
    console.print(f"{PROMPTS_PER_STEP} prompts x {GROUP} completions of at most {COMPLETION_TOKENS} tokens a step")
    trainer.train()
    share = sum(s["reward_seconds"] for s in report.steps) / sum(s["seconds"] for s in report.steps)
    parsed = statistics.fmean(s["parsed"] for s in report.steps)
    console.print(f"[bold]The reward took {share:.1%} of the steps' time[/]; {parsed:.0%} of the completions parsed.")
    best = sorted((pair for pair in reward.seen if pair[1]), key=lambda pair: -(pair[1] or 0))
    for text, value in best[:2] + best[-1:]:
        console.print(f"[dim]reward {value:.3f}[/]")
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    return {
        "steps": report.steps,
        "reward_share": share,
        "parsed": parsed,
        "masked": reward.masked,
        "samples": [{"text": text, "reward": value} for text, value in reward.seen],
    }


if __name__ == "__main__":
    main()

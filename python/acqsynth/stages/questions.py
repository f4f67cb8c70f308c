"""Questions: trains a generator, writes or selects its questions, and labels them."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from acqsynth import write
from acqsynth.artefacts import read_json, read_rows, read_table, write_rows
from acqsynth.config import EngineConfig, LabellingConfig, SamplingConfig
from acqsynth.domains import Messages, Sample, domain as find_domain
from acqsynth.engines import Sampling, derived_seed
from acqsynth.label import Labeller
from acqsynth.rewards.gates import sample_gates
from acqsynth.stages.rows import CHUNK, Scoring, fused, load_engine, signal_values
from acqsynth.steps import StepContext, StepError
from acqsynth.write import Candidate, WriteResult

_PROBE = 32  # samples whose order before and after a student refresh measures staleness


@dataclass(frozen=True)
class Writing:
    """How a generator is prompted for questions."""

    scoring: Scoring
    generator: Any  #: model
    sampling: SamplingConfig
    shown: int
    turns: bool
    n: int
    seed: int
    held_out: Any  #: rows to show
    earlier: Sequence[Any] = ()  #: samples of earlier rounds, whose questions are not asked again


def train_generator(
    context: StepContext,
    *,
    scoring: Scoring,
    generator: str | Path,
    prompts: int,
    shown: int,
    turns: bool,
    candidates: tuple[SamplingConfig, int] | None,
    options: dict[str, Any],
    seed: int,
) -> None:
    """Trains the generator; writes ``model/``, with the trainer's log and completions, and ``counts.json``.

    ``candidates`` gives, for DPO, how the candidates of a prompt are sampled, and how many; None trains by GRPO.
    """
    from acqsynth import train
    from acqsynth.callbacks import Progress, Refresh

    reward = scoring.build()
    seeds = read_rows(scoring.seeds)
    asked = write.prompts(scoring.find_domain(), seeds, prompts, shown=shown, turns=turns, seed=seed)
    output = context.folder / "model"
    arguments = (str(generator), asked, reward, output, {"seed": seed, "disable_tqdm": True, **options})
    callbacks = [Progress(context.say, context.status)]
    if candidates is not None:
        engine = partial(load_engine, scoring.engine, generator)
        train.dpo(*arguments, sampling=_sampling(*candidates, seed), engine=engine, callbacks=callbacks)
        drawn, masked = prompts * candidates[1], read_json(output / train.PAIRS)["masked"]
    else:
        refresh = None
        if scoring.reward.refresh_steps:

            def use(path: Path) -> None:
                context.say(f"the reward scores with {path.name}")
                reward.refresh(str(path))

            def probe() -> list[float | None]:
                return fused(signal_values(reward, seeds[:_PROBE]), reward, seeds[:_PROBE])

            source = Path(scoring.reward.refresh_from or output)
            refresh = Refresh(scoring.reward.refresh_steps, source, context.scratch / "students", use, probe)
        train.grpo(*arguments, refresh=refresh, callbacks=callbacks)
        drawn, masked = reward.scored, reward.masked
    context.write("counts.json", {"completions": drawn, "masked": masked})


def write_questions(context: StepContext, *, writing: Writing, mistakes: Path | None = None) -> None:
    """Writes ``samples.parquet``, up to n samples that pass the reward's gates, and ``counts.json``.

    ``mistakes``: a student's answers to the held-out rows. Only rows it got wrong are shown, weak skills more often.
    """
    pool = read_rows(writing.held_out)
    if mistakes is not None:
        pool = sample_mistakes(pool, read_table(mistakes)["right"], max(writing.n, writing.shown), writing.seed)
    _write(context, writing, pool)


def select_questions(context: StepContext, *, writing: Writing, candidates: int, spent: Sequence[Path]) -> None:
    """Rejection sampling: writes ``samples.parquet``, the best of several completions per prompt, and ``counts.json``.

    ``spent``: counts of a training run's round or rounds; instead of ``candidates`` per prompt, as many completions
    are drawn as training and writing used together.
    """
    if spent:
        drawn = sum(read_json(path)["completions"] for path in spent)
        candidates = max(2, math.ceil((drawn + writing.n) / writing.n))
    _write(context, writing, read_rows(writing.held_out), candidates)


def sample_mistakes(pool: Sequence[Sample], right: Sequence[bool], n: int, seed: int) -> list[Sample]:
    """Draws n of the wrongly answered samples, each skill in proportion to its share of wrong answers."""
    wrong = [sample for sample, ok in zip(pool, right, strict=True) if not ok]
    if not wrong:
        raise StepError("the student makes no mistake on the held-out rows; remove error_driven from baselines")
    # If m of a skill's a rows are wrong, its share m / a is split among m mistakes, giving 1 / a each.
    asked = Counter(sample.extra.get("skill") for sample in pool)
    return random.Random(seed).choices(wrong, [1 / asked[sample.extra.get("skill")] for sample in wrong], k=n)


def _sampling(config: SamplingConfig, n: int, seed: int) -> Sampling:
    return Sampling(n, config.temperature, config.top_p, config.max_tokens, seed)


def _write(context: StepContext, writing: Writing, pool: Sequence[Sample], candidates: int | None = None) -> None:
    """Writes samples, or the best candidate of each prompt, and the counts of kept and dropped completions. The prompts
    show rows of the pool."""
    domain, engine = writing.scoring.find_domain(), load_engine(writing.scoring.engine, writing.generator)
    hands = write.deal(domain, pool, writing.n, shown=min(writing.shown, len(pool)), seed=writing.seed)
    prompts = [write.prompt(domain, hand, writing.turns) for hand in hands]
    reward = writing.scoring.build(list({sample.question: sample for hand in hands for sample in hand}.values()))
    asked = write.questions()
    asked.add(sample.question for path in writing.earlier for sample in read_rows(path))

    def chunk(start: int, some: Sequence[Messages]) -> dict[str, Any]:
        sampling, wanted = _sampling(writing.sampling, candidates or 1, derived_seed(writing.seed, start)), len(some)
        made: WriteResult[Any]
        if candidates is None:
            made = write.write(engine, domain, some, sampling, rows=wanted, gates=reward.gates, asked=asked)
        else:
            made = write.best(engine, some, reward, sampling, rows=wanted, asked=asked)
        rows = [_scored(row) for row in made.rows]
        return {"rows": rows, "completions": made.completions, "dropped": made.dropped}

    rows: list[Mapping[str, Any]] = []
    completions, dropped = 0, Counter[str]()
    for found in context.chunks("samples", prompts, CHUNK, chunk, reward):
        rows += found["rows"]
        # Of chunks finished before a kill, so that the next one does not repeat them.
        asked.add(row["sample"]["question"] for row in found["rows"])
        completions += found["completions"]
        dropped.update(found["dropped"])
        context.say(f"{len(rows)} samples of {writing.n} from {completions} completions")
    if not rows:
        none = f"none of {completions} completions is a sample ({write.reasons(dropped)})"
        if not writing.earlier:
            raise StepError(none)
        # The run can go on with the rows of earlier rounds.
        context.say(f"{none}; this round adds no rows: set fewer rounds or a higher generator.sampling.temperature")
    scores = {name: [row["scores"][name] for row in rows] for name in (rows[0]["scores"] if rows else ())}
    write_rows(context.folder / "samples.parquet", [Sample(**row["sample"]) for row in rows], scores)
    counts = {"wanted": writing.n, "kept": len(rows), "completions": completions}
    context.write("counts.json", {**counts, "dropped": dict(dropped.most_common())})


def _scored(row: Sample | Candidate) -> dict[str, Any]:
    if isinstance(row, Sample):
        return {"sample": asdict(row), "scores": {}}
    assert row.sample is not None
    parts = {f"reward_{name}": value for name, value in row.components.items()}
    return {"sample": asdict(row.sample), "scores": {"reward": row.total, **parts}}


def label_questions(
    context: StepContext,
    *,
    domain: str,
    engine: EngineConfig,
    labelling: LabellingConfig,
    model: str | Path | None,
    gates: Sequence[str] | None,
    seeds: Path,
    samples: Path,
    seed: int,
) -> None:
    """Writes ``samples.parquet``, the labelled rows, and ``counts.json``: numbers of labels, of rows that a gate drops
    because of their label, and of right labels.

    ``model`` answers the questions, for the methods ``majority`` and ``teacher``. ``gates`` are those of the reward;
    ``sound`` always applies. ``seeds`` complete the domain, so that it drops labels that no seed has.
    """
    own, asked = find_domain(domain).with_seeds(read_rows(seeds)), read_rows(samples)
    kept: list[Sample] = []
    agreement: list[float | None] = []
    if labelling.method == "own":
        kept, agreement = asked, [None] * len(asked)
    else:
        labeller = Labeller(labelling, own, lambda: load_engine(engine, str(model)))

        def chunk(start: int, some: Sequence[Sample]) -> list[dict[str, Any]]:
            labels = labeller(some, derived_seed(seed, start))
            return [{"sample": asdict(x.sample), "agreement": x.agreement} for x in labels if x.sample is not None]

        for some in context.chunks("labels", asked, CHUNK, chunk):
            kept += [Sample(**row["sample"]) for row in some]
            agreement += [row["agreement"] for row in some]
            context.say(f"{len(kept)} questions labelled of {len(asked)}")
    if asked and not kept:
        raise StepError(f"the answers agree on none of {len(asked)} questions; lower labelling.threshold or raise k")
    dropped = Counter[str]()
    if labelling.method != "own":
        checks = [gate for gate in sample_gates(own) if gates is None or gate.name in ("sound", *gates)]
        passed = set(map(id, write.passing(checks, kept, dropped)))
        if kept and not passed:
            raise StepError(f"none of {len(kept)} labelled questions passes the gates ({write.reasons(dropped)})")
        agreement = [value for sample, value in zip(kept, agreement, strict=True) if id(sample) in passed]
        kept = [sample for sample in kept if id(sample) in passed]
    known = [verdict for verdict in own.verify(kept) if verdict is not None]
    proven = known if own.proves else []  # a domain that only refutes cannot tell which answers are right
    write_rows(context.folder / "samples.parquet", kept, {"agreement": agreement})
    counts = {"asked": len(asked), "labelled": len(kept), "truth_known": len(proven), "right": sum(proven)}
    counts["refuted"] = known.count(False)
    context.write("counts.json", {**counts, "dropped": dict(dropped.most_common())})

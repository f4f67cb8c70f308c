"""Training with TRL: a student learns rows (``sft``), a generator learns from a reward (``grpo``, ``dpo``).

Each function writes a folder for ``from_pretrained``, with the tokenizer, ``trainer_state.json`` (the log of all
steps), TRL's model card and, with LoRA, ``adapter/``. A killed run resumes from its last complete checkpoint if called
again with the same arguments.
"""

from __future__ import annotations

import json
import logging
import math
import os
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
from transformers import AutoConfig, PrinterCallback, TrainerCallback
from trl import DPOTrainer, GRPOTrainer, SFTTrainer

from acqsynth.artefacts import read_json, write_json
from acqsynth.callbacks import (
    CHECKPOINT,
    REWARD_STATE,
    Refresh,
    RewardStates,
    StepClock,
    WholeGenerations,
    newest_checkpoint,
)
from acqsynth.domains import Domain, Messages, Sample
from acqsynth.engines import Engine, Sampling, check_ids, encode, eos_ids
from acqsynth.models import load_tokenizer
from acqsynth.rewards.batch import require_samples
from acqsynth.train_options import check_prompts, configuration as configuration, grpo_steps, optimizer_steps
from acqsynth.write import Candidate, Scorer, candidates

logger = logging.getLogger(__name__)

ROWS = "rows.json"  #: of a student: how many samples are learnt, dropped, cut; whether answers lack an end
PAIRS = "pairs.json"  #: of a generator trained by DPO: the numbers of pairs and of candidates without a score

Row = dict[str, Messages]  #: ``{"prompt", "completion"}``
Reward = Callable[..., Any]  #: a TRL reward function

# --- the student ------------------------------------------------------------------------------------------------------


def training_rows(domain: Domain, samples: Sequence[Sample]) -> list[Row]:
    """Training rows for the student: the domain's prompt, with the solution as its completion."""
    learnt = ((domain.student_prompt(sample.question), domain.solution(sample)) for sample in samples)
    return [{"prompt": asked, "completion": [{"role": "assistant", "content": said}]} for asked, said in learnt]


def sft(
    student: str | Path,
    domain: Domain,
    samples: Sequence[Sample],
    output: str | Path,
    options: Mapping[str, Any] | None = None,
    *,
    replay: Sequence[Row] = (),
    replay_share: float = 0.2,
    callbacks: Sequence[TrainerCallback] = (),
) -> Path:
    """Trains ``student`` on the samples. Only completions count towards the loss.

    Args:
        student: path or hub id.
        domain: supplies the prompts and solutions.
        output: folder of the model.
        options: as in :func:`configuration`.
        replay: :func:`training_rows` of other domains or general data, to prevent forgetting.
        replay_share: share of replay among all rows; the option ``seed`` determines which rows are drawn.
        callbacks: further callbacks of the trainer.

    Raises:
        TypeError: a row that is not a ``Sample``.
        ValueError: no samples, a share outside [0, 1), too few replay rows for the share, or as
            :func:`configuration`; every prompt fills ``max_length``, which is at most the student's positions; a token
            outside the student's vocabulary.
    """
    require_samples("samples", samples, some=True)
    student, output = os.fspath(student), Path(output)
    config, lora = configuration("sft", options or {}, output)
    _keep_within(student, config, "max_length")
    rows = training_rows(domain, samples)
    if replay:
        rows += sample_replay(replay, replay_share, rows, config.seed)
    data = datasets.Dataset.from_list(rows).add_column("own", [i < len(samples) for i in range(len(rows))])
    trainer = SFTTrainer(model=student, args=config, train_dataset=data, peft_config=lora, callbacks=[*callbacks])
    # A multimodal student has a processor, which holds the tokenizer.
    tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
    check_ids("samples", trainer.train_dataset["input_ids"], tokenizer, trainer.model.config)
    learnt = _learnt(trainer.train_dataset, rows[: len(samples)], tokenizer, config)
    ends = eos_ids(tokenizer, trainer.model.generation_config)
    # The tokens with which the chat template closes an answer count.
    asked = _tokens(tokenizer, rows[0]["prompt"], add_generation_prompt=True)
    whole = _tokens(tokenizer, [*rows[0]["prompt"], *rows[0]["completion"]])
    learnt["endless"] = set(ends).isdisjoint(whole[len(asked) :])
    if learnt["endless"]:
        logger.warning("the chat template closes answers with no token that stops the student: it learns no end")
    _run(trainer, output, optimizer_steps(config, len(trainer.train_dataset)))
    if trainer.is_world_process_zero():
        write_json(output / ROWS, learnt)
    return output


def _keep_within(model: str, config: Any, name: str, taken: int = 0) -> None:
    """Lowers a maximum of tokens to the model's positions beyond those taken."""
    positions = getattr(AutoConfig.from_pretrained(model).get_text_config(), "max_position_embeddings", None)
    if not positions:
        return
    if taken >= positions:
        raise ValueError(f"prompts: expected fewer than {positions} tokens, the model's positions, got {taken}")
    given, most = getattr(config, name), positions - taken
    if given is None or given > most:
        logger.warning("%s is %d instead of %s: %d positions, %d of them taken", name, most, given, positions, taken)
        setattr(config, name, most)


def _learnt(prepared: Any, rows: Sequence[Row], tokenizer: Any, config: Any) -> dict[str, Any]:
    """The numbers of the samples' rows that TRL kept, dropped or may have cut."""
    most = config.max_length
    if "own" in prepared.column_names:
        lengths = [len(ids) for ids, own in zip(prepared["input_ids"], prepared["own"], strict=True) if own]
    elif config.packing_strategy == "bfd":  # packs hide where rows end; a completion past max_length is not learnt
        lengths = [
            min(most, len(_tokens(tokenizer, [*row["prompt"], *row["completion"]])))
            for row in rows
            if len(_tokens(tokenizer, row["prompt"], add_generation_prompt=True)) < most
        ]
    else:  # other packs continue a row in the next
        return {"learnt": len(rows), "dropped": 0, "cut": 0, "max_length": most}
    if not lengths:
        raise ValueError(f"samples: expected a prompt that leaves room in max_length = {most} tokens")
    cut = sum(length == most for length in lengths)
    return {"learnt": len(lengths), "dropped": len(rows) - len(lengths), "cut": cut, "max_length": most}


def _tokens(tokenizer: Any, messages: Messages, **options: Any) -> list[int]:
    return list(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)["input_ids"])


def sample_replay(replay: Sequence[Row], share: float, rows: Sequence[Row], seed: int) -> list[Row]:
    """Draws rows to make up ``share`` of the total beside ``rows``, which are repeated only if others run out."""
    count = replay_count(len(replay), share, len(rows))
    learnt = {json.dumps(row) for row in rows}
    drawn = random.Random(seed).sample(list(replay), len(replay))
    return sorted(drawn, key=lambda row: json.dumps(row) in learnt)[:count]


def replay_count(available: int, share: float, n: int) -> int:
    """The number of rows that make up ``share`` of the total beside n other rows; ValueError if too few are there."""
    if not 0 <= share < 1:
        raise ValueError(f"replay_share: expected a share in [0, 1), got {share}")
    count = round(n * share / (1 - share))
    if count > available:
        raise ValueError(f"replay: expected {count} rows for a share of {share} beside {n} samples, got {available}")
    return count


# --- the generator ----------------------------------------------------------------------------------------------------


def grpo(
    generator: str | Path,
    prompts: Sequence[Messages],
    reward: Reward | Sequence[Reward],
    output: str | Path,
    options: Mapping[str, Any] | None = None,
    *,
    refresh: Refresh | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> Path:
    """Trains ``generator`` on the reward by GRPO.

    Each logged step has the entries of TRL and the reward, ``seconds``, ``reward_seconds`` and ``reward_share``.
    ``completions/completions_<step>.parquet`` has prompts, completions, rewards, advantages and the reward's logged
    columns.

    Args:
        generator: path or hub id.
        prompts: from :func:`acqsynth.write.prompts`.
        reward: one TRL reward function, or several, which TRL weights (``reward_weights``).
        output: folder of the model.
        options: as in :func:`configuration`, including TRL's vLLM modes.
        refresh: refreshes the student behind the reward.
        callbacks: further callbacks of the trainer.

    Raises:
        ValueError: fewer prompts than a generation takes, one that leaves no room in the generator's positions or has
            a token outside its vocabulary, no end-of-sequence token, or as :func:`configuration`.
        TypeError: a reward that is not a function.
    """
    generator, output = os.fspath(generator), Path(output)
    rewards = list(reward) if isinstance(reward, Sequence) else [reward]
    if not all(map(callable, rewards)):
        raise TypeError(f"reward: expected a function or a list of functions, got {reward!r:.60}")
    config, lora = configuration("grpo", options or {}, output)
    check_prompts(config, len(prompts))
    tokenizer = load_tokenizer(generator)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"generator: expected a tokenizer with an end-of-sequence token, {generator} has none")
    encoded = encode(tokenizer, prompts)
    check_ids("prompts", encoded, tokenizer, AutoConfig.from_pretrained(generator))
    _keep_within(generator, config, "max_completion_length", max(map(len, encoded)))
    clock = StepClock()
    timed = [clock.timed(function) for function in rewards]
    data = datasets.Dataset.from_list([{"prompt": prompt} for prompt in prompts])
    trainer = GRPOTrainer(generator, timed, args=config, train_dataset=data, peft_config=lora, callbacks=[*callbacks])
    trainer.add_callback(WholeGenerations(trainer))
    # These run first, so that trackers see the entries they add to the log.
    trainer.callback_handler.callbacks[:0] = [clock, *([refresh] if refresh is not None else [])]
    # Refreshed first, as a new student may reset the state of a reward.
    _run(trainer, output, grpo_steps(config, len(prompts)), [refresh, *rewards])
    return output


def dpo(
    generator: str | Path,
    prompts: Sequence[Messages],
    reward: Scorer,
    output: str | Path,
    options: Mapping[str, Any] | None = None,
    *,
    sampling: Sampling,
    engine: Callable[[], Engine],
    callbacks: Sequence[TrainerCallback] = (),
) -> Path:
    """Trains ``generator`` by DPO on pairs of its own candidates. ``pairs.parquet`` stores the pairs, ``PAIRS`` their
    number; a resumed run reads them instead of drawing again.

    Args:
        generator, prompts, output, options, callbacks: as in :func:`grpo`.
        reward: scores candidates.
        sampling: its ``n`` is the number of candidates per prompt.
        engine: creates an engine for the generator.

    Raises:
        ValueError: one candidate per prompt, no pair was found or fits in ``max_length``, or as :func:`configuration`.
    """
    if sampling.n < 2:
        raise ValueError(f"sampling: expected n of at least 2 candidates to choose from, got {sampling.n}")
    generator, output = os.fspath(generator), Path(output)
    config, lora = configuration("dpo", options or {}, output)
    _keep_within(generator, config, "max_length")
    table = output / "pairs.parquet"
    if not (output / PAIRS).is_file():
        groups = candidates(engine(), prompts, reward, sampling)
        rows = pairs(groups)
        if not rows:
            raise ValueError(
                "prompts: expected a prompt whose best candidate passes the gates and beats the worst, "
                f"found none among {len(prompts)}"
            )
        logger.info("%d pairs from %d prompts", len(rows), len(prompts))
        output.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_list(rows).to_parquet(table)
        masked = sum(candidate.total is None for group in groups for candidate in group)
        write_json(output / PAIRS, {"pairs": len(rows), "masked": masked})  # last: the table is complete
    data = datasets.Dataset.from_parquet(str(table), keep_in_memory=True)
    data = data.select_columns(["prompt", "chosen", "rejected"])
    trainer = DPOTrainer(model=generator, args=config, train_dataset=data, peft_config=lora, callbacks=[*callbacks])
    if not (kept := len(trainer.train_dataset)):
        raise ValueError(f"prompts: expected one that leaves room in max_length = {config.max_length} tokens")
    if kept < len(data):
        logger.warning("%d of %d pairs are not learnt: their prompts fill max_length", len(data) - kept, len(data))
    _run(trainer, output, optimizer_steps(config, kept))
    return output


def pairs(groups: Sequence[Sequence[Candidate]]) -> list[dict[str, Any]]:
    """Pairs the best candidate of each group that passes the gates with the worst, which need not pass. Equal totals
    give no pair.

    Returns:
        Rows ``{"prompt", "chosen", "rejected"}`` as messages, with ``chosen_total`` and ``rejected_total``.
    """
    rows = []
    for group in groups:
        totals = [(candidate.total, candidate) for candidate in group if candidate.total is not None]
        passing = [(total, candidate) for total, candidate in totals if candidate.rejected_by is None]
        if not passing:
            continue
        best, chosen = max(passing, key=lambda entry: entry[0])
        worst, rejected = min(totals, key=lambda entry: entry[0])
        if best > worst:
            won, lost = ([{"role": "assistant", "content": each.text}] for each in (chosen, rejected))
            pair = {"prompt": chosen.prompt, "chosen": won, "rejected": lost}
            rows.append({**pair, "chosen_total": best, "rejected_total": worst})
    return rows


# --- resuming, saving and the log -------------------------------------------------------------------------------------


def read_log(output: Path) -> list[dict[str, Any]]:
    """The logged steps of a finished training run; non-finite numbers become None."""
    state = read_json(output / "trainer_state.json")
    return [
        {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in entry.items()}
        for entry in state["log_history"]
    ]


def _run(trainer: Any, output: Path, steps: int, rewards: Sequence[Any] = ()) -> None:
    """Trains from the last complete checkpoint, if any, and saves the model in ``output``."""
    if trainer.args.get_warmup_steps(steps) >= steps:  # the first step's learning rate is 0
        logger.warning("warmup_steps is 0 instead of %s, which takes all %d steps", trainer.args.warmup_steps, steps)
        trainer.args.warmup_steps = 0
    states = RewardStates(rewards)
    trainer.add_callback(states)
    trainer.remove_callback(PrinterCallback)  # with disable_tqdm it prints every step
    checkpoint = newest_checkpoint(output, REWARD_STATE)
    if trainer.is_world_process_zero():
        for folder in output.glob(f"{CHECKPOINT}*"):
            if not (folder / REWARD_STATE).is_file():
                shutil.rmtree(folder)
    if checkpoint is not None:
        states.restore(checkpoint)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    # Activation checkpointing disabled the cache; the saved model would generate without it.
    trainer.model.config.use_cache = True
    model = trainer.accelerator.unwrap_model(trainer.model)
    if not hasattr(model, "merge_and_unload"):
        trainer.save_model(str(output))
    elif trainer.is_world_process_zero():
        model.save_pretrained(output / "adapter")
        model.merge_and_unload().save_pretrained(output)
        trainer.processing_class.save_pretrained(output)
    trainer.save_state()
    if trainer.is_world_process_zero():
        trainer.create_model_card()
        for folder in output.glob(f"{CHECKPOINT}*"):
            (folder / REWARD_STATE).unlink(missing_ok=True)  # first: a killed run must not resume from what is left
            shutil.rmtree(folder)

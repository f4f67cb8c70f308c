"""The base model of the arithmetic world: a small Llama, trained in about a minute on two cores, then cached.

It learns two tasks at once, as chat turns: to answer questions (*practice*: mostly strong skills, few weak ones) and to
write a new sample in the tagged format when shown some (*writing*: every skill, mostly those shown). Rows are drawn on
demand from the training split only; the coin is tossed anew for each.

The tokenizer has one token per word, tag and digit, with the space before a number in its first digit's, as in
byte-level tokenizers of real models. Other text is spelt out; printable ASCII text is decoded unchanged.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import random
import re
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from acqsynth.cache import cached
from acqsynth.domains import Sample
from acqsynth.domains.arithmetic import COIN, SKILLS, Arithmetic, SkewedArithmetic
from acqsynth.parsing import TAGS

logger = logging.getLogger(__name__)

Row = tuple[list[int], int]  #: token ids, and the number of leading ones that are not trained

VERSION = 1  #: part of the cache key; increment it when this script produces a different model
_TOGETHER = 48  # rows per forward pass

PAD, END, UNKNOWN, USER, ASSISTANT = "<|pad|>", "<|end|>", "<|unknown|>", "<|user|>", "<|assistant|>"

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclass(frozen=True)
class Settings:
    """Everything that determines the weights.

    Args:
        seed: seed of the initial weights and the data.
        steps: AdamW steps; the learning rate decays from ``learning_rate`` by a cosine after ``warmup`` steps.
        practice_rows, writing_rows: rows per step.
        practice, writing: skill -> sampling weight for rows of each kind.
        most_shown: maximum number of samples shown in a writing row.
        follow: share of writing rows that use the skill of a sample shown.
        skewed: whether to use the world with non-uniform traps.
    """

    seed: int = 0
    hidden_size: int = 128
    layers: int = 4
    heads: int = 4
    intermediate_size: int = 512
    initializer_range: float = 0.07
    steps: int = 700
    warmup: int = 40
    learning_rate: float = 3e-3
    weight_decay: float = 0.05
    practice_rows: int = 96
    writing_rows: int = 9
    most_shown: int = 3
    follow: float = 0.25
    practice: Mapping[str, float] = field(
        default_factory=lambda: {
            "copy": 0.7, "even": 0.9, "larger": 3.0, "add": 2.5, "sort": 0.05, "median": 0.1, "double": 0.1,
            "lucky": 0.2, "code": 0.2,
        }
    )  # fmt: skip
    writing: Mapping[str, float] = field(
        default_factory=lambda: {name: 1.0 if skill.kind == "strong" else 0.5 for name, skill in SKILLS.items()}
    )
    skewed: bool = False

    @property
    def domain(self) -> Arithmetic:
        """The world that the rows come from."""
        return SkewedArithmetic() if self.skewed else Arithmetic()

    def rate(self, step: int) -> float:
        """Learning-rate factor at a step, counted from 0: linear warm-up, cosine decay to 0."""
        return min(1.0, (step + 1) / self.warmup) * (1 + math.cos(math.pi * step / self.steps)) / 2

    def key(self) -> str:
        """Identifies the settings in the cache."""
        settings = asdict(self)
        if not self.skewed:
            del settings["skewed"]  # some caches predate this field
        text = json.dumps({"version": VERSION, **settings}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def base_model(settings: Settings | None = None) -> Path:
    """Directory of the base model in transformers format, with settings and loss curve in ``pretrain.json``.

    The first call trains it, using torch's threads.
    """
    settings = settings or Settings()

    def make(folder: Path) -> None:
        model, curve = pretrain(settings)
        model.save_pretrained(folder)
        build_tokenizer().save_pretrained(folder)
        record = {"settings": asdict(settings), "loss": curve}
        (folder / "pretrain.json").write_text(json.dumps(record, indent=1) + "\n")

    return cached(f"arithmetic-{settings.key()}", make)


def pretrain(settings: Settings) -> tuple[LlamaForCausalLM, list[dict[str, float]]]:
    """The trained model, in eval mode, and its loss (nats per trained token) every 50 steps.

    Equal settings give equal weights on the same machine with the same number of threads. The random states of torch
    and Python are left unchanged.
    """
    tokenizer = build_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = untrained(settings, tokenizer)
    batches = [list(draw) for draw in (practice_batches(settings, tokenizer), writing_batches(settings, tokenizer))]
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=settings.weight_decay, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, settings.rate)
    curve: list[dict[str, float]] = []
    sums = torch.zeros(2)
    for step, (practice, writing) in enumerate(zip(*batches, strict=True), 1):
        losses = torch.stack([loss_of(model, batch) for batch in (practice, writing)])
        losses.sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        sums += losses.detach()
        if step % 50 == 0 or step == settings.steps:
            mean = sums / (step - (curve[-1]["step"] if curve else 0))
            curve.append({"step": step, "practice": mean[0].item(), "writing": mean[1].item()})
            logger.info("step %d of %d: practice loss %.3f, writing loss %.3f", step, settings.steps, *mean.tolist())
            sums.zero_()
    return model.eval(), curve


def untrained(settings: Settings, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """The model before training, initialised by torch's generator."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        max_position_embeddings=tokenizer.model_max_length,
        initializer_range=settings.initializer_range,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config).train()


def loss_of(model: LlamaForCausalLM, batch: Sequence[Row]) -> torch.Tensor:
    """Mean loss of the trained tokens, a scalar.

    Rows of similar length share a forward pass, as most rows are short. Padding is on the right, where no trained token
    sees it.
    """
    total = torch.zeros(())
    ordered = sorted(batch, key=lambda one: len(one[0]))
    for begin in range(0, len(ordered), _TOGETHER):
        part = ordered[begin : begin + _TOGETHER]
        ids = torch.full((len(part), len(part[-1][0])), model.config.pad_token_id)  # [rows, T]
        labels = torch.full_like(ids, -100)
        for i, (tokens, context) in enumerate(part):
            ids[i, : len(tokens)] = torch.tensor(tokens)
            labels[i, context : len(tokens)] = ids[i, context : len(tokens)]
        total = total + model(input_ids=ids, labels=labels, num_items_in_batch=1).loss
    return total / sum(len(tokens) - context for tokens, context in batch)


def chat(user: str, assistant: str) -> str:
    """The two turns as the chat template renders them."""
    return f"{USER}{user}{ASSISTANT}{assistant}{END}"


def row(tokenizer: PreTrainedTokenizerFast, text: str) -> Row:
    """Tokenizes a rendered two-turn chat; only the reply is trained."""
    ids = tokenizer(text).input_ids
    return ids, ids.index(tokenizer.convert_tokens_to_ids(ASSISTANT)) + 1


def practice_batches(settings: Settings, tokenizer: PreTrainedTokenizerFast) -> Iterator[list[Row]]:
    """For each step, questions with their solutions; only the solutions are trained."""
    domain, rng = settings.domain, random.Random(f"practice {settings.seed}")
    names, weights = list(settings.practice), list(settings.practice.values())
    for _ in range(settings.steps):
        drawn = rng.choices(names, weights, k=settings.practice_rows)
        samples = [random_row(domain, name, rng) for name in drawn]
        yield [row(tokenizer, chat(sample.question, domain.solution(sample))) for sample in samples]


def writing_batches(settings: Settings, tokenizer: PreTrainedTokenizerFast) -> Iterator[list[Row]]:
    """For each step, requests for new samples with written samples; only the latter are trained."""
    domain, rng = settings.domain, random.Random(f"writing {settings.seed}")
    names, weights = list(settings.writing), list(settings.writing.values())
    for _ in range(settings.steps):
        rows = []
        for _ in range(settings.writing_rows):
            shown = [random_row(domain, rng.choice(names), rng) for _ in range(rng.randint(0, settings.most_shown))]
            name = rng.choices(names, weights)[0]
            if shown and rng.random() < settings.follow:
                name = rng.choice(shown).extra["skill"]
            new = random_row(domain, name, rng)
            rows.append(row(tokenizer, chat(domain.generator_prompt(shown)[0]["content"], domain.tagged(new))))
        yield rows


def random_row(domain: Arithmetic, name: str, rng: random.Random) -> Sample:
    """An answered question from a skill's training split."""
    return domain.answered(rng.choice(SKILLS[name].questions["train"]), rng)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of the world; the end-of-sequence token closes the assistant's turns."""
    special = [PAD, END, UNKNOWN, USER, ASSISTANT]
    tags = [f"<{slash}{tag}>" for tag in TAGS for slash in ("", "/")]
    words = ["new", *COIN, *SKILLS]
    spaced = [f" {digit}" for digit in string.digits]
    characters = [chr(code) for code in range(32, 127)] + ["\n"]
    vocabulary = {token: i for i, token in enumerate([*special, *tags, *words, *spaced, *characters])}
    # Longest first, so that a word does not match in place of a longer one that it begins.
    whole = [*tags, *sorted(words, key=len, reverse=True)]
    pattern = "|".join([*map(re.escape, whole), " [0-9]", r"[\s\S]"])
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    inner.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        additional_special_tokens=[USER, ASSISTANT],
        padding_side="left",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer

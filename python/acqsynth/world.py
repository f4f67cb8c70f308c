"""The base model of the arithmetic world: a small Llama, trained in a minute or so on two cores, and cached.

It learns two tasks at once, as turns of a chat: to answer questions (*practice*: most of the strong skills, little of
the weak) and to write a new sample in the tagged format when shown some (*writing*: every skill, mostly whichever are
shown). Rows are drawn as they are needed, from the training split alone; the coin is tossed anew for each.

Its tokenizer has one token for each word, tag and digit; other text is spelt out. A digit that begins a number is
another token (`` 4``, with the space before it) than one within (``7``), as in byte-level tokenizers of real models.
Every text of printable ASCII is decoded unchanged.
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

from acqsynth.domains import Sample
from acqsynth.domains.arithmetic import COIN, SKILLS, Arithmetic, SkewedArithmetic
from acqsynth.models import cached
from acqsynth.parsing import TAGS

logger = logging.getLogger(__name__)

Row = tuple[list[int], int]  #: token ids, and how many at the start are not trained

VERSION = 1  #: part of the cache's key; raise it when this script makes another model
_TOGETHER = 48  # rows of one forward pass

PAD, END, UNKNOWN, USER, ASSISTANT = "<|pad|>", "<|end|>", "<|unknown|>", "<|user|>", "<|assistant|>"

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def _by_kind(**shares: float) -> dict[str, float]:
    return {name: shares[skill.kind] for name, skill in SKILLS.items()}


@dataclass(frozen=True)
class Settings:
    """Everything that the weights depend on.

    Args:
        seed: of the initial weights and of the data.
        steps: of AdamW, the learning rate falling from ``learning_rate`` as a cosine after ``warmup`` steps.
        practice_rows, writing_rows: rows of a step.
        practice, writing: skill -> weight in the draw of a row of each kind.
        most_shown: most samples shown in a writing row.
        follow: share of writing rows whose skill is that of a sample shown.
        skewed: the world whose traps are not uniform.
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
    writing: Mapping[str, float] = field(default_factory=lambda: _by_kind(strong=1.0, weak=0.5, coin=0.5, table=0.5))
    skewed: bool = False

    @property
    def domain(self) -> Arithmetic:
        """The world that the rows come from."""
        return SkewedArithmetic() if self.skewed else Arithmetic()

    def rate(self, step: int) -> float:
        """Factor of the learning rate at a step, from 0 on: linear warm-up, cosine to 0."""
        return min(1.0, (step + 1) / self.warmup) * (1 + math.cos(math.pi * step / self.steps)) / 2

    def key(self) -> str:
        """Identifies the settings in the cache."""
        settings = asdict(self)
        if not self.skewed:
            del settings["skewed"]  # caches are older than this field
        text = json.dumps({"version": VERSION, **settings}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def base_model(settings: Settings | None = None) -> Path:
    """Directory of the base model as transformers saves it, with ``pretrain.json``: its settings and loss curve.

    The first call trains it, with torch's threads.
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

    Equal settings give equal weights on one machine with one number of threads; torch's and Python's random numbers
    are left unchanged.
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
            logger.info("step %d of %d: loss of practice %.3f, of writing %.3f", step, settings.steps, *mean.tolist())
            sums.zero_()
    return model.eval(), curve


def untrained(settings: Settings, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """The model before training, drawn by torch's generator."""
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

    Rows of similar length share a forward pass, as most are short and few are long; padding is on the right, where no
    trained token sees it.
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
    """A rendered chat of two turns, of which the reply is trained."""
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
    """For each step, requests for a new sample and a written one; only the written sample is trained."""
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
    """A question of a skill's training split, answered."""
    return domain.answered(rng.choice(SKILLS[name].questions["train"]), rng)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of the world; its end of sequence closes the assistant's turns."""
    special = [PAD, END, UNKNOWN, USER, ASSISTANT]
    tags = [f"<{slash}{tag}>" for tag in TAGS for slash in ("", "/")]
    words = ["new", *COIN, *SKILLS]
    spaced = [f" {digit}" for digit in string.digits]
    characters = [chr(code) for code in range(32, 127)] + ["\n"]
    vocabulary = {token: i for i, token in enumerate([*special, *tags, *words, *spaced, *characters])}
    # Longest first: a word that is the prefix of another must not win.
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

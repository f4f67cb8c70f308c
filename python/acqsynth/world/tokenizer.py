"""A tokenizer of the arithmetic world: its words, tags and digits are one token each; other text is spelt out.

A digit that begins a number is another token (`` 4``, with the space before it) than one within (``7``), as in
byte-level tokenizers of real models. Every text of printable ASCII comes back as it was.
"""

from __future__ import annotations

import re
import string

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from acqsynth.domains.arithmetic import COIN, SKILLS
from acqsynth.parsing import TAGS

PAD, END, UNKNOWN, USER, ASSISTANT = "<|pad|>", "<|end|>", "<|unknown|>", "<|user|>", "<|assistant|>"

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The same tokenizer at each call. Its end of sequence closes the assistant's turns."""
    special = [PAD, END, UNKNOWN, USER, ASSISTANT]
    tags = [f"<{slash}{tag}>" for tag in TAGS for slash in ("", "/")]
    words = ["new", *COIN, *SKILLS]
    spaced = [f" {digit}" for digit in string.digits]
    characters = [chr(code) for code in range(32, 127)] + ["\n"]
    vocabulary = {token: i for i, token in enumerate([*special, *tags, *words, *spaced, *characters])}
    # The longest word first: a word that begins another must not win.
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

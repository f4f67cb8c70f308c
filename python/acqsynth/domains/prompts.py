"""What a generator is asked, the same for every domain but for the task."""

from __future__ import annotations

from collections.abc import Sequence

from acqsynth.domains.base import Messages, Sample, written as written


def ask_for_sample(task: str, answer: str, shown: Sequence[Sample]) -> Messages:
    """One user's turn that asks for one new sample.

    Args:
        task: what is to be written, as a noun phrase with its article.
        answer: what stands between the answer tags.
        shown: examples, for the difficulty; may be empty.
    """
    lines = [f"Write {task}, with its solution."]
    if shown:
        count = "This is an example" if len(shown) == 1 else f"These are {len(shown)} examples"
        lines.append(f"{count}, for the format and the difficulty:")
        lines += [written(sample) for sample in shown]
        lines.append("Yours is about as hard, asks for something else, and can be answered without them.")
    lines.append(
        "Write exactly these three parts and nothing else:\n"
        "<question>\nthe whole question, which does not give its answer away\n</question>\n"
        "<reasoning>\nthe steps from the question to the answer\n</reasoning>\n"
        f"<answer>\n{answer}\n</answer>"
    )
    return [{"role": "user", "content": "\n\n".join(lines)}]

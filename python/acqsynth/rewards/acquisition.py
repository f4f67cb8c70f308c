"""Acquisition functions as rewards of an online RL run, under the contract of TRL's GRPO and RLOO trainers.

    reward = AcquisitionReward("path/to/student", "entropy")
    GRPOTrainer(model=generator, reward_funcs=[reward], ...)

From the command line any acquisition is a ready-made reward, ``trl grpo --reward_funcs
acqsynth.rewards.entropy``, whose student is named by the environment variable ``ACQSYNTH_STUDENT``.

The reward of a completion is ``gate * acquisition``: the gate is 1 where the completion parses as a sample
and 0 elsewhere. It multiplies, because what an acquisition function likes best of all is text that is no
sample; a bonus for the format, added, leaves the broken sample on top. Where a value is negative, as influence may
be, the gated sample gets the least value of its call: it never outranks a sample.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from acqsynth.parsing import parse_sample
from acqsynth.rewards.scoring import Scorer

#: A parser gives a sample as ``acqcore.score`` takes it, or None.
Parser = Callable[[str], Any]


class AcquisitionReward:
    """The acquisition value of each completion for a student, as a reward function of TRL 1.16.

    Args:
        student: a transformers causal LM (the model in training too: it is scored in eval mode and left as
            found), an ``acqcore.Student``, a path or hub id, or None for the path in the environment variable
            ``ACQSYNTH_STUDENT``. A path is loaded at the first call and shared by all rewards of the process.
        acquisition: a name from ``acqcore.acquisitions()``. For several, pass several rewards: TRL weighs
            them.
        parse: text of a completion -> sample for ``acqcore.score``, or None where it is no sample.
        arguments: of the acquisition, as in ``acquisition_args`` of ``acqcore.score``: ``{"parameters": "all"}`` for
            ``grad_norm``; ``{"reference": ...}``, which ``influence`` can not do without.
        reduction: how token values become one, as in ``acqcore.score``.
        tokenizer: the student's; by default the one beside its path. A model given as an object needs it.
        backend: as in ``acqcore.score``.
        batch_tokens: tokens of one forward pass of the student, as in ``acqcore.score``.
        device: where a path is loaded; by default the CPU. A model given as an object stays where it is.
        max_length: longer samples are cut to this many tokens, and to what the student can take.
        name: the name TRL logs; by default ``acquisition_<acquisition>``.

    Raises:
        ValueError: an unknown acquisition, a model without a tokenizer, or a max_length below 2.
        TypeError: parse is not callable.
    """

    def __init__(
        self,
        student: Any,
        acquisition: str = "entropy",
        *,
        parse: Parser = parse_sample,
        arguments: Mapping[str, Any] | None = None,
        reduction: str = "mean",
        tokenizer: Any = None,
        backend: str | None = None,
        batch_tokens: int = 8192,
        max_length: int = 2048,
        device: str | None = None,
        name: str | None = None,
    ) -> None:
        if not callable(parse):
            raise TypeError(f"parse: expected a function of a text, got {type(parse).__name__}")
        self.__name__ = name or f"acquisition_{acquisition}"
        self.acquisition = acquisition
        self.parse = parse
        self.scorer = Scorer(
            student,
            (acquisition,),
            arguments=None if arguments is None else {acquisition: arguments},
            name=self.__name__,
            reduction=reduction,
            tokenizer=tokenizer,
            backend=backend,
            batch_tokens=batch_tokens,
            max_length=max_length,
            device=device,
        )
        #: Samples the scorer could not score, over the life of this reward.
        self.masked = 0
        #: Seconds of the last call.
        self.seconds = 0.0
        self._previous_end: float | None = None

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[str | list[dict[str, Any]]],
        completion_ids: Sequence[list[int]] | None = None,
        log_extra: Callable[[str, list[Any]], None] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """Rewards of n completions, scored in one ``acqcore.score`` call.

        Args:
            prompts: n prompts of the generator; not read, the sample stands in the completion.
            completions: n texts, or n lists of messages whose last assistant message is the text.
            completion_ids, columns: the rest of what TRL passes; not read.
            log_extra: takes a column name and n values, for the table of completions.
            log_metric: takes a name and a number.

        Returns:
            n rewards: the acquisition value; 0.0 (or the least value, where that is negative) where the completion
                is no sample; None (masked from the advantage) where the scorer reports the sample as invalid.

        Raises:
            RuntimeError: the student is to come from the environment, and ``ACQSYNTH_STUDENT`` is not set.
            ValueError, TypeError: what ``acqcore.score`` raises for a student or option that does not fit.
        """
        begin = time.perf_counter()
        samples = [self._sample(completion) for completion in completions]
        parsed = [i for i, sample in enumerate(samples) if sample is not None]
        values: list[float | None] = [None] * len(samples)
        lengths: list[int] = [0] * len(samples)
        if parsed:
            scored, counts = self.scorer([samples[i] for i in parsed])
            for i, value, length in zip(parsed, scored[self.acquisition], counts, strict=True):
                values[i], lengths[i] = value, length
        floor = min([0.0, *(value for value in values if value is not None)])
        rewards = [floor if sample is None else value for sample, value in zip(samples, values, strict=True)]
        masked = rewards.count(None)
        self.masked += masked
        end = time.perf_counter()
        self.seconds = end - begin
        if log_extra is not None:
            log_extra(f"{self.__name__}_value", list(values))
            log_extra(f"{self.__name__}_parsed", [sample is not None for sample in samples])
        if log_metric is not None and samples:
            metrics = {
                "seconds": self.seconds,
                "parsed": len(parsed) / len(samples),
                "masked": masked / len(samples),
                **_summary(values, lengths),
            }
            # From the end of one call to the end of the next is a whole step of the trainer.
            if self._previous_end is not None:
                metrics["time_share"] = self.seconds / (end - self._previous_end)
            for key, number in metrics.items():
                log_metric(f"{self.__name__}/{key}", number)
        self._previous_end = end
        return rewards

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_previous_end": None}  # another process has another clock

    def __repr__(self) -> str:
        return f"AcquisitionReward({self.acquisition!r}, name={self.__name__!r})"

    def _sample(self, completion: str | list[dict[str, Any]]) -> Any:
        text = completion_text(completion)
        return None if text is None else self.parse(text)


def completion_text(completion: str | list[dict[str, Any]]) -> str | None:
    """The text of a completion: itself, or its last assistant message's; None where that has none."""
    if isinstance(completion, str):
        return completion
    for message in reversed(completion):
        if message["role"] == "assistant":
            content = message.get("content")
            if isinstance(content, list):  # blocks, as for a model that also takes images
                content = "".join(block["text"] for block in content if block["type"] == "text")
            return content
    return None


def _summary(values: list[float | None], lengths: list[int]) -> dict[str, float]:
    """Mean value of the scored samples, and how far their lengths explain it where that is defined."""
    scored = [(value, length) for value, length in zip(values, lengths, strict=True) if value is not None]
    if not scored:
        return {}
    summary = {"mean": statistics.fmean(value for value, _ in scored)}
    if min(len(set(column)) for column in zip(*scored, strict=True)) > 1:
        summary["length_correlation"] = statistics.correlation(*zip(*scored, strict=True))
    return summary


@functools.cache
def ready_made(acquisition: str) -> AcquisitionReward:
    """The reward whose student is named by the environment."""
    return AcquisitionReward(None, acquisition)

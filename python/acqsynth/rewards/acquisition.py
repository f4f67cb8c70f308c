"""Acquisition functions as rewards of an online RL run, under the contract of TRL's GRPO and RLOO trainers.

    reward = AcquisitionReward("path/to/student", "entropy")
    GRPOTrainer(model=generator, reward_funcs=[reward], ...)

From the command line any acquisition is a ready-made reward, ``trl grpo --reward_funcs
acqsynth.rewards.entropy``, whose student is named by the environment variable ``ACQSYNTH_STUDENT``.

``AcquisitionReward(url="http://scorer:8000", acquisition="entropy")`` asks the server that ``acqsynth serve`` started.

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
        parse: text of a completion -> sample for ``acqcore.score``, or None where it is no sample; by default the
            tagged question and its solution. ``acqsynth.parsing`` has ``parse_chat_sample``, the same as turns of a
            chat, and ``as_text``, the whole completion.
        arguments: of the acquisition, as in ``acquisition_args`` of ``acqcore.score``: ``{"parameters": "all"}`` for
            ``grad_norm``; ``{"reference": ...}``, which ``influence`` can not do without.
        reduction: how token values become one, as in ``acqcore.score``.
        tokenizer: the student's; by default the one beside its path. A model given as an object needs it.
        backend: as in ``acqcore.score``.
        batch_tokens: tokens of one forward pass of the student, as in ``acqcore.score``.
        device: where a path is loaded; by default the CPU. A model given as an object stays where it is.
        max_length: longer samples are cut to this many tokens, and to what the student can take.
        name: the name TRL logs; by default ``acquisition_<acquisition>``.
        url: of a server in place of a student; gives a :class:`RemoteAcquisitionReward`.

    Raises:
        ValueError: an unknown acquisition, a model without a tokenizer, or a max_length below 2.
        TypeError: parse is not callable.
    """

    def __new__(cls, *arguments: Any, url: str | None = None, **options: Any) -> AcquisitionReward:
        # TRL asks the class whether its call is a coroutine, so that one in process and one over a network are two.
        return super().__new__(RemoteAcquisitionReward if url is not None and cls is AcquisitionReward else cls)

    def __init__(
        self,
        student: Any = None,
        acquisition: str = "entropy",
        *,
        url: None = None,
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
        self._set_up(acquisition, parse, name)
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

    def _set_up(self, acquisition: str, parse: Parser, name: str | None) -> None:
        if not callable(parse):
            raise TypeError(f"parse: expected a function of a text, got {type(parse).__name__}")
        self.__name__ = name or f"acquisition_{acquisition}"
        self.acquisition = acquisition
        self.parse = parse
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
        given = [sample for sample in samples if sample is not None]
        values, lengths = self.scorer(given) if given else ({self.acquisition: []}, [])
        return self._rewards(begin, samples, values[self.acquisition], lengths, log_extra, log_metric)

    def _rewards(
        self,
        begin: float,
        samples: Sequence[Any],
        scored: Sequence[float | None],
        counts: Sequence[int],
        log_extra: Callable[[str, list[Any]], None] | None,
        log_metric: Callable[[str, float], None] | None,
    ) -> list[float | None]:
        """Rewards of n samples, None where the completion is none, from values and lengths of the others."""
        parsed = [i for i, sample in enumerate(samples) if sample is not None]
        values: list[float | None] = [None] * len(samples)
        lengths = [0] * len(samples)
        for i, value, length in zip(parsed, scored, counts, strict=True):
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
        return f"{type(self).__name__}({self.acquisition!r}, name={self.__name__!r})"

    def _sample(self, completion: str | list[dict[str, Any]]) -> Any:
        text = completion_text(completion)
        return None if text is None else self.parse(text)


class RemoteAcquisitionReward(AcquisitionReward):
    """What ``AcquisitionReward(url=...)`` gives: the same numbers from a server, awaited.

    TRL awaits all such rewards of a step together. Samples that the server does not answer for, however often it is
    asked (see :class:`acqsynth.serve.client.ScorerClient`), are masked, counted in ``masked`` and told in the log.

    Args:
        student: None; the server has one.
        acquisition, parse, reduction, max_length, name: as :class:`AcquisitionReward`.
        url: of the server, ``http://host:port``.
        arguments: as :class:`AcquisitionReward`, of text and numbers.
        token: of the server; by default the one in the environment variable ``ACQSYNTH_TOKEN``, if there is one.
        client: options of ``ScorerClient``: ``timeout``, ``attempts``, ``batch``, ``backoff``, ``breaker``.

    Raises:
        ValueError: a student beside the url, no such URL, a max_length below 2.
        TypeError: parse is not callable, or an option of a student in this process.
        ModuleNotFoundError: httpx is not installed.
    """

    def __init__(
        self,
        student: None = None,
        acquisition: str = "entropy",
        *,
        url: str,
        parse: Parser = parse_sample,
        arguments: Mapping[str, Any] | None = None,
        reduction: str = "mean",
        max_length: int = 2048,
        token: str | None = None,
        client: Mapping[str, Any] | None = None,
        name: str | None = None,
    ) -> None:
        try:
            from acqsynth.serve.client import ScorerClient
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"url: asking a server needs {error.name}, which is not installed: run 'pip install acqcore[serve]'"
            ) from error
        if student is not None:
            raise ValueError("student: expected none beside url, the server has its own")
        if max_length < 2:
            raise ValueError(f"max_length: expected at least 2 tokens, got {max_length}")
        self._set_up(acquisition, parse, name)
        self.client = ScorerClient(url, token=token, **(client or {}))
        self._question: dict[str, Any] = {
            "arguments": None if arguments is None else {acquisition: dict(arguments)},
            "reduction": reduction,
            "max_length": max_length,
        }

    async def __call__(  # type: ignore[override]  # a coroutine of what the other gives, see __new__
        self,
        prompts: Sequence[Any],
        completions: Sequence[str | list[dict[str, Any]]],
        completion_ids: Sequence[list[int]] | None = None,
        log_extra: Callable[[str, list[Any]], None] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """As :meth:`AcquisitionReward.__call__`.

        Raises:
            acqsynth.serve.client.ScorerError: the server refuses what is asked: a wrong token or acquisition.
        """
        begin = time.perf_counter()
        samples = [self._sample(completion) for completion in completions]
        given = [sample for sample in samples if sample is not None]
        values, lengths = await self.client.score(given, (self.acquisition,), **self._question)
        return self._rewards(begin, samples, values[self.acquisition], lengths, log_extra, log_metric)


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

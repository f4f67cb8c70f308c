"""A single acquisition as a TRL reward function: its value, gated by whether the text parses.

    reward = AcquisitionReward("path/to/student", "entropy")

On the command line every acquisition is a ready-made reward, ``trl grpo --reward_funcs acqsynth.rewards.entropy``; the
environment variable ``ACQSYNTH_STUDENT`` names the student. ``AcquisitionReward(url="http://scorer:8000",
acquisition="entropy")`` scores on a server started by ``acqsynth serve``.

Malformed text scores highest on most acquisitions, so the format check multiplies the value; with an added bonus such
text would still rank first.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

import acqcore
from acqcore import Reduction
from acqsynth.parsing import parse_sample
from acqsynth.rewards.batch import Spread
from acqsynth.rewards.scoring import Scored, Scorer
from acqsynth.rewards.trl import Completion, Log, LogExtra, LogMetric, TrlReward, completion_text, prompt_key, summary

logger = logging.getLogger(__name__)

#: Maps a completion's text to a sample for ``acqcore.score``, or to None.
Parser = Callable[[str], Any]

_FAILED = object()  #: replaces the sample if the parser failed


class AcquisitionReward(TrlReward):
    """TRL 1.16 reward function: the acquisition value of each completion for a student.

    Text that does not parse gets the lowest possible value: 0.0, or -1.0 for influence by cosine. Influence by dot
    product and ``epig`` have none, so such text gets the lowest value of the call if that is negative. Samples that
    cannot be scored are masked. Logged per sample: the value and whether the text parses. Logged per call: shares
    parsed and masked, mean, correlation with length and, for randomly estimated acquisitions, ``reliability`` as in
    :meth:`ComposedReward.metrics`. A call raises RuntimeError if ``ACQSYNTH_STUDENT`` is needed and not set, or if
    values have no lower bound on several ranks without ``sync``, or if ``parse`` has failed on all texts so far, at
    least three; otherwise it raises as ``acqcore.score`` does.

    Args:
        student: a transformers causal LM (even the model in training: it is scored in eval mode and left unchanged), an
            ``acqcore.Student``, a path or hub id, or None for the path in the environment variable
            ``ACQSYNTH_STUDENT``. A path is loaded on the first call and shared by all rewards of the process.
        acquisition: a name from ``acqcore.acquisitions()``. To combine several, pass several rewards; TRL weights them.
        parse: maps a completion's text to a sample for ``acqcore.score``, or to None if it is not a sample; see
            ``acqsynth.parsing``. By default it reads the tagged question and its solution.
        arguments: the acquisition's arguments, as in ``acquisition_args`` of ``acqcore.score``: ``{"parameters":
            "all"}`` for ``grad_norm``; ``{"reference": ...}``, which ``influence`` requires.
        reduction: how token values are reduced to one, as in ``acqcore.score``.
        tokenizer: the student's tokenizer; by default the one at its path. Required if the student is a model object.
        backend: as in ``acqcore.score``.
        batch_tokens: tokens per forward pass of the student, as in ``acqcore.score``.
        device: device for a student loaded from a path; by default the CPU. A model object stays on its device.
        max_length: samples are truncated to this many tokens, and to the student's maximum length.
        sync: the ranks of the ``torch.distributed`` group call the reward together and share the lowest value, which
            is the reward for text that does not parse. Required on several ranks if values have no lower bound
            (influence by dot product, ``epig``).
        name: name under which TRL logs; by default ``acquisition_<acquisition>``.
        url: URL of a scoring server to use instead of a student; creates a :class:`RemoteAcquisitionReward`.

    Raises:
        ValueError: an unknown acquisition, a model without a tokenizer, or a max_length below 2.
        TypeError: parse is not callable.
    """

    def __new__(cls, *arguments: Any, url: str | None = None, **options: Any) -> AcquisitionReward:
        # TRL checks whether the class's __call__ is a coroutine function, so the remote reward needs its own class.
        return super().__new__(RemoteAcquisitionReward if url is not None and cls is AcquisitionReward else cls)

    def __init__(
        self,
        student: Any = None,
        acquisition: str = "entropy",
        *,
        url: None = None,
        parse: Parser = parse_sample,
        arguments: Mapping[str, Any] | None = None,
        sync: bool = False,
        name: str | None = None,
        **scoring: Any,
    ) -> None:
        self._set_up(acquisition, parse, name, arguments, sync)
        named = None if arguments is None else {acquisition: arguments}
        self.scorer = Scorer(student, (acquisition,), arguments=named, name=self.__name__, **scoring)

    def _set_up(
        self, acquisition: str, parse: Parser, name: str | None, arguments: Mapping[str, Any] | None, sync: bool
    ) -> None:
        if not callable(parse):
            raise TypeError(f"parse: expected a function of a text, got {type(parse).__name__}")
        super().__init__(name or f"acquisition_{acquisition}")
        self.acquisition = acquisition
        self.parse = parse
        self._sync = sync
        cosine = acquisition == "influence" and (arguments or {}).get("similarity", "cosine") == "cosine"
        self._least = -1.0 if cosine else 0.0  #: the known lower bound of the values
        self._unbounded = acquisition == "epig" or (acquisition == "influence" and not cosine)
        self._estimated = False  # whether a call has had standard errors

    def _reward(self, prompts: Sequence[Any], completions: Sequence[Completion], log: Log) -> list[float | None]:
        if not self._checked_form:
            self.scorer.check()  # reports a missing student even if nothing parses
        samples = self._samples(completions, log)
        scored = self.scorer([sample for sample in samples if _parsed(sample)])
        return self._rewards(prompts, samples, scored, log)

    def rewards(self, prompts: Sequence[Any], completions: Sequence[Completion]) -> list[float | None]:
        """The rewards, for direct use in a script or notebook; works for local and remote students."""
        return self(prompts, completions)

    def _samples(self, completions: Sequence[Completion], log: Log) -> list[Any]:
        """The result of ``parse`` for each completion, or ``_FAILED`` where it raises or returns something else."""
        texts = [completion_text(completion) for completion in completions]
        read = self._guard.each("parse", self._read, texts, needed=not log.evaluates)
        return [
            None if text is None else _FAILED if found is None else found[0]
            for text, found in zip(texts, read, strict=True)
        ]

    def _read(self, text: str) -> Any:
        found = self.parse(text)
        if not isinstance(found, str | Mapping | acqcore.Row | None):
            raise TypeError(f"parse: expected a sample for acqcore.score or None, got {type(found).__name__}")
        return found

    def _rewards(self, prompts: Sequence[Any], samples: Sequence[Any], scored: Scored, log: Log) -> list[float | None]:
        """Rewards for n samples (None: text that does not parse), given the scores of the parsed ones."""
        self._check_form(
            [] if log.evaluates else samples,
            "has the format that parse=%s expects, so each gets the lowest reward; ask for "
            "<question>...</question><answer>...</answer> in the prompts, or pass parse=acqsynth.parsing.as_text to "
            "score whole completions",
            getattr(self.parse, "__name__", type(self.parse).__name__),
        )
        parsed = [i for i, sample in enumerate(samples) if _parsed(sample)]

        def placed(column: Sequence[Any], default: Any = None) -> list[Any]:
            found = dict(zip(parsed, column, strict=True))
            return [found.get(i, default) for i in range(len(samples))]

        values = placed(scored.values[self.acquisition])
        floor = self._floor([value for value in values if value is not None])
        rewards = [floor if sample is None else value for sample, value in zip(samples, values, strict=True)]
        if not log.evaluates:
            self.masked += rewards.count(None)
        columns = {"value": values, "parsed": [sample is not None for sample in samples]}
        metrics: dict[str, float] = {}
        if n := len(samples):
            metrics = {"parsed": len(parsed) / n, "masked": rewards.count(None) / n}
            metrics |= summary(values, placed(scored.lengths, 0))
        errors = scored.stderr.get(self.acquisition)
        self._estimated = self._estimated or errors is not None
        if self._estimated:  # even if a server gave none now: TRL would show those of an earlier call
            columns["stderr"] = placed(errors or [None] * len(parsed))
            spread = Spread.within(values, columns["stderr"], [prompt_key(prompt) for prompt in prompts])
            if not log.evaluates:
                self._watch.add({self.acquisition: spread})
            if spread.reliability is not None:
                metrics["reliability"] = spread.reliability
        self._log(rewards, columns, metrics, log)
        return rewards

    def _floor(self, values: Sequence[float]) -> float:
        """Reward for text that does not parse; identical on all ranks, as a group may span several."""
        floor = min([self._least, *values])
        distributed = torch.distributed
        if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
            return floor
        if self._sync:
            floors: list[Any] = [None] * distributed.get_world_size()
            distributed.all_gather_object(floors, floor)
            return min(floors)
        if self._unbounded or floor < self._least - 1e-6:
            raise RuntimeError(
                f"{self.__name__}: the values of {self.acquisition} have no lower bound, and ranks must agree on the "
                "reward for text that does not parse; make the reward with sync=True"
            )
        return self._least

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.acquisition!r}, name={self.__name__!r})"


class RemoteAcquisitionReward(AcquisitionReward):
    """Created by ``AcquisitionReward(url=...)``: the same values, fetched asynchronously from a server.

    TRL awaits all such rewards of a step concurrently; other callers use :meth:`rewards`. Samples without a value after
    all retries (see :class:`acqsynth.serve.client.ScorerClient`) are masked, counted in ``masked`` and logged.

    Args:
        student: must be None; the server holds the student.
        acquisition, parse, reduction, max_length, sync, name: as :class:`AcquisitionReward`.
        url: the server's URL, ``http://host:port``.
        arguments: as :class:`AcquisitionReward`, but only text and numbers.
        token: the server's access token; by default the environment variable ``ACQSYNTH_TOKEN``, if set.
        client: options of ``ScorerClient``: ``timeout``, ``attempts``, ``batch``, ``backoff``, ``breaker``.

    Raises:
        ValueError: a student together with url, an invalid URL, or a max_length below 2.
        TypeError: parse is not callable, or an option that applies only to a local student.
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
        reduction: Reduction = "mean",
        max_length: int = 2048,
        token: str | None = None,
        client: Mapping[str, Any] | None = None,
        sync: bool = False,
        name: str | None = None,
    ) -> None:
        try:
            from acqsynth.serve.client import ScorerClient
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f'url: scoring on a server needs {error.name}, which is not installed: run pip install "acqcore[serve]"'
            ) from error
        if student is not None:
            raise ValueError("student: expected None with url, as the server has its own")
        if not isinstance(max_length, int) or max_length < 2:
            raise ValueError(f"max_length: expected at least 2 tokens, got {max_length!r}")
        self._set_up(acquisition, parse, name, arguments, sync)
        self.client = ScorerClient(url, token=token, **(client or {}))
        self._spec: dict[str, Any] = {
            "arguments": None if arguments is None else {acquisition: dict(arguments)},
            "reduction": reduction,
            "max_length": max_length,
        }

    async def __call__(  # type: ignore[override]  # a coroutine, see __new__
        self,
        prompts: Sequence[Any],
        completions: Sequence[Completion],
        log_extra: LogExtra | None = None,
        log_metric: LogMetric | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """As :meth:`TrlReward.__call__`.

        Raises:
            acqsynth.serve.client.ScorerError: the server rejects the request: an invalid token or acquisition.
        """
        rewards: Any = super().__call__(prompts, completions, log_extra, log_metric)
        return list(await rewards)

    async def _reward(  # type: ignore[override]
        self, prompts: Sequence[Any], completions: Sequence[Completion], log: Log
    ) -> list[float | None]:
        samples = self._samples(completions, log)
        given = [sample for sample in samples if _parsed(sample)]
        scored = await self.client.score(given, (self.acquisition,), **self._spec)
        return self._rewards(prompts, samples, scored, log)

    def rewards(self, prompts: Sequence[Any], completions: Sequence[Completion]) -> list[float | None]:
        """As :meth:`AcquisitionReward.rewards`; blocks, whereas calling the reward returns a coroutine."""
        with ThreadPoolExecutor(1) as pool:  # a notebook already runs an event loop
            return pool.submit(asyncio.run, self(prompts, completions)).result()


def _parsed(sample: Any) -> bool:
    return sample is not None and sample is not _FAILED

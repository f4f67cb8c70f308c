"""High-throughput generation with vLLM, installed by the extra ``vllm``."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from transformers import GenerationConfig

from acqsynth.domains import Messages
from acqsynth.engines import Completion, Engine, Sampling, completion, encode, eos_ids, where_room
from acqsynth.models import load_tokenizer


class VllmEngine(Engine):
    """Runs prompts through ``vllm.LLM``; they are tokenised here, so that both engines see the same tokens.

    Args:
        model: a local path or hub id.
        tokenizer: by default the one at the path.
        lora: folder of a PEFT adapter, used for all generation.
        options: options of ``vllm.LLM``, such as ``max_model_len``, ``gpu_memory_utilization``, ``dtype``,
            ``tensor_parallel_size``.

    Raises:
        RuntimeError: the package ``vllm`` cannot be imported.
        TypeError: the model is not a path or hub id.
    """

    name = "vllm"

    def __init__(
        self,
        model: str | os.PathLike[str],
        tokenizer: Any = None,
        *,
        lora: str | os.PathLike[str] | None = None,
        **options: Any,
    ) -> None:
        if not isinstance(model, str | os.PathLike):
            raise TypeError(f"model: expected a path or hub id, which vllm loads itself, got {type(model).__name__}")
        try:
            from vllm import LLM
            from vllm.lora.request import LoRARequest
        except ImportError as error:
            raise RuntimeError(
                f"the engine 'vllm' needs the package vllm ({error}); run pip install \"acqcore[vllm]\""
            ) from error
        path = os.fspath(model)
        self.tokenizer = tokenizer or load_tokenizer(path)
        self.lora = None if lora is None else LoRARequest("adapter", 1, os.fspath(lora))
        if self.lora is not None:
            options = {"enable_lora": True, **options}
        # Raw, that is, before temperature, as in ``Completion``.
        self.llm = LLM(
            model=path,
            logprobs_mode="raw_logprobs",
            worker_extension_cls="acqsynth.engines.vllm.WorkerExtension",
            **options,
        )
        try:
            generation = GenerationConfig.from_pretrained(path)
        except OSError:  # a model may have none
            generation = None
        self.eos = eos_ids(self.tokenizer, generation)

    def generate(self, prompts: Sequence[str | Messages], sampling: Sampling) -> list[list[Completion]]:
        """As in :class:`Engine`."""
        limit = self.llm.llm_engine.model_config.max_model_len
        return where_room(encode(self.tokenizer, prompts), limit, sampling, self._draw)

    def _draw(self, ids: list[list[int]], sampling: Sampling) -> list[list[Completion]]:
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        # vLLM varies the seed across the draws of one prompt, but two prompts with equal seeds would share their draws.
        seeds = numpy.random.SeedSequence(sampling.seed).generate_state(len(ids)).tolist()
        outputs = self.llm.generate(
            [TokensPrompt(prompt_token_ids=row) for row in ids],
            [
                SamplingParams(
                    n=sampling.n,
                    temperature=sampling.temperature,
                    top_p=sampling.top_p,
                    max_tokens=sampling.max_tokens,
                    seed=seed,
                    stop_token_ids=self.eos,
                    logprobs=2 if sampling.top2 else None,
                    detokenize=False,
                )
                for seed in seeds
            ],
            use_tqdm=False,
            lora_request=self.lora,
        )
        return [
            [
                completion(self.tokenizer, draw.token_ids, self.eos, *_logprobs(draw.token_ids, draw.logprobs))
                for draw in output.outputs
            ]
            for output in outputs
        ]

    def reload(self, weights: str | os.PathLike[str] | Mapping[str, torch.Tensor]) -> None:
        """As in :class:`Engine`; a path is a folder with safetensors. Cached prefixes of the old weights are
        discarded.

        Raises:
            FileNotFoundError: no such folder.
        """
        if isinstance(weights, Mapping):
            from safetensors.torch import save_file

            # Workers may be separate processes, which can all read a folder.
            with tempfile.TemporaryDirectory(prefix="acqsynth-weights-") as folder:
                state = {name: tensor.detach().clone().contiguous() for name, tensor in weights.items()}
                save_file(state, Path(folder) / "model.safetensors")
                self.reload(folder)
            return
        if not Path(weights).is_dir():
            raise FileNotFoundError(f"weights: expected a folder with a model, {weights} is not one")
        self.llm.collective_rpc("reload_weights", kwargs={"weights_path": os.fspath(weights)})
        self.llm.collective_rpc("repack_head")
        self.llm.reset_prefix_cache()


def _logprobs(
    ids: Sequence[int], positions: Sequence[Mapping[int, Any]] | None
) -> tuple[list[tuple[float, float]] | None, list[float] | None]:
    """The two largest at each position, and the drawn token's, which vLLM lists whatever its rank."""
    if positions is None:
        return None, None
    pairs = []
    for position in positions:
        first, second = sorted((entry.logprob for entry in position.values()), reverse=True)[:2]
        pairs.append((first, second))
    return pairs, [position[token].logprob for token, position in zip(ids, positions, strict=True)]


class WorkerExtension:
    """Methods for vLLM's workers, which load this class by name (``worker_extension_cls``)."""

    model_runner: Any

    def repack_head(self) -> None:
        """Repacks the head's weight after a reload. On CPUs the head uses a packed copy, which vLLM 0.32 does not
        update if the head is tied to the embeddings; other devices have no such copy."""
        head = getattr(self.model_runner.get_model(), "lm_head", None)
        head = getattr(head, "base_layer", head)  # under a LoRA layer
        if head is not None and hasattr(head, "cpu_linear"):
            head.quant_method.process_weights_after_loading(head)

"""What a worker of vLLM can do beyond its own methods; loaded by vLLM in each worker process."""

from __future__ import annotations

from typing import Any


class WorkerExtension:
    """Named to vLLM as ``worker_extension_cls``: its methods become the worker's."""

    model_runner: Any

    def repack_head(self) -> None:
        """On a CPU the head multiplies a packed copy of its weight, and vLLM 0.32 leaves the copy of a head tied to
        the embeddings as it was when weights are reloaded: it is made anew. Elsewhere there is none."""
        head = getattr(self.model_runner.get_model(), "lm_head", None)
        head = getattr(head, "base_layer", head)  # of one wrapped for LoRA
        if head is not None and hasattr(head, "cpu_linear"):
            head.quant_method.process_weights_after_loading(head)

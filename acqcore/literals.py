"""Closed sets of strings that public arguments accept."""

from __future__ import annotations

from typing import Literal, TypeAlias

#: Reduction of a sample's token values; ``topk`` is the mean of the largest.
Reduction: TypeAlias = Literal["mean", "sum", "max", "topk"]
#: Reduction of ``-log p`` over a sample's scored tokens.
Loss: TypeAlias = Literal["mean", "sum"]
#: Parameters to differentiate; an int n means the last n transformer blocks.
Parameters: TypeAlias = Literal["head", "trainable", "all"] | int
#: Where dropout acts: every block, the student's own dropout modules, or the last n blocks (0: the last hidden state).
Layers: TypeAlias = Literal["all", "own"] | int
#: Dropout of single columns of the last hidden state, or of groups of them.
Form: TypeAlias = Literal["element", "block"]
#: Source of uncertainty in the linear form of mutual information: activations under dropout, or weights.
Posterior: TypeAlias = Literal["dropout", "isotropic", "laplace"]
#: Tokens whose activations are perturbed: all, or those from the predictor of the first scored token onwards.
Positions: TypeAlias = Literal["all", "completion"]
Similarity: TypeAlias = Literal["cosine", "dot"]
#: Methods of :func:`acqcore.select`.
Method: TypeAlias = Literal["top_k", "k_center", "facility_location", "badge", "log_det"]

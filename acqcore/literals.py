"""The closed sets of strings that public arguments take."""

from __future__ import annotations

from typing import Literal, TypeAlias

#: Of a sample's token values; ``topk`` is the mean of the largest.
Reduction: TypeAlias = Literal["mean", "sum", "max", "topk"]
#: Of ``-log p`` over a sample's scored tokens.
Loss: TypeAlias = Literal["mean", "sum"]
#: Whose gradient is taken; an int is the last n transformer blocks.
Parameters: TypeAlias = Literal["head", "trainable", "all"] | int
#: Where dropout acts: every block, the student's own dropout modules, the last n blocks (0: the last hidden state).
Layers: TypeAlias = Literal["all", "own"] | int
#: Dropout of single columns of the last hidden state, or of groups of them.
Form: TypeAlias = Literal["element", "block"]
#: What is uncertain in the linear form of mutual information: activations under dropout, or weights.
Posterior: TypeAlias = Literal["dropout", "isotropic", "laplace"]
#: Whose activations are perturbed: every token's, or those from the one that predicts the first scored token on.
Positions: TypeAlias = Literal["all", "completion"]
Similarity: TypeAlias = Literal["cosine", "dot"]
#: Of :func:`acqcore.select`.
Method: TypeAlias = Literal["top_k", "k_center", "facility_location", "badge", "log_det"]

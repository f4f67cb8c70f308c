"""Selection among vectors: subsets, diversity gains and label trust."""

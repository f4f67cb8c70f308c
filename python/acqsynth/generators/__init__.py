"""Ways to a better generator: ``grpo`` and ``dpo`` train one, ``best_of_n`` selects from one as it is."""

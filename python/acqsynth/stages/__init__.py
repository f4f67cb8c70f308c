"""The stages of a run, each a file: rows, training, writing, labelling, fits, answers, report; and their plan."""

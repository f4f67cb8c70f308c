"""Mass scoring: blocks of a data file, the processes that score them, and what is left of a run that was cut off."""

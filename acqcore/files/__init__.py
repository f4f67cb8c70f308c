"""Bulk scoring of data files: blocks of rows, the processes that score them, and resuming interrupted runs."""

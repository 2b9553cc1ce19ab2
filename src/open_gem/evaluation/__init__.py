"""Data sets to numbers: protocols, tasks, metrics, runs on disk."""

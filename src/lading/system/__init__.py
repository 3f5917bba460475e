"""The layer below all others: file systems, settings, progress bars, threads, entry points."""

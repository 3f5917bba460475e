"""The ground: files, settings, progress, threads, entry points."""

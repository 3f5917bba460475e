"""Checkpoint formats; each gives a manifest."""

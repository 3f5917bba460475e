"""Checkpoints of cards: their place, download and verification."""

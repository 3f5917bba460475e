"""Tokenizers: text to the ids of a vocabulary and back, with the control tokens that a model expects around a text."""

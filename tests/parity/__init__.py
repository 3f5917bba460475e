"""Tests against transformers and fairseq2."""

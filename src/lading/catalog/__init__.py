"""The catalog: a database of families, architectures, cards, checkpoints and their tensors."""

"""The built-in model families, one page each."""

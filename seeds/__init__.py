"""The built-in architectures and cards."""

"""A model hub for PyTorch whose catalog is a SQLite database."""

"""Cards: the documents that say which model a name stands for."""

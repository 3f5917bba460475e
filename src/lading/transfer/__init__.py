"""The transfer of tensors from files to memory, by a plan."""

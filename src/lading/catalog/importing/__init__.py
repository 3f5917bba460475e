"""Card files into rows: what is new, changed, gone or in conflict, and the writes of it."""

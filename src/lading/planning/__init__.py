"""The plan: which bytes of which files go where. Pure, and free of torch."""

"""Cards: what a name means."""

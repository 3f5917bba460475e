"""The operations of the commands, for Python."""

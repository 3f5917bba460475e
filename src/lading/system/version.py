"""The version of this package; it stands here alone, so that the lowest room can import it."""

__version__ = "0.1.0"

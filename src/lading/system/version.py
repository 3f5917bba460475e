"""The name and the version of this distribution, in a module of its own so that every other module can import them."""

__version__ = "0.1.0"

DISTRIBUTION = "lading-hub"
"""The name to install; the package to import is ``lading``."""

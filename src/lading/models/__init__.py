"""From a family, a configuration and a checkpoint to a module."""

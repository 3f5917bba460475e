"""Modules that the families share."""

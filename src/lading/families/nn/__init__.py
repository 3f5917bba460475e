"""Modules shared by the families."""

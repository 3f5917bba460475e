"""Tests through the public calls and the command line."""

"""Tests with real ranks over gloo."""

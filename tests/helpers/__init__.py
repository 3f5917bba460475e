"""Helpers of the tests: checkpoints, catalogs, examples of pages, processes."""

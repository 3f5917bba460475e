"""Imports of card files as rows: the new, changed, gone and conflicting ones, and the writes."""

"""Readers and a writer of documents: YAML 1.2 streams and JSON Lines, from and to plain objects.

The text is untrusted. Invalid text never raises: each document carries a list of its problems, and a broken document
does not hide the next one.

- ``document``: a document in plain objects, and the checks that each one must pass; needs no parser.
- ``read_yaml``, ``json_lines``: from text to documents.
- ``write_yaml``: back to text.
"""

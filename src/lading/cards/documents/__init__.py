"""Text ↔ plain objects: YAML 1.2 streams and JSON Lines, one document after another.

The text comes from strangers. Whatever it is, nothing is raised: each document comes with a list of what is wrong with
it, and one that is broken does not hide the next.

- ``document``: a document in plain objects, and what any of them must satisfy; needs no parser.
- ``read_yaml``, ``json_lines``: from text to documents.
- ``write_yaml``: back to text.
"""

"""Sources of checkpoint files, one package per kind; :func:`lading.sources.open.open_source` opens the one of a URI."""

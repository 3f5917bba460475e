"""From a URI to files on this machine; one scheme a file. The door is :func:`lading.sources.open.open_source`."""

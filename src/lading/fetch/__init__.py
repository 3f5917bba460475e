"""From a URI to files on this machine, one scheme a file."""

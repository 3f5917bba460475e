"""Sources of files on web servers."""

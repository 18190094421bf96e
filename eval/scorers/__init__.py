"""One file a scorer, found by file name."""

"""One paper a file, each to be read beside its paper."""

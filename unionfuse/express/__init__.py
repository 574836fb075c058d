"""The fast door: a reader of the FUSE channel of our own, beside pyfuse3."""

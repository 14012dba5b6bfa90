"""The whole pipeline at a small size, from rendered faces to a measured recogniser: `make demo`."""

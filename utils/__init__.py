"""Everything that the entry points share: configuration, checkpoints, images, data."""

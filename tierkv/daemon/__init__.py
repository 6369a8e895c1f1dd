"""The cache daemon: one pool of blocks for all engines of a machine."""

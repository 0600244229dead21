"""The GPU's view of attention and matrix products."""

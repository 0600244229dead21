"""Training and serving on many GPUs."""

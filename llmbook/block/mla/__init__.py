"""Multi-head latent attention: one compressed vector per token instead of every head's key and value."""

"""Flash attention 2."""

"""Dropout: a random mask as a function of a seed and a position, forward, backward, and over many ranks."""

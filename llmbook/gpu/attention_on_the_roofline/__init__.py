"""Attention on the roofline."""

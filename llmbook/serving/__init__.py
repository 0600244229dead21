"""Serving: prefill, decode, and the clusters that run them."""

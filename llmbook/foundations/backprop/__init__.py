"""Backprop."""

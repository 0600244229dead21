"""Regression and classification: one network, two heads, two likelihoods, and how fast each loss learns."""

"""Batch, Layer and RMS normalisation: one operation over different axes, forward and backward by hand.

`standardise` is that operation, `by_axes` makes LayerNorm and BatchNorm of it, `rms` holds the RMSNorm that models
use and its fused residual form, `stack` measures pre- and post-norm, `training` what a norm does to the largest stable
learning rate, `cost` counts FLOPs and bytes, and `kernel` is RMSNorm in Triton.
"""

"""Rotary position embedding (RoPE): queries and keys turn with their position, so scores see distances only.

`rotation` builds it four ways and permutes weights between layouts, `scaling` stretches it to longer
contexts, `decay` holds the bound of RoFormer and what scores really do, `cost` counts FLOPs and bytes, and
`kernel` fuses it in Triton.
"""

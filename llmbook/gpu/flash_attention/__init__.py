"""FlashAttention: exact attention tile by tile, with every element of SRAM and every byte of HBM accounted for."""

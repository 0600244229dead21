"""Llama: the block's parts as one model that trains, is saved, and writes."""

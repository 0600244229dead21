"""DeepSeek's mixture of experts."""

"""Inside the transformer block."""

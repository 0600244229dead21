"""Matrix calculus: which shape a derivative has, what fills it, and why a backward pass never builds it."""

"""Switch routing."""

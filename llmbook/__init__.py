"""The library behind *Gradients to Goodput*: every mechanism the book shows, as the book shows it."""

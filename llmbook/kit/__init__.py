"""What every chapter shares. Each tool is a module of its own, so that a mechanism can use one without the others."""

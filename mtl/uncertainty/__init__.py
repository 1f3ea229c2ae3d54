"""Whether a model knows what it does not know."""

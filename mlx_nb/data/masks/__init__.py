"""A conversation as text, tokens and loss mask, from a single render by its chat template."""

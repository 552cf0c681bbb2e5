"""A conversation as text, tokens and loss mask, from one render by its chat template."""

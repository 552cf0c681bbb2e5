"""Rows as examples: read, tokenized, truncated and batched, for each split."""

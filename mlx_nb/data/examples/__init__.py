"""Rows as examples, cut to length, split, tokenized and put into batches."""

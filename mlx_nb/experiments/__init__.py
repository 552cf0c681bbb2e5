"""Questions that need more than one run: which of two is better, and on which rows."""

"""Reward functions: lookup, calling convention, isolated calls, scores."""

"""Reward functions: found, called, guarded, scored."""

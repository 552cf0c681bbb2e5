"""Randomness, optimizer, the transactional step, and the trainer."""

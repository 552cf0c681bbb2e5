"""Displays of rows and batches: tokens with their loss mask."""

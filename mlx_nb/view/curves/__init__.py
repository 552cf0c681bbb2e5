"""Curves of a run: live in a browser, and as a figure that stays."""

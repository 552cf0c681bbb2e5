"""The curves of a run: live in the panel, and as a lasting figure."""

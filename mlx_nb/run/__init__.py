"""A run as a person holds it, what it is made of, and what it can go back to."""

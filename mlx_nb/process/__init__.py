"""This process: whose turn it is to compute, functions of the person's own, signals, and the end."""

"""What the model writes when it is asked."""

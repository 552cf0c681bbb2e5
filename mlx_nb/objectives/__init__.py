"""Training objectives. One file is one objective."""

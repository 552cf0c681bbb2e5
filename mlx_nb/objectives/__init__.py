"""Training objectives. One file is one method; a new loss of a method is a function in its file."""

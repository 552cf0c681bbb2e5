"""The panel under the cell."""

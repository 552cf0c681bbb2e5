"""The data check: errors and oddities in the rows, found before training."""

"""The IPython extension: magics, commands, Tab completion, and training in the cells of a notebook."""

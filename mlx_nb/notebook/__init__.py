"""The IPython extension: session, driver and magics."""

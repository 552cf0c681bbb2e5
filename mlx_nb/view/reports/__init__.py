"""Reports: of a run, of a data check, of completions."""

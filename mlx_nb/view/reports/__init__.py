"""Reports of a run, a data check, and the completions of a rollout."""

"""Device, loading, adapters and log-probabilities."""

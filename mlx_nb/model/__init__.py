"""Device, loading, adapters and log-probabilities."""

from mlx_nb.model.backend import prepare_backend

prepare_backend()  # before any module of this package imports mlx

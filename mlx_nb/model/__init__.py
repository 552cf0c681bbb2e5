"""Models: device and BLAS, loading, adapters, log-probabilities, packing and the reference model."""

from mlx_nb.model.backend import prepare_backend

prepare_backend()  # before any module of this package imports mlx

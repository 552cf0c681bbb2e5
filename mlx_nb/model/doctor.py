"""The report of `mlx-nb doctor`: device, versions, BLAS, speed of matrix products, memory, and what to do."""

from __future__ import annotations

import os
import time
from importlib.metadata import version

import mlx.core as mx

from mlx_nb.model.backend import device_name, is_cpu, prepare_backend

_SLOW = 40  # GFLOP/s in float32 below which something is wrong


def doctor_report() -> list[tuple[str, str]]:
    """(label, value) lines about this machine. Measures for about two seconds."""
    blas = prepare_backend()
    lines = [
        ("device", device_name()),
        ("mlx", f"{version('mlx')}, mlx-lm {version('mlx-lm')}"),
        ("BLAS", f"{blas.note}: {blas.path}" if blas.path else blas.note),
    ]
    speeds = {
        "float32": measured_gflops(mx.float32),
        "bfloat16": measured_gflops(mx.bfloat16),
        "4-bit": measured_gflops(None),
    }
    lines += [(f"{name} matrix product", f"{speed:.0f} GFLOP/s") for name, speed in speeds.items()]
    lines.append(("memory", f"{mx.get_active_memory() / 1e9:.2f} GB in use by mlx"))
    lines.append(("advice", _advice(speeds)))
    return lines


def format_doctor_report() -> str:
    """The report of `mlx-nb doctor`."""
    lines = doctor_report()
    width = max(len(label) for label, _ in lines)
    return "\n".join(f"{label.ljust(width)}  {value}" for label, value in lines)


def measured_gflops(dtype: mx.Dtype | None, size: int = 1024, seconds: float = 0.3) -> float:
    """Speed of (256, size) @ (size, size) in GFLOP/s; `dtype` None multiplies by a 4-bit quantized matrix."""
    left = mx.ones((256, size), dtype=dtype or mx.float32)
    right = mx.random.normal((size, size), key=mx.random.key(0))
    if dtype is None:
        packed = mx.quantize(right, group_size=32, bits=4)

        def product() -> None:
            mx.eval(mx.quantized_matmul(left, *packed, group_size=32, bits=4))
    else:
        right = right.astype(dtype)

        def product() -> None:
            mx.eval(left @ right)

    product()
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        product()
        count += 1
    return 2 * 256 * size * size * count / (time.perf_counter() - started) / 1e9


def _load_average() -> float:
    """The 1-minute load average; 0 if unavailable."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return 0.0


def _advice(speeds: dict[str, float]) -> str:
    if not is_cpu():
        return "the GPU is used; nothing to do"
    slow = speeds["float32"] < _SLOW
    if slow and (busy := _load_average()) >= 0.5:
        return (
            f"this machine is busy: about {busy:.1f} of its {os.cpu_count()} cores are in use, so these speeds are "
            "unreliable. Run `mlx-nb doctor` again when it is idle"
        )
    warning = prepare_backend().warning
    if warning is not None:
        return warning
    if slow:
        return "float32 is slow: see whether OPENBLAS_NUM_THREADS or OPENBLAS_CORETYPE is set"
    return "models are computed in float32, the fast path of this CPU; saved adapters are the same either way"

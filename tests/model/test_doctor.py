"""What `mlx-nb doctor` says of a machine."""

from __future__ import annotations

from mlx_nb.model import doctor
from mlx_nb.model.backend import Blas


def test_a_busy_machine_is_reported_before_any_advice(monkeypatch):
    monkeypatch.setattr(doctor.os, "getloadavg", lambda: (1.9, 1.0, 1.0))
    monkeypatch.setattr(doctor, "is_cpu", lambda: True)
    slow, quick = {"float32": 11.0}, {"float32": 400.0}
    assert "busy: about 1.9 of its" in doctor._advice(slow)
    assert "OPENBLAS" not in doctor._advice(slow)
    assert "busy" not in doctor._advice(quick)
    monkeypatch.setattr(doctor.os, "getloadavg", lambda: (0.1, 0.1, 0.1))
    assert "busy" not in doctor._advice(slow)


def test_the_report_names_device_versions_and_speeds_in_aligned_lines(monkeypatch):
    monkeypatch.setattr(doctor, "measured_gflops", lambda dtype: 4.0 if dtype is None else 400.0)
    monkeypatch.setattr(doctor, "is_cpu", lambda: True)
    monkeypatch.setattr(doctor, "prepare_backend", lambda: Blas("/lib/blas.so", "OpenBLAS"))
    labels, values = zip(*doctor.doctor_report())
    assert labels == (
        *("device", "mlx", "BLAS"),
        *("float32 matrix product", "bfloat16 matrix product", "4-bit matrix product"),
        *("memory", "advice"),
    )
    assert values[2:6] == ("OpenBLAS: /lib/blas.so", "400 GFLOP/s", "400 GFLOP/s", "4 GFLOP/s")
    assert "the fast path of this CPU" in values[-1]
    lines = doctor.format_doctor_report().splitlines()
    assert {line.index(value) for line, value in zip(lines, values)} == {len("bfloat16 matrix product") + 2}

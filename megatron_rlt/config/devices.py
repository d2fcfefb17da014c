"""GPUs that are known: memory, peak rate and bandwidth, by the word that `plan` takes and by CUDA's name.

Peak dense bfloat16 FLOP/s and bandwidth come from NVIDIA's data sheets (A100 2021, L40S, H100, H200 2023, B200 2024);
memory is what a process can allocate at most, as torch reports it. Users state the peak of other devices: a wrong peak
is worse than none.
"""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """One kind of GPU."""

    name: str
    cuda_names: tuple[str, ...]  # as torch.cuda.get_device_name() says
    memory_bytes: int
    peak_flops_per_second: float | None  # dense bfloat16; None: unknown
    bandwidth_bytes_per_second: float | None  # of its memory
    has_fp8: bool = False


_H100 = "NVIDIA H100 80GB HBM3"
DEVICES = {
    device.name: device
    for device in (
        Device("a100", ("NVIDIA A100-SXM4-80GB",), int(79.1 * GIB), 312e12, 2.039e12),
        Device("a100-40", ("NVIDIA A100-SXM4-40GB",), int(39.4 * GIB), 312e12, 1.555e12),
        Device("l40s", ("NVIDIA L40S",), int(44.3 * GIB), 362e12, 0.864e12, has_fp8=True),
        Device("h100", (_H100,), int(79.1 * GIB), 989.4e12, 3.35e12, has_fp8=True),
        Device("h100-pcie", ("NVIDIA H100 PCIe",), int(79.1 * GIB), 756e12, 2.0e12, has_fp8=True),
        Device("h200", ("NVIDIA H200",), int(139.7 * GIB), 989.4e12, 4.8e12, has_fp8=True),
        Device("b200", ("NVIDIA B200",), int(178.3 * GIB), 2250e12, 7.7e12, has_fp8=True),
    )
}


def known_peak(cuda_name: str | None) -> float | None:
    """Peak FLOP/s of a GPU by CUDA's name (None on a CPU); None if unknown."""
    found = (device for device in DEVICES.values() if cuda_name in device.cuda_names)
    return next((device.peak_flops_per_second for device in found), None)

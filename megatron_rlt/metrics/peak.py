"""A device's peak rate of matrix products, which shares are quoted against."""

from __future__ import annotations

# Dense bfloat16 without sparsity, from NVIDIA's data sheets of the A100 (2021), H100 and H200 (both 2023). Others are
# stated in the configuration: a wrong peak is worse than none.
_PEAK_FLOPS_PER_SECOND = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989.4e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989.4e12,
}


def peak_flops_per_second(configured: float | None, device_name: str | None) -> float | None:
    """Of one device; None where nobody knows it.

    Args:
        configured: what the user states; it goes first.
        device_name: as CUDA calls it; None on a CPU.
    """
    if configured is not None or device_name is None:
        return configured
    return _PEAK_FLOPS_PER_SECOND.get(device_name)

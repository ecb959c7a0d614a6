"""Peak FLOP/s of devices, dense bfloat16, by the name that JAX gives them.

Names are matched whole, never by their beginning: an H100 PCIe, an L40S and a MIG slice are other
chips than those whose names they extend. Vendors like to print twice these numbers, "with
sparsity"; here every row is dense. A device is what JAX calls one: a TensorCore on TPU v2, v3 and
7x, a whole chip of two cores on v4 and v5p.
"""

from __future__ import annotations

_TERA = 1e12

# `device_kind` -> TFLOP/s.
_PEAKS = {
    # Google Cloud, "TPU architecture" and the page of each version: TFLOP/s of a chip in bfloat16,
    # 45, 123, 275, 197, 459, 918, 2307; halved where a chip is two devices.
    "TPU v2": 22.5,
    "TPU v3": 61.5,
    "TPU v4": 275.0,
    "TPU v5 lite": 197.0,
    "TPU v5e": 197.0,
    "TPU v5": 459.0,
    "TPU v5p": 459.0,
    "TPU v6 lite": 918.0,
    "TPU v6e": 918.0,
    "TPU7x": 1153.5,
    # NVIDIA DGX B200 / GB200 NVL72 data sheets: 4500 and 5000 with sparsity.
    "NVIDIA B200": 2250.0,
    "NVIDIA GB200": 2500.0,
    # NVIDIA H200 data sheet: 1979 (SXM) and 1671 (NVL) with sparsity.
    "NVIDIA H200": 989.5,
    "NVIDIA H200 NVL": 835.5,
    # NVIDIA GH200 data sheet: 1979 with sparsity.
    "NVIDIA GH200 480GB": 989.5,
    "NVIDIA GH200 120GB": 989.5,
    # NVIDIA H100 data sheet: 1979 (SXM) and 1671 (NVL) with sparsity; 1513 (PCIe) in its first
    # edition.
    "NVIDIA H100 80GB HBM3": 989.5,
    "NVIDIA H100 NVL": 835.5,
    "NVIDIA H100 PCIe": 756.5,
    # NVIDIA A100 data sheet: 312 in every form, 40 and 80 GB.
    "NVIDIA A100-SXM4-40GB": 312.0,
    "NVIDIA A100-SXM4-80GB": 312.0,
    "NVIDIA A100-PCIE-40GB": 312.0,
    "NVIDIA A100 80GB PCIe": 312.0,
    # NVIDIA data sheets of L4 (242 with sparsity), L40 and L40S.
    "NVIDIA L4": 121.0,
    "NVIDIA L40": 181.05,
    "NVIDIA L40S": 362.05,
    # NVIDIA data sheets of A10, A10G, A30 and A40.
    "NVIDIA A10": 125.0,
    "NVIDIA A10G": 70.0,
    "NVIDIA A30": 165.0,
    "NVIDIA A40": 149.7,
    # NVIDIA architecture white papers (Ampere GA102, Ada, RTX Blackwell), sums in float32.
    "NVIDIA GeForce RTX 3090": 71.0,
    "NVIDIA GeForce RTX 4090": 165.2,
    "NVIDIA GeForce RTX 5090": 209.5,
    # NVIDIA data sheets of V100 and T4. In float16: these two have no bfloat16 at all.
    "Tesla V100-SXM2-16GB": 125.0,
    "Tesla V100-SXM2-32GB": 125.0,
    "Tesla V100-PCIE-16GB": 112.0,
    "Tesla V100-PCIE-32GB": 112.0,
    "Tesla T4": 65.0,
}


def peak_flops(device_kind: str) -> float | None:
    """Peak dense bfloat16 FLOP/s of one device called so (`jax.Device.device_kind`).

    None for a device that is not in the table, as every CPU: no utilisation can be given then.
    """
    tera = _PEAKS.get(device_kind)
    return None if tera is None else tera * _TERA

"""FLOPs of the network and peak rates of devices. Never imports jax.

FLOPs are those of the convolutions and the head alone, 2 for a multiply-add, independent of how a program computes
them. A training step counts three times the forward pass, less the gradient of the first convolution's input.
"""

import re

# Dense peaks from the vendors' data sheets: TFLOP/s in float32 as JAX multiplies it by default (TF32 on NVIDIA where
# there is one, bfloat16 passes on TPUs) and in bfloat16 (float16 on a T4), and GB/s of device memory.
# A100, H100 and H200 are those with SXM sockets, of 80 GB or more.
PEAKS = {
    "H200": {"float32": 494.7, "bfloat16": 989.4, "bandwidth": 4800},
    "H100": {"float32": 494.7, "bfloat16": 989.4, "bandwidth": 3350},
    "A100": {"float32": 156.0, "bfloat16": 312.0, "bandwidth": 2039},
    "L4": {"float32": 60.0, "bfloat16": 121.0, "bandwidth": 300},
    "T4": {"float32": 8.1, "bfloat16": 65.0, "bandwidth": 320},
    "TPU v6 lite": {"float32": 918.0, "bfloat16": 918.0, "bandwidth": 1640},
    "TPU v5p": {"float32": 459.0, "bfloat16": 459.0, "bandwidth": 2765},
    "TPU v5 lite": {"float32": 197.0, "bfloat16": 197.0, "bandwidth": 819},
    "TPU v4": {"float32": 275.0, "bfloat16": 275.0, "bandwidth": 1228},
}


def find_peaks(device_kind: str) -> dict[str, float] | None:
    """Returns the row of PEAKS for a device, by its name in JAX; None for a device without a row."""
    if re.search("PCI|NVL|MIG|40GB", device_kind, re.IGNORECASE):  # slower variants and partitions
        return None
    return next((row for name, row in PEAKS.items() if re.search(rf"\b{name}\b", device_kind)), None)


def forward_flops(size: int, depth: int = 20, width: int = 16, classes: int = 3) -> tuple[int, int]:
    """Returns the FLOPs per image of the forward pass of `ResNet(depth, width)` on size x size pixels.

    Returns:
      total, and the share of the first convolution.
    """
    first = 2 * 9 * width * size**2
    total, channels = first, width
    for stage in range(3):
        filters = width * 2**stage
        size = -(-size // 2) if stage else size
        for _ in range((depth - 2) // 6):
            total += 2 * 9 * (channels + filters) * filters * size**2
            channels = filters
    return total + 2 * channels * classes, first


def train_flops(size: int) -> int:
    """Returns the FLOPs per image of a training step of `ResNet20`."""
    total, first = forward_flops(size)
    return 3 * total - first

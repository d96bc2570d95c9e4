"""What a training step costs on paper: arithmetic, and what the devices have to tell each other. Never imports jax.

FLOPs are those of the convolutions and the head alone, 2 for a multiply-add: what the task needs, however a program
does it. A training step counts three times the forward pass, less the gradient of the first convolution's input.

Every device has all parameters and a share of the batch, so in each step the devices add up their gradients: 268,979
float32 numbers, 1.08 MB, of which a ring all-reduce moves 2 (n - 1) / n through each of n devices. Batch normalisation
is over the whole batch too: each of its 19 layers adds up two sums per channel forward and two backward, 512 bytes at
most, and the step waits for them. So bytes matter little, but every one of the 40 all-reduces has a latency. (So many
are in the program compiled for CPUs; other compilers may join some.) All is counted one after the other: no all-reduce
overlaps with arithmetic, and the latency does not grow with the number of devices.
"""

import math
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

# GB/s through each device in one direction, from the vendors' data sheets: fourth-generation NVLink; one 400 Gbit/s
# adapter for each GPU; the four links of a v5e chip (1600 Gbit/s) together.
LINKS = {"NVLink": 450.0, "InfiniBand": 50.0, "TPU v5e ICI": 200.0}

GRADIENT_BYTES = 4 * 268_979  # float32 parameters of `ResNet20`
ALLREDUCES = 40  # a step: 19 normalisations forward, 19 backward, the gradients, the count of correct answers
LATENCY_SECONDS = 15e-6  # of one all-reduce; an assumption, 10 to 20 microseconds are usual


def find_peaks(device_kind: str) -> dict[str, float] | None:
    """Returns the row of PEAKS for a device, by the name that JAX has for it; None if it is in none."""
    if re.search("PCI|NVL|MIG|40GB", device_kind, re.IGNORECASE):  # slower ones, and parts
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


def allreduce_seconds(devices: int, link: float, latency_seconds: float = LATENCY_SECONDS) -> float:
    """Returns the seconds that the all-reduces of a training step of `ResNet20` take, bytes and latency.

    Args:
      devices: in the ring.
      link: GB/s through each device in one direction, as in LINKS.
      latency_seconds: of one all-reduce.
    """
    if devices == 1:
        return 0.0
    return ALLREDUCES * latency_seconds + 2 * (devices - 1) / devices * GRADIENT_BYTES / (link * 1e9)


def allreduce_fraction(
    batch_per_device: int, size: int, devices: int, tflops: float, link: float, latency_seconds: float = LATENCY_SECONDS
) -> float:
    """Returns the part, 0 to 1, of a training step's time that its all-reduces take.

    Args:
      batch_per_device: images a step on each device.
      size: pixels of the network's input, height and width.
      devices, link, latency_seconds: as in `allreduce_seconds`.
      tflops: TFLOP/s at which each device computes, what it reaches of its peak.
    """
    reducing = allreduce_seconds(devices, link, latency_seconds)
    return reducing / (reducing + batch_per_device * train_flops(size) / (tflops * 1e12))


def least_batch(
    fraction: float, size: int, devices: int, tflops: float, link: float, latency_seconds: float = LATENCY_SECONDS
) -> int:
    """Returns the least batch per device at which `allreduce_fraction` of the same arguments is `fraction` or less."""
    reducing = allreduce_seconds(devices, link, latency_seconds)
    return max(1, math.ceil(reducing * (1 / fraction - 1) * tflops * 1e12 / train_flops(size)))

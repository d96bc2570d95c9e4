"""What is measured of a step, its FLOPs, and the peak rates of devices. Importing it imports no jax.

FLOPs are those of the convolutions and the head alone, 2 for a multiply-add, independent of how a program computes
them. A training step counts three times the forward pass, less the gradient of the first convolution's input.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from bench.harness import Row, check_least, time_calls
from gravlens_jax.config import Config, InputConfig, ModelConfig, OptimConfig
from gravlens_jax.errors import check

Dtype = Literal["float32", "bfloat16"]

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


class Case(NamedTuple):
    """A step to measure, of `ResNet(depth)` on stored images."""

    train: bool  # flips, forward and backward pass and Adam; else input preparation and forward pass
    batch_size: int  # images a step, over all devices
    image_size: int  # pixels, height and width of images and network's input
    dtype: Dtype = "float32"  # of activations
    devices: int = 1  # how many of the devices to use
    depth: int = 20  # layers of the network

    @property
    def config(self) -> Config:
        """The network, its input, and an optimizer that PyTorch has too."""
        return Config(
            input=InputConfig(crop=self.image_size, pool=1).resolve(),
            model=ModelConfig(depth=self.depth, dtype=self.dtype),
            optim=OptimConfig("adam", learning_rate=1e-3, weight_decay=1e-4),
        )


@dataclass(frozen=True)
class Steps:
    """What to measure; options that take several values are all combined."""

    batch_size: tuple[int, ...] = (64,)  # images a step, over all devices
    image_size: tuple[int, ...] = (50,)  # pixels of the network's input, height and width
    dtype: tuple[Dtype, ...] = ("float32",)  # of activations
    devices: tuple[int, ...] = (1,)  # number of devices to use; a CPU is split into as many as needed
    warmup: int = 10  # steps before each measurement
    steps: int = 30  # steps of each measurement
    repeats: int = 3  # measurements of each combination, alternating with the peer's
    peer: Literal["torch"] | None = None  # time the same in PyTorch (pip install torch)
    profile: Path | None = None  # folder for a trace of a few steps, for Perfetto or TensorBoard

    def __post_init__(self):
        check_least(1, batch_size=self.batch_size, image_size=self.image_size, devices=self.devices)
        check_least(1, steps=self.steps, repeats=self.repeats)
        check_least(0, warmup=self.warmup)
        check(len(self.dtype) > 0, "dtype is empty: expected float32, bfloat16 or both")


def find_peaks(device_kind: str) -> dict[str, float] | None:
    """Returns the row of PEAKS for a device, by its name in JAX; None for a device without a row."""
    if re.search("PCI|NVL|MIG|40GB", device_kind, re.IGNORECASE):  # slower variants and partitions
        return None
    return next((row for name, row in PEAKS.items() if re.search(rf"\b{name}\b", device_kind)), None)


def copy_bandwidth() -> float:
    """Returns GB/s, read and write, of the fastest of a few copies of 256 MiB in the memory of the CPU."""
    source, target = np.ones(2**25), np.ones(2**25)
    return 2 * source.nbytes / min(time_calls(lambda: np.copyto(target, source), 1, 5)) / 1e9


def peaks(dtype: str) -> dict[str, float]:
    """Returns the device's peak {"tflops", "bandwidth"} (TFLOP/s, GB/s): from the table; measured on a CPU.

    On a CPU these are the best of a few 2048 x 2048 float32 matrix products and `copy_bandwidth`. Empty for an unknown
    device.
    """
    import jax

    if jax.default_backend() == "cpu":
        a = jax.numpy.ones((2048, 2048))
        matmul = jax.jit(lambda a: a @ a)
        product = min(time_calls(lambda: matmul(a), 3, 10))
        return {"tflops": 2 * 2048**3 / product / 1e12, "bandwidth": copy_bandwidth()}
    values = find_peaks(jax.devices()[0].device_kind)
    return {"tflops": values[dtype], "bandwidth": values["bandwidth"]} if values else {}


def step_flops(case: Case) -> int:
    """Returns the FLOPs per image of a step.

    The network has a first convolution, and three stages of `depth - 2` convolutions together, with 16, 32 and 64
    filters.
    """
    first = total = 18 * 16 * case.image_size**2
    convolutions, channels = (case.depth - 2) // 3, 16
    for stage in range(3):
        filters, pixels = 16 * 2**stage, (-(-case.image_size // 2**stage)) ** 2
        total += 18 * (channels + (convolutions - 1) * filters) * filters * pixels
        channels = filters
    total += 2 * channels * 3
    return 3 * total - first if case.train else total


def step_figures(seconds: list[float], case: Case) -> Row:
    """Returns step_seconds (median), step_seconds_quartiles, images_per_second and tflops from seconds of steps."""
    low, step, high = np.quantile(seconds, [0.25, 0.5, 0.75]).tolist()
    rate = case.batch_size / step
    figures = {"step_seconds": step, "step_seconds_quartiles": [low, high], "images_per_second": rate}
    return figures | {"tflops": step_flops(case) * rate / 1e12}

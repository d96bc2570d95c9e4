"""What is measured of a step, its FLOPs, and the peak rates of devices. Importing it imports no jax.

FLOPs are those of the convolutions and the head alone, 2 for a multiply-add, independent of how a program computes
them. A training step counts three times the forward pass, less the gradient of the first convolution's input.
"""

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from bench.harness import Row, check_least, time_calls
from gravlens_jax.config import Config, InputConfig, ModelConfig
from gravlens_jax.errors import check

Dtype = Literal["float32", "bfloat16"]
Source = Literal["device", "files", "simulate"]
LATENCY = 0.2  # a step that reaches less of both peaks waits for something else

# Dense peaks of the vendors' data sheets by the device's name in JAX, a regular expression: TFLOP/s in float32 as JAX
# multiplies it by default, TFLOP/s in bfloat16, GB/s of memory, and the arithmetic that is used instead of each dtype.
# They are of what JAX counts as one device: half a chip of TPU v3 and TPU7x. MI300X has TF32, but XLA does not use it.
_TF32, _HALF, _TPU = {"float32": "TF32"}, {"bfloat16": "float16"}, {"float32": "bfloat16"}
PEAKS: dict[str, tuple[float, float, float, dict[str, str]]] = {
    "B200": (1125.0, 2250.0, 8000, _TF32),
    "GH200 144G HBM3e": (494.7, 989.4, 4900, _TF32),
    "GH200 (?:120|480)GB": (494.7, 989.4, 4000, _TF32),
    "H200": (494.7, 989.4, 4800, _TF32),
    "H100 80GB HBM3": (494.7, 989.4, 3350, _TF32),
    "A100-SXM4-80GB": (156.0, 312.0, 2039, _TF32),
    "A100-SXM4-40GB": (156.0, 312.0, 1555, _TF32),
    "L40S": (183.0, 362.0, 864, _TF32),
    "L4": (60.0, 121.0, 300, _TF32),
    "A10G": (35.0, 70.0, 600, _TF32),
    "RTX 4090": (82.6, 165.2, 1008, _TF32),
    "V100-SXM[23]-(?:16|32)GB": (15.7, 125.0, 900, _HALF),
    "T4": (8.1, 65.0, 320, _HALF),
    "MI300X(?: OAM)?": (163.4, 1307.4, 5300, {}),
    "TPU7x": (1153.5, 1153.5, 3690, _TPU),
    "TPU v6 lite": (918.0, 918.0, 1640, _TPU),
    "TPU v5": (459.0, 459.0, 2765, _TPU),  # v5p
    "TPU v5 lite": (197.0, 197.0, 819, _TPU),  # v5e
    "TPU v4": (275.0, 275.0, 1228, _TPU),
    "TPU v3": (61.5, 61.5, 450, _TPU),
}


class Peak(NamedTuple):
    """The peak rates of some devices together."""

    tflops: float  # TFLOP/s
    bandwidth: float  # GB/s of memory
    arithmetic: str  # in which the first is reached


class Case(NamedTuple):
    """A step to measure, of `ResNet(depth)` on stored images."""

    train: bool  # flips, forward and backward pass and update; else input preparation and forward pass
    batch_size: int  # images a step, over all devices
    image_size: int  # pixels, height and width of images and network's input
    dtype: Dtype = "float32"  # of activations
    devices: int = 1  # how many of the devices to use
    steps_per_call: int = 1  # more than one: images are in the device's memory, as with train.py --device-data
    depth: int = 20  # layers of the network

    @property
    def config(self) -> Config:
        """The run of which it is a step: the default recipe."""
        return Config(
            input=InputConfig(crop=self.image_size, pool=1),
            model=ModelConfig(depth=self.depth, dtype=self.dtype),
        )


@dataclass(frozen=True)
class Steps:
    """What to measure; options that take several values are all combined."""

    batch_size: tuple[int, ...] = (32,)  # images a step, over all devices
    image_size: tuple[int, ...] = (42,)  # pixels of the network's input, height and width
    dtype: tuple[Dtype, ...] = ("float32",)  # of activations
    devices: tuple[int, ...] = (1,)  # how many of the devices; a CPU is split into as many as needed
    warmup: int = 10  # steps before each measurement
    steps: int = 30  # steps of each measurement
    repeats: int = 3  # measurements of each combination, alternating with the peer's
    peer: Literal["torch"] | None = None  # time the same in PyTorch (pip install "gravlens_jax[peers]")
    peak_tflops: float | None = None  # TFLOP/s of a device that is not known, in this dtype
    peak_gb: float | None = None  # GB/s of the memory of such a device

    def __post_init__(self):
        check_least(1, batch_size=self.batch_size, image_size=self.image_size, devices=self.devices)
        check_least(1, steps=self.steps, repeats=self.repeats)
        check_least(0, warmup=self.warmup)
        check(len(self.dtype) > 0, "dtype is empty: expected float32, bfloat16 or both")


@dataclass(frozen=True)
class Device:
    """What to measure; the first batch size is that of all rows that have only one."""

    batch_sizes: tuple[int, ...] = (32, 256, 2048)  # images a step
    dtypes: tuple[Dtype, ...] = ("float32", "bfloat16")  # of activations
    steps_per_call: int = 64  # of the row with more than one
    runs: tuple[Source, ...] = ("device", "files")  # images of the runs; or none
    preset: Literal["default", "best", "smoke"] = "default"  # recipe of the runs, and of the size of images
    budget_minutes: float = 10.0  # after which it ends with what is measured, as it does at Ctrl-C
    profile: Path | None = None  # folder for a trace of a few training steps, for Perfetto or TensorBoard
    peak_tflops: float | None = None  # TFLOP/s of a device that is not known, in the first dtype
    peak_gb: float | None = None  # GB/s of the memory of such a device

    def __post_init__(self):
        check_least(1, batch_sizes=self.batch_sizes, steps_per_call=self.steps_per_call)
        check(len(self.dtypes) > 0, "dtypes is empty: expected float32, bfloat16 or both")
        check(self.budget_minutes > 0, f"budget_minutes={self.budget_minutes}: expected a positive number")


def find_peak(device_kind: str, dtype: str) -> Peak | None:
    """Returns the row of PEAKS for a device, by its name in JAX; None for a device without a row."""
    vendor = "(?:NVIDIA |Tesla |GeForce |AMD |Instinct )*"
    for name, (float32, bfloat16, bandwidth, instead) in PEAKS.items():
        if re.fullmatch(vendor + name, device_kind):
            return Peak(float32 if dtype == "float32" else bfloat16, bandwidth, instead.get(dtype, dtype))
    return None


def copy_bandwidth() -> float:
    """Returns GB/s, read and write, of the fastest of a few copies of 256 MiB in the memory of the CPU."""
    source, target = np.ones(2**25), np.ones(2**25)
    return 2 * source.nbytes / time_calls(lambda: np.copyto(target, source), 1, 5)[0] / 1e9


@cache
def cpu_peak() -> Peak:
    """Returns the best of a few 2048 x 2048 float32 matrix products, and `copy_bandwidth`."""
    import jax

    a = jax.numpy.ones((2048, 2048))
    matmul = jax.jit(lambda a: a @ a)
    return Peak(2 * 2048**3 / time_calls(lambda: matmul(a), 3, 10)[0] / 1e12, copy_bandwidth(), "float32, measured")


def peak_of(dtype: str, devices: int = 1, tflops: float | None = None, bandwidth: float | None = None) -> Peak | None:
    """Returns the peak of several devices: of a CPU `cpu_peak`, of others from PEAKS, or the numbers that are given."""
    import jax

    on_cpu = jax.default_backend() == "cpu"
    known = cpu_peak() if on_cpu else find_peak(jax.devices()[0].device_kind, dtype)
    if tflops and bandwidth:
        known = Peak(tflops, bandwidth, "given")
    elif known:
        known = known._replace(tflops=tflops or known.tflops, bandwidth=bandwidth or known.bandwidth)
    shared = 1 if on_cpu else devices  # virtual devices of a CPU share its cores
    return known and known._replace(tflops=shared * known.tflops, bandwidth=shared * known.bandwidth)


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


def quartiles(seconds: list[float], n: int) -> Row:
    """Returns step_seconds (median), step_seconds_quartiles and images_per_second of steps on `n` images each."""
    low, step, high = np.quantile(seconds, [0.25, 0.5, 0.75]).tolist()
    return {"step_seconds": step, "step_seconds_quartiles": [low, high], "images_per_second": n / step}


def roofline(tflops: float, gb_per_second: float, peak: Peak) -> Row:
    """Returns where a step lies relative to the roofline of its devices.

    Returns:
      bandwidth_fraction, of the peak; intensity, FLOPs for each byte of memory traffic; ridge, the intensity from which
      on arithmetic is the bottleneck; and bound: "latency bound" if the fractions of both peaks are below LATENCY, else
      "compute bound" if the intensity is above the ridge, else "memory bound".
    """
    compute, memory = tflops / peak.tflops, gb_per_second / peak.bandwidth
    bound = "latency" if max(compute, memory) < LATENCY else "compute" if compute > memory else "memory"
    row = {"bandwidth_fraction": memory, "bound": f"{bound} bound", "intensity": 1e3 * tflops / gb_per_second}
    return row | {"ridge": 1e3 * peak.tflops / peak.bandwidth}

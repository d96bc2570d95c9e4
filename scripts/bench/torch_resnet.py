"""The network, its training step and inference in PyTorch."""

import itertools
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from bench.costs import Case
from bench.harness import Row, Run, alternate, time_calls
from bench.steps import random_batch
from gravlens_jax.config import Config, InputConfig, OptimConfig
from gravlens_jax.train_step import DEFLECTION_UNIT, VISIBLE

Tensors = tuple[Any, Any, Any]  # images (n, 1, height, width), labels (n,), maps (n, 2, cells, cells) or None
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Conv(torch.nn.Module):
    """A 3x3 convolution. Its kernel is a matrix, as torch.optim.Muon needs it, in the order of a channels-last one."""

    def __init__(self, channels, filters, stride=1):
        super().__init__()
        self.shape, self.stride = (filters, 3, 3, channels), stride
        self.weight = torch.nn.Parameter(torch.randn(filters, 9 * channels) * (2 / (9 * filters)) ** 0.5)

    def forward(self, x):
        return functional.conv2d(x, self.weight.view(self.shape).permute(0, 3, 1, 2), None, self.stride, 1)


class Block(torch.nn.Module):
    """A residual block of two convolutions."""

    def __init__(self, channels, filters):
        super().__init__()
        self.stride, self.extra = filters // channels, filters // 4
        self.conv1, self.norm1 = Conv(channels, filters, self.stride), torch.nn.BatchNorm2d(filters)
        self.conv2, self.norm2 = Conv(filters, filters), torch.nn.BatchNorm2d(filters)

    def forward(self, x):
        y = functional.hardswish(self.norm1(self.conv1(x)), inplace=True)
        y = self.norm2(self.conv2(y))
        if self.stride == 2:
            x = functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.extra, self.extra))
        return functional.hardswish(x + y, inplace=True)


class ResNet(torch.nn.Module):
    """The network of `gravlens_jax.model`, and the head of the auxiliary loss; returns logits and features."""

    def __init__(self, depth):
        super().__init__()
        self.conv, self.norm = Conv(1, 16), torch.nn.BatchNorm2d(16)
        n = (depth - 2) // 6  # blocks of a stage
        channels = [16] * (n + 1) + [32] * n + [64] * n
        self.blocks = torch.nn.Sequential(*itertools.starmap(Block, itertools.pairwise(channels)))
        self.head, self.auxiliary = torch.nn.Linear(64, 3), torch.nn.Conv2d(64, 2, 1)

    def forward(self, x):
        features = self.blocks(functional.hardswish(self.norm(self.conv(x))))
        return self.head(features.mean((2, 3)).float()), features


def _tensors(batch: dict[str, Any]) -> Tensors:
    images = torch.from_numpy(np.asarray(batch["images"]).astype(np.int32)).to(DEVICE)[:, None]
    labels = torch.from_numpy(np.asarray(batch["labels"]).astype(np.int64)).to(DEVICE)
    maps = batch.get("deflections")
    if maps is not None:
        maps = torch.from_numpy(np.asarray(maps).transpose(0, 3, 1, 2) / DEFLECTION_UNIT).to(DEVICE)
    return images, labels, maps


def _unit(images: Any) -> Any:
    """Returns images in [0, 1], as `preprocess.to_unit` does."""
    x = images.float()
    low, high = x.amin((1, 2, 3), keepdim=True), x.amax((1, 2, 3), keepdim=True)
    return (x - low) / (high - low)


def _flip(x: Any, maps: Any) -> tuple[Any, Any]:
    """Mirrors images, and with them maps of vectors, along each axis with probability 1/2."""
    for axis in (2, 3):
        mirrored = torch.rand(len(x), 1, 1, 1, device=DEVICE) < 0.5
        x = torch.where(mirrored, x.flip(axis), x)
        sign = torch.tensor([1.0, -1.0] if axis == 2 else [-1.0, 1.0], device=DEVICE).view(1, 2, 1, 1)
        maps = torch.where(mirrored, sign * maps.flip(axis), maps)
    return x, maps


def _pool(x: Any, crop: int, window: int, edge: int = 0) -> Any:
    """Returns means of square windows of the central `crop` pixels of images, with `edge` pixels of 0 around these."""
    first = (x.shape[-1] - crop) // 2
    return functional.avg_pool2d(
        x[..., first : first + crop, first : first + crop], window, padding=edge, ceil_mode=True
    )


def _forward(network: Any, x: Any, config: InputConfig) -> Any:
    """Returns logits and features of images in [0, 1], prepared as `preprocess.prepare` does, with the logarithm."""
    x = (_pool(x, config.crop, config.pool) + 0.01).log() + 2.3
    return network(x.contiguous(memory_format=torch.channels_last))


def _loss(network: Any, auxiliary: Any, batch: Tensors, config: Config) -> Any:
    """Returns the loss of `train_step` on flipped images."""
    images, labels, maps = batch
    x, maps = _flip(_unit(images), maps)
    logits, features = _forward(network, x, config.input)
    crop, window = config.input.crop, config.input.cell
    visible = (_pool(x, crop, window, (config.input.cells * window - crop) // 2) / VISIBLE).clamp(max=1)
    squares = visible * (auxiliary(features) - maps) ** 2
    return functional.cross_entropy(logits, labels) + config.deflection_weight * squares.mean()


def _optimizers(network: ResNet, config: OptimConfig) -> list[Any]:
    """Returns the optimizers of `optim.make_optimizer`: Muon for the kernels of the blocks, Adam for all the rest."""
    kernels = {name: param for name, param in network.blocks.named_parameters() if param.ndim == 2}
    others = [param for name, param in network.named_parameters() if name.removeprefix("blocks.") not in kernels]
    muon = torch.optim.Muon(list(kernels.values()), lr=config.learning_rate, weight_decay=config.weight_decay)
    return [muon, torch.optim.Adam(others, lr=0.1 * config.learning_rate, betas=(0.9, 0.99))]


@lru_cache(maxsize=1)
def torch_step(case: Case) -> tuple[Run, Row]:
    """Returns the measurement of `steps.compile_step` in PyTorch: same network, input, loss and optimizer.

    Returns:
      run: (warmup, steps) -> sorted seconds of `steps` steps.
      facts: device; and mode, "eager" or "compile" (torch.compile), whichever takes less time.
    """
    batch, config = _tensors(random_batch(case, case.batch_size)), case.config
    network = ResNet(case.depth).to(DEVICE).train(case.train)
    optimizers = _optimizers(network, config.optim)
    autocast = partial(torch.autocast, DEVICE, torch.bfloat16, enabled=case.dtype == "bfloat16")

    def step(forward):
        if not case.train:
            with torch.inference_mode(), autocast():
                return float(_forward(forward, _unit(batch[0]), config.input)[0].sum())  # waits for a GPU
        for optimizer in optimizers:
            optimizer.zero_grad()
        with autocast():
            loss = _loss(forward, network.auxiliary, batch, config)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        return float(loss.detach())

    runs = {"eager": partial(time_calls, partial(step, network))}
    try:
        runs["compile"] = partial(time_calls, partial(step, torch.compile(network)))
        fastest = {name: min(some)[0] for name, some in alternate(runs, lambda name: runs[name](3, 5), 2).items()}
        mode = min(runs, key=lambda name: fastest[name])
        return runs[mode], {"device": DEVICE, "mode": mode}
    except Exception as error:  # torch.compile fails in many ways, most often because there is no C++ compiler
        return runs["eager"], {"device": DEVICE, "mode": f"eager (torch.compile failed: {type(error).__name__})"}

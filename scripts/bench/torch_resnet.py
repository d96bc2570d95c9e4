"""The network and its training in PyTorch, for benchmarks; functions import torch when they need it."""

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from bench.machine import time_calls
from gravlens_jax.config import Config, InputConfig, ModelConfig
from gravlens_jax.datasets import Splits
from gravlens_jax.errors import check
from gravlens_jax.loader import Plan, train_batches
from gravlens_jax.npz import Dataset
from gravlens_jax.optim import learning_rate_schedule
from gravlens_jax.train_step import DEFLECTION_UNIT, VISIBLE


def _resnet(depth: int = 20) -> Any:
    import torch
    from torch.nn import functional

    class Conv(torch.nn.Module):
        def __init__(self, channels, filters, stride):
            super().__init__()
            self.shape, self.stride = (filters, 3, 3, channels), stride
            # A matrix, as torch.optim.Muon needs it; its elements are in the order of a channels-last kernel.
            self.weight = torch.nn.Parameter(torch.randn(filters, 9 * channels) * (2 / (9 * filters)) ** 0.5)

        def forward(self, x):
            return functional.conv2d(x, self.weight.view(self.shape).permute(0, 3, 1, 2), None, self.stride, 1)

    class Block(torch.nn.Module):
        def __init__(self, channels, filters, stride):
            super().__init__()
            self.conv1, self.norm1 = Conv(channels, filters, stride), torch.nn.BatchNorm2d(filters)
            self.conv2, self.norm2 = Conv(filters, filters, 1), torch.nn.BatchNorm2d(filters)
            self.stride, self.extra = stride, filters // 4

        def forward(self, x):
            y = functional.relu(self.norm1(self.conv1(x)), inplace=True)
            y = self.norm2(self.conv2(y))
            if self.stride == 2:
                x = functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.extra, self.extra))
            return functional.relu(x + y, inplace=True)

    class ResNet(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = Conv(1, 16, 1), torch.nn.BatchNorm2d(16)
            more = (depth - 2) // 6 - 1  # blocks of a stage after its first
            plan = [(16, 16, 1)] * (1 + more) + [(16, 32, 2)] + [(32, 32, 1)] * more
            plan += [(32, 64, 2)] + [(64, 64, 1)] * more
            self.blocks = torch.nn.Sequential(*(Block(*arguments) for arguments in plan))
            self.head, self.auxiliary = torch.nn.Linear(64, 3), torch.nn.Conv2d(64, 2, 1)
            torch.nn.init.zeros_(self.auxiliary.weight)
            torch.nn.init.zeros_(self.auxiliary.bias)

        def forward(self, x):
            features = self.blocks(functional.relu(self.norm(self.conv(x))))
            return self.head(features.mean((2, 3)).float()), features

    return ResNet()


def _unit(images: Any) -> Any:
    """Returns images (n, 1, height, width) in [0, 1], as `preprocess.to_unit` does."""
    x = images.float()
    low, high = x.amin((1, 2, 3), keepdim=True), x.amax((1, 2, 3), keepdim=True)
    return (x - low) / (high - low)


def _flip(x: Any, maps: Any = None) -> tuple[Any, Any]:
    """Mirrors images, and with them maps of vectors (n, 2, height, width), along each axis with probability 1/2."""
    import torch

    for axis in (2, 3):
        mirrored = torch.rand(len(x), 1, 1, 1, device=x.device) < 0.5
        x = torch.where(mirrored, x.flip(axis), x)
        if maps is not None:
            sign = torch.tensor([1.0, -1.0] if axis == 2 else [-1.0, 1.0], device=x.device).view(1, 2, 1, 1)
            maps = torch.where(mirrored, sign * maps.flip(axis), maps)
    return x, maps


def _prepare(x: Any, config: InputConfig) -> Any:
    """Returns the network's input, channels-last, as `preprocess.prepare` does, with the logarithm."""
    import torch
    from torch.nn.functional import avg_pool2d

    x = (avg_pool2d(_crop(x, config), config.pool) + 0.01).log()
    return ((x - config.mean) / config.std).contiguous(memory_format=torch.channels_last)


def _crop(x: Any, config: InputConfig) -> Any:
    first = (x.shape[-1] - config.crop) // 2
    return x[..., first : first + config.crop, first : first + config.crop]


def _faster(step: Callable[[Any], Any], network: Any) -> tuple[Any, str]:
    """Returns the network or, if a step with it takes less time, the compiled network; and which of them it is."""
    import torch

    try:
        compiled = torch.compile(network)
        times = [time_calls(partial(step, some), 3, 5)[2] for some in (network, compiled)]
        return (compiled, "compile") if times[1] < times[0] else (network, "eager")
    except Exception as error:  # torch.compile fails in many ways, most often because there is no C++ compiler
        return network, f"eager (torch.compile failed: {type(error).__name__})"


def _wait(device: str) -> None:
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


def torch_step(
    train: bool, batch: dict[str, np.ndarray], dtype: str, depth: int = 20
) -> tuple[Callable[[int, int], list[float]], dict[str, str]]:
    """Returns the measurement of `steps.compile_step` in PyTorch: same network, input, loss and optimizer.

    Tensors are channels-last; the faster of eager and compiled code is used.

    Args:
      train: a training step, or else a forward pass.
      batch: images uint16 (n, size, size), labels int32 (n,).
      dtype: "float32", or "bfloat16" by autocast.
      depth: layers of the network.

    Returns:
      run: (warmup, steps) -> sorted seconds of `steps` steps.
      facts: version, device, mode ("eager" or "compile").
    """
    import torch
    from torch.nn.functional import cross_entropy

    device = "cuda" if torch.cuda.is_available() else "cpu"
    net = _resnet(depth).to(device).train(train)
    optimizer = torch.optim.Adam(net.parameters(), 1e-3, weight_decay=1e-4)
    images = torch.from_numpy(batch["images"].astype(np.int32)).to(device)[:, None]
    labels = torch.from_numpy(batch["labels"].astype(np.int64)).to(device)
    config = InputConfig(crop=images.shape[-1], pool=1).resolve()

    def step(network):
        with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"), torch.inference_mode(not train):
            x = _unit(images)
            logits, _ = network(_prepare(_flip(x)[0] if train else x, config))
            if train:
                optimizer.zero_grad()
                cross_entropy(logits, labels).backward()
                optimizer.step()
        _wait(device)

    network, mode = _faster(step, net)
    return partial(time_calls, partial(step, network)), {"version": torch.__version__, "device": device, "mode": mode}


def _tensors(batch: dict[str, Any], device: str) -> tuple[Any, Any, Any]:
    import torch

    images = torch.from_numpy(np.asarray(batch["images"]).astype(np.int32)).to(device)[:, None]
    labels = torch.from_numpy(np.asarray(batch["labels"]).astype(np.int64)).to(device)
    maps = batch.get("deflections")
    if maps is not None:
        maps = torch.from_numpy(np.asarray(maps).transpose(0, 3, 1, 2) / DEFLECTION_UNIT).to(device)
    return images, labels, maps


def _accuracy(net: Any, dataset: Dataset, config: InputConfig, device: str, size: int = 250) -> float:
    import torch

    correct = 0
    net.eval()
    for start in range(0, dataset.size, size):
        rows = slice(start, start + size)
        images, labels, _ = _tensors({"images": dataset.images[rows], "labels": dataset.labels[rows]}, device)
        with torch.inference_mode():
            correct += int((net(_prepare(_unit(images), config))[0].argmax(1) == labels).sum())
    net.train()
    return correct / dataset.size


def train_torch(config: Config, splits: Splits) -> Iterator[dict[str, float]]:
    """Trains by the recipe of `training.fit`, on the same batches; yields image_steps and val_accuracy of each epoch.

    Args:
      config: a run with Muon, cosine decay and flips; its network is `ResNet20`, its input has the logarithm.
      splits: the images of the run.
    """
    import torch
    from torch.nn.functional import avg_pool2d, cross_entropy

    config = config.resolve()
    same = config.model == ModelConfig() and config.input.stretch == "log"
    check(same, f"only ResNet20 and the logarithm are there in PyTorch; got {config.model}, {config.input}")
    device, size = "cuda" if torch.cuda.is_available() else "cpu", config.batch_size
    torch.manual_seed(config.seed)
    net = _resnet().to(device)
    kernels = [block for name, block in net.named_parameters() if name.startswith("blocks") and block.ndim == 2]
    others = [param for param in net.parameters() if all(param is not kernel for kernel in kernels)]
    muon = torch.optim.Muon(kernels, weight_decay=config.optim.weight_decay)
    adam = torch.optim.Adam(others, betas=(0.9, 0.99))
    plan = Plan((splits.easy.size if splits.easy else 0) // size, splits.train.size // size, config.epochs)
    rates = np.asarray(learning_rate_schedule(config.optim, plan.total_steps)(np.arange(plan.total_steps)))
    window = config.input.cell

    def loss_of(network, images, labels, maps):
        x, maps = _flip(_unit(images), maps)
        logits, features = network(_prepare(x, config.input))
        loss = cross_entropy(logits, labels)
        if maps is not None:
            cells = maps.shape[-1]
            edge = (cells * window - config.input.crop) // 2
            visible = (avg_pool2d(_crop(x, config.input), window, padding=edge) / VISIBLE).clamp(max=1)
            loss = loss + config.deflection_weight * (visible * (net.auxiliary(features) - maps) ** 2).mean()
        return loss

    def update(network, rate, batch):
        for optimizer, factor in ((muon, 1.0), (adam, 0.1)):
            optimizer.param_groups[0]["lr"] = float(rate) * factor
            optimizer.zero_grad()
        loss_of(network, *batch).backward()
        muon.step()
        adam.step()

    batches = train_batches(splits.train, splits.easy, plan, 0)
    first = next(batches)

    def timed(some):  # changes no parameter
        update(some, 0.0, _tensors(first[1], device))
        _wait(device)

    network, _ = _faster(timed, net)
    for optimizer in (muon, adam):
        optimizer.state.clear()
    for step, batch in itertools.chain([first], batches):
        update(network, rates[step - 1], _tensors(batch, device))
        if plan.ends_epoch(step) and step > plan.easy_steps:
            yield {"image_steps": step * size, "val_accuracy": _accuracy(net, splits.val, config.input, device)}

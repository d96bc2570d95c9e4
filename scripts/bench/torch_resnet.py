"""The network and its training in PyTorch."""

import itertools
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from bench.costs import Case
from bench.harness import Row, Run, alternate, time_calls
from bench.steps import random_batch
from gravlens_jax.config import Config, InputConfig, ModelConfig
from gravlens_jax.datasets import Splits
from gravlens_jax.errors import check
from gravlens_jax.loader import Plan, eval_batches, train_batches
from gravlens_jax.npz import Dataset
from gravlens_jax.optim import learning_rate_schedule
from gravlens_jax.sharding import data_mesh
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
        y = functional.relu(self.norm1(self.conv1(x)), inplace=True)
        y = self.norm2(self.conv2(y))
        if self.stride == 2:
            x = functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.extra, self.extra))
        return functional.relu(x + y, inplace=True)


class ResNet(torch.nn.Module):
    """The network of `gravlens_jax.model`, and the head of the auxiliary loss; returns logits and features."""

    def __init__(self, depth):
        super().__init__()
        self.conv, self.norm = Conv(1, 16), torch.nn.BatchNorm2d(16)
        n = (depth - 2) // 6  # blocks of a stage
        channels = [16] * (n + 1) + [32] * n + [64] * n
        self.blocks = torch.nn.Sequential(*itertools.starmap(Block, itertools.pairwise(channels)))
        self.head, self.auxiliary = torch.nn.Linear(64, 3), torch.nn.Conv2d(64, 2, 1)
        torch.nn.init.zeros_(self.auxiliary.weight)
        torch.nn.init.zeros_(self.auxiliary.bias)

    def forward(self, x):
        features = self.blocks(functional.relu(self.norm(self.conv(x))))
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
        if maps is not None:
            sign = torch.tensor([1.0, -1.0] if axis == 2 else [-1.0, 1.0], device=DEVICE).view(1, 2, 1, 1)
            maps = torch.where(mirrored, sign * maps.flip(axis), maps)
    return x, maps


def _pool(x: Any, crop: int, window: int, edge: int = 0) -> Any:
    """Returns means of square windows of the central `crop` pixels of images, with `edge` pixels of 0 around these."""
    first = (x.shape[-1] - crop) // 2
    return functional.avg_pool2d(x[..., first : first + crop, first : first + crop], window, padding=edge)


def _forward(network: Any, x: Any, config: InputConfig) -> Any:
    """Returns logits and features of images in [0, 1], prepared as `preprocess.prepare` does, with the logarithm."""
    x = ((_pool(x, config.crop, config.pool) + 0.01).log() - config.mean) / config.std
    return network(x.contiguous(memory_format=torch.channels_last))


def _loss(network: Any, auxiliary: Any, batch: Tensors, config: Config) -> Any:
    """Returns the loss of `train_step` on flipped images."""
    images, labels, maps = batch
    x, maps = _flip(_unit(images), maps)
    logits, features = _forward(network, x, config.input)
    loss = functional.cross_entropy(logits, labels)
    if maps is not None:
        crop, window = config.input.crop, config.input.cell
        visible = (_pool(x, crop, window, (config.input.cells * window - crop) // 2) / VISIBLE).clamp(max=1)
        loss = loss + config.deflection_weight * (visible * (auxiliary(features) - maps) ** 2).mean()
    return loss


def _optimizers(net: ResNet, config: Config) -> list[tuple[Any, float]]:
    """Returns the optimizers of `optim.make_optimizer`, and the factor of the learning rate of each."""
    decay = config.optim.weight_decay
    if config.optim.method == "adam":
        return [(torch.optim.Adam(net.parameters(), weight_decay=decay), 1.0)]
    kernels = {name: param for name, param in net.blocks.named_parameters() if param.ndim == 2}
    others = [param for name, param in net.named_parameters() if name.removeprefix("blocks.") not in kernels]
    muon = torch.optim.Muon(list(kernels.values()), weight_decay=decay)
    return [(muon, 1.0), (torch.optim.Adam(others, betas=(0.9, 0.99)), 0.1)]


def make_step(config: Config, train: bool, batch: Tensors) -> tuple[ResNet, Callable[[Tensors, float], Any], str]:
    """Returns the network, its step (batch, learning rate) -> loss or logits, and how it runs: "eager" or "compile".

    It is compiled if a step on `batch` then takes less time.
    """
    net = ResNet(config.model.depth).to(DEVICE).train(train)
    optimizers = _optimizers(net, config)
    autocast = partial(torch.autocast, DEVICE, torch.bfloat16, enabled=config.model.dtype == "bfloat16")

    def step(network, batch, rate):
        if not train:
            with torch.inference_mode(), autocast():
                return _forward(network, _unit(batch[0]), config.input)[0]
        for optimizer, factor in optimizers:
            optimizer.param_groups[0]["lr"] = rate * factor
            optimizer.zero_grad()
        with autocast():
            loss = _loss(network, net.auxiliary, batch, config)
        loss.backward()
        for optimizer, _ in optimizers:
            optimizer.step()
        return loss.detach()

    def seconds(network):  # with a learning rate of 0, which changes no parameter
        return time_calls(lambda: _done(step(network, batch, 0.0)), 3, 5)[0]

    try:
        networks = {"eager": net, "compile": torch.compile(net)}
        fastest = {name: min(some) for name, some in alternate(networks, lambda n: seconds(networks[n]), 2).items()}
        mode = min(networks, key=lambda name: fastest[name])
        network = networks[mode]
    except Exception as error:  # torch.compile fails in many ways, most often because there is no C++ compiler
        network, mode = net, f"eager (torch.compile failed: {type(error).__name__})"
    for optimizer, _ in optimizers:
        optimizer.state.clear()
    return net, partial(step, network), mode


def _done(result: Any) -> float:
    """Waits for a tensor, and for all that a GPU does before; returns the sum of its elements."""
    return float(result.sum())


@lru_cache(maxsize=1)
def torch_step(case: Case) -> tuple[Run, Row]:
    """Returns the measurement of `steps.compile_step` in PyTorch: same network, input, loss and optimizer.

    Returns:
      run: (warmup, steps) -> sorted seconds of `steps` steps.
      facts: version, device, mode: see `make_step`.
    """
    batch = _tensors(random_batch(case, case.batch_size))
    _, step, mode = make_step(case.config, case.train, batch)
    run = partial(time_calls, lambda: _done(step(batch, case.config.optim.learning_rate)))
    return run, {"version": torch.__version__, "device": DEVICE, "mode": mode}


def train_torch(config: Config, splits: Splits) -> Iterator[Row]:
    """Trains by the recipe of `training.fit`, on the same batches; yields image_steps and val_accuracy of each epoch.

    Args:
      config: a run with cosine decay and flips; its network is `ResNet20`, its input has the logarithm.
      splits: the images of the run.
    """
    config = config.resolve()
    same = config.model == ModelConfig() and config.input.stretch == "log"
    check(same, f"only ResNet20 and the logarithm are there in PyTorch; got {config.model}, {config.input}")
    torch.manual_seed(config.seed)
    size = config.batch_size
    plan = Plan((splits.easy.size if splits.easy else 0) // size, splits.train.size // size, config.epochs)
    rates = np.asarray(learning_rate_schedule(config.optim, plan.total_steps)(np.arange(plan.total_steps)))
    batches = train_batches(splits.train, splits.easy, plan, 0)
    first = next(batches)
    net, update, _ = make_step(config, True, _tensors(first[1]))
    for step, batch in itertools.chain([first], batches):
        update(_tensors(batch), float(rates[step - 1]))
        if plan.ends_epoch(step) and step > plan.easy_steps:
            yield {"image_steps": step * size, "val_accuracy": _accuracy(net, splits.val, config.input)}


@torch.inference_mode()
def _accuracy(net: ResNet, dataset: Dataset, config: InputConfig) -> float:
    correct = 0
    net.eval()
    for batch in eval_batches(dataset, 250, data_mesh(1)):
        images, labels, _ = _tensors(batch)
        right = _forward(net, _unit(images), config)[0].argmax(1) == labels
        correct += int((right.cpu().numpy() & np.asarray(batch["mask"])).sum())
    net.train()
    return correct / dataset.size

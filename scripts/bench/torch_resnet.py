"""The network and its training step in PyTorch, for benchmarks; functions import torch when they need it."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from bench.machine import time_calls


def _torch_resnet20() -> Any:
    import torch
    from torch.nn import functional

    class Block(torch.nn.Module):
        def __init__(self, channels, filters, stride):
            super().__init__()
            self.conv1 = torch.nn.Conv2d(channels, filters, 3, stride, 1, bias=False)
            self.norm1 = torch.nn.BatchNorm2d(filters)
            self.conv2 = torch.nn.Conv2d(filters, filters, 3, 1, 1, bias=False)
            self.norm2 = torch.nn.BatchNorm2d(filters)
            self.stride, self.extra = stride, filters // 4

        def forward(self, x):
            y = functional.relu(self.norm1(self.conv1(x)), inplace=True)
            y = self.norm2(self.conv2(y))
            if self.stride == 2:
                x = functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.extra, self.extra))
            return functional.relu(x + y, inplace=True)

    class ResNet20(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = torch.nn.Conv2d(1, 16, 3, 1, 1, bias=False), torch.nn.BatchNorm2d(16)
            plan = [(16, 16, 1)] * 3 + [(16, 32, 2)] + [(32, 32, 1)] * 2 + [(32, 64, 2)] + [(64, 64, 1)] * 2
            self.blocks = torch.nn.Sequential(*(Block(*arguments) for arguments in plan))
            self.head = torch.nn.Linear(64, 3)

        def forward(self, x):
            x = self.blocks(functional.relu(self.norm(self.conv(x))))
            return self.head(x.mean((2, 3)).float())

    return ResNet20()


def _torch_prepare(images: Any, flips: bool) -> Any:
    import torch

    x = images.float()
    low, high = x.amin((1, 2, 3), keepdim=True), x.amax((1, 2, 3), keepdim=True)
    x = (x - low) / (high - low)
    for axis in (2, 3) if flips else ():
        x = torch.where(torch.rand(len(x), 1, 1, 1, device=x.device) < 0.5, x.flip(axis), x)
    return ((x.sqrt() - 0.29) / 0.19).contiguous(memory_format=torch.channels_last)


def torch_step(
    train: bool, batch: dict[str, np.ndarray], dtype: str
) -> tuple[Callable[[int, int], list[float]], dict[str, str]]:
    """Returns the measurement of `steps.compile_step` in PyTorch: same network, input, loss and optimizer.

    Tensors are channels-last; the faster of eager and compiled code is used.

    Args:
      train: a training step, or else a forward pass.
      batch: images uint16 (n, size, size), labels int32 (n,).
      dtype: "float32", or "bfloat16" by autocast.

    Returns:
      run: (warmup, steps) -> sorted seconds of `steps` steps.
      facts: version, device, mode ("eager" or "compile").
    """
    import torch
    from torch.nn.functional import cross_entropy

    device = "cuda" if torch.cuda.is_available() else "cpu"
    net = _torch_resnet20().to(device, memory_format=torch.channels_last).train(train)
    optimizer = torch.optim.Adam(net.parameters(), 1e-3, weight_decay=1e-4)
    images = torch.from_numpy(batch["images"].astype(np.int32)).to(device)[:, None]
    labels = torch.from_numpy(batch["labels"].astype(np.int64)).to(device)

    def step(network):
        with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"), torch.inference_mode(not train):
            logits = network(_torch_prepare(images, flips=train))
            if train:
                optimizer.zero_grad()
                cross_entropy(logits, labels).backward()
                optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()

    run, mode = partial(time_calls, partial(step, net)), "eager"
    try:
        compiled = partial(time_calls, partial(step, torch.compile(net)))
        if compiled(3, 5)[2] < run(3, 5)[2]:
            run, mode = compiled, "compile"
    except Exception as error:  # torch.compile fails in many ways, most often because there is no C++ compiler
        mode = f"eager (torch.compile failed: {type(error).__name__})"
    return run, {"version": torch.__version__, "device": device, "mode": mode}

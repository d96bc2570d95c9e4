"""The same computations in other codes, for validation and benchmarks: lenses in lenstronomy, the network in PyTorch.

lenstronomy (Birrer & Amara 2018) and torch are imported by the functions that need them.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import numpy as np

from bench.machine import time_calls
from gravlens_jax.lensing.priors import Priors
from gravlens_jax.lensing.profiles import einstein_radius_squared


def ellipticity(axis_ratio: float, angle: float) -> dict[str, float]:
    """Returns lenstronomy's e1, e2 of an axis ratio and the direction of the major axis (radians)."""
    e = (1 - axis_ratio) / (1 + axis_ratio)
    return {"e1": e * np.cos(2 * angle), "e2": e * np.sin(2 * angle)}


@lru_cache
def _camera(priors: Priors):
    from lenstronomy.Data.imaging_data import ImageData
    from lenstronomy.Data.psf import PSF

    n, scale, half = priors.num_pixels, priors.pixel_scale, priors.psf_pixels // 2
    edge = -(n - 1) / 2 * scale
    data = ImageData(np.zeros((n, n)), ra_at_xy_0=edge, dec_at_xy_0=edge, transform_pix2angle=np.eye(2) * scale)
    profile = np.exp(-0.5 * (np.arange(-half, half + 1) * scale / priors.psf_sigma) ** 2)
    return data, PSF("PIXEL", kernel_point_source=np.outer(profile, profile) / profile.sum() ** 2)


def lenstronomy_image(lens_params: dict, priors: Priors, string_points: int = 100) -> np.ndarray:
    """Returns the image of `lensing.render.render_lens`, float64 (num_pixels, num_pixels), computed by lenstronomy.

    Args:
      lens_params: as `lensing.render.sample_lens` returns them.
      priors: the camera and the source's fixed profile.
      string_points: point masses that represent a string.
    """
    from lenstronomy.ImSim.image_model import ImageModel
    from lenstronomy.LensModel.lens_model import LensModel
    from lenstronomy.LightModel.light_model import LightModel

    p = {name: np.asarray(value, np.float64) for name, value in lens_params.items()}
    gamma, phi = p["shear"], p["shear_angle"]
    models = ["SIS" if priors.lens_axis_ratio == 1 else "SIE", "SHEAR"]
    halo = {"theta_E": p["theta_E"], "center_x": 0, "center_y": 0}
    if priors.lens_axis_ratio != 1:
        halo |= ellipticity(priors.lens_axis_ratio, 0.0)
    keywords = [halo, {"gamma1": gamma * np.cos(2 * phi), "gamma2": gamma * np.sin(2 * phi)}]
    masses, centres = p.get("subhalo_masses", np.zeros(0)), p.get("subhalo_centres", np.zeros((0, 2)))
    if "vortex_mass" in p:
        along = p["vortex_length"] * ((np.arange(string_points) + 0.5) / string_points - 0.5)
        direction = np.array([np.cos(p["vortex_angle"]), np.sin(p["vortex_angle"])])
        masses = np.full(string_points, p["vortex_mass"] / string_points)
        centres = p["vortex_centre"] + along[:, None] * direction
    strength = float(einstein_radius_squared(1.0, float(p["z_lens"]), float(p["z_source"])))
    for radius, (x, y) in zip(np.sqrt(strength * masses), centres, strict=True):
        if radius > 0:
            models.append("POINT_MASS")
            keywords.append({"theta_E": radius, "center_x": x, "center_y": y})
    source = {
        "amp": 1.0,
        "R_sersic": p["source_radius"],
        "n_sersic": priors.source_n,
        "center_x": p["source"][0],
        "center_y": p["source"][1],
    } | ellipticity(float(p["source_axis_ratio"]), float(p["source_angle"]))
    numerics = {"supersampling_factor": priors.supersampling, "supersampling_convolution": False}
    model = ImageModel(*_camera(priors), LensModel(models), LightModel(["SERSIC_ELLIPSE"]), kwargs_numerics=numerics)
    image = model.image(kwargs_lens=keywords, kwargs_source=[source])
    # lenstronomy has +y in the last row, and returns the flux of a pixel
    return priors.photons * (image[::-1] / priors.pixel_scale**2 + priors.sky)


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

"""The same lenses in lenstronomy (Birrer & Amara 2018), an independent code: for validation and benchmarks only."""

from functools import lru_cache

import numpy as np

from gravlens_jax.lens import einstein_radius_squared
from gravlens_jax.priors import Priors


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
    """Returns what `simulate.render_lens` returns, float64 (num_pixels, num_pixels), computed by lenstronomy.

    Args:
      lens_params: as `simulate.sample_lens` returns them.
      priors: the camera and the source's fixed profile.
      string_points: point masses that stand for a string.
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
    radii = np.sqrt(np.asarray(einstein_radius_squared(masses, p["z_lens"], p["z_source"])))
    for radius, (x, y) in zip(radii, centres, strict=True):
        if radius > 0:
            models.append("POINT_MASS")
            keywords.append({"theta_E": radius, "center_x": x, "center_y": y})
    source = {
        "amp": 1.0,
        "R_sersic": p["source_radius"],
        "n_sersic": priors.source_n,
        "center_x": p["source"][0],
        "center_y": p["source"][1],
    } | ellipticity(p["source_axis_ratio"], p["source_angle"])
    numerics = {"supersampling_factor": priors.supersampling, "supersampling_convolution": False}
    model = ImageModel(*_camera(priors), LensModel(models), LightModel(["SERSIC_ELLIPSE"]), kwargs_numerics=numerics)
    image = model.image(kwargs_lens=keywords, kwargs_source=[source])
    # theirs has +y in the last row, and the flux of a pixel
    return priors.photons * (image[::-1] / priors.pixel_scale**2 + priors.sky)

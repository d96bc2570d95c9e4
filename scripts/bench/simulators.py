"""The same images by other codes, for validation and benchmarks.

lenstronomy (Birrer & Amara 2018) and herculens (Galan et al. 2022) are imported by the functions that need them. They
get the lenses of `lensing.render.sample_lens` and return images as `render_lens` does.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gravlens_jax.lensing.priors import Priors
from gravlens_jax.lensing.profiles import einstein_radius_squared, sersic_b


def psf_kernel(priors: Priors) -> np.ndarray:
    """Returns the normalized PSF, float64 (psf_size, psf_size)."""
    half = priors.psf_size // 2
    profile = np.exp(-0.5 * (np.arange(-half, half + 1) * priors.pixel_scale / priors.psf_sigma) ** 2)
    return np.outer(profile, profile) / profile.sum() ** 2


def ellipticity(axis_ratio: Any, angle: Any, xp: Any = np) -> dict[str, Any]:
    """Returns lenstronomy's e1, e2 of an axis ratio and the direction of the major axis (radians), by numpy or jax."""
    e = (1 - axis_ratio) / (1 + axis_ratio)
    return {"e1": e * xp.cos(2 * angle), "e2": e * xp.sin(2 * angle)}


def _keywords(p: dict, priors: Priors, masses: Any, centres: Any, xp: Any) -> tuple[list[dict], dict]:
    """Returns what lenstronomy and herculens call halo, shear and each point mass, in a list, and the source."""
    gamma, phi = p["shear"], p["shear_angle"]
    lens = [{"theta_E": p["theta_E"], "center_x": 0.0, "center_y": 0.0}]
    lens.append({"gamma1": gamma * xp.cos(2 * phi), "gamma2": gamma * xp.sin(2 * phi), "ra_0": 0.0, "dec_0": 0.0})
    radii = xp.sqrt(einstein_radius_squared(masses, p["z_lens"], p["z_source"]))
    for radius, (x, y) in zip(radii, centres, strict=True):
        lens.append({"theta_E": radius, "center_x": x, "center_y": y})
    source = {"amp": 1.0, "R_sersic": p["source_radius"], "n_sersic": priors.source_n}
    source |= {"center_x": p["source"][0], "center_y": p["source"][1]}
    return lens, source | ellipticity(p["source_axis_ratio"], p["source_angle"], xp)


def _grid(priors: Priors) -> dict[str, Any]:
    edge = -(priors.num_pixels - 1) / 2 * priors.pixel_scale
    return {"ra_at_xy_0": edge, "dec_at_xy_0": edge, "transform_pix2angle": np.eye(2) * priors.pixel_scale}


@lru_cache
def _camera(priors: Priors):
    from lenstronomy.Data.imaging_data import ImageData
    from lenstronomy.Data.psf import PSF

    data = ImageData(np.zeros((priors.num_pixels,) * 2), **_grid(priors))
    return data, PSF("PIXEL", kernel_point_source=psf_kernel(priors))


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
    masses, centres = p.get("subhalo_masses", np.zeros(0)), p.get("subhalo_centres", np.zeros((0, 2)))
    if "vortex_mass" in p:
        along = p["vortex_length"] * ((np.arange(string_points) + 0.5) / string_points - 0.5)
        direction = np.array([np.cos(p["vortex_angle"]), np.sin(p["vortex_angle"])])
        masses = np.full(string_points, p["vortex_mass"] / string_points)
        centres = p["vortex_centre"] + along[:, None] * direction
    keywords, source = _keywords(p, priors, masses[masses > 0], centres[masses > 0], np)
    models = ["SIS", "SHEAR", *["POINT_MASS"] * (len(keywords) - 2)]
    if priors.lens_axis_ratio != 1:
        models[0] = "SIE"
        keywords[0] |= ellipticity(priors.lens_axis_ratio, 0.0)
    numerics = {"supersampling_factor": priors.supersampling, "supersampling_convolution": False}
    model = ImageModel(*_camera(priors), LensModel(models), LightModel(["SERSIC_ELLIPSE"]), kwargs_numerics=numerics)
    image = model.image(kwargs_lens=keywords, kwargs_source=[source])
    # lenstronomy has +y in the last row, and returns the flux of a pixel
    return priors.photons * (image[::-1] / priors.pixel_scale**2 + priors.sky)


def _clip(x, *limits, a_min=None, a_max=None, _clip=jnp.clip, **others):
    """`jnp.clip` with names of arguments that JAX has removed and herculens uses."""
    if a_min is not None or a_max is not None:
        limits = a_min, a_max
    return _clip(x, *limits, **others)


def make_herculens(priors: Priors) -> Callable[[dict[str, jax.Array]], jax.Array]:
    """Returns a function that renders one lens with all subhalos of its `priors`, for `jax.vmap` and `jax.jit`.

    In float32 the isothermal sphere of herculens is NaN: a slightly elliptical one stands in for it.
    """
    jnp.clip = _clip  # type: ignore[assignment]
    from herculens.Coordinates.pixel_grid import PixelGrid
    from herculens.Instrument.psf import PSF
    from herculens.LensImage.lens_image import LensImage
    from herculens.LightModel.light_model import LightModel
    from herculens.LightModel.Profiles.sersic import Sersic
    from herculens.MassModel.mass_model import MassModel

    n, exact = priors.subhalo_padding, jnp.result_type(float) == jnp.float64
    image = LensImage(
        PixelGrid(priors.num_pixels, priors.num_pixels, **_grid(priors)),
        PSF("PIXEL", kernel_point_source=psf_kernel(priors)),
        lens_mass_model_class=MassModel(["SIS" if exact else "SIE", "SHEAR", *["POINT_MASS"] * n]),
        source_model_class=LightModel([Sersic(radius_major_axis=False)]),
        kwargs_numerics={"supersampling_factor": priors.supersampling, "supersampling_convolution": False},
    )
    theirs, ours = 1.9992 * priors.source_n - 0.3271, sersic_b(priors.source_n)  # b_n of the Sersic profile
    amplitude, factor = np.exp(ours - theirs), (theirs / ours) ** priors.source_n  # with which theirs is ours

    def render(p):
        keywords, source = _keywords(p, priors, p["subhalo_masses"], p["subhalo_centres"], jnp)
        if not exact:
            keywords[0] |= {"e1": 1e-4, "e2": 0.0}
        source |= {"amp": amplitude, "R_sersic": p["source_radius"] * factor}
        flux = image.model(kwargs_lens=keywords, kwargs_source=[source])[::-1]
        return priors.photons * (flux / priors.pixel_scale**2 + priors.sky)

    return render

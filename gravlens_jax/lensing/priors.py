"""Populations of lenses: the distributions of their parameters, and the camera.

Make your own with `dataclasses.replace(PRIORS["ct1"], shear_max=0.1)`, or `scripts/simulate.py --prior.shear-max 0.1`.
"""

import math
from dataclasses import dataclass, replace
from math import pi, radians
from typing import Any

from gravlens_jax.config import PriorPreset, check_ranges
from gravlens_jax.errors import check


@dataclass(frozen=True)
class Priors:
    """A population of lenses and the camera; `_min` and `_max` bound a uniform prior.

    The defaults are `ct1`. Sources: [P] arXiv 1909.07346 and 2008.12731, [C] public simulation code of that group, [M]
    measured on public images. A "quirk" is an apparent error of that code, kept on purpose because the public images
    have it. theta_E follows from mass and redshifts: see `profiles.einstein_radius_squared` for its quirk.
    """

    num_pixels: int = 150  # [M] image height and width
    pixel_scale: float = 0.05  # [M] arcsec; one paper prints 0.5
    supersampling: int = 2  # [C] sub-pixels per pixel and axis, averaged
    psf_sigma: float = 0.0858  # [M] arcsec, Gaussian
    psf_pixels: int | None = None  # width of the kernel, odd; default: 4 psf_sigma on either side
    photons: float = 100.0  # [M] counts per pixel at surface brightness 1
    sky: float = 0.1  # [M] surface brightness: 10 sky counts per pixel
    mass: float = 1e12  # [P] solar masses of the main halo, an isothermal profile at the origin
    mass_includes_substructure: bool = True  # [M] whether substructure is taken out of `mass` or comes on top of it
    lens_axis_ratio: float = 1.0  # [P] of the main halo; 1 is a sphere
    z_lens_min: float = 0.4  # [M] redshift
    z_lens_max: float = 0.6
    z_source_min: float = 0.8  # [M] redshift
    z_source_max: float = 1.2
    shear_min: float = 0.0  # [P, M] strength of the external shear
    shear_max: float = 0.3
    shear_angle_min: float = 0.0  # [M] radians from +x
    shear_angle_max: float = radians(2 * pi)  # quirk: 2 pi was meant, and read as degrees
    source_offset_min: float = 0.0  # [P, M] arcsec, distance from the axis (not uniform in area), at a random angle
    source_offset_max: float = 0.5
    source_in_square: bool = False  # whether offset_min and offset_max bound x and y each instead
    source_n: float = 1.5  # [P, M] Sersic index
    source_radius_min: float = 0.5  # [P, M] arcsec, effective radius
    source_radius_max: float = 0.5
    source_axis_ratio_min: float = 0.4  # [P, M]
    source_axis_ratio_max: float = 1.0
    source_angle_min: float = 0.0  # [M] radians from +x, of the major axis
    source_angle_max: float = radians(2 * pi)  # quirk: 2 pi was meant, and read as degrees
    subhalo_number: float = 25.0  # [P] mean number of point masses in a `sphere` lens
    subhalo_poisson: bool = True  # [C] whether the number is a Poisson variate, or exact
    subhalo_mass_min: float = 1e6  # [P] solar masses
    subhalo_mass_max: float = 1e10
    subhalo_slope: float = -0.9  # [C, M] pdf proportional to mass^slope; quirk: the papers print -1.9
    subhalo_offset_min: float = 0.0  # [P, C] arcsec from the lens's centre, at a random angle
    subhalo_offset_max: float = 2.0
    subhalo_padding: int = 64  # length of the arrays; a Poisson(25) variate exceeds it with probability 1e-11
    vortex_mass_fraction_min: float = 0.030  # [P] of `mass`, on one straight string in a `vort` lens
    vortex_mass_fraction_max: float = 0.055
    vortex_length_min: float = 1.0  # [M] arcsec, end to end; quirk: the papers' length, U[0.5, 2], is half of it
    vortex_length_max: float = 4.0
    vortex_length_log: bool = False  # whether the logarithm of the length is uniform
    vortex_centre_sigma: float = 0.5  # [P, M] arcsec, normal in x and in y

    def __post_init__(self):
        values, stems = vars(self), {name: name.removesuffix("_min").removesuffix("_max") for name in vars(self)}
        check_ranges(self, **{name: RANGES[stem] for name, stem in stems.items() if stem in RANGES})
        for name, stem in stems.items():
            if name.endswith("_min"):
                low, high = values[name], values[f"{stem}_max"]
                check(low <= high, f"{name}={low} is larger than {stem}_max={high}")
        behind = self.z_source_min > self.z_lens_max
        check(behind, f"z_source_min={self.z_source_min} is not behind z_lens_max={self.z_lens_max}")
        check(self.psf_size % 2 == 1, f"psf_pixels={self.psf_pixels}: expected an odd number")
        cut = 1 - math.erf(self.psf_size * self.pixel_scale / (math.sqrt(8) * self.psf_sigma)) ** 2
        wide = f"psf_pixels={self.psf_pixels} cut {cut:.1%} of the flux of a PSF with psf_sigma={self.psf_sigma}"
        check(cut <= 0.01, f"{wide}, more than 1 %; leave psf_pixels out for 4 sigma on either side")
        check(self.subhalo_slope != -1, "subhalo_slope=-1 has no power-law integral; try -0.999")
        most = self.subhalo_number + (6 * math.sqrt(self.subhalo_number) if self.subhalo_poisson else 0)
        few = f"subhalo_padding={self.subhalo_padding} is too few for subhalo_number={self.subhalo_number}"
        check(most <= self.subhalo_padding, f"{few}; set it to {math.ceil(most)} or more")

    @property
    def psf_size(self) -> int:
        """Width of the PSF's kernel in pixels."""
        return self.psf_pixels or 2 * math.ceil(4 * self.psf_sigma / self.pixel_scale) + 1


# Smallest and largest value of each number above, with and without _min and _max: what can be rendered correctly.
RANGES: dict[str, tuple[float, float]] = {
    "num_pixels": (2, 2**12),
    "pixel_scale": (1e-4, 10),
    "supersampling": (1, 16),
    "psf_sigma": (1e-4, 10),
    "psf_pixels": (1, 2**10 - 1),
    "photons": (1e-3, 6e4),
    "sky": (0, 1e4),
    "mass": (1e6, 1e16),
    "lens_axis_ratio": (0.05, 1),
    "z_lens": (0.01, 10),
    "z_source": (0.01, 10),
    "shear": (0, 0.9),
    "shear_angle": (-10, 10),
    "source_offset": (-60, 60),
    "source_n": (0.5, 10),
    "source_radius": (1e-3, 60),
    "source_axis_ratio": (0.05, 1),
    "source_angle": (-10, 10),
    "subhalo_number": (0, 1e4),
    "subhalo_mass": (1, 1e13),
    "subhalo_slope": (-3, 3),
    "subhalo_offset": (0, 60),
    "subhalo_padding": (1, 2e4),
    "vortex_mass_fraction": (0, 0.99),
    "vortex_length": (1e-3, 60),
    "vortex_centre_sigma": (0, 60),
}


def _bounds(**values: float | tuple[float, float]) -> dict[str, Any]:
    """Returns the fields of bounds (min, max), or of fixed values."""
    pairs = {name: value if isinstance(value, tuple) else (value, value) for name, value in values.items()}
    return {f"{name}_{bound}": x for name, pair in pairs.items() for bound, x in zip(("min", "max"), pair, strict=True)}


CT1 = Priors(psf_pixels=11)  # [M]
PRIORS: dict[PriorPreset, Priors] = {
    # Re-simulates the public "Common Test I" images.
    "ct1": CT1,
    # The same at fixed redshifts, as in the papers' Model A.
    "model_a": replace(CT1, **_bounds(z_lens=0.5, z_source=1.0)),
    # DeepLenseSim's Model I [C]. Its exposure time, log-uniform from 1e3 to 10^3.5, is here its geometric mean, and its
    # Gaussian background of rms 0.01 is here the Poisson noise of a sky of the same variance.
    "deeplensesim_i": Priors(
        supersampling=1,
        psf_sigma=0.087 / 2.3548,  # 0.087 is the full width at half maximum here
        psf_pixels=5,
        photons=89.0,
        sky=3.55,
        mass_includes_substructure=False,
        lens_axis_ratio=0.9 / 1.1,  # e1 = 0.1, e2 = 0
        **_bounds(z_lens=0.5, z_source=1.0, shear=0.05, shear_angle=0.0, source_radius=0.25, vortex_mass_fraction=0.03),
        **_bounds(source_axis_ratio=0.7522, source_angle=3 * pi / 8),  # e1 = -0.1, e2 = 0.1
        **_bounds(source_offset=(-0.35, 0.35)),
        source_in_square=True,
        source_n=1.0,
        subhalo_poisson=False,
        subhalo_offset_min=0.25,
        **_bounds(vortex_length=(0.06, 6.0)),  # 0.06: twice the de Broglie wavelength of axions of 1e-22 to 1e-24 eV
        vortex_length_log=True,
        vortex_centre_sigma=0.0,
    ),
}


def make_easy(priors: Priors, factor: float = 4.0) -> Priors:
    """Returns the population with substructure `factor` times as heavy, which a network learns to recognize first."""
    names = ("subhalo_mass_min", "subhalo_mass_max", "vortex_mass_fraction_min", "vortex_mass_fraction_max")
    largest, reason = priors.vortex_mass_fraction_max, f"substructure of easy images is {factor:g} times as heavy"
    expected = f"expected less than {1 / factor:g}, because {reason}; lower it or simulate no easy images"
    check(factor * largest < 1, f"vortex_mass_fraction_max={largest}: {expected}")
    return replace(priors, **{name: factor * getattr(priors, name) for name in names})

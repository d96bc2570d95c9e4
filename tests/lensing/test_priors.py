from dataclasses import replace

import pytest

from gravlens_jax.config import PRIOR_PRESETS
from gravlens_jax.errors import InputError
from gravlens_jax.lensing.priors import PRIORS, Priors, make_easy


def test_presets_are_those_of_the_config():
    assert tuple(PRIORS) == PRIOR_PRESETS


@pytest.mark.parametrize("priors", PRIORS.values(), ids=PRIORS)
def test_easy_images_differ_only_in_the_mass_of_their_substructure(priors):
    names = ("subhalo_mass_min", "subhalo_mass_max", "vortex_mass_fraction_min", "vortex_mass_fraction_max")
    heavier = {name: pytest.approx(3 * getattr(priors, name)) for name in names}
    assert vars(make_easy(priors, 3)) == vars(priors) | heavier


@pytest.mark.parametrize(
    "change, message",
    [
        ({"shear_min": 0.4}, "shear_min=0.4 is larger than shear_max=0.3"),
        ({"mass": -1.0}, "mass=-1.0: expected a positive number"),
        ({"z_source_min": 0.55}, "z_source_min=0.55 is not behind z_lens_max=0.6"),
        ({"lens_axis_ratio": 0.0}, r"lens_axis_ratio=0.0: expected an axis ratio in \(0, 1\]"),
        ({"source_axis_ratio_max": 1.2}, r"source_axis_ratio_max=1.2: expected an axis ratio in \(0, 1\]"),
        ({"num_pixels": 9}, "num_pixels=9: the grid is smaller than the PSF of 11 pixels"),
        ({"psf_pixels": 10}, "psf_pixels=10: expected an odd number"),
        ({"subhalo_number": 50.0}, "subhalo_padding=64 is too few for subhalo_number=50.0; set it to 93 or more"),
        ({"subhalo_slope": -1.0}, "subhalo_slope=-1"),
        ({"vortex_mass_fraction_max": 1.0}, "vortex_mass_fraction_max=1.0: is over 1"),
        ({"sky": -0.1}, "sky=-0.1: expected a number >= 0"),
        ({"photons": float("inf")}, "photons=inf: expected a finite number"),
    ],
)
def test_impossible_populations_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        replace(Priors(), **change)

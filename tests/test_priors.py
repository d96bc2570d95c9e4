import typing
from dataclasses import replace

import pytest

from gravlens_jax.config import InputError, PriorPreset
from gravlens_jax.priors import PRESETS, Priors, make_easy


def test_every_preset_can_be_named_in_a_config():
    assert typing.get_args(PriorPreset) == tuple(PRESETS)


def test_easy_images_differ_in_the_mass_of_their_substructure_alone():
    for priors in PRESETS.values():
        easy = make_easy(priors, 3)
        assert easy.vortex_mass_fraction_max == pytest.approx(3 * priors.vortex_mass_fraction_max)
        assert easy.subhalo_mass_min == 3 * priors.subhalo_mass_min
        names = ("subhalo_mass_min", "subhalo_mass_max", "vortex_mass_fraction_min", "vortex_mass_fraction_max")
        assert replace(easy, **{name: getattr(priors, name) for name in names}) == priors


@pytest.mark.parametrize(
    "change, message",
    [
        ({"shear_min": 0.4}, "shear_min=0.4 is larger than shear_max=0.3"),
        ({"mass": -1.0}, "mass=-1.0: expected a positive number"),
        ({"subhalo_mass_min": 0.0}, "subhalo_mass_min=0.0: expected a positive number"),
        ({"z_source_min": 0.55}, "z_source_min=0.55 is not behind z_lens_max=0.6"),
        ({"lens_axis_ratio": 0.0}, r"lens_axis_ratio=0.0: expected an axis ratio in \(0, 1\]"),
        ({"source_axis_ratio_max": 1.2}, r"source_axis_ratio_max=1.2: expected an axis ratio in \(0, 1\]"),
        ({"num_pixels": 9}, "num_pixels=9: the grid is smaller than the PSF of 11 pixels"),
        ({"psf_pixels": 10}, "psf_pixels=10: expected an odd number"),
        ({"subhalo_number": 50.0}, "subhalo_padding=64 is too few for subhalo_number=50.0; set it to 93 or more"),
        ({"subhalo_slope": -1.0}, "subhalo_slope=-1"),
        ({"sky": -0.1}, "sky=-0.1: expected a number >= 0"),
    ],
)
def test_impossible_populations_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        replace(Priors(), **change)

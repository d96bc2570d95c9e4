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
        ({"mass": -1.0}, r"mass=-1.0: expected 1e\+06 to 1e\+16"),
        ({"z_source_min": 0.55}, "z_source_min=0.55 is not behind z_lens_max=0.6"),
        ({"source_n": 0.25}, "source_n=0.25: expected 0.5 to 10"),
        ({"pixel_scale": 0.04, "psf_pixels": 11}, "psf_pixels=11 cut 2.1% of the flux .* leave psf_pixels out"),
        ({"psf_pixels": 10}, "psf_pixels=10: expected an odd number"),
        ({"subhalo_number": 50.0}, "subhalo_padding=64 is too few for subhalo_number=50.0; set it to 93 or more"),
        ({"subhalo_slope": -1.0}, "subhalo_slope=-1"),
        ({"photons": float("inf")}, "photons=inf: expected a finite number"),
    ],
)
def test_impossible_populations_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        replace(Priors(), **change)


def test_easy_images_need_a_light_vortex():
    with pytest.raises(
        InputError, match=r"vortex_mass_fraction_max=0.3: expected less than 0.25, because substructure of"
    ):
        make_easy(replace(Priors(), vortex_mass_fraction_max=0.3))


def test_psf_reaches_4_sigma_by_default():
    assert [replace(Priors(), pixel_scale=scale).psf_size for scale in (0.05, 0.02, 0.5)] == [15, 37, 3]
    assert PRIORS["ct1"].psf_size == 11

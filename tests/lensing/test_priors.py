from dataclasses import replace

import pytest

from gravlens_jax.config import PRIOR_PRESETS
from gravlens_jax.lensing.priors import PRIORS, Priors, make_easy
from helpers import refuse


def test_presets_are_those_of_the_config_and_the_psf_reaches_4_sigma_by_default():
    assert tuple(PRIORS) == PRIOR_PRESETS and PRIORS["ct1"].psf_size == 11
    assert [replace(Priors(), pixel_scale=scale).psf_size for scale in (0.05, 0.02, 0.5)] == [15, 37, 3]


@pytest.mark.parametrize("priors", PRIORS.values(), ids=PRIORS)
def test_easy_images_differ_only_in_the_mass_of_their_substructure(priors):
    names = ("subhalo_mass_min", "subhalo_mass_max", "vortex_mass_fraction_min", "vortex_mass_fraction_max")
    heavier = {name: pytest.approx(3 * getattr(priors, name)) for name in names}
    assert vars(make_easy(priors, 3)) == vars(priors) | heavier


def test_impossible_populations_are_refused():
    def make(**change):
        make_easy(replace(Priors(), **change))

    refuse("shear_min=0.4 is larger than shear_max=0.3", make, shear_min=0.4)
    refuse("z_source_min=0.55 is not behind z_lens_max=0.6", make, z_source_min=0.55)
    cut = "psf_pixels=11 cut 2.1% of the flux .* leave psf_pixels out"
    refuse(cut, make, pixel_scale=0.04, psf_pixels=11)
    few = "subhalo_padding=64 is too few for subhalo_number=50.0; set it to 93 or more"
    refuse(few, make, subhalo_number=50.0)
    heavy = "vortex_mass_fraction_max=0.3: expected less than 0.25, because substructure of"
    refuse(heavy, make, vortex_mass_fraction_max=0.3)

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from gravlens_jax.lensing import noise


@pytest.fixture(scope="module")
def all_normals():
    """All values of `jax.random.normal` in float32, each of the same probability."""
    uniform = (np.arange(2**23, dtype=np.uint32) | 0x3F800000).view(np.float32) - np.float32(1)  # [0, 1)
    lowest = np.nextafter(np.float32(-1), np.float32(0))
    return jnp.float32(np.sqrt(2)) * jax.lax.erf_inv(jnp.maximum(uniform * (1 - lowest) + lowest, lowest))


def distance(counts, rate):
    """Returns the total variation distance of equally probable counts from the Poisson distribution."""
    found = np.bincount(np.maximum(np.asarray(counts), 0)) / counts.size
    expected = stats.poisson.pmf(np.arange(len(found)), float(np.float32(rate)))
    return (np.abs(found - expected).sum() + 1 - expected.sum()) / 2


@pytest.mark.parametrize("rate", [0.1, 1, 5, 9.49, noise.SMALL_RATE, 10, 12, 30, 100.7, 2000, 60_000])
def test_expansion_and_inversion_have_the_poisson_distribution_by_enumeration(all_normals, rate):
    small, uniform = rate < noise.SMALL_RATE, jnp.arange(2**23, dtype=jnp.float32) / 2**23
    function, variates = (noise.invert, uniform) if small else (noise.expand, all_normals)
    counts = jax.jit(function)(variates, jnp.full(uniform.shape, rate, jnp.float32))
    assert distance(counts.astype(int), rate) < 1e-4


def test_small_and_large_rates_may_be_mixed_0_gives_0_and_variates_depend_on_their_key_alone():
    keys, rates = jax.random.split(jax.random.key(0), 4), jnp.tile(jnp.float32([0, 2, 9, 10, 1000]), (4, 5000, 1))
    counts = np.asarray(jax.jit(noise.poisson)(keys, rates))
    np.testing.assert_array_equal(counts[1:2], jax.jit(noise.poisson)(keys[1:2], rates[1:2]))
    counts = counts.reshape(-1, 5)
    assert counts.dtype == np.int32 and counts.min() == 0 and counts[:, 0].max() == 0
    expected = np.asarray(rates[0, 0])
    np.testing.assert_allclose(counts.mean(0), expected, atol=5 * np.sqrt(1000 / len(counts)))
    np.testing.assert_allclose(counts.var(0)[1:], expected[1:], rtol=0.06)  # 5 standard errors: sqrt(2 / 20,000)

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gravlens_jax.conv import DIMENSIONS, conv


@pytest.mark.parametrize("n", [1, 3, 4])
@pytest.mark.parametrize("size", [(6, 6), (7, 5)])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("channels, filters, kernel", [(1, 3, 3), (4, 2, 3), (2, 4, 1), (3, 17, 3), (2, 3, 5)])
def test_values_and_gradients_are_the_library_s(n, size, stride, channels, filters, kernel):
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        x, w = rng.normal(size=(n, *size, channels)), rng.normal(size=(kernel, kernel, channels, filters))
        strides, padding = (stride, stride), ((kernel // 2, kernel // 2),) * 2

        def library(x, w):
            return jax.lax.conv_general_dilated(x, w, strides, padding, dimension_numbers=DIMENSIONS)

        @partial(jax.jit, static_argnums=0)
        def gradients(function):
            out, transpose = jax.vjp(function, jnp.array(x), jnp.array(w))
            return out, *transpose(jnp.cos(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape))

        for ours, theirs in zip(gradients(lambda x, w: conv(x, w, strides, padding)), gradients(library), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-12)


def test_other_platforms_keep_the_library_s_gradient():
    x, w = jnp.ones((2, 4, 4, 1)), jnp.ones((3, 3, 1, 2))
    gradient = jax.jit(jax.grad(lambda w: conv(x, w, (1, 1), ((1, 1), (1, 1))).sum()))
    assert "while" in gradient.trace(w).lower(lowering_platforms=("cpu",)).as_text()
    for platform in ("cuda", "tpu"):
        assert "while" not in gradient.trace(w).lower(lowering_platforms=(platform,)).as_text()

import jax
import jax.numpy as jnp
import pytest

from gravlens_jax import costs
from gravlens_jax.model import ResNet


@pytest.mark.parametrize("size", [100, 150])
def test_flops_are_the_compiler_s_count(size):
    model = ResNet()
    variables = model.init(jax.random.key(0), jnp.zeros((1, size, size, 1)))
    forward = jax.jit(model.apply).trace(variables, jnp.zeros((2, size, size, 1))).lower(lowering_platforms=("cuda",))
    # The compiler counts normalisation and ReLU too, and leaves out products with the padding.
    assert costs.forward_flops(size)[0] == pytest.approx(forward.cost_analysis()["flops"] / 2, rel=0.05)

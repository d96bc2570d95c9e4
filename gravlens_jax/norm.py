"""Batch normalisation with a gradient written out: the numbers of `flax.linen.BatchNorm`, with less memory traffic.

What automatic differentiation keeps for the backward pass (the centred input) is as large as the input itself and is
written and read once more; here the backward pass needs the input alone. The convolution's output is read twice forward
and twice backward, which is the least that training needs.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def normalize(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float) -> tuple[jax.Array, ...]:
    """Normalises `x` by the mean and variance of each channel.

    Args:
      x: float (n, height, width, channels).
      scale, bias: float32 (channels,).
      epsilon: added to the variance.

    Returns:
      scale (x - mean) / sqrt(variance + epsilon) + bias, in the dtype of `x`; mean and (biased) variance, float32
      (channels,), through which no gradient flows.
    """
    return _forward(x, scale, bias, epsilon)[0]


def _forward(x, scale, bias, epsilon):
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    mean = wide.mean((0, 1, 2))
    variance = jnp.maximum((wide * wide).mean((0, 1, 2)) - mean * mean, 0)
    inverse = jax.lax.rsqrt(variance + epsilon)
    k = scale * inverse
    return (_affine(x, k, bias - mean * k), mean, variance), (x, scale, mean, inverse)


def _affine(x, k, c):
    return (x * k[None, None, None] + c[None, None, None]).astype(x.dtype)


def _backward(epsilon, residuals, cotangents):
    x, scale, mean, inverse = residuals
    wide, grad = (a.astype(mean.dtype) for a in (x, cotangents[0]))
    n = x.size // x.shape[-1]
    grad_bias = grad.sum((0, 1, 2))
    grad_scale = ((grad * wide).sum((0, 1, 2)) - mean * grad_bias) * inverse
    centred = wide - mean[None, None, None]
    rest = grad_bias[None, None, None] + centred * (inverse * grad_scale)[None, None, None]
    grad_x = (scale * inverse)[None, None, None] * (grad - rest / n)
    return grad_x.astype(x.dtype), grad_scale, grad_bias


normalize.defvjp(_forward, _backward)


class BatchNorm(nn.Module):
    """Batch normalisation over all but the last axis; parameters and statistics are named as in `flax.linen`.

    Attributes:
      use_running_average: normalise by the running statistics, and leave them as they are.
      momentum: weight of the old running statistics.
      epsilon: added to the variance.
      dtype: of the result.
    """

    use_running_average: bool
    momentum: float = 0.9
    epsilon: float = 1e-5
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the normalised `x`, float (n, height, width, channels)."""
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,))
        running_var = self.variable("batch_stats", "var", jnp.ones, (channels,))
        x = x.astype(self.dtype)
        if self.use_running_average:
            k = scale * jax.lax.rsqrt(running_var.value + self.epsilon)
            return _affine(x, k, bias - running_mean.value * k)
        y, mean, var = normalize(x, scale, bias, self.epsilon)
        if not self.is_initializing():
            running_mean.value = self.momentum * running_mean.value + (1 - self.momentum) * mean
            running_var.value = self.momentum * running_var.value + (1 - self.momentum) * var
        return y

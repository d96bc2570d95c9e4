"""A 2-d convolution whose weight gradient is fast on CPUs; the same numbers as the library's, to rounding. Pure.

XLA's CPU backend computes the weight gradient of a convolution with few channels at a fraction of the speed of the
convolution itself. As a sum over small groups of images of (output gradient)^T (input patches), whose patches stay in
the cache, it is 1 to 4 times as fast. Other platforms keep the library's gradient; the choice is made at lowering.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp

DIMENSIONS = ("NHWC", "HWIO", "NHWC")


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def conv(x: jax.Array, kernel: jax.Array, strides: tuple[int, int], padding: tuple) -> jax.Array:
    """Returns the convolution of `x` with `kernel`.

    Args:
      x: float (n, height, width, channels).
      kernel: float (kernel height, kernel width, channels, filters).
      strides: along height and width.
      padding: ((top, bottom), (left, right)) zeros.
    """
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=DIMENSIONS)


def _forward(x, kernel, strides, padding):
    return conv(x, kernel, strides, padding), (x, kernel)


def _backward(strides, padding, residuals, grad):
    x, kernel = residuals
    plain = partial(jax.lax.conv_general_dilated, window_strides=strides, padding=padding, dimension_numbers=DIMENSIONS)
    (grad_x,) = jax.linear_transpose(lambda x: plain(x, kernel), x)(grad)

    def library(x, grad):
        return jax.linear_transpose(lambda kernel: plain(x, kernel), kernel)(grad)[0]

    def patches(x, grad):
        return _weight_gradient(x, grad, kernel, strides, padding)

    return grad_x, jax.lax.platform_dependent(x, grad, cpu=patches, default=library)


conv.defvjp(_forward, _backward)


def _weight_gradient(x, grad, kernel, strides, padding):
    n, out_height, out_width, filters = grad.shape
    kernel_height, kernel_width, channels, _ = kernel.shape
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    group = math.gcd(n, 4)

    def window(x, i, j):
        rows = slice(i, i + (out_height - 1) * strides[0] + 1, strides[0])
        columns = slice(j, j + (out_width - 1) * strides[1] + 1, strides[1])
        return x[:, rows, columns]

    def add(total, images):
        x, grad = images
        patches = [window(x, i, j) for i in range(kernel_height) for j in range(kernel_width)]
        patches = jnp.concatenate(patches, axis=-1)
        patches = patches.reshape(-1, kernel_height * kernel_width * channels)
        product = jax.lax.dot_general(
            grad.reshape(-1, filters), patches, (((0,), (0,)), ((), ())), preferred_element_type=total.dtype
        )
        return total + product, None

    groups = (x.reshape(n // group, group, *x.shape[1:]), grad.reshape(n // group, group, *grad.shape[1:]))
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    total, _ = jax.lax.scan(add, jnp.zeros((filters, kernel_height * kernel_width * channels), dtype), groups)
    return total.T.reshape(kernel.shape).astype(kernel.dtype)


def conv_general_dilated(
    lhs, rhs, window_strides, padding, *, lhs_dilation, rhs_dilation, dimension_numbers, feature_group_count, **_
) -> jax.Array:
    """`conv` under the signature that `flax.linen.Conv(conv_general_dilated=...)` calls."""
    plain = (set(lhs_dilation) | set(rhs_dilation) | {feature_group_count}) == {1}
    assert plain and dimension_numbers.lhs_spec == (0, 3, 1, 2), "only undilated, ungrouped NHWC convolutions"
    return conv(lhs, rhs, tuple(window_strides), tuple(map(tuple, padding)))

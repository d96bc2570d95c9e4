"""A 2-d convolution that is fast on CPUs too; the same numbers as the library's, to rounding. Pure.

Two things hold XLA's CPU backend back. The weight gradient of a convolution with few channels runs at a fraction of the
convolution's own speed: here it is a sum, over small groups of images that stay in the cache, of one matrix product.
And a convolution with more than 16 channels is given to a library that uses one core; one whose output is larger than
its input is not: here it makes one more row, which is dropped. Other platforms keep the library's own code; the choice
is made when the program is lowered.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp

DIMENSIONS = ("NHWC", "HWIO", "NHWC")
GROUP_ELEMENTS = 160_000  # of the output gradient in one matrix product; copies of them fill the second-level cache


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def conv(x: jax.Array, kernel: jax.Array, strides: tuple[int, int], padding: tuple) -> jax.Array:
    """Returns the convolution of `x` with `kernel`.

    Args:
      x: float (n, height, width, channels).
      kernel: float (kernel height, kernel width, channels, filters).
      strides: along height and width.
      padding: ((top, bottom), (left, right)) zeros.
    """
    options = {"strides": strides, "padding": padding}
    return jax.lax.platform_dependent(x, kernel, cpu=partial(_cpu, **options), default=partial(_library, **options))


def _library(x, kernel, strides, padding):
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=DIMENSIONS)


def _cpu(x, kernel, strides, padding):
    (top, bottom), sides = padding
    height = x.shape[1]
    same_height = strides[0] == 1 and top + bottom + 1 == kernel.shape[0]
    if same_height and max(kernel.shape[2:]) > 16:
        return _library(x, kernel, strides, ((top, bottom + 1), sides))[:, :height]
    return _library(x, kernel, strides, padding)


def _forward(x, kernel, strides, padding):
    return conv(x, kernel, strides, padding), (x, kernel)


def _backward(strides, padding, residuals, grad):
    def library(x, kernel, grad):
        plain = partial(_library, strides=strides, padding=padding)
        (grad_x,) = jax.linear_transpose(lambda x: plain(x, kernel), x)(grad)
        (grad_kernel,) = jax.linear_transpose(lambda kernel: plain(x, kernel), kernel)(grad)
        return grad_x, grad_kernel

    def cpu(x, kernel, grad):
        grad_x, _ = library(x, kernel, grad)
        if strides == (1, 1):  # then it is a convolution itself
            mirrored = kernel[::-1, ::-1].swapaxes(2, 3)
            rest = tuple((k - 1 - low, k - 1 - high) for k, (low, high) in zip(kernel.shape, padding, strict=False))
            grad_x = _cpu(grad, mirrored, strides, rest)
        return grad_x, _weight_gradient(x, kernel, grad, strides, padding)

    return jax.lax.platform_dependent(*residuals, grad, cpu=cpu, default=library)


conv.defvjp(_forward, _backward)


def _weight_gradient(x, kernel, grad, strides, padding):
    n, out_height, out_width, filters = grad.shape
    kernel_height, kernel_width, channels, _ = kernel.shape
    wanted = GROUP_ELEMENTS // max(1, out_height * out_width * filters)
    group = math.gcd(n, 2 ** max(0, wanted.bit_length() - 1))
    # Kernel row i meets every strides[0]-th row of x from i on. Kernel rows of one phase, i mod strides[0], meet the
    # same rows of x, only shifted; with the gradient shifted instead, one matrix product serves them all.
    phases = [range(phase, kernel_height, strides[0]) for phase in range(min(strides[0], kernel_height))]
    dtype = jnp.promote_types(x.dtype, jnp.float32)

    def add(index, totals):
        images = jax.lax.dynamic_slice_in_dim(x, index * group, group)
        images = jnp.pad(images, ((0, 0), *padding, (0, 0)))
        grads = jax.lax.dynamic_slice_in_dim(grad, index * group, group)
        span = (out_width - 1) * strides[1] + 1
        columns = jnp.concatenate([images[:, :, j : j + span : strides[1]] for j in range(kernel_width)], axis=-1)
        return [
            total + product(columns[:, p[0] :: strides[0]], grads, len(p))
            for p, total in zip(phases, totals, strict=True)
        ]

    def product(columns, grads, taps):
        height = columns.shape[1]
        grads = jnp.pad(grads, ((0, 0), (taps - 1, height - out_height), (0, 0), (0, 0)))
        rows = jnp.concatenate([grads[:, taps - 1 - tap : taps - 1 - tap + height] for tap in range(taps)], axis=-1)
        rows = rows.reshape(-1, taps * filters)
        columns = columns.reshape(-1, kernel_width * channels)
        return jax.lax.dot_general(rows, columns, (((0,), (0,)), ((), ())), preferred_element_type=dtype)

    totals = [jnp.zeros((len(p) * filters, kernel_width * channels), dtype) for p in phases]
    totals = jax.lax.fori_loop(0, n // group, add, totals)
    result = jnp.zeros(kernel.shape, kernel.dtype)
    for p, total in zip(phases, totals, strict=True):
        total = total.reshape(len(p), filters, kernel_width, channels).transpose(0, 2, 3, 1)
        result = result.at[p[0] :: strides[0]].set(total.astype(kernel.dtype))
    return result


def conv_general_dilated(
    lhs, rhs, window_strides, padding, *, lhs_dilation, rhs_dilation, dimension_numbers, feature_group_count, **_
) -> jax.Array:
    """`conv` under the signature that `flax.linen.Conv(conv_general_dilated=...)` calls."""
    plain = (set(lhs_dilation) | set(rhs_dilation) | {feature_group_count}) == {1}
    assert plain and dimension_numbers.lhs_spec == (0, 3, 1, 2), "only undilated, ungrouped NHWC convolutions"
    return conv(lhs, rhs, tuple(window_strides), tuple(map(tuple, padding)))

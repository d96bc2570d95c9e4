"""Convolution and batch normalization that are fast on CPUs; the results are those of `flax.linen`, to rounding.

XLA has three bottlenecks in training on CPUs, worked around here:

- The weight gradient of a convolution with few channels runs at a fraction of the speed of a matrix product. Here it is
  a sum of matrix products, one for each group of images that fits into the cache; or, of small maps with 64 channels or
  more, a convolution with the images as channels.
- The input gradient of a convolution with stride 2 is slow too. Here it is a convolution with stride 1 that computes
  blocks of 2 x 2 pixels, which takes less than half the time.
- Automatic differentiation of batch normalization stores the centered input for the backward pass: an array as large as
  the input, written and read once more. The gradient here is written by hand and needs the input alone.

On other platforms convolutions are XLA's own; the choice is made when the program is lowered.
"""

import math
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

GROUP_ELEMENTS = 160_000  # of the output gradient in one matrix product; its operands fill the second-level cache
LAYOUT = ("NHWC", "HWIO", "NHWC")  # of images, kernels and results of convolutions


def convolve(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """Returns the convolution of `x` with `kernel`, with a zero around each image.

    `x` is float (n, height, width, channels), `kernel` float (3, 3, channels, filters).
    """
    return jax.lax.conv_general_dilated(x, kernel, (stride, stride), [(1, 1)] * 2, dimension_numbers=LAYOUT)


convolve_for_training = jax.custom_vjp(convolve, nondiff_argnums=(2,))  # the same, without forward-mode derivatives


def _conv_backward(stride, residuals, grad):
    def xla(x, kernel, grad):
        return jax.vjp(partial(convolve, stride=stride), x, kernel)[1](grad)

    def cpu(x, kernel, grad):
        if stride == 2:
            grad_x = _strided_input_gradient(x.shape, kernel, grad)
        else:
            grad_x, _ = xla(x, kernel, grad)
        if stride == 1 and x.shape[3] >= 64 and x.shape[1] * x.shape[2] <= 256:
            return grad_x, _gradient_by_convolution(x, grad).astype(kernel.dtype)
        grad_kernel = jnp.zeros_like(kernel)
        for first in range(stride):
            rows = _rows_gradient(x, grad, stride, first)
            grad_kernel = grad_kernel.at[first::stride].set(rows.astype(kernel.dtype))
        return grad_x, grad_kernel

    return jax.lax.platform_dependent(*residuals, grad, cpu=cpu, default=xla)


convolve_for_training.defvjp(lambda x, kernel, stride: (convolve(x, kernel, stride), (x, kernel)), _conv_backward)


def _strided_input_gradient(shape, kernel, grad):
    """Returns the gradient of the input, of this shape, of a convolution with stride 2."""
    # Row 2q of the input has met kernel row 1 at output row q; row 2q + 1 has met rows 2 and 0 at output rows q and
    # q + 1. Columns likewise. So a 2x2 convolution of `grad` gives the four pixels of each block, as channels.
    _, height, width, channels = shape
    rows = jnp.zeros((2, 2, *kernel.shape[1:]), kernel.dtype)  # output row less q, input row less 2q, ...
    rows = rows.at[0, 0].set(kernel[1]).at[0, 1].set(kernel[2]).at[1, 1].set(kernel[0])
    both = jnp.zeros((2, 2, 2, 2, *kernel.shape[2:]), kernel.dtype)  # then the same of columns
    both = both.at[:, :, 0, 0].set(rows[:, :, 1]).at[:, :, 0, 1].set(rows[:, :, 2]).at[:, :, 1, 1].set(rows[:, :, 0])
    both = both.transpose(0, 2, 5, 1, 3, 4).reshape(2, 2, kernel.shape[3], 4 * channels)
    blocks = jax.lax.conv_general_dilated(grad, both, (1, 1), ((0, 1), (0, 1)), dimension_numbers=LAYOUT)
    n, q, r, _ = grad.shape
    blocks = blocks.reshape(n, q, r, 2, 2, channels).transpose(0, 1, 3, 2, 4, 5)
    return blocks.reshape(n, 2 * q, 2 * r, channels)[:, :height, :width]


def _gradient_by_convolution(x, grad):
    """Returns the gradient of a kernel with stride 1: `x` convolved with `grad`, the sum over images as channels."""
    x, grad = x.transpose(3, 1, 2, 0), grad.transpose(1, 2, 0, 3)
    kernel = jax.lax.conv_general_dilated(x, grad, (1, 1), [(1, 1)] * 2, dimension_numbers=LAYOUT)
    return kernel.transpose(1, 2, 0, 3)


def _rows_gradient(x, grad, stride, first):
    """Returns the gradient of kernel rows first, first + stride, ...: (rows, 3, channels, filters)."""
    # These rows are multiplied with the same rows of `x`, each shifted by one against the one before. With `grad`
    # shifted instead, one matrix product is enough for all of them.
    n, height, width, filters = grad.shape
    channels, taps = x.shape[3], len(range(first, 3, stride))
    span = (width - 1) * stride + 1
    group = math.gcd(n, 1 << max(0, (GROUP_ELEMENTS // (height * width * filters)).bit_length() - 1))
    dtype = jnp.promote_types(x.dtype, jnp.float32)

    def add(index, total):
        images = jax.lax.dynamic_slice_in_dim(x, index * group, group)
        images = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))[:, first::stride]
        images = jnp.concatenate([images[:, :, j : j + span : stride] for j in range(3)], axis=-1)
        rows = images.shape[1]
        grads = jax.lax.dynamic_slice_in_dim(grad, index * group, group)
        grads = jnp.pad(grads, ((0, 0), (taps - 1, rows - height), (0, 0), (0, 0)))
        grads = jnp.concatenate([grads[:, i : i + rows] for i in reversed(range(taps))], axis=-1)
        images, grads = images.reshape(-1, 3 * channels), grads.reshape(-1, taps * filters)
        return total + jax.lax.dot_general(grads, images, (((0,), (0,)), ((), ())), preferred_element_type=dtype)

    total = jax.lax.fori_loop(0, n // group, add, jnp.zeros((taps * filters, 3 * channels), dtype))
    return total.reshape(taps, filters, 3, channels).transpose(0, 2, 3, 1)


class Conv(nn.Module):
    """`convolve` with a 3x3 kernel and He initialization (fan-out); named as in `flax.linen`."""

    filters: int
    stride: int = 1
    dtype: Any = jnp.float32  # of computation and result; the kernel is float32
    train: bool = False  # with fast gradients, but without forward-mode derivatives

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the convolution of `x`, float (n, height, width, channels)."""
        he_normal = nn.initializers.variance_scaling(2.0, "fan_out", "normal")  # He et al., arXiv 1502.01852
        kernel = self.param("kernel", he_normal, (3, 3, x.shape[-1], self.filters), jnp.float32)
        function = convolve_for_training if self.train else convolve
        return function(x.astype(self.dtype), kernel.astype(self.dtype), self.stride)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def normalize(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float) -> tuple[jax.Array, ...]:
    """Returns scale (x - mean) / sqrt(variance + epsilon) + bias; and mean and variance, without gradients.

    `x` is float (n, height, width, channels); all others are float32 (channels,), with the biased variance.
    """
    return _normalize_forward(x, scale, bias, epsilon)[0]


def _normalize_forward(x, scale, bias, epsilon):
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    mean = wide.mean((0, 1, 2))
    variance = jnp.maximum((wide * wide).mean((0, 1, 2)) - mean * mean, 0)
    inverse = jax.lax.rsqrt(variance + epsilon)
    k = scale * inverse
    return (_affine(x, k, bias - mean * k), mean, variance), (x, scale, mean, inverse)


def _normalize_backward(epsilon, residuals, cotangents):
    x, scale, mean, inverse = residuals
    wide, grad = (a.astype(mean.dtype) for a in (x, cotangents[0]))
    n = x.size // x.shape[-1]
    grad_bias = grad.sum((0, 1, 2))
    grad_scale = ((grad * wide).sum((0, 1, 2)) - mean * grad_bias) * inverse
    centered = wide - mean[None, None, None]
    rest = grad_bias[None, None, None] + centered * (inverse * grad_scale)[None, None, None]
    grad_x = (scale * inverse)[None, None, None] * (grad - rest / n)
    return grad_x.astype(x.dtype), grad_scale, grad_bias


normalize.defvjp(_normalize_forward, _normalize_backward)


def _affine(x, k, c):
    return (x * k[None, None, None] + c[None, None, None]).astype(x.dtype)


class BatchNorm(nn.Module):
    """Batch normalization over all but the last axis; parameters and statistics are named as in `flax.linen`."""

    use_running_average: bool  # normalize by the running statistics and leave them unchanged
    momentum: float = 0.9  # weight of the old running statistics: PyTorch's 0.1
    epsilon: float = 1e-5  # added to the variance
    dtype: Any = jnp.float32  # of the result; parameters and statistics are float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the normalized `x`, float (n, height, width, channels)."""
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (channels,), jnp.float32)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,), jnp.float32)
        running_var = self.variable("batch_stats", "var", jnp.ones, (channels,), jnp.float32)
        x = x.astype(self.dtype)
        if self.use_running_average:
            k = scale * jax.lax.rsqrt(running_var.value + self.epsilon)
            return _affine(x, k, bias - running_mean.value * k)
        y, mean, var = normalize(x, scale, bias, self.epsilon)
        if not self.is_initializing():
            running_mean.value = self.momentum * running_mean.value + (1 - self.momentum) * mean
            running_var.value = self.momentum * running_var.value + (1 - self.momentum) * var
        return y

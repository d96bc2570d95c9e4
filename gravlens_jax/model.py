"""The network: a residual network of depth 6n + 2 (He et al., arXiv 1512.03385, section 4.2) in Flax Linen.

`model.apply(variables, x)` takes prepared images and returns logits; `predict(model, variables, images)` takes images
as they are on disk, prepares them as the network wants them, and returns probabilities.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from gravlens_jax.augment import prepare, to_unit
from gravlens_jax.config import CLASSES, InputConfig, ModelConfig, check
from gravlens_jax.conv import conv_general_dilated
from gravlens_jax.norm import BatchNorm
from gravlens_jax.npz import native

ALL, BEFORE_HEAD = slice(None), slice(0, 5)  # parts of the network


class ResNet(nn.Module):
    """Residual network of depth 6n + 2 for one-channel images of any size.

    Attributes:
      depth: 6n + 2 layers: a first convolution, three stages of n blocks of two convolutions, a linear head.
      width: filters of the first stage; the second and third have 2 and 4 times as many.
      classes: what the logits stand for, in order.
      projection: 1x1 convolutions in the two shortcuts that change shape, instead of every second pixel and zero
        channels on both sides.
      dtype: of activations; parameters, statistics and logits are float32.
      input: how `predict` and the training step turn images into `x`.
    """

    depth: int = 20
    width: int = 16
    classes: tuple[str, ...] = CLASSES
    projection: bool = False
    dtype: Any = jnp.float32
    input: InputConfig = InputConfig()

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False, parts: slice = ALL) -> jax.Array:
        """Returns logits, float32 (n, len(classes)).

        Args:
          x: float (n, height, width, 1), prepared images.
          train: normalise by the batch and update the running statistics (then pass mutable=["batch_stats"]).
          parts: which of the six parts to run: first convolution, stages 1 to 3, mean over the pixels, head. `x` is
            then what the first of them takes, and the result what the last of them makes.
        """
        conv = partial(
            nn.Conv,
            use_bias=False,
            dtype=self.dtype,
            kernel_init=nn.initializers.variance_scaling(2.0, "fan_out", "normal"),  # He et al., arXiv 1502.01852
            conv_general_dilated=conv_general_dilated,
        )
        conv3 = partial(conv, kernel_size=(3, 3), padding=((1, 1), (1, 1)))
        conv1 = partial(conv, kernel_size=(1, 1), padding=((0, 0), (0, 0)), strides=(2, 2))
        # momentum weighs the old statistics: 0.9 here is PyTorch's 0.1.
        norm = partial(BatchNorm, use_running_average=not train, momentum=0.9, epsilon=1e-5, dtype=self.dtype)

        def first(x):
            return nn.relu(norm(name="norm0")(conv3(self.width, name="conv0")(x)))

        def run_stage(stage, x):
            filters = self.width * 2**stage
            for block in range((self.depth - 2) // 6):
                name = f"stage{stage + 1}_block{block + 1}"
                stride = 2 if stage and not block else 1
                y = conv3(filters, strides=(stride, stride), name=f"{name}_conv1")(x)
                y = nn.relu(norm(name=f"{name}_norm1")(y))
                y = norm(name=f"{name}_norm2")(conv3(filters, name=f"{name}_conv2")(y))
                if stride == 2 and self.projection:
                    x = conv1(filters, name=f"{name}_projection")(x)
                    x = norm(name=f"{name}_projection_norm")(x)
                elif stride == 2:
                    x = jnp.pad(x[:, ::2, ::2], ((0, 0), (0, 0), (0, 0), (filters // 4, filters // 4)))
                x = nn.relu(x + y)
            return x

        def mean(x):
            return x.astype(jnp.float32).mean((1, 2))

        head = nn.Dense(len(self.classes), dtype=jnp.float32, name="head")
        stages = (partial(run_stage, stage) for stage in range(3))
        every: list[Callable[[jax.Array], jax.Array]] = [first, *stages, mean, head]
        for part in every[parts]:
            x = part(x)
        return x


ResNet20 = partial(ResNet, depth=20)


def make_model(config: ModelConfig, input_config: InputConfig, classes: tuple[str, ...]) -> ResNet:
    """Returns the network that a run's config describes."""
    return ResNet(
        depth=config.depth,
        width=config.width,
        classes=classes,
        projection=config.projection,
        dtype=jnp.dtype(config.dtype),
        input=input_config,
    )


def forward(model: ResNet, variables: Any, x: jax.Array, parts: slice = ALL) -> jax.Array:
    """Returns `model.apply(variables, x, parts=parts)`: what these parts make of `x`, by the running statistics."""
    y = model.apply(variables, x, parts=parts)
    assert not isinstance(y, tuple)  # it is one if variables may change
    return y


@partial(jax.jit, static_argnames=("model", "tta"))
def _logits(variables, images: jax.Array, *, model: ResNet, tta: bool) -> jax.Array:
    x = prepare(to_unit(images), model.input)
    mirrored = [x, x[:, ::-1], x[:, :, ::-1], x[:, ::-1, ::-1]] if tta else [x]
    return jnp.stack([forward(model, variables, some) for some in mirrored]).mean(0)


@partial(jax.jit, static_argnames="model")
def _features(variables, images: jax.Array, *, model: ResNet) -> jax.Array:
    return forward(model, variables, prepare(to_unit(images), model.input), BEFORE_HEAD)


def predict_logits(
    model: ResNet, variables: Any, images: np.ndarray, batch_size: int = 128, tta: bool = False
) -> np.ndarray:
    """Returns the logits of `images`, float32 (n, len(model.classes)).

    Args:
      model: the network.
      variables: {"params": ..., "batch_stats": ...}, as `model.init` and `load_run` return them.
      images: (n, height, width), any real dtype, as on disk: pixels in [0, 1], or counts, which are scaled. Read
        batch by batch, so that it may be a memory map.
      batch_size: images per step.
      tta: test-time augmentation: the mean over an image and its three mirror images, at four times the work.

    Raises:
      InputError: not (n, height, width), or smaller than the crop.
    """
    check_images(images.shape, model.input)
    function = partial(_logits, variables, model=model, tta=tta)
    return _in_batches(function, images, batch_size, len(model.classes))


def embed(model: ResNet, variables: Any, images: np.ndarray, batch_size: int = 128) -> np.ndarray:
    """Returns what the head reads of each image, float32 (n, 4 * model.width); arguments as in `predict_logits`."""
    check_images(images.shape, model.input)
    return _in_batches(partial(_features, variables, model=model), images, batch_size, 4 * model.width)


def _in_batches(function: Callable, images: np.ndarray, batch_size: int, columns: int) -> np.ndarray:
    """Returns function(images), float32 (n, columns), batch by batch; the last one is filled up, to compile once."""
    results = np.empty((len(images), columns), np.float32)
    for start in range(0, len(images), batch_size):
        batch = native(images[start : start + batch_size])
        padding = ((0, min(batch_size, len(images)) - len(batch)), (0, 0), (0, 0))
        results[start : start + len(batch)] = function(np.pad(batch, padding))[: len(batch)]
    return results


def predict(model: ResNet, variables: Any, images: np.ndarray, batch_size: int = 128, tta: bool = False) -> np.ndarray:
    """Returns the probability of each class, float32 (n, len(model.classes)); arguments as in `predict_logits`."""
    return np.asarray(jax.nn.softmax(predict_logits(model, variables, images, batch_size, tta)))


def check_images(shape: tuple[int, ...], config: InputConfig) -> None:
    """Raises InputError unless images of `shape` are (n, height, width) and hold the crop."""
    check(len(shape) == 3, f"images have shape {tuple(shape)}; expected (n, height, width)")
    check(
        min(shape[1:]) >= config.crop,
        f"images are {shape[1]} x {shape[2]} pixels, the network's input is a crop of {config.crop} x {config.crop}; "
        f"give larger images, or train with --input.crop {min(shape[1:]) // config.pool * config.pool}",
    )

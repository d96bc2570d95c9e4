"""The network: a residual network of depth 6n + 2 (He et al., arXiv 1512.03385, section 4.2).

It is written in Flax Linen rather than NNX: `init` and `apply` are pure functions, as everything here; Linen is
maintained; and every layer is named explicitly, so that a port changes this file and `layers.py` alone.
"""

from dataclasses import asdict
from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from gravlens_jax.config import CLASSES, InputConfig, ModelConfig
from gravlens_jax.layers import BatchNorm, Conv


class ResNet(nn.Module):
    """Residual network of depth 6n + 2 for one-channel images of any size."""

    depth: int = 20  # 6n + 2: a first convolution, three stages of n blocks of two convolutions, a linear head
    width: int = 16  # filters of the first stage; the second and third have 2 and 4 times as many
    classes: tuple[str, ...] = CLASSES  # names, in the order of the logits
    activation: Literal["relu", "hard_swish"] = "hard_swish"  # the latter is x min(max(x + 3, 0), 6) / 6
    dtype: Any = jnp.float32  # of activations; parameters, statistics and logits are float32
    momentum: float = 0.97  # of the running statistics; with PyTorch's 0.9 their noise costs 1.4 % of the loss
    input: InputConfig = InputConfig()  # how images become `x`: see `preprocess`
    pixel_scale: float | None = None  # of the training images, arcsec; None if unknown

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """Returns the logits and the four feature maps: after the first convolution and after each stage.

        `x` are prepared images, float (n, height, width, 1). With `train` they are normalized by the batch, and the
        running statistics updated (then pass mutable=["batch_stats"]). Logits are float32 (n, len(classes)); maps are
        of `dtype`, of width, width, 2 width and 4 width channels, the last two with 1/2 and 1/4 of the pixels per axis.
        """
        conv = partial(Conv, dtype=self.dtype, train=train)
        norm = partial(BatchNorm, use_running_average=not train, momentum=self.momentum, epsilon=1e-5, dtype=self.dtype)
        activate = {"relu": nn.relu, "hard_swish": nn.hard_swish}[self.activation]
        x = activate(norm(name="norm0")(conv(self.width, name="conv0")(x)))
        feature_maps = [x]
        for stage in range(3):
            filters = self.width * 2**stage
            for block in range((self.depth - 2) // 6):
                name = f"stage{stage + 1}_block{block + 1}"
                stride = 2 if stage and not block else 1
                y = conv(filters, stride=stride, name=f"{name}_conv1")(x)
                y = activate(norm(name=f"{name}_norm1")(y))
                y = norm(name=f"{name}_norm2")(conv(filters, name=f"{name}_conv2")(y))
                if stride == 2:
                    extra = filters - x.shape[-1]
                    x = jnp.pad(x[:, ::2, ::2], ((0, 0), (0, 0), (0, 0), (extra // 2, extra - extra // 2)))
                x = activate(x + y)
            feature_maps.append(x)
        features = x.astype(jnp.float32).mean((1, 2))
        return nn.Dense(len(self.classes), dtype=jnp.float32, name="head")(features), tuple(feature_maps)


ResNet20 = partial(ResNet, depth=20)


def apply_head(feature_map: jax.Array, head: Any) -> jax.Array:
    """Returns deflection maps, float32 (n, height, width, 2), linear in the last feature map."""
    return feature_map.astype(jnp.float32) @ head["kernel"] + head["bias"][None, None, None]


def make_model(
    config: ModelConfig, input_config: InputConfig, classes: tuple[str, ...], pixel_scale: float | None = None
) -> ResNet:
    """Returns the network that a run's config describes."""
    fields = asdict(config) | {"dtype": jnp.dtype(config.dtype)}
    return ResNet(**fields, classes=classes, input=input_config, pixel_scale=pixel_scale)


def variable_shapes(model: ResNet) -> Any:
    """Returns {"params": ..., "batch_stats": ...} of `jax.ShapeDtypeStruct`, computing nothing."""
    size = model.input.crop // model.input.pool
    return jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, size, size, 1), jnp.float32))

"""A network as the bytes of a file, for this package and for programs without it. Pure."""

import io
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax import export

from gravlens_jax.augment import prepare, to_unit
from gravlens_jax.model import ResNet, forward

PLATFORMS = ("cpu", "cuda", "tpu")


def to_arrays(variables: Any) -> dict[str, np.ndarray]:
    """Returns the variables as float32 arrays, under names such as params/head/bias."""
    return {name: np.array(x, np.float32, order="C") for name, x in flatten_dict(variables, sep="/").items()}


def as_npz(variables: Any, about: dict[str, Any]) -> bytes:
    """Returns an .npz of `to_arrays`, and as `about` what the network says of itself, in JSON."""
    file = io.BytesIO()
    arrays: dict[str, Any] = {"about": np.array(json.dumps(about)), **to_arrays(variables)}
    np.savez(file, **arrays)
    return file.getvalue()


def as_safetensors(variables: Any, about: dict[str, Any]) -> bytes:
    """Returns the same in the format of safetensors, `about` among its metadata."""
    from safetensors.numpy import save

    return save(to_arrays(variables), {"about": json.dumps(about)})


def as_stablehlo(model: ResNet, variables: Any, image_shape: tuple[int, int]) -> bytes:
    """Returns the whole prediction as a program that JAX alone runs.

    `jax.export.deserialize(program).call(images)` takes float32 (n, *image_shape), for any n, as they are on disk, and
    returns the probabilities float32 (n, len(model.classes)), as `predict` does, on any of PLATFORMS.
    """

    @jax.jit
    def predict(images):
        return jax.nn.softmax(forward(model, variables, prepare(to_unit(images), model.input)))

    (n,) = export.symbolic_shape("n")
    images = jax.ShapeDtypeStruct((n, *image_shape), jnp.float32)
    return bytes(export.export(predict, platforms=PLATFORMS)(images).serialize())

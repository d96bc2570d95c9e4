import jax
import jax.numpy as jnp
import pytest

from bench import costs, steps
from gravlens_jax.model import ResNet
from gravlens_jax.sharding import data_mesh, shard_batch


@pytest.mark.parametrize("size", [100, 150])
def test_forward_flops_equal_the_compiler_count(size):
    model = ResNet()
    variables = model.init(jax.random.key(0), jnp.zeros((1, size, size, 1)))
    forward = jax.jit(model.apply).trace(variables, jnp.zeros((2, size, size, 1))).lower(lowering_platforms=("cuda",))
    # The compiler counts normalization and ReLU too, and leaves out products with the padding.
    assert costs.forward_flops(size)[0] == pytest.approx(forward.cost_analysis()["flops"] / 2, rel=0.05)


def test_training_step_has_40_all_reduces_and_1_mb_of_gradients():  # the numbers of scripts/bench/README.md
    mesh = data_mesh(2)
    _, step, state = steps.set_up(8, "float32", mesh)
    batch = shard_batch(steps.random_batch(2, 8), mesh)
    assert jax.jit(step).lower(state, batch).compile().as_text().count(" all-reduce(") == 40
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(state.params)) == 4 * 268_979


@pytest.mark.parametrize(
    "kind, name",
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA L4", "L4"),
        ("Tesla T4", "T4"),
        ("TPU v5 lite", "TPU v5 lite"),
        *((kind, None) for kind in ("NVIDIA L40S", "NVIDIA H100 PCIe", "NVIDIA H100 NVL", "NVIDIA GH200 480GB")),
        *((kind, None) for kind in ("NVIDIA A100-PCIE-40GB", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "TPU v5")),
    ],
)
def test_peaks_are_found_for_exactly_the_listed_devices(kind, name):
    assert costs.find_peaks(kind) == costs.PEAKS.get(name)

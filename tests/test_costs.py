import jax
import jax.numpy as jnp
import pytest

from gravlens_jax import costs, measure
from gravlens_jax.mesh import data_mesh, shard_batch
from gravlens_jax.model import ResNet


@pytest.mark.parametrize("size", [100, 150])
def test_flops_are_the_compiler_s_count(size):
    model = ResNet()
    variables = model.init(jax.random.key(0), jnp.zeros((1, size, size, 1)))
    forward = jax.jit(model.apply).trace(variables, jnp.zeros((2, size, size, 1))).lower(lowering_platforms=("cuda",))
    # The compiler counts normalisation and ReLU too, and leaves out products with the padding.
    assert costs.forward_flops(size)[0] == pytest.approx(forward.cost_analysis()["flops"] / 2, rel=0.05)


def test_a_step_has_as_many_all_reduces_as_are_counted():
    mesh = data_mesh(2)
    _, step, state = measure.set_up(8, "float32", mesh)
    batch = shard_batch(measure.random_batch(2, 8), mesh)
    assert jax.jit(step).lower(state, batch).compile().as_text().count(" all-reduce(") == costs.ALLREDUCES
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(state.params)) == costs.GRADIENT_BYTES


def test_all_reduces_take_their_latency_and_a_ring_s_bytes():
    # 1.076 MB, 2 * 3/4 of which pass through each of 4 devices at 1 GB/s: 1.614 ms; and 40 times 10 microseconds
    assert costs.allreduce_seconds(4, link=1.0, latency_seconds=10e-6) == pytest.approx(2.014e-3, rel=1e-3)
    assert costs.allreduce_seconds(1, link=1.0) == 0


def test_all_reduces_take_half_the_step_where_arithmetic_takes_as_long():
    seconds = costs.allreduce_seconds(8, link=450.0)
    tflops = 10 * costs.train_flops(50) / seconds / 1e12
    assert costs.allreduce_fraction(10, 50, 8, tflops, link=450.0) == pytest.approx(0.5)


@pytest.mark.parametrize("devices, link", [(8, "NVLink"), (16, "InfiniBand"), (256, "TPU v5e ICI")])
def test_a_smaller_batch_than_the_least_spends_more_on_all_reduces(devices, link):
    rest = (50, devices, 100.0, costs.LINKS[link])
    batch = costs.least_batch(0.05, *rest)
    assert costs.allreduce_fraction(batch, *rest) <= 0.05 < costs.allreduce_fraction(batch - 1, *rest)
    assert costs.least_batch(0.05, 50, 1, *rest[2:]) == 1


@pytest.mark.parametrize(
    "kind, devices, link, microseconds, small, large",
    [
        ("H100", 8, "NVLink", 604, 5637, 638),
        ("H100", 16, "InfiniBand", 640, 5975, 676),
        ("TPU v5 lite", 256, "TPU v5e ICI", 611, 1135, 129),
    ],
)
def test_the_readme_s_numbers(kind, devices, link, microseconds, small, large):
    tflops, gb_per_second = 0.3 * costs.PEAKS[kind]["bfloat16"], costs.LINKS[link]
    assert round(1e6 * costs.allreduce_seconds(devices, gb_per_second)) == microseconds
    assert costs.least_batch(0.05, 50, devices, tflops, gb_per_second) == small
    assert costs.least_batch(0.05, 150, devices, tflops, gb_per_second) == large


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
def test_peaks_are_those_of_the_very_device(kind, name):
    assert costs.find_peaks(kind) == costs.PEAKS.get(name)

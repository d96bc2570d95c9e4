import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gravlens_jax import measure, measure_input
from gravlens_jax.model import ResNet


@pytest.mark.parametrize("size", [100, 150])
def test_flops_are_the_compiler_s_count(size):
    model = ResNet()
    variables = model.init(jax.random.key(0), jnp.zeros((1, size, size, 1)))
    forward = jax.jit(model.apply).trace(variables, jnp.zeros((2, size, size, 1))).lower(lowering_platforms=("cuda",))
    # The compiler counts normalisation and ReLU too, and leaves out products with the padding.
    assert measure.forward_flops(size)[0] == pytest.approx(forward.cost_analysis()["flops"] / 2, rel=0.05)


def test_a_compiled_step_is_timed():
    run, facts = measure.compile_step(True, 4, 8, "float32", 1)
    seconds = run(1, 5)
    assert len(seconds) == 5 and seconds == sorted(seconds) and seconds[0] > 0
    assert facts["memory_bytes"] > 1e6 and facts["compile_seconds"] > 0 < facts["transfer_seconds"]


def test_two_devices_are_used():
    run, _ = measure.compile_step(False, 4, 8, "bfloat16", 2)
    assert len(run(0, 1)) == 1


def test_a_cpu_s_peaks_are_measured():
    values = measure.peaks("float32")
    assert 0 < values["tflops"] < 100 and 0 < values["bandwidth"] < 10_000


def test_the_loop_s_busy_fraction():
    assert 0 < measure.busy_fraction(4, 8, "float32", 3, 1) < 2


def test_figures_of_a_step():
    figures = measure.step_figures([0.1, 0.2, 0.3], [0.4], batch_size=10, flops=10**9, accessed_bytes=4e9)
    assert figures["images_per_second"] == pytest.approx(50) and figures["ratio"] == pytest.approx(2)
    assert figures["tflops"] == pytest.approx(0.05) and figures["accessed_gb_per_second"] == pytest.approx(20)
    assert figures["step_seconds_quartiles"] == pytest.approx([0.15, 0.25])


@pytest.mark.parametrize("reader", measure_input.READERS[:3])
def test_readers_give_batches(reader, tmp_path):
    measure_input.write_files(tmp_path, 8, npy=False)
    values = measure_input.measure_reader(reader, tmp_path, 4, 2)
    assert values["batches_per_second"] > 0 and values["open_seconds"] > 0
    with np.load(tmp_path / "compressed.npz") as a, np.load(tmp_path / "packed.npz") as b:
        np.testing.assert_array_equal(a["images"], b["images"])

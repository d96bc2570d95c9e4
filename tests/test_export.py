import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from safetensors import safe_open

from gravlens_jax import export, weights
from gravlens_jax.config import InputConfig, InputError
from gravlens_jax.model import ResNet, predict

MODEL = ResNet(depth=8, width=8, classes=("a", "b"), input=InputConfig(crop=16, pool=2))
WITHOUT_THE_PACKAGE = """
import sys
sys.modules["gravlens_jax"] = None
try:
    import gravlens_jax
    raise SystemExit("it could be imported")
except ImportError:
    pass
import numpy as np
from jax import export
images = np.load("images.npy")
call = export.deserialize(open("net.stablehlo", "rb").read()).call
np.savez("out.npz", all=call(images), one=call(images[:1]))
"""


@pytest.fixture(scope="module")
def network():
    return weights.Network(MODEL, MODEL.init(jax.random.key(0), np.zeros((1, 8, 8, 1), np.float32)), (20, 20))


def test_a_fresh_process_predicts_the_same_without_this_package(network, tmp_path):
    weights.write_network(tmp_path / "net.stablehlo", network, {})
    images = np.random.default_rng(0).poisson(50, (5, 20, 20)).astype(np.float32)
    np.save(tmp_path / "images.npy", images)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-I", "-c", WITHOUT_THE_PACKAGE]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    expected = predict(network.model, network.variables, images)
    with np.load(tmp_path / "out.npz") as out:
        np.testing.assert_allclose(out["all"], expected, atol=1e-5)
        np.testing.assert_allclose(out["one"], expected[:1], atol=1e-5)


def test_the_program_is_for_every_platform_and_any_number_of_images(network):
    program = jax.export.deserialize(bytearray(export.as_stablehlo(*network[:3])))
    assert program.platforms == ("cpu", "cuda", "tpu")
    assert [str(size) for size in program.in_avals[0].shape] == ["n", "20", "20"]


def test_safetensors_hold_the_same_arrays_as_the_npz(network, tmp_path):
    about = weights.describe(network)
    for name in ("net.npz", "net.safetensors"):
        weights.write_network(tmp_path / name, network, about)
    with np.load(tmp_path / "net.npz") as npz, safe_open(tmp_path / "net.safetensors", "numpy") as file:
        assert file.metadata() == {"about": str(npz["about"])}
        assert json.loads(str(npz["about"]))["classes"] == ["a", "b"]
        assert {*file.keys(), "about"} == set(npz.files)
        for name in file.keys():  # noqa: SIM118 - it is no dict
            np.testing.assert_array_equal(file.get_tensor(name), npz[name])


@pytest.mark.parametrize("suffix, package", [("safetensors", "safetensors"), ("stablehlo", "flatbuffers")])
def test_a_missing_package_is_named_and_nothing_is_written(network, tmp_path, monkeypatch, suffix, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=rf'needs {package}; pip install "gravlens_jax\[export\]"'):
        weights.write_network(tmp_path / f"net.{suffix}", network, {})
    assert list(tmp_path.iterdir()) == []


def test_other_suffixes_and_folders_that_are_not_there_are_refused(network, tmp_path):
    with pytest.raises(InputError, match=r"expected a name that ends in \.npz, \.safetensors, \.stablehlo"):
        weights.write_network(tmp_path / "net.pth", network, {})
    with pytest.raises(InputError, match=r"none/net\.npz: there is no folder .*none; make it"):
        weights.write_network(tmp_path / "none/net.npz", network, {})


def test_a_write_that_fails_leaves_the_old_file_and_no_other(network, tmp_path, monkeypatch):
    (tmp_path / "net.npz").write_bytes(b"old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(InputError, match="No space left"):
        weights.write_network(tmp_path / "net.npz", network, {})
    assert [f.read_bytes() for f in tmp_path.iterdir()] == [b"old"]

"""Damaged files are read well or refused by an InputError; nothing else happens, and memory stays small.

150 damaged files of each kind, the same each time. For others, and more of them:
GRAVLENS_FUZZ_EXAMPLES=5000 pytest tests/test_fuzz.py
"""

import io
import json
import os
import re
import tracemalloc
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gravlens_jax.config import CLASSES, PRESETS, Config, InputConfig, InputError, ModelConfig, to_json
from gravlens_jax.folders import load_image
from gravlens_jax.model import make_model
from gravlens_jax.npz import open_npz, write_npz
from gravlens_jax.run import RunInfo, create_run, read_run
from gravlens_jax.torch_weights import load_state_dict
from gravlens_jax.weights import load_network

EXAMPLES = os.environ.get("GRAVLENS_FUZZ_EXAMPLES")
MEMORY_BYTES = 2**23  # that reading a damaged file of some kB may take
FUZZ = settings(
    max_examples=int(EXAMPLES or 150),
    derandomize=EXAMPLES is None,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
pytestmark = pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")

NUMBERS = st.sampled_from([0, 1, 2, 3, 4, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1])
LENGTHS = NUMBERS | st.integers(-5, 5) | st.sampled_from([10**12, 10**30, 2**62, True, 1.0, None, "3"])
TYPES = st.sampled_from(["<f4", ">f8", "|u1", "<i8", "<f2", "|b1", "<c16", "|O", "<U0", "<U5", ">U2", "|S4", "<M8[s]"])
TYPES |= st.sampled_from(["|V9", "x", 3, None, [("a", "<f4")], [("a", "|O", (3,))], ("<f4", (7, 7))])
NAMES = ["images.npy", "labels.npy", "classes.npy", "info.npy", "about.npy", "images", "/images.npy", "../labels.npy"]
NAMES += ["C:\\a.npy", "a/b.npy", ".npy", "a/", "a\0.npy", "é.npy"]


@st.composite
def edited(draw, data: bytes, least: int = 1):
    """Draws the bytes after a few flips, overwritten numbers, insertions, removals, copies, cuts, often in headers."""
    marks = [found.start() for found in re.finditer(b"PK[\1-\6]|\x93NUMPY", data)]
    anywhere = st.integers(0, max(0, len(data) - 1))
    place = anywhere | st.builds(int.__add__, st.sampled_from(marks), st.integers(0, 60)) if marks else anywhere
    for _ in range(draw(st.sampled_from([least, least, 1, 1, 2, 4]))):
        i, j, size = draw(place), draw(place), draw(st.integers(1, 16))
        kind = draw(st.sampled_from(["flip", "flip", "number", "number", "insert", "remove", "copy", "cut"]))
        if kind == "flip":
            data = data[:i] + bytes(b ^ draw(st.integers(1, 255)) for b in data[i : i + 1]) + data[i + 1 :]
        if kind == "number":
            size = draw(st.sampled_from([1, 2, 4, 8]))
            data = data[:i] + (draw(NUMBERS) % 256**size).to_bytes(size, "little") + data[i + size :]
        if kind == "insert":
            data = data[:i] + draw(st.binary(max_size=size)) + data[i:]
        if kind == "remove":
            data = data[:i] + data[i + size :]
        if kind == "copy":
            data = data[:i] + data[j : j + 4 * size] + data[i + 4 * size :]
        if kind == "cut":
            data = data[:i] if draw(st.booleans()) else data[i:]
    return data


@st.composite
def headers(draw, data: bytes):
    """Draws an array whose header announces something else."""
    header = {"descr": draw(TYPES), "fortran_order": draw(st.booleans()), "shape": tuple(draw(st.lists(LENGTHS)))}
    if draw(st.booleans()):
        del header[draw(st.sampled_from(sorted(header)))]
    text = repr(header).encode()
    text += b" " * (-(len(text) + 10) % 16) * draw(st.integers(0, 1))
    length = len(text) if draw(st.booleans()) else draw(NUMBERS)
    version = draw(st.sampled_from([1, 1, 1, 2, 3, 9]))
    size = 2 if version == 1 else 4
    return b"\x93NUMPY" + bytes([version, 0]) + (length % 256**size).to_bytes(size, "little") + text + data[128:]


@st.composite
def archives(draw, whole: bytes):
    """Draws an archive that is damaged as a file, or a sound archive with damaged members, or both."""
    if draw(st.booleans()):
        with zipfile.ZipFile(io.BytesIO(whole)) as archive:
            members = [[info.filename, archive.read(info), info.compress_type] for info in archive.infolist()]
        for _ in range(draw(st.sampled_from([0, 1, 1, 2]))):
            member = draw(st.sampled_from(members[:8]))
            kind = draw(st.sampled_from(["name", "content", "header", "compression", "twice", "missing"]))
            if kind == "name":
                member[0] = draw(st.sampled_from(NAMES))
            if kind == "content":
                member[1] = draw(edited(member[1]))
            if kind == "header":
                member[1] = draw(headers(member[1]))
            if kind == "compression":
                member[2] = draw(st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2]))
            if kind == "twice":
                members.append(list(member))
            if kind == "missing" and len(members) > 1:
                members.remove(member)
        if draw(st.integers(0, 9)) == 9:
            members[0] = [members[0][0], members[0][1] + bytes(2 * MEMORY_BYTES), zipfile.ZIP_DEFLATED]
        with zipfile.ZipFile(buffer := io.BytesIO(), "w", compresslevel=1) as archive:
            for name, content, compression in members:
                archive.writestr(name, content, compression)
        whole = buffer.getvalue()
        return draw(edited(whole, least=0))
    return draw(edited(whole))


def read(reader, path: Path, data: bytes, outcomes: list):
    """Reads damaged bytes; returns what the reader makes of them, or None if it refuses them."""
    path.write_bytes(data)
    path.with_suffix(".unpacked.npz").unlink(missing_ok=True)
    tracemalloc.start()
    try:
        result = reader(path)
    except InputError as error:
        assert path.name in str(error) or "=" in str(error), error  # values are named by their field
        result = None
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    outcomes.append(result is not None)
    assert peak < MEMORY_BYTES + 4 * len(data)
    return result


def check_outcomes(outcomes: list):
    """Asserts that the damage is neither always fatal nor always harmless."""
    print(f"{len(outcomes)} files, {sum(outcomes)} read")
    assert 0 < sum(outcomes) < len(outcomes)


@pytest.mark.parametrize("kind", ["packed", "compressed", "from numpy"])
def test_damaged_images(tmp_path, kind):
    path, outcomes = tmp_path / "a.npz", []
    images, labels = np.arange(72, dtype=np.float32).reshape(3, 6, 4), np.array([0, 1, 2])
    if kind == "packed":
        write_npz(path, iter([images]), images.shape, images.dtype, labels, CLASSES, {"source": "test"})
    else:
        save = np.savez if kind == "from numpy" else np.savez_compressed
        save(path, images=images[:, None], labels=labels)
    whole = path.read_bytes()

    @FUZZ
    @given(archives(whole))
    def examine(data):
        dataset = read(open_npz, path, data, outcomes)
        if dataset is not None:
            n, height, width = dataset.images.shape
            assert n > 0 and height > 0 and width > 0 and dataset.images.dtype.kind in "uif"
            assert len(dataset.images.tobytes()) == dataset.images.nbytes  # touches every page of the map
            assert dataset.labels.shape == (n,) and dataset.labels.dtype == np.int32 and isinstance(dataset.info, dict)
            assert all(type(name) is str for name in dataset.classes)
            assert dataset.labels.min() >= 0 and dataset.labels.max() < len(dataset.classes)

    examine()
    check_outcomes(outcomes)


def test_damaged_images_in_folders(tmp_path):
    path, outcomes = tmp_path / "a.npy", []
    np.save(path, np.ones((1, 6, 4)))
    whole = path.read_bytes()

    @FUZZ
    @given(edited(whole) | headers(whole))
    def examine(data):
        image = read(load_image, path, data, outcomes)
        assert image is None or (image.ndim == 2 and image.dtype.kind in "uif" and np.isfinite(image).all())

    examine()
    check_outcomes(outcomes)


def test_damaged_networks(tmp_path):
    path, outcomes = tmp_path / "a.npz", []
    model = make_model(ModelConfig(depth=8, width=4), InputConfig(crop=16, pool=1), CLASSES)
    image = jax.ShapeDtypeStruct((1, 16, 16, 1), np.float32)
    variables = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), jax.eval_shape(model.init, jax.random.key(0), image))
    about = {"model": {"depth": 8, "width": 4, "projection": False, "dtype": "float32"}}
    about |= {"input": json.loads(to_json(model.input)), "classes": CLASSES, "image_shape": [20, 20], "version": "1"}
    arrays = {"/".join(key.key for key in keys): array for keys, array in jax.tree.leaves_with_path(variables)}
    shapes = jax.tree.map(np.shape, variables)

    @st.composite
    def networks(draw):
        text = draw(st.just(json.dumps(about).encode()) | edited(json.dumps(about).encode()) | jsons(about)).decode(
            "latin-1"
        )
        np.savez(buffer := io.BytesIO(), about=np.array(text), **arrays)
        return draw(st.just(buffer.getvalue()) | archives(buffer.getvalue()))

    @FUZZ
    @given(networks())
    def examine(data):
        network = read(load_network, path, data, outcomes)
        if network is not None:
            assert all(array.dtype == np.float32 for array in jax.tree.leaves(network.variables))
            assert jax.tree.map(np.shape, network.variables) == shapes and len(network.model.classes) == 3
        state_dict = read(load_state_dict, path, data, [])
        assert state_dict is None or all(array.dtype.kind in "uif" for array in state_dict.values())

    examine()
    check_outcomes(outcomes)


@st.composite
def jsons(draw, values: dict):
    """Draws JSON in which a field, at any depth, is something else, missing or called something else."""
    values = inner = json.loads(json.dumps(values))
    key = draw(st.sampled_from(sorted(inner)))
    while isinstance(inner[key], dict) and inner[key] and draw(st.integers(0, 4)):
        inner = inner[key]
        key = draw(st.sampled_from(sorted(inner)))
    simple = st.none() | st.booleans() | st.integers() | NUMBERS | st.floats() | st.text(max_size=5)
    some = st.recursive(simple, lambda inside: st.lists(inside) | st.dictionaries(st.text(max_size=5), inside))
    kind = draw(st.sampled_from(["value", "value", "missing", "name", "deep", "long"]))
    old = inner.pop(key)
    if kind == "value":
        inner[key] = draw(some)
    if kind == "name":
        inner[draw(st.text(max_size=9))] = old
    if kind in ("deep", "long"):
        inner[key] = "@"
    text = json.dumps(values)
    return text.replace('"@"', "[" * 10**4 if kind == "deep" else "1" * 5000).encode()


def test_damaged_configs(tmp_path):
    path, outcomes = tmp_path / "config.json", []
    create_run(tmp_path, RunInfo(PRESETS["best"], CLASSES, (150, 150)))
    whole = path.read_bytes()

    @FUZZ
    @given(edited(whole) | jsons(json.loads(whole)))
    def examine(data):
        info = read(lambda _: read_run(tmp_path), path, data, outcomes)
        if info is not None:
            assert isinstance(info.config, Config) and all(type(size) is int for size in info.image_shape)
            assert len(info.classes) > 0 and all(type(name) is str for name in info.classes)

    examine()
    check_outcomes(outcomes)

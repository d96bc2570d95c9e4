"""Damaged files are read correctly or refused by an InputError, with little memory and no other effect.

100 damaged files of each kind, the same each time. For more: GRAVLENS_FUZZ_EXAMPLES=5000 pytest tests/test_fuzz.py
"""

import io
import json
import math
import os
import random
import re
import tracemalloc
import zipfile
from functools import partial

import jax
import numpy as np
import pytest

from gravlens_jax.config import CLASSES, PRESETS, Config, InputConfig, ModelConfig
from gravlens_jax.errors import InputError
from gravlens_jax.folders import read_images
from gravlens_jax.model import make_model, variable_shapes
from gravlens_jax.npz import open_npz
from gravlens_jax.run_dir import RunInfo, create_run, read_run
from gravlens_jax.weights import Network, describe, load_network, write_network

EXAMPLES = int(os.environ.get("GRAVLENS_FUZZ_EXAMPLES", 100))
MEMORY_BYTES = 2**23  # limit for reading a damaged file of some kB
NUMBERS = [0, 1, 2, 3, 4, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1]
LENGTHS = [*NUMBERS, 1, 2, 3, 4, 6, 24, -1, -5, 10**12, 10**30, 2**62, True, 1.0, None, "3"]
TYPES = ["<f4", ">f8", "|u1", "<i8", "<f2", "|b1", "<c16", "|O", "<U0", "<U5", ">U2", "|S4", "<M8[s]", "|V9", "x", 3]
TYPES += [None, [("a", "<f4")], [("a", "|O", (3,))], ("<f4", (7, 7))]
NAMES = [
    "images.npy",
    "labels.npy",
    "classes.npy",
    "info.npy",
    "about.npy",
    "Y.npy",
    "images",
    "../labels.npy",
    "a/",
    "a\0.npy",
]
NAMES += ["Y.npy"]
VALUES = [*NUMBERS, -1, 10**30, 0.5, math.nan, -math.inf, None, True, "", "x", [], {}, [1, "a"], [[]], {"a": 1}]

pytestmark = pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")


def edited(rng, data):
    """Returns the bytes after a few changes, often in headers."""
    marks = [found.start() for found in re.finditer(b"PK[\1-\6]|\x93NUMPY", data)]
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        place = rng.choice([rng.randrange(len(data) + 1), *(mark + rng.randrange(60) for mark in marks)])
        size = rng.choice([1, 2, 4, 8])
        number = (rng.choice(NUMBERS) % 256**size).to_bytes(size, "little")
        before, after = data[:place], data[place:]
        changes = [
            before + rng.randbytes(1) + after[1:],
            before + number + after[size:],
            before + number + after,
            before + after[size:],
            before,
        ]
        data = rng.choice(changes)
    return data


def with_header(rng, data):
    """Returns an array with another header."""
    shape = tuple(rng.choices(LENGTHS, k=rng.choice([0, 1, 2, 3, 3, 4, 9])))
    header = {"descr": rng.choice(TYPES), "fortran_order": rng.random() < 0.5, "shape": shape}
    if rng.random() < 0.2:
        del header[rng.choice(sorted(header))]
    text = repr(header).encode()
    length, version = rng.choice([len(text), len(text), *NUMBERS]), rng.choice([1, 1, 1, 2, 3, 9])
    size = 2 if version == 1 else 4
    return b"\x93NUMPY" + bytes([version, 0]) + (length % 256**size).to_bytes(size, "little") + text + data[128:]


def damaged_archive(rng, whole):
    """Returns an archive that is damaged as a file, or an intact archive with damaged members, or both."""
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        members = [(info.filename, archive.read(info), info.compress_type) for info in archive.infolist()]
    i = rng.randrange(min(8, len(members)))
    name, data, method = member = members[i]
    changes = [
        [],
        [member],
        [member, member],
        [(rng.choice(NAMES), data, method)],
        [(name, data, rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2]))],
        [(name, edited(rng, data), method)],
        [(name, with_header(rng, data), method)],
    ]
    members[i : i + 1] = rng.choice(changes)
    if rng.random() < 0.1:
        members[0] = (members[0][0], members[0][1] + bytes(2 * MEMORY_BYTES), zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(buffer := io.BytesIO(), "w", compresslevel=1) as archive:
        for member in members:
            archive.writestr(*member)
    return rng.choice([edited(rng, whole), buffer.getvalue(), edited(rng, buffer.getvalue())])


def damaged_json(rng, text):
    """Returns JSON in which a field, at any depth, has another value or name, or is missing; or edited bytes."""
    values = inner = json.loads(text)
    key = rng.choice(sorted(inner))
    while isinstance(inner[key], dict) and inner[key] and rng.random() < 0.8:
        inner = inner[key]
        key = rng.choice(sorted(inner))
    old = inner.pop(key)
    if rng.random() < 0.8:
        inner[rng.choice([key, key, key, "x"])] = rng.choice([old, *VALUES, "@", "@@"])
    changed = json.dumps(values).replace('"@"', "[" * 10**4).replace('"@@"', "1" * 5000).encode()
    return rng.choice([changed, changed, edited(rng, text.encode())])


def read_damaged(reader, path, damage, examples=EXAMPLES):
    """Yields what the reader returns for damaged files, of which it must read some and refuse some."""
    read = 0
    for seed in range(examples):
        data, result = damage(random.Random(seed)), None
        path.write_bytes(data)
        path.with_suffix(".unpacked.npz").unlink(missing_ok=True)
        tracemalloc.start()
        try:
            result = reader(path)
        except InputError as error:
            assert path.name in str(error) or "=" in str(error), (seed, error)  # values are named by their field
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < MEMORY_BYTES + 4 * len(data), seed
        if result is not None:
            read += 1
            yield result
    assert 0 < read < examples


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_damaged_images(tmp_path, save):
    path = tmp_path / "a.npz"
    images = np.arange(72, dtype=np.float32).reshape(3, 1, 6, 4)
    save(path, images=images, labels=np.arange(3), classes=np.array(CLASSES), info=np.array('{"source": "test"}'))
    for dataset in read_damaged(open_npz, path, partial(damaged_archive, whole=path.read_bytes())):
        n, height, width = dataset.images.shape
        assert n > 0 and height > 0 and width > 0 and dataset.images.dtype.kind in "uif"
        assert len(dataset.images.tobytes()) == dataset.images.nbytes  # touches every page of the map
        assert dataset.labels.shape == (n,) and dataset.labels.dtype == np.int32 and isinstance(dataset.info, dict)
        assert all(type(name) is str for name in dataset.classes)
        assert dataset.labels.min() >= 0 and dataset.labels.max() < len(dataset.classes)


@pytest.mark.parametrize("name", ["a.npy", "a.fits", "a.fits.gz"])
def test_damaged_images_in_folders(tmp_path, name):
    path = tmp_path / name
    if name == "a.npy":
        np.save(path, np.ones((2, 6, 4)))
    else:
        pytest.importorskip("astropy.io.fits").PrimaryHDU(np.ones((2, 6, 4))).writeto(path)
    changes = [edited, with_header] if name == "a.npy" else [edited]
    whole = path.read_bytes()
    for images in read_damaged(lambda p: [*read_images(p)], path, lambda rng: rng.choice(changes)(rng, whole)):
        assert images
        for image in images:
            assert image.ndim == 2 and image.dtype.kind in "uif" and np.isfinite(image).all()


def test_damaged_networks(tmp_path):
    path = tmp_path / "a.npz"
    model = make_model(ModelConfig(depth=8, width=4), InputConfig(crop=16, pool=1), CLASSES)
    variables = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), variable_shapes(model))
    network = Network(model, variables, (20, 20))
    write_network(path, network, describe(network))
    arrays = dict(np.load(path))
    about = arrays.pop("about").item()

    def damage(rng):
        text = rng.choice([about, damaged_json(rng, about).decode("latin-1")])
        np.savez(buffer := io.BytesIO(), about=np.array(text), **arrays)
        return rng.choice([buffer.getvalue(), damaged_archive(rng, buffer.getvalue())])

    for network in read_damaged(load_network, path, damage, EXAMPLES // 3):  # slow
        assert all(array.dtype == np.float32 for array in jax.tree.leaves(network.variables))
        assert jax.tree.map(np.shape, network.variables) == jax.tree.map(np.shape, variables)
        assert len(network.model.classes) == 3


def test_damaged_configs(tmp_path):
    create_run(tmp_path, RunInfo(PRESETS["best"], CLASSES, (150, 150)))
    path = tmp_path / "config.json"
    for info in read_damaged(lambda _: read_run(tmp_path), path, partial(damaged_json, text=path.read_text())):
        assert isinstance(info.config, Config) and all(type(size) is int for size in info.image_shape)
        assert len(info.classes) > 0 and all(type(name) is str for name in info.classes)

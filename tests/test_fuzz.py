"""Damaged files are read correctly or refused by one InputError, with little memory and no other effect.

100 damaged files of each kind, the same each time. For more: GRAVLENS_FUZZ_EXAMPLES=5000 pytest tests/test_fuzz.py
"""

import io
import json
import math
import os
import random
import re
import zipfile
from functools import partial

import jax
import numpy as np
import pytest
from astropy.io import fits

from gravlens_jax.config import CLASSES, PRESETS, Config
from gravlens_jax.errors import InputError
from gravlens_jax.folders import Planes, load_npz, read_images
from gravlens_jax.network import Network, describe, load_network, write_network
from gravlens_jax.npz import Dataset, open_npz, read_rows
from gravlens_jax.run_files import RunInfo, create_run, read_run
from helpers import limited_memory, make_network
from pack import read_scaled

EXAMPLES = int(os.environ.get("GRAVLENS_FUZZ_EXAMPLES", 100))
MEMORY_BYTES = 2**23  # limit for reading a damaged file of some kB
NUMBERS = [0, 1, 2, 3, 4, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1]
LENGTHS = [*NUMBERS, 1, 2, 3, 4, 6, 24, -1, -5, 10**12, 10**30, 2**62, True, 1.0, None, "3"]
TYPES = ["<f4", ">f8", "|u1", "<i8", "<f2", "|b1", "<c16", "|O", "<U0", "<U5", ">U2", "|S4", "<M8[s]", "|V9", "x", 3]
TYPES += [None, [("a", "<f4")], [("a", "|O", (3,))], ("<f4", (7, 7))]
NAMES = ["images.npy", "labels.npy", "classes.npy", "info.npy", "about.npy", "Y.npy", "images", "../labels.npy", "a/"]
NAMES += ["a\0.npy", "Y.npy"]
VALUES = [*NUMBERS, -1, 10**30, 0.5, math.nan, -math.inf, None, True, "", "x", [], {}, [1, "a"], [[]], {"a": 1}]


def edited(rng, data):
    """Returns the bytes after a few changes, often in headers."""
    marks = [found.start() for found in re.finditer(b"PK[\1-\6]|\x93NUMPY", data)]
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        place = rng.choice([rng.randrange(len(data) + 1), *(mark + rng.randrange(60) for mark in marks)])
        size = rng.choice([1, 2, 4, 8])
        number = (rng.choice(NUMBERS) % 256**size).to_bytes(size, "little")
        before, after = data[:place], data[place:]
        changes = [rng.randbytes(1) + after[1:], number + after[size:], number + after, after[size:], b""]
        data = before + rng.choice(changes)
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
    renamed = rng.choice(NAMES), data, method
    packed = name, data, rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
    changed = [(name, damage(rng, data), method) for damage in (edited, with_header)]
    members[i : i + 1] = rng.choice([[], [member], [member, member], [renamed], [packed], *([x] for x in changed)])
    if rng.random() < 0.1:
        members[0] = (members[0][0], members[0][1] + bytes(2 * MEMORY_BYTES), zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(buffer := io.BytesIO(), "w", compresslevel=1) as archive:
        for member in members:
            archive.writestr(*member)
    return rng.choice([edited(rng, whole), buffer.getvalue(), edited(rng, buffer.getvalue())])


def damaged_json(rng, whole):
    """Returns JSON in which a field, at any depth, has another value or name, or is missing; or edited bytes."""
    values = inner = json.loads(whole)
    key = rng.choice(sorted(inner))
    while isinstance(inner[key], dict) and inner[key] and rng.random() < 0.8:
        inner = inner[key]
        key = rng.choice(sorted(inner))
    old = inner.pop(key)
    if rng.random() < 0.8:
        inner[rng.choice([key, key, key, "x"])] = rng.choice([old, *VALUES, "@", "@@"])
    changed = json.dumps(values).replace('"@"', "[" * 10**4).replace('"@@"', "1" * 5000).encode()
    return rng.choice([changed, changed, edited(rng, whole)])


def check_result(result):
    """Asserts that what was read of a damaged file is a valid data set, network, run or list of images."""
    if isinstance(result, Dataset):
        n, labels = len(result.images), result.labels
        assert n > 0 and labels.shape == (n,) and labels.dtype == np.int32 and isinstance(result.info, dict)
        assert labels.min() >= 0 and labels.max() < len(result.classes) and type(result.classes[0]) is str
        try:
            assert read_rows(result.images, slice(None)).shape == result.images.shape  # all bytes are in the file
        except InputError as error:
            assert "has NaN or infinite pixels" in str(error)
    elif isinstance(result, Network):
        assert all(array.dtype == np.float32 for array in jax.tree.leaves(result.variables))
        assert jax.tree.map(np.shape, result.variables) == jax.tree.map(np.shape, make_network().variables)
    elif isinstance(result, RunInfo):
        assert isinstance(result.config, Config) and {int} == {type(size) for size in result.image_shape}
        assert {str} == {type(name) for name in result.classes}
    else:
        assert len(result) and all(x.ndim == 2 and x.dtype.kind in "uif" and np.isfinite(x).all() for x in result)


def write_fits(path):
    fits.PrimaryHDU(STACK).writeto(path)


def write_tiny_network(path):
    write_network(path, make_network(), describe(make_network()))


def read_pair_file(path):
    return [x for (x,) in read_scaled([(path, 0)], Planes(), [])]


STACK, PAIR = np.ones((2, 6, 4)), np.array([np.ones((6, 4)), 1.0], object)
read_all = partial(read_images, planes=Planes(stack=True))
DATASET = {"images": np.arange(72, dtype=np.float32).reshape(3, 1, 6, 4), "labels": np.arange(3)}
DATASET |= {"classes": np.array(CLASSES), "info": np.array('{"source": "test"}')}
RUN = RunInfo(PRESETS["best"], CLASSES, (150, 150))
KINDS = {  # file -> how it is written, damaged and read
    "stored.npz": (lambda path: np.savez(path, **DATASET), damaged_archive, open_npz),
    "compressed.npz": (lambda path: np.savez_compressed(path, **DATASET), damaged_archive, load_npz),
    "a.npy": (lambda path: np.save(path, STACK), lambda rng, x: rng.choice([edited, with_header])(rng, x), read_all),
    "a.fits": (write_fits, edited, read_all),
    "a.fits.gz": (write_fits, edited, read_all),
    "pair.npy": (lambda path: np.save(path, PAIR), edited, read_pair_file),
    "net.npz": (write_tiny_network, damaged_archive, load_network),
    "config.json": (lambda path: create_run(path.parent, RUN), damaged_json, lambda path: read_run(path.parent)),
}


@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
@pytest.mark.parametrize("name", KINDS)
def test_damaged_files_are_read_correctly_or_refused(tmp_path, monkeypatch, name):
    (write, damage, read), path, results = KINDS[name], tmp_path / name, 0
    monkeypatch.chdir(tmp_path)
    write(path)
    files, whole = sorted(tmp_path.iterdir()), path.read_bytes()
    examples = EXAMPLES // 3 if name == "net.npz" else EXAMPLES  # slow
    for seed in range(examples):
        data, result = damage(random.Random(seed), whole), None
        path.write_bytes(data)
        with limited_memory(MEMORY_BYTES + 4 * len(data)):
            try:
                result = read(path)
            except InputError as error:
                assert path.name in str(error) or "=" in str(error), (seed, error)  # values are named by their field
        assert sorted(tmp_path.iterdir()) == files
        if result is not None:
            check_result(result)
            results += 1
    assert 0 < results < examples

import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from gravlens_jax.errors import InputError
from gravlens_jax.files import locked


def test_folder_in_use_is_refused(tmp_path):
    with locked(tmp_path), pytest.raises(InputError, match=f"in use by another process .process {os.getpid()} on"):
        locked(tmp_path).__enter__()
    with locked(tmp_path):  # it is free again
        pass


def test_folder_in_use_is_waited_for_if_asked(tmp_path, capsys):
    with ThreadPoolExecutor(1) as pool:
        with locked(tmp_path):
            waiting = pool.submit(locked(tmp_path, wait=True).__enter__)
            while not (err := capsys.readouterr().err):
                assert not waiting.done()
        waiting.result(timeout=60)
    owner = f"process {os.getpid()} on {os.uname().nodename}"
    assert err == f"{tmp_path} is in use by another process ({owner}); waiting until it is done\n"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_folder_is_an_input_error(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match="Permission denied"), locked(tmp_path / "run"):
        pass

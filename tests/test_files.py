import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from gravlens_jax.files import locked
from helpers import refuse


def test_folder_in_use_is_refused_or_waited_for_if_asked(tmp_path, capsys):
    with ThreadPoolExecutor(1) as pool:
        with locked(tmp_path):
            refuse(f"in use by another process .process {os.getpid()} on", locked(tmp_path).__enter__)
            waiting = pool.submit(locked(tmp_path, wait=True).__enter__)
            while not (err := capsys.readouterr().err):
                assert not waiting.done()
        waiting.result(timeout=60)
    owner = f"process {os.getpid()} on {os.uname().nodename}"
    assert err == f"{tmp_path} is in use by another process ({owner}); waiting until it is done\n"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_folder_is_an_input_error(tmp_path):
    tmp_path.chmod(0o500)
    refuse("Permission denied", locked(tmp_path / "run").__enter__)

"""What the scripts share."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gravlens_jax.cli import HUGE_PAGES


def test_a_program_starts_anew_once_where_linux_gives_huge_pages_to_those_who_ask():
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.exists() or "[madvise]" not in setting.read_text():
        pytest.skip("needs a Linux that gives huge pages to those who ask")
    code = "import os; from gravlens_jax import cli; cli.use_huge_pages(); print(os.environ['GLIBC_TUNABLES'])"
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True).stdout.strip() == HUGE_PAGES

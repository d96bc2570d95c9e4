"""What the scripts share: a mistake of the user's ends in one paragraph and exit status 2, without a traceback."""

import sys
from collections.abc import Callable
from typing import Any

import tyro

from gravlens_jax.config import InputError


def run(main: Callable[[], Any]) -> None:
    """Calls `main`; turns InputError into exit status 2, a loss that is not finite into 1, Ctrl-C into 130."""
    try:
        main()
    except InputError as error:
        _stop(f"error: {error}", 2)
    except FloatingPointError as error:
        _stop(f"error: {error}", 1)
    except KeyboardInterrupt:
        _stop("interrupted", 130)


def run_function(function: Callable[..., Any]) -> None:
    """Calls `function` with arguments from the command line; its signature and docstring are the help."""
    run(lambda: tyro.cli(function))


def _stop(message: str, status: int) -> None:
    print(message, file=sys.stderr)
    raise SystemExit(status)

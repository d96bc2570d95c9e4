"""What the scripts share: a mistake of the user's ends in one paragraph and exit status 2, without a traceback."""

import os
import sys
from collections.abc import Callable
from typing import Any

import tyro

from gravlens_jax.config import InputError, check


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
    except BrokenPipeError:  # the reader of our output, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run_function(function: Callable[..., Any]) -> None:
    """Calls `function` with arguments from the command line; its signature and docstring are the help."""
    run(lambda: tyro.cli(function))


def split_names(text: str) -> tuple[str, ...]:
    """Returns the class names of a comma-separated list: at least two, all different."""
    names = tuple(name.strip() for name in text.split(","))
    check(
        len(names) >= 2 and all(names) and len(set(names)) == len(names),
        f"--classes {text}: expected at least two different names separated by commas, such as no,sphere,vort",
    )
    return names


def _stop(message: str, status: int) -> None:
    print(message, file=sys.stderr)
    raise SystemExit(status)

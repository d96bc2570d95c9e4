"""What the scripts share: a mistake of the user's ends in one paragraph and exit status 2, without a traceback."""

import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro

from gravlens_jax.config import InputError, check
from gravlens_jax.signals import Stopped

Source = Annotated[
    Path,
    tyro.conf.Positional,
    tyro.conf.arg(
        metavar="RUN",
        help="directory made by train.py or import_torch.py, .npz made by export.py, or the word pretrained",
    ),
]
HUGE_PAGES = "glibc.malloc.hugetlb=1"


def run(main: Callable[[], Any]) -> None:
    """Calls `main`; turns what ends it early into one paragraph and an exit status.

    InputError, or a file or an output that cannot be read or written: 2; a loss that is not finite, or the loss of
    another process of the same run: 1; SIGINT (Ctrl-C): 130; SIGTERM: 143.
    """
    signal.signal(signal.SIGTERM, _terminate)
    silence_orbax()
    try:
        main()
        sys.stdout.flush()
    except InputError as error:
        _stop(f"error: {error}", 2)
    except FloatingPointError as error:
        _stop(f"error: {error}", 1)
    except (jax.errors.JaxRuntimeError, ValueError) as error:  # either is what a lost connection raises
        if not jax.distributed.is_initialized():
            raise
        reason = " ".join(str(error).split())[:200]
        _stop(
            "error: another process of this run has ended or cannot be reached; what was saved is intact. Start all "
            f"processes again with --resume ({reason})",
            1,
        )
    except Stopped as stopped:
        _stop(str(stopped), 128 + stopped.number)
    except KeyboardInterrupt:
        _stop("interrupted", 130)
    except BrokenPipeError:  # the reader of our output, such as head, has seen enough
        _discard_output()
    except OSError as error:
        _discard_output()  # it may be the output itself that fills a disk
        _stop(f"error: {error}; free space, mend the permissions or choose another place", 2)


def use_huge_pages() -> None:
    """Starts the program anew with huge memory pages, on a Linux that gives them to those who ask.

    XLA's large temporary arrays are new memory in every step; with huge pages a training step on a CPU takes a fifth
    less time. glibc reads this setting only when a program starts. A GLIBC_TUNABLES that is set already is respected.
    """
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if "GLIBC_TUNABLES" not in os.environ and setting.exists() and "[madvise]" in setting.read_text():
        os.environ["GLIBC_TUNABLES"] = HUGE_PAGES
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def use_compile_cache() -> None:
    """Keeps compiled programs in the user's cache folder, so that the next run starts at once.

    A cache that is set already (JAX_COMPILATION_CACHE_DIR) is respected.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "gravlens_jax"
        jax.config.update("jax_compilation_cache_dir", str(folder))


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


def silence_orbax() -> None:
    """Hides what each of Orbax's threads and tasks prints, beside the error that we catch, when a disk is full."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)

    def show_others(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            sys.__unraisablehook__(unraisable)

    sys.unraisablehook = show_others
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)


def _terminate(number: int, _: Any) -> None:
    raise SystemExit(128 + number)  # on the way out temporary files are removed


def _discard_output() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _stop(message: str, status: int) -> None:
    print(message, file=sys.stderr, flush=True)
    if jax.distributed.is_initialized():  # an ordinary exit would wait for processes that wait for this one
        sys.stdout.flush()
        os._exit(status)
    raise SystemExit(status)

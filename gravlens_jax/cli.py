"""The command `gravlens`, and what the scripts share. It imports no JAX by itself, so that every --help is fast."""

import ast
import io
import logging
import os
import platform
import re
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import tyro

from gravlens_jax import __version__
from gravlens_jax.errors import InputError, check
from gravlens_jax.folders import Planes
from gravlens_jax.progress import Stopped

HELP = "directory made by train.py or import_torch.py, .npz made by export.py or finetune.py, or the word pretrained"
Run = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN", help=HELP)]
PlaneOptions = Annotated[Planes, tyro.conf.arg(name=""), tyro.conf.FlagCreatePairsOff]
HUGE_PAGES = "glibc.malloc.hugetlb=1"
CPU_FLAGS = (  # the first moves convolutions to oneDNN, the second keeps another library from taking them before
    "--xla_cpu_experimental_onednn_custom_call=true --xla_cpu_experimental_ynn_fusion_type=-individual_convolution"
)
OUT_OF_MEMORY = "RESOURCE_EXHAUSTED|out of memory|Failed to determine best cudnn convolution algorithm"
LOST_CONNECTION = "UNAVAILABLE|DEADLINE_EXCEEDED|gloo|heartbeat|connection|socket|coordination service|barrier|peer"


def main() -> None:
    """Runs `gravlens COMMAND ...`, which is `python scripts/COMMAND.py ...`."""
    package = Path(__file__).parent
    folders = package / "commands", package.parent / "scripts"  # of a wheel, and of a clone: see pyproject.toml
    scripts = {path.stem: path for path in sorted(next(f for f in folders if f.is_dir()).glob("*.py"))}
    word = sys.argv[1] if len(sys.argv) > 1 else "--help"
    path = scripts.get(word.replace("-", "_"))
    if path is None:
        run(lambda: _print_commands(word, scripts))
        return
    sys.argv[:2] = [f"gravlens {word}"]  # the name in its usage; runpy would replace it by the path
    sys.path.append(str(path.parent))  # for `import bench`; last, so that no script hides a package of its name
    script = sys.modules["__main__"] = ModuleType("__main__")
    script.__file__ = str(path)  # where the processes of benchmarks, and tyro's help, find it
    exec(compile(path.read_bytes(), path, "exec"), vars(script))


def _print_commands(word: str, scripts: dict[str, Path]) -> None:
    if word == "--version":
        print(f"gravlens_jax {__version__}")
        return
    check(word in ("-h", "--help"), f"gravlens {word}: no such command; expected one of {', '.join(scripts)}")
    print("usage: gravlens COMMAND ... (gravlens COMMAND --help shows its options; gravlens --version)\n")
    for name, path in scripts.items():
        print(f"  {name:15} {(ast.get_docstring(ast.parse(path.read_bytes())) or '').partition(chr(10))[0]}")


def run(main: Callable[[], Any]) -> None:
    """Calls `main`; turns expected errors and signals into one message and an exit status.

    InputError, a file or an output that cannot be read or written, a missing device or too little memory: 2;
    FloatingPointError (a loss or a parameter is not finite), or a lost connection to another process of the run: 1;
    SIGINT (Ctrl-C): 130; SIGTERM: 143; SIGHUP: 129.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what the terminal's encoding lacks is printed as \\xe9, for example
            stream.reconfigure(errors="backslashreplace")
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup makes SIGHUP
            signal.signal(number, _handle)
    os.environ.pop("MPLBACKEND", None)  # figures need none, and a notebook's may not be installed here
    silence_orbax()
    try:
        main()
        sys.stdout.flush()
    except (AssertionError, FloatingPointError, RuntimeError, ValueError) as error:
        if (explained := _explain(error)) is None:
            raise
        _stop(f"error: {explained[0]}", explained[1])
    except Stopped as stopped:
        _stop(str(stopped), 128 + stopped.number)
    except KeyboardInterrupt:
        _stop("interrupted", 130)
    except BrokenPipeError:  # the reader of our output, such as head, has closed it
        _discard_output()
    except OSError as error:
        _discard_output()  # the output itself may be what fills a disk
        _stop(f"error: {error}; free disk space, fix the permissions or choose another place", 2)


def _handle(number: int, _: Any) -> None:
    """Removes temporary files and exits, except at SIGUSR1: between training steps see `progress.recorded_signals`."""
    if number != signal.SIGUSR1:
        sys.exit(128 + number)


def _explain(error: Exception) -> tuple[str, int] | None:
    """Returns message and status for an error of the user's or a known one of JAX; None for any other error."""
    if isinstance(error, InputError | FloatingPointError):
        return str(error), 2 if isinstance(error, InputError) else 1
    text = " ".join(str(error).split())
    in_backend = traceback.extract_tb(error.__traceback__)[-1].filename.endswith("xla_bridge.py")
    if text.startswith("Unable to initialize backend") or (in_backend and isinstance(error, AssertionError)):
        reason = text.partition(" (set JAX_PLATFORMS")[0] or "none found"
        advice = 'unset it to use any device, or install its driver and "gravlens_jax[cuda12]", [cuda13] or [tpu]'
        return f"JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS')}: this device cannot be used ({reason}); {advice}", 2
    if re.search(OUT_OF_MEMORY, text, re.IGNORECASE):
        advice = "train with a smaller --batch-size or without --device-data, set XLA_PYTHON_CLIENT_PREALLOCATE=false"
        advice += " if other programs use the device, or JAX_PLATFORMS=cpu"
        return f"the device has too little memory ({text[:200]}); {advice}", 2
    if _several_processes() and re.search(LOST_CONNECTION, text, re.IGNORECASE):
        message = "another process of this run has ended or cannot be reached; saved checkpoints are intact"
        return f"{message}. Start all processes again with --resume ({text[:200]})", 1
    return None


def _several_processes() -> bool:
    return "jax" in sys.modules and sys.modules["jax"].distributed.is_initialized()


def set_environment() -> None:
    """Restarts the program, once, with the `fast_environment` if it has another one."""
    if wanted := fast_environment():
        os.environ |= wanted
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def fast_environment() -> dict[str, str]:
    """Returns the environment variables, read only at program start, that make training fast and are not set yet.

    GLIBC_TUNABLES, on Linux systems that provide huge memory pages on request (madvise): XLA allocates large temporary
    arrays in every step; with huge pages a training step on a CPU takes a fifth less time.
    XLA_FLAGS, for the version of jaxlib where it was measured: convolutions by oneDNN, which is in that version but
    off. A training step on a CPU with AVX-512 takes a fifth less time; one with AVX2 as long as before. The compile
    cache cannot keep such programs: each start compiles them, which takes seconds.
    TF_CPP_MIN_LOG_LEVEL, for versions that print an error about each cached program with AVX-512: jax issue 38445.
    """
    wanted = {}
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if "GLIBC_TUNABLES" not in os.environ and setting.exists() and "[madvise]" in setting.read_text():
        wanted["GLIBC_TUNABLES"] = HUGE_PAGES
    if "XLA_FLAGS" not in os.environ and has_cpu_flags():
        wanted["XLA_FLAGS"] = CPU_FLAGS
    numbers = tuple(int(number) for number in version("jax").split(".")[:3])
    if (0, 9, 1) <= numbers <= (0, 10, 1) and os.environ.get("TF_CPP_MIN_LOG_LEVEL", "1") == "1":  # JAX sets it to 1
        wanted["TF_CPP_MIN_LOG_LEVEL"] = "3"
    return wanted


def has_cpu_flags() -> bool:
    """Whether this is the jaxlib that CPU_FLAGS were measured with; others may abort at unknown flags."""
    return (sys.platform, platform.machine()) == ("linux", "x86_64") and version("jaxlib").startswith("0.12.0")


def use_compile_cache() -> None:
    """Keeps compiled programs in the user's cache folder, unless JAX_COMPILATION_CACHE_DIR is set."""
    import jax

    if os.environ.get("XLA_FLAGS") == CPU_FLAGS and jax.default_backend() == "cpu":  # see `fast_environment`
        warnings.filterwarnings("ignore", "Error writing persistent compilation cache", UserWarning)
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        base = Path(os.environ.get("XDG_CACHE_HOME", ""))  # the XDG specification ignores relative paths
        base = base if base.is_absolute() else Path.home() / ".cache"
        jax.config.update("jax_compilation_cache_dir", str(base / "gravlens_jax"))


def run_function(function: Callable[..., Any]) -> None:
    """Calls `function` with arguments from the command line; its signature and docstring are the help."""
    run(lambda: tyro.cli(function))


def parse_classes(text: str) -> dict[str, str]:
    """Returns the classes of a --classes option: name in the network -> name in the data (of a folder, for example).

    `no,sphere` means that both are the same; `no=no_sub,sphere=cdm` gives both. At least two, all different.
    """
    pairs = [name.partition("=") for name in text.split(",")]
    classes = {name.strip(): (in_data if equals else name).strip() for name, equals, in_data in pairs}
    right = len(classes) == len(set(classes.values())) == len(pairs) >= 2 and all(classes) and all(classes.values())
    expected = "at least two different names separated by commas, such as no,sphere,vort or no=no_sub,sphere=cdm"
    check(right, f"--classes {text}: expected {expected}")
    return classes


def silence_orbax() -> None:
    """Hides what Orbax's threads and tasks print on a full disk, in addition to the error that we catch."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    sys.unraisablehook = lambda x: None if str(x.exc_value) == "Event loop is closed" else sys.__unraisablehook__(x)
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)


def _discard_output() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _stop(message: str, status: int) -> None:
    print(message, file=sys.stderr, flush=True)
    if _several_processes():  # a normal exit would wait for processes that wait for this one
        sys.stdout.flush()
        os._exit(status)
    raise SystemExit(status)

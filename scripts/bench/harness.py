"""How all benchmarks measure and print. Importing it imports no jax."""

import json
import os
import platform
import time
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from multiprocessing import get_context
from string import Formatter
from typing import Any, TypeVar

from gravlens_jax.errors import check

Row = dict[str, Any]  # a line of a table, and an object in JSON
Run = Callable[[int, int], list[float]]  # (warmup, steps) -> seconds of each of `steps` steps
Key = TypeVar("Key", bound=Hashable)


def check_least(least: int, **values: int | tuple[int, ...] | None) -> None:
    """Raises InputError unless each value, and every number of a tuple of one or more, is at least `least`, or None."""
    for name, value in values.items():
        numbers = value if isinstance(value, tuple) else (least if value is None else value,)
        check(len(numbers) > 0 and min(numbers) >= least, f"{name}={value}: expected at least {least}")


def time_calls(function: Callable[[], Any], warmup: int, calls: int) -> list[float]:
    """Returns the sorted seconds of `calls` calls of `function` after `warmup` others; each waits for its result."""
    from jax import block_until_ready

    seconds = []
    for _ in range(warmup + calls):
        start = time.perf_counter()
        block_until_ready(function())
        seconds.append(time.perf_counter() - start)
    return sorted(seconds[warmup:])


def alternate(cases: Iterable[Key], measure: Callable[[Key], Any], repeats: int) -> dict[Key, list[Any]]:
    """Returns the results of `measure` for each case; the cases take turns, so that all see the same machine."""
    results: dict[Key, list[Any]] = {case: [] for case in cases}
    for _ in range(repeats):
        for case, some in results.items():
            some.append(measure(case))
    return results


def time_runs(runs: dict[Key, Run], warmup: int, steps: int, repeats: int) -> dict[Key, list[float]]:
    """Returns the seconds of all steps of each run; the runs take turns, `repeats` times `steps` steps."""
    seconds = alternate(runs, lambda key: runs[key](warmup, steps), repeats)
    return {key: [second for run in some for second in run] for key, some in seconds.items()}


def worker() -> ProcessPoolExecutor:
    """Returns a new process, which starts with its first call."""
    return ProcessPoolExecutor(1, get_context("spawn"))


def call_apart(function: Callable[..., Any], *calls: tuple[Any, ...]) -> list[Any]:
    """Returns the results of `function` for each of `calls`, its arguments: all at once, each in a new process."""
    with ExitStack() as stack:
        futures = [stack.enter_context(worker()).submit(function, *arguments) for arguments in calls]
        return [future.result() for future in futures]


def table(rows: Iterable[Row], columns: str) -> list[Row]:
    """Prints rows as a table, each as soon as it is measured; returns them.

    Args:
      rows: values by name.
      columns: the titles, each followed by its value as a replacement field: "code     {code}  seconds{time:.3g}". A
        column is as wide as its title, to the left if this ends with a space. "-" stands for a value that a row lacks.
    """
    fields = [(title, name or "", spec or "") for title, name, spec, _ in Formatter().parse(columns)]
    print(*(title for title, _, _ in fields), sep="", flush=True)
    done = []
    for row in rows:
        print(*(_cell(row, *field) for field in fields), sep="", flush=True)
        done.append(row)
    return done


def _cell(row: Row, title: str, name: str, spec: str) -> str:
    try:
        text = format(Formatter().get_field(name, (), row)[0], spec)
    except KeyError:
        text = "-"
    if title.endswith(" "):
        return (" " * (len(title) - len(title.lstrip())) + text).ljust(len(title))
    return text.rjust(len(title))


def as_json(benchmark: str, rows: list[Row], **facts: Any) -> str:
    """Returns a benchmark as one JSON object: its rows, other facts, and what measurements depend on here."""
    import jax
    import numpy as np

    machine = {
        "device_kind": jax.devices()[0].device_kind,
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "matmul_precision": jax.config.values["jax_default_matmul_precision"] or "default",
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "huge_pages": os.environ.get("GLIBC_TUNABLES", ""),
        "versions": {"jax": jax.__version__, "numpy": np.__version__, "python": platform.python_version()},
    }
    return json.dumps({"benchmark": benchmark, "rows": rows} | facts | machine)

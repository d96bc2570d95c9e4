"""How all benchmarks measure and print. Importing it imports no jax."""

import json
import time
from collections.abc import Callable, Iterable
from math import inf
from pathlib import Path
from string import Formatter
from typing import Any

from bench.facts import describe, machine_facts, utc_time
from gravlens_jax.errors import check
from gravlens_jax.files import check_folder

SCHEMA = 1

Row = dict[str, Any]  # a line of a table, and an object in JSON
Run = Callable[..., list[float]]  # (warmup, calls) -> seconds of each of `calls` calls


def check_least(least: int, **values: int | tuple[int, ...]) -> None:
    """Raises InputError unless each value, and every number of a tuple of one or more, is at least `least`."""
    for name, value in values.items():
        numbers = value if isinstance(value, tuple) else (value,)
        check(len(numbers) > 0 and min(numbers) >= least, f"{name}={value}: expected at least {least}")


def time_calls(function: Callable[[], Any], warmup: int, calls: int, most_seconds: float = inf) -> list[float]:
    """Returns the sorted seconds of `calls` calls of `function` after `warmup` others; each waits for its result.

    Each of both takes at most about `most_seconds`, with fewer calls if need be, but at least one.
    """
    from jax import block_until_ready

    seconds: list[float] = []
    for count in (warmup, calls):
        seconds = []
        while len(seconds) < count and sum(seconds) < most_seconds:
            start = time.perf_counter()
            block_until_ready(function())
            seconds.append(time.perf_counter() - start)
    return sorted(seconds)


def alternate(cases: Iterable[Any], measure: Callable[[Any], Any], repeats: int) -> dict[Any, list[Any]]:
    """Returns the results of `measure` for each case; the cases take turns, so that all see the same machine."""
    results: dict[Any, list[Any]] = {case: [] for case in cases}
    for _ in range(repeats):
        for case, some in results.items():
            some.append(measure(case))
    return results


def report(benchmark: str, rows: Iterable[Row], columns: str, json_file: Path) -> None:
    """Prints rows as a Markdown table, and appends each as a line of JSON to a file.

    Both is done as soon as a row is measured. A line of JSON holds the row's values, `machine_facts` and SCHEMA, the
    version of its keys: a key never changes its meaning.

    Args:
      benchmark: its name.
      rows: values by name, measured when they are requested.
      columns: the titles, each followed by its value as a replacement field: "code     {code} seconds{time:.3g}". A
        column is as wide as its title, to the left if this ends with a space. "-" stands for a value that a row lacks.
      json_file: where the lines are added.
    """
    check_folder(json_file)
    count, facts = 0, dict[str, Any]()
    fields = [(title, name or "", spec or "") for title, name, spec, _ in Formatter().parse(columns)]
    print("|", " | ".join(title for title, _, _ in fields), "|")
    rules = ["-" * len(title) + ("--" if title.endswith(" ") else "-:") for title, _, _ in fields]
    print("|" + "|".join(rules) + "|", flush=True)
    try:
        with json_file.open("a") as file:
            for row in rows:
                print("|", " | ".join(_cell(row, *field) for field in fields), "|", flush=True)
                count += 1
                facts = facts or machine_facts()
                assert not row.keys() & facts.keys(), row.keys() & facts.keys()
                line = {"schema": SCHEMA, "benchmark": benchmark, "time": utc_time()} | row | facts
                print(json.dumps(line), file=file, flush=True)
    finally:  # also if it is cut short
        if facts:
            print(f"\n{describe(facts)}\n{count} lines added to {json_file}", flush=True)


def _cell(row: Row, title: str, name: str, spec: str) -> str:
    try:
        text = format(Formatter().get_field(name, (), row)[0], spec)
    except KeyError:
        text = "-"
    return text.ljust(len(title)) if title.endswith(" ") else text.rjust(len(title))

"""Progress on a terminal; plain lines where the output is none."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from gravlens_jax.mesh import is_main


def progress_bar() -> Progress:
    """Returns a rich progress bar with a count, a free text and the time left; silent where there is no terminal.

    80 columns hold it if the text has 34.
    """
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=8),
        MofNCompleteColumn(),
        TextColumn("{task.fields[text]}"),
        TimeRemainingColumn(compact=True),
        TextColumn("left"),
        disable=not (sys.stdout.isatty() and is_main()),
        speed_estimate_period=120,
    )


def track(items: Iterable, name: str, total: int) -> Iterator[Any]:
    """Yields `items` (arrays of images, or one file each) and shows how many of `total` images are done."""
    start, done = time.perf_counter(), 0
    with progress_bar() as bar:
        task = bar.add_task(name, total=total, text="")
        for item in items:
            yield item
            done += len(item) if hasattr(item, "shape") else 1
            rate = done / (time.perf_counter() - start)
            bar.update(task, completed=done, text=f"images {rate:,.0f}/s")
    print(f"{name}: {done:,} images in {time.perf_counter() - start:.0f} s")

# SPDX-License-Identifier: Apache-2.0
"""Progress bars of steps that come one after the other, on a terminal; elsewhere a line a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from enclavekit.cli.output import Output
from enclavekit.runtime import Progress


@contextmanager
def steps(output: Output) -> Iterator[Callable[[Progress], None]]:
    """A function to tell progress to."""
    console = output.stderr
    tasks: dict[str, TaskID] = {}
    said: set[str] = set()
    if not console.is_terminal or output.quiet:

        def tell(progress: Progress) -> None:
            if progress.step not in said:
                said.add(progress.step)
                output.say(progress.step)

        yield tell
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
    )
    with Bars(*columns, console=console) as bars:

        def show(progress: Progress) -> None:
            if progress.step not in tasks:
                for task in tasks.values():
                    bars.update(task, completed=1.0)
                tasks[progress.step] = bars.add_task(progress.step, total=1.0)
            bars.update(tasks[progress.step], completed=progress.fraction or 0.0)

        yield show
        for task in tasks.values():
            bars.update(task, completed=1.0)

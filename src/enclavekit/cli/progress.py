# SPDX-License-Identifier: Apache-2.0
"""Progress of an installation, and of layers that are fetched: bars on a terminal, elsewhere a line a stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from enclavekit.cli.output import Output
from enclavekit.runtime import Progress


@contextmanager
def bars(output: Output) -> Iterator[Callable[[Progress], None]]:
    """A function to tell progress to."""
    console = output.stderr
    if not console.is_terminal or output.quiet:
        said: set[str] = set()

        def tell(progress: Progress) -> None:
            line = _line(progress)
            if line not in said:
                said.add(line)
                output.say(line)

        yield tell
        return
    from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
    )
    with Bars(*columns, console=console) as shown:
        tasks: dict[str, TaskID] = {}

        def finish() -> None:
            for task in tasks.values():
                shown.update(task, total=1.0, completed=1.0)

        def show(progress: Progress) -> None:
            line = _line(progress)
            if line not in tasks:
                finish()
                tasks[line] = shown.add_task(line, total=None if progress.fraction is None else 1.0)
            shown.update(tasks[line], completed=progress.fraction or 0.0)

        yield show
        finish()


def _line(progress: Progress) -> str:
    return f"{progress.stage}: {progress.text}"


@contextmanager
def layer_bars(output: Output) -> Iterator[Callable[[str, int, int], None]]:
    """A function to tell a layer's progress to: its name, bytes so far, bytes in all. Only a terminal shows it."""
    console = output.stderr
    if not console.is_terminal or output.quiet:
        yield lambda name, done, size: None
        return
    from rich.progress import BarColumn, DownloadColumn, TaskID, TextColumn, TransferSpeedColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Bars(*columns, console=console, transient=True) as shown:
        tasks: dict[str, TaskID] = {}

        def show(name: str, done: int, size: int) -> None:
            if name not in tasks:
                tasks[name] = shown.add_task(name.rpartition(": ")[2], total=size)
            shown.update(tasks[name], completed=done)

        yield show

# SPDX-License-Identifier: Apache-2.0
"""``enclave ps``, ``logs``, ``console``, ``wait``, ``stop``, ``connect``: the life of enclaves that run."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import sys
import time
from pathlib import Path
from typing import Any

import click

from enclavekit import vsock
from enclavekit.cli.describe import status_of
from enclavekit.cli.options import output_options
from enclavekit.cli.output import Exit, Output
from enclavekit.enclave.control import ask
from enclavekit.enclave.directory import CONSOLE, OUTPUT, State, ended, find, is_running, running
from enclavekit.enclave.log_file import read_log
from enclavekit.environment import runtime_directory
from enclavekit.errors import NoEnclaveError, UsageError
from enclavekit.virtio.host_sockets import MAX_PORT

CHUNK = 1 << 16
STOP_MARGIN_S = 30.0
SHOWN = ("id", "name", "cid", "state", "image")


@click.command()
@click.option("-a", "--all", "also_ended", is_flag=True, help="Those that have ended, too.")
@output_options
def ps(also_ended: bool, output: Output) -> None:
    """Enclaves that run."""
    directory = runtime_directory()
    states = [status_of(directory / str(state["id"]), state) for state in running(directory)]
    if also_ended:
        states = [*ended(directory), *states]
    output.show({"schema": 1, "enclaves": states}, lambda console: _table(console, states))


def _table(console: Any, states: list[State]) -> None:
    rows = [("ID", "NAME", "CID", "STATE", "AGE", "MEMORY", "IMAGE")]
    for state in states:
        # Its own count first: the clock of the day may have been set in between.
        age = state.get("uptime_s")
        if not isinstance(age, int | float):
            age = float(state.get("ended") or time.time()) - float(state.get("started") or 0)
        what = _ending(state) if state.get("state") == "ended" else str(state.get("state"))
        memory = f"{int(state.get('memory') or 0) >> 20} MiB"
        rows.append(
            (
                str(state["id"]),
                str(state["name"]),
                str(state["cid"]),
                what,
                _age(age),
                memory,
                str(state.get("image", "")),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(6)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        console.print("  ".join([*cells, row[6]]).rstrip(), markup=False)


def _ending(state: State) -> str:
    reason = str(state.get("reason"))
    if state.get("exit_code") is not None:
        return f"{reason} {state['exit_code']}"
    return f"{reason} {state['signal']}" if state.get("signal") is not None else reason


def _age(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f}{unit}"
    return f"{max(seconds, 0):.0f}s"


def _show_log(named: str, file: str, follow: bool) -> None:
    path, _ = find(runtime_directory(), named, also_ended=True)
    out = sys.stdout.buffer
    for chunk in read_log(path / file, more=(lambda: is_running(path)) if follow else (lambda: False)):
        out.write(chunk)
        out.flush()


@click.command()
@click.argument("name")
@click.option("-f", "--follow", is_flag=True, help="Go on as long as it runs.")
@output_options
def logs(name: str, follow: bool, output: Output) -> None:
    """What an enclave's application has written, if its image gives that (`build --logs`); also when it has ended."""
    del output
    _show_log(name, OUTPUT, follow)


@click.command()
@click.argument("name")
@click.option("--no-follow", is_flag=True, help="What there is, and no more.")
@output_options
def console(name: str, no_follow: bool, output: Output) -> None:
    """The serial console of an enclave in debug mode; also of one that has ended."""
    del output
    _, state = find(runtime_directory(), name, also_ended=True)
    if state.get("mode") != "debug":
        raise UsageError(f"enclave {name}: runs in production mode, which has no console", hint="enclave run --debug")
    _show_log(name, CONSOLE, not no_follow)


@click.command()
@click.argument("name")
@output_options
def wait(name: str, output: Output) -> int:
    """Wait for an enclave's end, and exit as `run` would.

    With its application's status, 128+n when signal n ended it, and otherwise 125.
    """
    directory = runtime_directory()
    path, state = find(directory, name, also_ended=True)
    if state.get("state") != "ended":
        with contextlib.suppress(NoEnclaveError):  # it has just ended
            ask(path, {"command": "wait"}, timeout_s=None)
        state = _ended_state(directory, state)
    return _report(state, output)


@click.command()
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@click.option(
    "--grace",
    type=click.FloatRange(0, 86400),
    default=5.0,
    show_default=True,
    metavar="S",
    help="Between the signal and the end by force.",
)
@output_options
def stop(names: tuple[str, ...], grace: float, output: Output) -> None:
    """Ask enclaves' applications to end, then end the enclaves, and wait for that."""
    directory = runtime_directory()
    found = [find(directory, name) for name in names]
    for path, _ in found:
        with contextlib.suppress(NoEnclaveError):
            ask(path, {"command": "stop", "grace_s": grace})
    states = []
    for path, state in found:
        with contextlib.suppress(NoEnclaveError):
            ask(path, {"command": "wait"}, timeout_s=grace + STOP_MARGIN_S)
        states.append(_ended_state(directory, state))
    output.show(
        {"schema": 1, "enclaves": states},
        lambda console: console.print("\n".join(f"{one['name']}: {_ending(one)}" for one in states), markup=False),
    )


def _ended_state(directory: Path, before: State) -> State:
    """How it ended; of one whose process was killed, the sweep says so."""
    running(directory)
    for state in reversed(ended(directory)):
        if state.get("id") == before["id"]:
            return state
    return {**before, "reason": "killed", "exit_code": None, "signal": None}  # not even its record is left


def _report(state: State, output: Output) -> int:
    if output.json:
        output.result({"schema": 1, **{key: state.get(key) for key in ("id", "name", "reason", "exit_code", "signal")}})
    elif state.get("exit_code") is None:
        output.say(f"{state.get('name')}: {_ending(state)}" + (f": {state['message']}" if state.get("message") else ""))
    if state.get("exit_code") is not None:
        return int(state["exit_code"])
    return 128 + int(state["signal"]) if state.get("signal") is not None else Exit.RUN_FAILED


@click.command()
@click.argument("name")
@click.argument("port", type=click.IntRange(0, MAX_PORT))
@output_options
def connect(name: str, port: int, output: Output) -> None:
    """Standard input and output to a vsock port of an enclave."""
    del output
    with vsock.connect(name, port) as sock:
        _pump(sock)


def _pump(sock: socket.socket) -> None:
    """Both directions, each to its own end; the enclave's end is ours."""
    poller = select.poll()
    poller.register(sock, select.POLLIN)
    poller.register(0, select.POLLIN)
    while True:
        ready = dict(poller.poll())
        if 0 in ready:
            data = os.read(0, CHUNK)
            if data:
                sock.sendall(data)
            else:
                poller.unregister(0)
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_WR)
        if sock.fileno() in ready:
            data = sock.recv(CHUNK)
            if not data:
                return
            view = memoryview(data)
            while view:
                view = view[os.write(1, view) :]

# SPDX-License-Identifier: Apache-2.0
"""``enclave lab``: a parent machine with the kernel's own Nitro Enclaves driver, and its device, on this one."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import signal
import sys
import termios
import tty
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import click

from enclavekit.cli.options import output_options, parse_size
from enclavekit.cli.output import Output
from enclavekit.cli.progress import bars
from enclavekit.cli.runtime import runtime_root
from enclavekit.enclave.background import MAX_WORD, background, told_error
from enclavekit.enclave.control import ask
from enclavekit.enclave.log_file import read_log
from enclavekit.environment import attestation_directory, lab_cache, lab_directory, qemu_environment, search_path
from enclavekit.errors import MissingError, NoEnclaveError, UsageError
from enclavekit.hypervisor.accel import Accel, choose
from enclavekit.hypervisor.carriers import CarrierName, CarrierOptions, select_carrier
from enclavekit.hypervisor.contract import Carrier
from enclavekit.lab.agent_frames import Command
from enclavekit.lab.copy import copy_in, copy_out
from enclavekit.lab.directory import CONSOLE, LOG, claim, find, up
from enclavekit.lab.parent import ParentOptions
from enclavekit.lab.process import Lab, LabOptions, connect_agent
from enclavekit.lab.root import System, make_system, package_ramdisk, system_of
from enclavekit.lab.session import Streams, run_command
from enclavekit.linux.process import allow_many_files
from enclavekit.runtime import Runtime
from enclavekit.runtime.distribution import PARENT
from enclavekit.runtime.find import Qemu, find_kernel, find_qemu

DEFAULT = "lab"
STOP_TIMEOUT_S = 20.0

name_option = click.option("--name", default=DEFAULT, show_default=True, metavar="NAME", help="Which lab.")


@click.group()
def lab() -> None:
    """A parent machine like an EC2 instance, with the kernel's own driver for enclaves and the device behind it."""


@lab.command()
@output_options
def install(output: Output) -> None:
    """Download what the parent's root file system is made of: Debian's Python and bash, and our own needs from PyPI."""
    with bars(output) as tell:
        packages = Runtime(runtime_root()).install(tell, ["qemu", "kernel", PARENT])
    output.say("making the parent's root file system")
    tree = next(item.path for item in packages if item.component.name == PARENT)
    system = make_system(tree, lab_cache())
    output.show(
        {"schema": 1, "root": str(system.ramdisk), "size": system.ramdisk.stat().st_size},
        lambda console: console.print(f"{system.ramdisk}", markup=False),
    )


def _system() -> System:
    found = {item.component.name: item for item in Runtime(runtime_root()).show() if item.usable}
    system = system_of(found[PARENT].path, lab_cache()) if PARENT in found else None
    if system is None or not system.ramdisk.exists():
        raise MissingError("the parent's root file system is not there", hint="enclave lab install")
    return system


@lab.command("up")
@name_option
@click.option("--cpus", type=int, default=4, show_default=True, help="Threads; two a core. The first core is kept.")
@click.option("--memory", "-m", default="768M", show_default=True, metavar="SIZE", help="The parent's own.")
@click.option("--enclave-memory", default="512M", show_default=True, metavar="SIZE", help="Huge pages, for enclaves.")
@click.option("--instance-id", metavar="i-ID", help="Made up, unless one is given; PCR4 of the enclaves.")
@click.option("--role", metavar="ARN", help="The instance's IAM role, for PCR3 of the enclaves.")
@click.option("--accel", type=click.Choice(["auto", *Accel]), default="auto", show_default=True)
@click.option(
    "--carrier",
    type=click.Choice([CarrierName.QEMU, CarrierName.KVM]),
    default=CarrierName.QEMU,
    show_default=True,
    help="What runs the enclaves.",
)
@click.option("--qemu", envvar="ENCLAVEKIT_QEMU", metavar="PROGRAM", help="Instead of the runtime's; from 10.1 on.")
@output_options
def up_command(
    name: str,
    cpus: int,
    memory: str,
    enclave_memory: str,
    instance_id: str | None,
    role: str | None,
    accel: str,
    carrier: str,
    qemu: str | None,
    output: Output,
) -> None:
    """Start a lab, in the background, and wait until it takes commands."""
    parent = ParentOptions(
        instance_id=instance_id or f"i-{secrets.token_hex(9)[1:]}",
        cpus=cpus,
        memory=parse_size(memory),
        enclave_memory=parse_size(enclave_memory),
    )
    parent.check()
    found = find_qemu(runtime_root(), qemu, search_path())
    system = _system()
    chosen = choose(None if accel == "auto" else Accel(accel))
    output.detail(chosen.reason)
    options = LabOptions(
        qemu=Qemu(found.command, found.version, {**qemu_environment(), **found.environment}),
        kernel=find_kernel(runtime_root()),
        accel=chosen.accel,
        ramdisks=[system.ramdisk, package_ramdisk(system, lab_cache())],
        parent=parent,
        carrier=_carrier(carrier, qemu, chosen.accel),
        attestation_directory=attestation_directory(),
        role=role,
    )
    state = _start(name, options)
    output.show(
        {"schema": 1, **state}, lambda console: console.print(f"{name}: up, as {state['instance_id']}", markup=False)
    )


def _carrier(name: str, qemu: str | None, accel: Accel) -> Carrier:
    options = CarrierOptions(
        runtime_root=runtime_root(),
        search_path=search_path(),
        environment=qemu_environment(),
        qemu=qemu,
        accel=accel,
    )
    return select_carrier(CarrierName(name), options).carrier


def _start(name: str, options: LabOptions) -> dict[str, Any]:
    """In a process of its own, whose first word is the state, or what went wrong."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read_end)
        background(lambda tell: _run(name, options, tell), write_end)
    os.close(write_end)
    with open(read_end, "rb") as pipe:  # noqa: PTH123 - a descriptor
        try:
            said = pipe.read(MAX_WORD)
        except BaseException:  # Ctrl-C: nothing of it is to stay
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGTERM)
                os.waitpid(pid, 0)
            raise
    word = json.loads(said) if said else {"code": "lab", "message": "the lab's process ended without a word"}
    error = told_error(word)
    if error:
        raise error
    return dict(word)


def _run(name: str, options: LabOptions, tell: Callable[[dict[str, Any]], None]) -> None:
    labs: list[Lab] = []

    def stop(number: int, frame: FrameType | None) -> None:
        del number, frame
        if not labs:
            raise KeyboardInterrupt
        labs[0].stop("ended by a signal")

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    allow_many_files()
    labs.append(Lab(claim(lab_directory(), name), options))
    labs[0].run(tell)


@lab.command()
@output_options
def status(output: Output) -> None:
    """The labs that are up."""
    states = [state for _, state in up(lab_directory())]

    def render(console: Any) -> None:
        for state in states:
            memory = f"{state['memory'] >> 20} MiB and {state['enclave_memory'] >> 20} MiB for enclaves"
            line = f"{state['name']}  {state['instance_id']}  {state['cpus']} CPUs, {memory}  process {state['pid']}"
            console.print(line, markup=False)
        if not states:
            console.print("none is up: enclave lab up", markup=False)

    output.show({"schema": 1, "labs": states}, render)


@lab.command()
@name_option
@click.option("--console", "console", is_flag=True, help="What the parent's kernel says, instead of the hypervisor.")
@click.option("-f", "--follow", is_flag=True, help="Go on as long as it is up.")
@output_options
def logs(name: str, console: bool, follow: bool, output: Output) -> None:
    """What the hypervisor has done."""
    del output
    path, _ = find(lab_directory(), name)
    for chunk in read_log(path / (CONSOLE if console else LOG), more=lambda: follow and path.exists()):
        sys.stdout.buffer.write(chunk)
        sys.stdout.buffer.flush()


@lab.command()
@name_option
@output_options
def down(name: str, output: Output) -> None:
    """End a lab, its parent and all of its enclaves, and wait until nothing is left."""
    path, _ = find(lab_directory(), name)
    with contextlib.suppress(NoEnclaveError):  # it ends just now
        ask(path, {"command": "stop", "grace_s": 0})
    with contextlib.suppress(NoEnclaveError):
        ask(path, {"command": "wait"}, timeout_s=STOP_TIMEOUT_S)
    output.show({"schema": 1, "name": name}, lambda console: console.print(f"{name}: down", markup=False))


@lab.command(context_settings={"ignore_unknown_options": True})
@name_option
@click.option("--env", "-e", "env", multiple=True, metavar="NAME=VALUE", help="Environment; repeatable.")
@click.option("--tty", "-t", "terminal", is_flag=True, help="With this terminal.")
@click.argument("command", nargs=-1, required=True, metavar="-- COMMAND...")
@output_options
def run(name: str, env: tuple[str, ...], terminal: bool, command: tuple[str, ...], output: Output) -> int:
    """Run a command in the parent, as root; exits with its status."""
    del output
    environment = {}
    for item in env:
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise UsageError(f"--env {item[:64]!r}: expected NAME=VALUE")
        environment[key] = value
    return _command(name, list(command), environment, terminal=terminal)


@lab.command()
@name_option
@output_options
def shell(name: str, output: Output) -> int:
    """A shell in the parent, as root."""
    del output
    return _command(name, ["/bin/bash", "-l"], {}, terminal=os.isatty(0) and os.isatty(1))


@lab.command()
@click.argument("source", metavar="SRC")
@click.argument("target", metavar="DST")
@output_options
def cp(source: str, target: str, output: Output) -> None:
    """Copy a file or directory into a parent or out of it: one of the two is NAME:PATH, as in lab:/root/a.eif."""
    del output
    ends = [(DEFAULT if not sep else name, path) if sep else None for name, sep, path in map(_parted, (source, target))]
    match ends:
        case [None, (name, path)]:
            directory, _ = find(lab_directory(), name)
            copy_in(lambda: connect_agent(directory), Path(source), path or ".")
        case [(name, path), None]:
            directory, _ = find(lab_directory(), name)
            copy_out(lambda: connect_agent(directory), path or ".", Path(target))
        case _:
            raise UsageError(
                "one of the two, and only one, is of the form NAME:PATH", hint="enclave lab cp a.eif lab:/root/"
            )


def _parted(text: str) -> tuple[str, str, str]:
    """A colon behind a slash is a file's name's."""
    name, colon, path = text.partition(":")
    return ("", "", "") if "/" in name else (name, colon, path)


def _command(name: str, words: list[str], environment: dict[str, str], *, terminal: bool) -> int:
    directory, _ = find(lab_directory(), name)
    if not terminal:
        streams = Streams(_writer(1), _writer(2), stdin=0)
        return run_command(connect_agent(directory), Command(words, environment), streams)
    if not os.isatty(0):
        raise UsageError("--tty: standard input is no terminal")
    environment = {"TERM": "xterm-256color", **environment}
    with _raw_terminal() as resized:
        streams = Streams(_writer(1), _writer(2), stdin=0, resized=resized, size=_size)
        return run_command(connect_agent(directory), Command(words, environment, _size()), streams)


def _writer(fd: int) -> Callable[[bytes], None]:
    def write(data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]

    return write


def _size() -> tuple[int, int]:
    rows, columns, _, _ = memoryview(fcntl.ioctl(0, termios.TIOCGWINSZ, bytes(8))).cast("H")
    return rows, columns


@contextmanager
def _raw_terminal() -> Iterator[int]:
    """This terminal passes all keys on; the descriptor becomes readable when its size changes."""
    before = termios.tcgetattr(0)
    read_end, write_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def resized(number: int, frame: FrameType | None) -> None:
        del number, frame
        with contextlib.suppress(BlockingIOError):
            os.write(write_end, b"\0")

    handler = signal.signal(signal.SIGWINCH, resized)
    try:
        tty.setraw(0)
        yield read_end
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, before)
        signal.signal(signal.SIGWINCH, handler)
        os.close(read_end)
        os.close(write_end)

# SPDX-License-Identifier: Apache-2.0
"""``enclave run``: in the foreground, with the application's output and exit status as its own."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO

import click

from enclavekit.build.application import text_bytes
from enclavekit.build.image import build as build_image
from enclavekit.build.source import is_source
from enclavekit.cli.build import build_options
from enclavekit.cli.describe import naming, reading
from enclavekit.cli.options import image_options, kernel_options, output_options, parse_cpu_list, parse_size
from enclavekit.cli.output import Exit, Output
from enclavekit.cli.ports import parse_listen, parse_publish
from enclavekit.cli.project import ProjectCommand, config_option, with_added
from enclavekit.cli.runtime import runtime_root
from enclavekit.codec.init_frames import MAX_PAYLOAD
from enclavekit.enclave.background import MAX_WORD, background, told_error
from enclavekit.enclave.run import Running, RunOptions
from enclavekit.enclave.run import run as run_image
from enclavekit.enclave.security_module import check_instance_id
from enclavekit.enclave.supervisor import Outcome, Streams
from enclavekit.environment import attestation_directory, qemu_environment, runtime_directory, search_path
from enclavekit.errors import FileError, UsageError
from enclavekit.hypervisor.accel import Accel
from enclavekit.hypervisor.carriers import CarrierName, CarrierOptions, select_carrier
from enclavekit.hypervisor.contract import Carrier, Mode
from enclavekit.linux.cpu_topology import read_topology
from enclavekit.linux.process import allow_many_files
from enclavekit.platform.machine import BootProtocol, Platform

STDOUT, STDERR = 1, 2
POLL_MS = 100
LONGEST_TIMEOUT_S = 10 * 365 * 86400.0
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

GIVEN_TO_BUILD = (
    *("env", "entrypoint", "workdir", "user", "stop_signal", "launch_value"),
    *("logs", "attest", "cmdline", "keep_owners", "kernel", "modules"),
)


@click.command(cls=ProjectCommand)
@click.argument("target", metavar="F.eif|SOURCE")
@click.argument("command", nargs=-1, type=click.UNPROCESSED, metavar="[-- COMMAND...]")
@config_option
@click.option("--memory", "-m", default="auto", metavar="SIZE|auto", help="For instance 512M; auto fits the image.")
@click.option("--cpus", type=int, help="Number of vCPUs; one, or the threads of one core where the driver is.")
@click.option("--cpu-list", metavar="0,2-3", help="The machine's CPUs that it may run on.")
@click.option("--cgroup", type=click.Path(path_type=Path), metavar="DIR", help="Of cgroup v2: limits it to its size.")
@click.option("-d", "--detach", is_flag=True, help="In the background, once it is up; prints its id.")
@click.option("--name", metavar="NAME", help="What the other commands call it, besides its id.")
@click.option("--publish", "-p", multiple=True, metavar="[ADDR:]PORT:VSOCK", help="A TCP port that leads into it.")
@click.option(
    "--listen", multiple=True, metavar="VSOCK=unix:PATH|tcp:ADDR:PORT", help="Where a port that it dials leads."
)
@click.option("--cid", type=click.IntRange(4, 0xFFFFFFFE), help="vsock CID; the lowest free one from 16 on.")
@click.option("--debug", is_flag=True, help="Debug mode: shows the console.")
@click.option(
    "--timeout", type=click.FloatRange(0, LONGEST_TIMEOUT_S, min_open=True), metavar="S", help="Stop it then; exit 124."
)
@click.option(
    "--carrier",
    "carrier_name",
    envvar="ENCLAVEKIT_CARRIER",
    type=click.Choice(["auto", *(carrier.value for carrier in CarrierName)]),
    default="auto",
    help="What runs it; the best that this machine has.",
)
@click.option(
    "--accel",
    type=click.Choice(["auto", *(accel.value for accel in Accel)]),
    default="auto",
    help="KVM, or emulation by TCG.",
)
@click.option(
    "--platform",
    type=click.Choice([platform.value for platform in Platform]),
    default=Platform.DEFAULT.value,
    help="nitro: devices are told of as on EC2, and in no other way.",
)
@click.option(
    "--boot",
    type=click.Choice([protocol.value for protocol in BootProtocol]),
    default=BootProtocol.EIF.value,
    help="How the kernel is entered; what is measured stays the same.",
)
@click.option(
    "--set", "given", multiple=True, metavar="NAME=VALUE", help="A value that the image declares; repeatable."
)
@click.option("--secret-file", "secrets", multiple=True, metavar="NAME=PATH", help="The same, read from a file.")
@click.option("--role", metavar="ARN", help="The parent's IAM role, for PCR3 of its attestation documents.")
@click.option("--instance-id", metavar="i-ID", help="The parent's instance id, for PCR4.")
@click.option("--qemu", envvar="ENCLAVEKIT_QEMU", metavar="PROGRAM", help="Instead of the runtime's.")
@click.option("--dry-run", is_flag=True, help="Check all that can be checked before a launch, and start nothing.")
@kernel_options
@image_options
@output_options
@click.pass_context
def run(
    ctx: click.Context,
    /,
    target: str,
    command: tuple[str, ...],
    memory: str,
    cpus: int | None,
    cpu_list: str | None,
    cgroup: Path | None,
    detach: bool,
    name: str | None,
    publish: tuple[str, ...],
    listen: tuple[str, ...],
    cid: int | None,
    debug: bool,
    timeout: float | None,
    carrier_name: str,
    accel: str,
    platform: str,
    boot: str,
    given: tuple[str, ...],
    secrets: tuple[str, ...],
    role: str | None,
    instance_id: str | None,
    qemu: str | None,
    dry_run: bool,
    output: Output,
    **words: Any,
) -> int:
    """Run an image, or a SOURCE that is built first, and exit with its application's status.

    128+n when signal n ended the application, 124 after --timeout, 125 for every failure that is not its own.
    """
    del words["config"]
    wanted = None if carrier_name == "auto" else CarrierName(carrier_name)
    carriers = CarrierOptions(
        runtime_root=runtime_root(),
        search_path=search_path(),
        environment=qemu_environment(),
        qemu=qemu,
        accel=None if accel == "auto" else Accel(accel),
        cgroup=cgroup is not None,
    )
    options = RunOptions(
        runtime_directory=runtime_directory(),
        memory=None if memory == "auto" else parse_size(memory),
        cpus=_fewest_cpus(wanted, carriers) if cpus is None else cpus,
        cid=cid,
        mode=Mode.DEBUG if debug else Mode.PRODUCTION,
        timeout_s=timeout,
        values=_values(given, secrets),
        name=name,
        image=target,
        cpu_list=parse_cpu_list(cpu_list) if cpu_list is not None else None,
        cgroup=cgroup,
        platform=Platform(platform),
        boot=BootProtocol(boot),
        listen=dict(parse_listen(one) for one in listen),
        publish=[parse_publish(one) for one in publish],
        attestation_directory=attestation_directory(),
        role=role,
        instance_id=None if instance_id is None else check_instance_id(instance_id),
    )
    if dry_run:
        from enclavekit.cli.dry_run import dry_run as check

        with _image(target, command, with_added(ctx, words)) as file:
            return check(file, wanted, carriers, options, output)
    selected = select_carrier(wanted, carriers)
    carrier = selected.carrier
    output.detail(selected.reason)
    if options.boot is not BootProtocol.EIF:
        output.detail(f"boot protocol {options.boot}; what is measured is the image, whatever the protocol")
    if selected.name is CarrierName.NITRO and (role is not None or instance_id is not None):
        raise UsageError("--role, --instance-id: a real enclave's PCR3 and PCR4 tell of the instance that it runs on")
    if selected.lacks is not None:
        output.say(selected.lacks)
    allow_many_files()  # each vsock connection is a Unix socket
    if detach:
        return _detached(target, command, with_added(ctx, words), carrier, options, output)
    started: list[Running] = []
    with _stop_signals() as signals, _image(target, command, with_added(ctx, words)) as file:

        def on_started(running: Running) -> None:
            started.append(running)
            signals.request_stop = running.request_stop
            output.detail(f"enclave {running.enclave_id}, CID {running.cid}")
            output.detail(f"memory {running.memory >> 20} MiB: to boot, the image needs {running.needed >> 20} MiB")

        def on_running(logs: bool) -> None:
            if not logs and not debug:
                output.say("the image keeps its output to itself: build it with --logs, or run it with --debug")

        # With --json, stdout is for the result.
        end = None if timeout is None else time.monotonic() + timeout
        write = _writer(
            STDERR if output.json else STDOUT,
            lambda: signals.number is not None or (end is not None and time.monotonic() > end),
        )
        streams = Streams(
            output=write,
            console=write if debug else None,
            on_running=on_running,
            on_lost=lambda count: output.say(f"{count} bytes of output were lost: they were not taken in time"),
        )
        outcome = run_image(file, carrier, options, streams, on_started)
    code = _exit_code(outcome, signals.number)
    if outcome.timed_out:
        output.say(f"stopped after {timeout:g} s")
    if output.json:
        output.result(
            {
                "schema": 1,
                "id": started[0].enclave_id,
                "cid": started[0].cid,
                "reason": outcome.reason,
                "exit_code": outcome.exit_code,
                "signal": outcome.signal,
            }
        )
    return code


def _detached(
    target: str,
    command: tuple[str, ...],
    words: dict[str, Any],
    carrier: Carrier,
    options: RunOptions,
    output: Output,
) -> int:
    """In a process of its own, of which we wait for the first word: that it is up, or what went wrong."""
    with _image(target, command, words) as file:
        read_end, write_end = os.pipe()
        if os.fork() == 0:
            os.close(read_end)
            background(lambda tell: _run_in_background(file, carrier, options, tell), write_end)
        os.close(write_end)
        with open(read_end, "rb") as pipe:  # noqa: PTH123 - a descriptor
            said = pipe.read(MAX_WORD)
    word = json.loads(said) if said else {"code": "carrier", "message": "the enclave's process ended without a word"}
    error = told_error(word)
    if error:
        raise error
    if output.json:
        output.result({"schema": 1, **word})
    else:
        output.result_text(word["id"])
    return Exit.DONE


def _run_in_background(
    file: BinaryIO, carrier: Carrier, options: RunOptions, tell: Callable[[dict[str, Any]], None]
) -> None:
    started: list[Running] = []
    with _stop_signals() as signals:

        def on_started(running: Running) -> None:
            started.append(running)
            signals.request_stop = running.request_stop

        def on_running(logs: bool) -> None:
            del logs
            tell({"id": started[0].enclave_id, "name": options.name or started[0].enclave_id, "cid": started[0].cid})

        run_image(file, carrier, options, Streams(output=lambda data: None, on_running=on_running), on_started)


def _fewest_cpus(wanted: CarrierName | None, carriers: CarrierOptions) -> int:
    """The driver takes whole cores only."""
    if wanted not in (None, CarrierName.NITRO) or not carriers.nitro_device.exists():
        return 1
    with contextlib.suppress(OSError, ValueError):
        return read_topology().threads_per_core
    return 1


def _values(given: tuple[str, ...], secrets: tuple[str, ...]) -> dict[bytes, bytes]:
    """Launch values, as --set and --secret-file have them."""
    values: dict[bytes, bytes] = {}
    for option, items in (("--set", given), ("--secret-file", secrets)):
        for item in items:
            name, equals, value = item.partition("=")
            # The value itself may be a secret: it is not repeated.
            if not equals or not name:
                expected = "NAME=VALUE" if option == "--set" else "NAME=PATH"
                raise UsageError(f"{option} {name[:64]!r}: expected {expected}")
            if text_bytes(name) in values:
                raise UsageError(f"{option} {name}: given twice")
            if option == "--set":
                values[text_bytes(name)] = text_bytes(value)
            else:
                values[text_bytes(name)] = _secret(value)
    return values


def _secret(path: str) -> bytes:
    """From a file, or from a pipe as shells make them: <(...)."""
    try:
        with Path(path).open("rb") as file:
            return file.read(MAX_PAYLOAD + 1)
    except OSError as error:
        raise FileError.of(error, path, "read") from error


def _exit_code(outcome: Outcome, signal_number: int | None) -> int:
    if outcome.timed_out:
        return Exit.TIMED_OUT
    if outcome.exit_code is not None:
        return outcome.exit_code
    if outcome.signal is not None:
        return 128 + outcome.signal
    return 128 + signal_number if signal_number else Exit.RUN_FAILED


@contextmanager
def _image(target: str, command: tuple[str, ...], words: dict[str, Any]) -> Iterator[BinaryIO]:
    """The image's file: what ``target`` names, or what is built of it, which is gone afterwards."""
    if is_source(target):
        with tempfile.TemporaryDirectory(prefix="enclavekit-") as directory:
            built = Path(directory) / "image.eif"
            build_image(build_options(target, built, command, arch=None, **words))
            with reading(str(built)) as file:
                yield file
        return
    given = [
        name
        for name in ("command", *GIVEN_TO_BUILD)
        if (command if name == "command" else words[name])
        and click.get_current_context().get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
    ]
    if given:
        raise UsageError(
            f"{target}: an image's {given[0]} is fixed when it is built",
            hint="run a SOURCE, oci:DIR or dir:DIR for example, or build the image anew",
        )
    with reading(target) as file, naming(target):
        yield file


class _Signals:
    """What a signal does: until the enclave is started it interrupts us, then it asks the enclave to stop."""

    def __init__(self) -> None:
        self.request_stop: Callable[[], None] | None = None
        self.number: int | None = None

    def handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.number = number
        if self.request_stop is None:
            raise KeyboardInterrupt
        self.request_stop()


@contextmanager
def _stop_signals() -> Iterator[_Signals]:
    signals = _Signals()
    before = {number: signal.signal(number, signals.handle) for number in STOP_SIGNALS}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _writer(fd: int, given_up: Callable[[], bool]) -> Callable[[bytes], None]:
    """All of it, at once: what the application prints is seen when it prints it.

    A reader that takes nothing holds the application up, but neither --timeout nor a signal: then the rest is dropped.
    """
    poller = select.poll()
    poller.register(fd, select.POLLOUT)

    def write(data: bytes) -> None:
        view = memoryview(data)
        while view:
            if not poller.poll(POLL_MS):
                if given_up():
                    return
                continue
            with contextlib.suppress(BlockingIOError):
                view = view[os.write(fd, view[: select.PIPE_BUF]) :]

    return write

# SPDX-License-Identifier: Apache-2.0
"""``nitro-cli run-enclave | describe-enclaves | terminate-enclave | console``, over whichever carrier this machine has.

Source: aws-nitro-enclaves-cli src/main.rs, src/common/commands_parser.rs, src/lib.rs.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

from enclavekit.enclave.directory import CONSOLE, is_running, running, unique_name
from enclavekit.enclave.log_file import read_log
from enclavekit.enclave.run import check_host
from enclavekit.environment import (
    attestation_directory,
    data_directory,
    qemu,
    qemu_environment,
    runtime_directory,
    search_path,
)
from enclavekit.environment import carrier as wanted_carrier
from enclavekit.errors import FileError, MissingError, NotEnoughMemoryError, ProtocolError
from enclavekit.hypervisor.carriers import CarrierName, CarrierOptions, Selected, select_carrier
from enclavekit.hypervisor.nitro import CONSOLE_PORT_BASE, CONSOLE_TIMEOUT_S
from enclavekit.linux.nitro_enclaves import DEVICE
from enclavekit.linux.parent_vsock import HYPERVISOR_CID, KernelVsock, ParentVsock
from enclavekit.nitro_cli.codes import Code
from enclavekit.nitro_cli.command import NitroCliError, print_json, printable
from enclavekit.nitro_cli.cpus import choose_cpus, read_pool
from enclavekit.nitro_cli.enclave_process import Prepared, failure_of, start_process
from enclavekit.nitro_cli.log import LOG
from enclavekit.nitro_cli.places import sockets_directory
from enclavekit.nitro_cli.run_options import (
    MIB,
    RunEnclaveOptions,
    check_memory_rule,
    default_name,
    parse_cid,
    parse_memory,
    parse_number,
    read_config,
)
from enclavekit.nitro_cli.sockets import Answers, ask_all, ask_number, ask_one, id_of, names
from enclavekit.nitro_cli.wire import DEBUG_FLAG, Command, Reply, read_reply

CPU_IDS = "--cpu-ids"
CONSOLE_READ_SIZE = 65536
LOOK_S = 0.2
"""How often a console that says nothing is left to look at the time."""


class RunEnclaveCommand(click.Command):
    """``--cpu-ids 1 3 5`` takes all numbers up to the next option, as nitro-cli's parser does."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Repeat the option before each number."""
        words: list[str] = []
        within = False
        for word in args:
            if within and not word.startswith("-"):
                words += [CPU_IDS, word] if words[-1] != CPU_IDS else [word]
                continue
            within = word == CPU_IDS
            words.append(word)
        return super().parse_args(ctx, words)


@click.command("run-enclave", cls=RunEnclaveCommand)
@click.option("--config", metavar="FILE", help="JSON with these options, instead of them.")
@click.option("--eif-path", metavar="F.eif", help="The image to run.")
@click.option("--memory", metavar="MB", help="Memory; also with M, G or T. At least four times the image's size.")
@click.option("--cpu-count", metavar="N", help="How many CPUs.")
@click.option(CPU_IDS, "cpu_ids", multiple=True, metavar="ID ID...", help="Which CPUs, of the pool.")
@click.option("--enclave-cid", metavar="CID", help="Its vsock CID; 0, or none, for any.")
@click.option("--enclave-name", metavar="NAME", help="Instead of the file's name.")
@click.option("--debug-mode", is_flag=True, help="With a console.")
@click.option("--attach-console", is_flag=True, help="In debug mode, and read its console.")
def run_enclave(config: str | None, attach_console: bool, **words: Any) -> None:  # noqa: ANN401 - click's words
    """Run an enclave, in the background."""
    options = _options(config, attach_console, words)
    with ExitStack() as stack:
        prepared = _prepare(options, stack)
        with start_process(prepared) as sock:
            try:
                reply = read_reply(sock, _say)
            except (OSError, ProtocolError) as error:
                LOG.error("%s", error)
                reply = Reply()
    made = _object(reply)
    if made is None:
        raise _no_answer(1)
    print_json(made)
    if options.attach_console:
        _console(sockets_directory(), made["EnclaveID"], None)


def _options(config: str | None, attach_console: bool, words: dict[str, Any]) -> RunEnclaveOptions:
    given = [f"--{name.replace('_', '-')}" for name, value in words.items() if value]
    if config is not None:
        if given:
            raise click.UsageError(f"--config and {given[0]}: the file says it all")
        return read_config(config, attach_console=attach_console)
    for name in ("eif_path", "memory"):
        if words[name] is None:
            raise click.UsageError(f"--{name.replace('_', '-')} is needed, or --config")
    if (words["cpu_count"] is None) == (not words["cpu_ids"]):
        raise click.UsageError("one of --cpu-count and --cpu-ids is needed, and only one")
    return RunEnclaveOptions(
        words["eif_path"],
        parse_memory(words["memory"]),
        parse_number("cpu-count", words["cpu_count"]) if words["cpu_count"] is not None else None,
        tuple(parse_number("cpu-ids", word) for word in words["cpu_ids"]) if words["cpu_ids"] else None,
        _cid(words["enclave_cid"]),
        words["enclave_name"],
        words["debug_mode"] or attach_console,
        attach_console,
    )


def _cid(text: str | None) -> int | None:
    cid = parse_cid(text) if text is not None else None
    if cid == 0:
        click.echo("The enclave CID will be chosen by the hypervisor.", err=True)
    return cid


def _prepare(options: RunEnclaveOptions, stack: ExitStack) -> Prepared:
    """All that can be checked before; nitro-cli does it in the enclave's process, so the exit code is that one's."""
    sockets = sockets_directory()
    try:
        try:
            file = stack.enter_context(open(options.eif_path, "rb"))  # noqa: PTH123, SIM115 - the stack closes it
            size = os.fstat(file.fileno()).st_size
        except OSError as error:
            message = FileError.of(error, options.eif_path, "read").message
            raise NitroCliError(Code.FILE_OPERATION, message, file=options.eif_path) from error
        cpus = choose_cpus(read_pool(), options.cpu_count, options.cpu_ids)
        check_memory_rule(options.eif_path, size, options.memory_mib)
        selected = _select()
        if selected.lacks is not None:
            click.echo(selected.lacks, err=True)
        try:
            check_host(selected.carrier, options.memory_mib * MIB, None)
        except NotEnoughMemoryError as error:
            raise NitroCliError(Code.INSUFFICIENT_MEMORY, error.message) from error
        if not cpus:
            raise NitroCliError(Code.IOCTL, "an enclave needs a CPU at least")
    except NitroCliError as failure:
        LOG.error("%s: %s", failure.code, failure.message)
        click.echo(failure.text(), err=True)
        raise _no_answer(1) from failure
    return Prepared(
        file=file,
        eif_path=options.eif_path,
        carrier=selected.carrier,
        runtime_directory=runtime_directory(),
        sockets=sockets,
        name=unique_name(options.name or default_name(options.eif_path), names(sockets)),
        memory=options.memory_mib * MIB,
        cpus=tuple(cpus),
        pinned=options.cpu_ids is not None,
        cid=options.cid or None,
        debug=options.debug,
        attestation_directory=attestation_directory(),
    )


def _select() -> Selected:
    wanted = wanted_carrier()
    if wanted not in (None, *CarrierName):
        raise NitroCliError(Code.INVALID_ARGUMENT, f"ENCLAVEKIT_CARRIER: {wanted!r}, expected {', '.join(CarrierName)}")
    options = CarrierOptions(
        runtime_root=data_directory() / "runtime",
        search_path=search_path(),
        environment=qemu_environment(),
        qemu=qemu(),
    )
    try:
        return select_carrier(CarrierName(wanted) if wanted else None, options)
    except MissingError as error:
        raise failure_of(error, "") from error


@click.command("describe-enclaves")
@click.option("--metadata", is_flag=True, help="And what their images say of themselves.")
def describe_enclaves(metadata: bool) -> None:
    """All enclaves that run."""
    answers = ask_all(sockets_directory(), Command.DESCRIBE, {"metadata": metadata})
    print_json(answers.objects())
    _check(answers)


@click.command("terminate-enclave")
@click.option("--enclave-id", metavar="ID", help="As run-enclave printed it.")
@click.option("--enclave-name", metavar="NAME", help="Its name.")
@click.option("--all", "everyone", is_flag=True, help="All that you may end.")
def terminate_enclave(enclave_id: str | None, enclave_name: str | None, everyone: bool) -> None:
    """End enclaves, without asking what runs in them."""
    if (enclave_id is not None) + (enclave_name is not None) + everyone != 1:
        raise click.UsageError("one of --enclave-id, --enclave-name and --all is needed, and only one")
    sockets = sockets_directory()
    if everyone:
        answers = ask_all(sockets, Command.TERMINATE)
        for reply in answers.replies.values():
            _say(reply.stderr)
        print_json(answers.objects())
        _check(Answers(answers.replies))  # those that we may not end said nothing
        return
    found = enclave_id if enclave_id is not None else id_of(sockets, str(enclave_name))
    reply = ask_one(sockets, found, Command.TERMINATE, on_stderr=_say)
    _check(Answers({found: reply}))
    made = _object(reply)
    if made is None:
        raise _no_answer(1)
    print_json(made)


@click.command("console")
@click.option("--enclave-id", metavar="ID", help="As run-enclave printed it.")
@click.option("--enclave-name", metavar="NAME", help="Its name.")
@click.option("--disconnect-timeout", metavar="S", help="Read for so many seconds at most.")
def console(enclave_id: str | None, enclave_name: str | None, disconnect_timeout: str | None) -> None:
    """Read the console of an enclave in debug mode, to its end."""
    if (enclave_id is None) == (enclave_name is None):
        raise click.UsageError("one of --enclave-id and --enclave-name is needed, and only one")
    seconds = parse_number("disconnect-timeout", disconnect_timeout) if disconnect_timeout is not None else None
    sockets = sockets_directory()
    _console(sockets, enclave_id if enclave_id is not None else id_of(sockets, str(enclave_name)), seconds)


def _console(sockets: Path, enclave_id: str, seconds: int | None) -> None:
    cid = ask_number(sockets, enclave_id, Command.GET_CID)
    if not ask_number(sockets, enclave_id, Command.GET_FLAGS) & DEBUG_FLAG:
        raise NitroCliError(Code.CONSOLE_CONNECTION, f"{enclave_id} does not run in debug mode")
    click.echo(f"Connecting to the console for enclave {cid}...")
    chunks = _console_of(enclave_id, cid)
    click.echo("Successfully connected to the console.")
    end = None if seconds is None else time.monotonic() + seconds
    out = sys.stdout.buffer
    try:
        for chunk in chunks:
            try:
                out.write(chunk)
                out.flush()
            except BrokenPipeError:
                raise
            except OSError as error:
                raise NitroCliError(Code.CONSOLE_WRITE, FileError.of(error, "the console", "write").message) from error
            if end is not None and time.monotonic() >= end:
                return
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            raise
        raise NitroCliError(Code.CONSOLE_READ, FileError.of(error, "the console", "read").message) from error


def _console_of(enclave_id: str, cid: int) -> Iterator[bytes]:
    """Its process keeps all of it, in the enclave's directory; else the hypervisor has it. NitroCliError E44."""
    state = next((state for state in running(runtime_directory()) if state.get("cid") == cid), None)
    if state is not None:
        directory = runtime_directory() / str(state["id"])
        return read_log(directory / CONSOLE, more=lambda: is_running(directory))
    if not DEVICE.exists():
        raise NitroCliError(Code.CONSOLE_CONNECTION, f"{enclave_id}: its console is kept by another user")
    return hypervisor_console(enclave_id, cid, KernelVsock())


def hypervisor_console(enclave_id: str, cid: int, vsock: ParentVsock) -> Iterator[bytes]:
    """What a real enclave says, whoever started it. NitroCliError E44."""
    try:
        connection = vsock.connect(HYPERVISOR_CID, CONSOLE_PORT_BASE + cid, CONSOLE_TIMEOUT_S)
    except OSError as error:
        raise NitroCliError(
            Code.CONSOLE_CONNECTION, f"{enclave_id}: {(error.strerror or str(error)).lower()}"
        ) from error
    return _read_all(connection)


def _read_all(connection: socket.socket) -> Iterator[bytes]:
    """To its end; nothing where nothing was said for a while."""
    with connection:
        connection.settimeout(LOOK_S)
        while True:
            try:
                data = connection.recv(CONSOLE_READ_SIZE)
            except TimeoutError:
                yield b""
                continue
            if not data:
                return
            yield data


def _say(text: str) -> None:
    """What an enclave's process says; it may be another user's."""
    for line in text.splitlines():
        click.echo(printable(line), err=True)


def _object(reply: Reply) -> Any:  # noqa: ANN401 - any JSON
    try:
        return json.loads(reply.stdout) if reply.status == 0 else None
    except (ValueError, RecursionError):
        return None


def _check(answers: Answers) -> None:
    """NitroCliError E39 where some did not answer, E38 where some could not do it."""
    if answers.failed:
        raise _no_answer(answers.failed)
    bad = [reply for reply in answers.replies.values() if reply.status != 0]
    if bad:
        raise NitroCliError(Code.COMMAND_NOT_EXECUTED, bad[0].stderr or f"status {bad[0].status}")


def _no_answer(count: int) -> NitroCliError:
    click.echo(f"Failed connections: {count}", err=True)
    return NitroCliError(Code.PROCESS_CONNECTION, f"{count} of them")

# SPDX-License-Identifier: Apache-2.0
"""``enclave``: the commands, the options that all share, and the one place that turns errors into exit codes."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import click

from enclavekit import __version__
from enclavekit.cli.output import Exit, Output, exit_code
from enclavekit.errors import Error, FileError, UsageError
from enclavekit.nitro_cli.late_group import LateGroup

COMMANDS = {
    # name: module that defines the click command, imported only when it is used
    "ps": "enclavekit.cli.lifecycle:ps",
    "logs": "enclavekit.cli.lifecycle:logs",
    "console": "enclavekit.cli.lifecycle:console",
    "wait": "enclavekit.cli.lifecycle:wait",
    "stop": "enclavekit.cli.lifecycle:stop",
    "connect": "enclavekit.cli.lifecycle:connect",
    "allocate": "enclavekit.cli.allocate:allocate_command",
    "attest": "enclavekit.cli.attest:attest",
    "build": "enclavekit.cli.build:build",
    "cache": "enclavekit.cli.cache:cache",
    "describe": "enclavekit.cli.describe:describe",
    "diff": "enclavekit.cli.diff:diff",
    "init": "enclavekit.cli.project:init",
    "kernel": "enclavekit.cli.kernel:kernel",
    "lab": "enclavekit.cli.lab:lab",
    "doctor": "enclavekit.cli.doctor:doctor",
    "explain": "enclavekit.cli.explain_code:explain",
    "extract": "enclavekit.cli.extract:extract",
    "keygen": "enclavekit.cli.keygen:keygen",
    "kms-policy": "enclavekit.cli.kms_policy:kms_policy",
    "lint": "enclavekit.cli.lint:lint",
    "nitro-cli": "enclavekit.nitro_cli.main:nitro_cli",
    "pcr": "enclavekit.cli.describe:pcr",
    "resign": "enclavekit.cli.sign:resign",
    "run": "enclavekit.cli.run:run",
    "runtime": "enclavekit.cli.runtime:runtime",
    "sign": "enclavekit.cli.sign:sign",
    "simulate": "enclavekit.cli.simulate:simulate",
    "verify": "enclavekit.cli.verify:verify",
}


NITRO_CLI = "nitro-cli"
FAILURES = {
    "run": Exit.RUN_FAILED,
    "simulate": Exit.RUN_FAILED,
    "wait": Exit.RUN_FAILED,
    "diff": Exit.TROUBLE,
    "lab run": Exit.RUN_FAILED,
    "lab shell": Exit.RUN_FAILED,
}
"""Commands whose other exit codes say something else: all failures have this one."""


@click.group(
    cls=LateGroup, late=COMMANDS, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(__version__, prog_name="enclave", message="%(prog)s %(version)s")
def cli() -> None:
    """Build, run, inspect and trust enclave images (EIF), on any Linux machine."""


def main(arguments: list[str] | None = None) -> None:
    """The program: never a traceback for bad input, a lacking machine or Ctrl-C.

    Called by the name nitro-cli (a symlink), it is that.
    """
    words = sys.argv[1:] if arguments is None else arguments
    if arguments is None and Path(sys.argv[0]).name == NITRO_CLI:
        sys.exit(_nitro_cli(words, NITRO_CLI))
    sys.exit(run_command(words))


def run_command(words: list[str]) -> int:
    """Run one command line and return its exit code."""
    if words[:1] == [NITRO_CLI]:
        return _nitro_cli(words[1:], f"enclave {NITRO_CLI}")
    own = words[: words.index("--")] if "--" in words else words
    output = Output(json="--json" in own)
    try:
        code: Any = cli.main(args=words, prog_name="enclave", standalone_mode=False)
        return int(code or 0)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        code = Exit.USAGE
    except click.ClickException as error:
        hint = None
        if isinstance(error, click.UsageError) and error.ctx is not None:
            hint = f"{error.ctx.command_path} --help"
        output.error(UsageError(_one_line(error.format_message()), hint=hint))
        code = Exit.USAGE
    except Error as error:
        output.error(error)
        code = exit_code(error)
    except BrokenPipeError:
        # Whoever read our stdout has gone: say nothing, and keep the interpreter from trying again at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = Exit.FAILED
    except OSError as error:
        output.error(FileError(f"{error.filename or 'system'}: {(error.strerror or str(error)).lower()}"))
        code = Exit.FAILED
    except (KeyboardInterrupt, click.Abort):
        click.echo("enclave: interrupted", err=True)
        return 130
    return int(FAILURES.get(" ".join(own[:2]), FAILURES.get(own[0], code)) if own else code)


def _nitro_cli(words: list[str], name: str) -> int:
    from enclavekit.nitro_cli.main import run_command as run

    return run(words, name)


def _one_line(text: str) -> str:
    text = " ".join(text.split()).rstrip(".")
    return text[:1].lower() + text[1:]

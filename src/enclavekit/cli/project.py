# SPDX-License-Identifier: Apache-2.0
"""``enclave.toml`` as the options' defaults, and ``enclave init``, which makes one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from enclavekit.build.project import FILE, Project, read_project, template
from enclavekit.build.source import KINDS, is_source
from enclavekit.cli.options import output_options
from enclavekit.cli.output import Output
from enclavekit.errors import UsageError
from enclavekit.linux.atomic import replacing

ADDED = ("env", "launch_value")
"""Options that are added to the file's; the others take their place."""

config_option = click.option("--config", metavar="FILE", help=f"An {FILE}; without a SOURCE, the one that is here.")


class ProjectCommand(click.Command):
    """A command whose options an ``enclave.toml`` gives, if one is named, or the first argument is left out.

    ``project`` of the context's ``meta`` is the file that was read.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """As click does, with the file's values as defaults."""
        given, _, _ = self.make_parser(ctx).parse_args(args=list(args))
        first = next(one.name for one in self.params if isinstance(one, click.Argument))
        named = given.get("config")
        here = not isinstance(given.get(first), str) or self._is_command(given[first])
        if isinstance(named, str) or (here and Path(FILE).is_file()):
            project = read_project(Path(named if isinstance(named, str) else FILE))
            values = {"target" if first == "target" and name == "source" else name: value
                      for name, value in project.values.items()
                      if not (first == "target" and name == "target")}  # fmt: skip
            parameters = {one.name for one in self.params}
            ctx.default_map = {name: value for name, value in values.items() if name in parameters}
            ctx.meta["project"] = project
            if isinstance(given.get(first), str) and self._is_command(given[first]) and first in values:
                # Only click's parser has forgotten that it stood behind "--".
                args = [values[first], *args] if "--" in args else args
        return super().parse_args(ctx, args)

    def _is_command(self, word: str) -> bool:
        """Whether what stands where the source should is the command behind ``--``."""
        return not is_source(word) and self.name == "build"


def project_of(ctx: click.Context) -> Project | None:
    """The file that gave this command's defaults."""
    found = ctx.meta.get("project")
    return found if isinstance(found, Project) else None


def with_added(ctx: click.Context, words: dict[str, Any]) -> dict[str, Any]:
    """The options' values, with what a file has put before what was given."""
    project = project_of(ctx)
    if project is None:
        return words
    added = {}
    for name in ADDED:
        if ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
            added[name] = (*project.values.get(name, ()), *words[name])
    return {**words, **added}


@click.command()
@click.argument("source", required=False)
@click.option("-o", "--output", "target", default=FILE, show_default=True, metavar="FILE", help="Where it goes.")
@click.option("--force", is_flag=True, help="Replace one that is there.")
@output_options
def init(source: str | None, target: str, force: bool, output: Output) -> None:
    """Write an enclave.toml with every key in it, commented. SOURCE is what the image will be made of."""
    if source is not None and not is_source(source):
        raise UsageError(f"source {source!r}: expected one of {', '.join(f'{kind}:' for kind in KINDS)}")
    path = Path(target)
    if path.exists() and not force:
        raise UsageError(f"{target}: is there already", hint="--force replaces it")
    with replacing(path) as file:
        file.write(template(source).encode())
    output.show({"schema": 1, "file": target}, lambda console: console.print(target, markup=False))

# SPDX-License-Identifier: Apache-2.0
"""A group of commands that are imported when they are used, so that the program starts fast."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

import click


class LateGroup(click.Group):
    """``late`` is, by name, where each command is: ``package.module:attribute``. Others can be added as usual."""

    def __init__(self, *args: Any, late: Mapping[str, str], **words: Any) -> None:  # noqa: ANN401 - click's words
        super().__init__(*args, **words)
        self._late = late

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All names, sorted."""
        return sorted({*super().list_commands(ctx), *self._late})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one."""
        if cmd_name not in self._late:
            return super().get_command(ctx, cmd_name)
        module, name = self._late[cmd_name].split(":")
        command: click.Command = getattr(import_module(module), name)
        return command

# SPDX-License-Identifier: Apache-2.0
"""Where the sockets of enclaves' processes are: where it is said, else where nitro-cli's packages made a directory.

A machine without those packages has no /run/nitro_enclaves. There a directory of the user's own is made, so that no
root is needed.
"""

from __future__ import annotations

from pathlib import Path

from enclavekit.enclave.directory import own_directory
from enclavekit.environment import nitro_cli_sockets, nitro_cli_state
from enclavekit.errors import Error, FileError
from enclavekit.nitro_cli.codes import Code
from enclavekit.nitro_cli.command import NitroCliError


def sockets_directory() -> Path:
    """NitroCliError E07 where it cannot be read."""
    directory = nitro_cli_sockets()
    try:
        if directory is None:
            directory = nitro_cli_state()
            own_directory(directory)
        next(directory.iterdir(), None)
    except OSError as error:
        raise NitroCliError(Code.READ_FROM_DISK, FileError.of(error, str(directory), "read").message) from error
    except Error as error:
        raise NitroCliError(Code.READ_FROM_DISK, error.message) from error
    return directory

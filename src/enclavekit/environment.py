# SPDX-License-Identifier: Apache-2.0
"""All that is read from the environment, here and nowhere else."""

from __future__ import annotations

import os
from pathlib import Path

from enclavekit.errors import MissingError, UsageError


def runtime_directory() -> Path:
    """Of running enclaves: $XDG_RUNTIME_DIR/enclavekit, else one of this user's under /tmp."""
    base = os.environ.get("XDG_RUNTIME_DIR")
    if base:
        return Path(base) / "enclavekit"
    return Path(f"/tmp/enclavekit-{os.getuid()}")  # noqa: S108 - owner and mode are checked before use


def data_directory() -> Path:
    """Of the installed runtime: $XDG_DATA_HOME/enclavekit, else ~/.local/share/enclavekit."""
    base = os.environ.get("XDG_DATA_HOME")
    if base:
        return Path(base) / "enclavekit"
    try:
        return Path.home() / ".local" / "share" / "enclavekit"
    except RuntimeError as error:
        raise MissingError("this user has no home directory", hint="set HOME or XDG_DATA_HOME") from error


def cache_directory() -> Path:
    """Of what can be fetched or made again: $XDG_CACHE_HOME/enclavekit, else ~/.cache/enclavekit."""
    base = os.environ.get("XDG_CACHE_HOME")
    if base:
        return Path(base) / "enclavekit"
    try:
        return Path.home() / ".cache" / "enclavekit"
    except RuntimeError as error:
        raise MissingError("this user has no home directory", hint="set HOME or XDG_CACHE_HOME") from error


def attestation_directory() -> Path:
    """Of the authority that signs for this user's local enclaves: ``root.pem``, and keys that only the user reads."""
    return data_directory() / "attestation"


def docker_config() -> Path:
    """Docker's configuration file, with what logs in to registries."""
    directory = os.environ.get("DOCKER_CONFIG")
    if directory:
        return Path(directory) / "config.json"
    return Path(os.environ.get("HOME") or "/") / ".docker" / "config.json"


def docker_sockets() -> list[Path]:
    """Of a docker daemon: DOCKER_HOST, or where docker and rootless podman have theirs."""
    host = os.environ.get("DOCKER_HOST", "")
    if host:
        return [Path(host.removeprefix("unix://"))] if host.startswith("unix://") else []
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    own = [Path(runtime) / "docker.sock", Path(runtime) / "podman/podman.sock"] if runtime else []
    return [path for path in (Path("/var/run/docker.sock"), *own) if path.exists()]


def nitro_cli_blobs() -> Path | None:
    """nitro-cli's kernel and init: NITRO_CLI_BLOBS, or where its packages put them; None where they are not."""
    named = os.environ.get("NITRO_CLI_BLOBS")
    if named:
        return Path(named)
    installed = Path("/usr/share/nitro_enclaves/blobs")
    return installed if installed.is_dir() else None


def nitro_cli_sockets() -> Path | None:
    """NITRO_CLI_SOCKETS_PATH, or where nitro-cli's packages have them; None where they are not."""
    named = os.environ.get("NITRO_CLI_SOCKETS_PATH")
    if named:
        return Path(named)
    installed = Path("/run/nitro_enclaves")
    return installed if installed.is_dir() else None


def nitro_cli_logs() -> Path | None:
    """NITRO_CLI_LOGS_PATH, or where nitro-cli's packages have them; None where they are not."""
    named = os.environ.get("NITRO_CLI_LOGS_PATH")
    if named:
        return Path(named)
    installed = Path("/var/log/nitro_enclaves")
    return installed if installed.is_dir() else None


def nitro_cli_state() -> Path:
    """What takes the place of both for a user without them: beside the directory of running enclaves."""
    runtime = runtime_directory()
    return runtime.with_name(f"{runtime.name}-nitro-cli")


def nitro_cli_words() -> tuple[str, bool]:
    """The log's level (RUST_LOG), and whether failures are told with where they happened (BACKTRACE)."""
    return os.environ.get("RUST_LOG") or "info", os.environ.get("BACKTRACE") == "1"


def lab_directory() -> Path:
    """Of labs that are up, beside the directory of running enclaves."""
    runtime = runtime_directory()
    return runtime.with_name(f"{runtime.name}-labs")


def lab_cache() -> Path:
    """Of the root file system of labs' parents."""
    return cache_directory() / "lab"


def carrier() -> str | None:
    """What runs enclaves of commands that have no option for it."""
    return os.environ.get("ENCLAVEKIT_CARRIER") or None


def qemu() -> str | None:
    """A QEMU instead of the runtime's."""
    return os.environ.get("ENCLAVEKIT_QEMU") or None


def proxies() -> dict[str, str]:
    """HTTP_PROXY, HTTPS_PROXY and NO_PROXY, in either case, by http, https and no."""
    found = {}
    for scheme in ("http", "https", "no"):
        value = os.environ.get(f"{scheme}_proxy") or os.environ.get(f"{scheme.upper()}_PROXY")
        if value:
            found[scheme] = value
    return found


def source_date_epoch() -> int | None:
    """Seconds since 1970 that every file's time is clamped to (reproducible-builds.org/specs/source-date-epoch)."""
    text = os.environ.get("SOURCE_DATE_EPOCH")
    if text is None or text == "":
        return None
    if not text.isascii() or not text.isdigit() or int(text) > 0xFFFF_FFFF:
        raise UsageError(f"SOURCE_DATE_EPOCH: got {text!r}, expected seconds from 0 to {0xFFFFFFFF}")
    return int(text)


def key_password() -> str | None:
    """Of an encrypted signing key."""
    return os.environ.get("ENCLAVEKIT_KEY_PASSWORD") or None


def pkcs11_pin() -> str | None:
    """Of the token with the signing key."""
    return os.environ.get("ENCLAVEKIT_PIN") or None


def search_path() -> str:
    """Where programs are looked for."""
    return os.environ.get("PATH", os.defpath)


def qemu_environment() -> dict[str, str]:
    """What QEMU needs of our environment: nothing secret of ours is handed down."""
    return {name: os.environ[name] for name in ("PATH", "LANG", "LD_LIBRARY_PATH") if name in os.environ}

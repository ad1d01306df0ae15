# SPDX-License-Identifier: Apache-2.0
"""``enclave extract``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from enclavekit import eif
from enclavekit.cli.describe import naming, reading
from enclavekit.cli.options import output_options
from enclavekit.cli.output import Output, printable
from enclavekit.errors import UsageError
from enclavekit.inspection.extract import extract as extract_image

if TYPE_CHECKING:
    from rich.console import Console


@click.command()
@click.argument("image", metavar="F.eif")
@click.option("-C", "--directory", required=True, metavar="DIR", help="Where the files go; made if need be.")
@click.option("--rootfs", is_flag=True, help="Also unpack the ramdisks, to DIR/ramdisk-N/.")
@click.option("--devices", is_flag=True, help="Make device nodes (root only).")
@click.option("--owners", is_flag=True, help="Keep owners and set-user-id bits (root only).")
@output_options
def extract(image: str, directory: str, rootfs: bool, devices: bool, owners: bool, output: Output) -> None:
    """Write every section of an image to a file; nothing that is in DIR is overwritten."""
    if (devices or owners) and not rootfs:
        raise UsageError("--devices and --owners are for --rootfs", hint="enclave extract --help")
    if (devices or owners) and os.geteuid() != 0:
        raise UsageError("--devices and --owners need root", hint="without them, files belong to you")
    with reading(image) as file, naming(image):
        found = eif.inspect(file)
        made = extract_image(file, found, Path(directory), name=image, rootfs=rootfs, devices=devices, owners=owners)
    for remark in found.remarks:
        output.say(f"warning: {printable(remark.message)}")
    for one in made:
        for note in one.notes:
            output.say(f"warning: {one.path.name}: {printable(note)}")
    files = [
        {
            "Section": one.section,
            "Path": str(one.path),
            "Size": one.size,
            **({"Compression": list(one.compressions)} if one.compressions else {}),
            **({"Files": one.files} if one.files is not None else {}),
        }
        for one in made
    ]

    def lines(console: Console) -> None:
        for one in made:
            what = f"{one.files} files" if one.files is not None else f"{one.size} bytes"
            packed = "" if set(one.compressions) <= {"none"} else f", {', '.join(one.compressions)}"
            console.print(f"{printable(str(one.path))}  {what}{packed}", markup=False)

    output.show({"schema": 1, "Files": files}, lines)

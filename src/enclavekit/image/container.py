# SPDX-License-Identifier: Apache-2.0
"""A container image, wherever it lies, as a tree: its layers, unpacked to a cache and checked, applied in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from threading import Event
from typing import BinaryIO

from enclavekit.eif import Arch
from enclavekit.errors import SourceError
from enclavekit.image.layer_cache import LayerBlob, LayerCache
from enclavekit.image.layers import Layers
from enclavekit.image.oci import ARCHITECTURES, Digest, ImageConfig
from enclavekit.image.tree import Tree

PARALLEL = 4

Report = Callable[[str, int, int], None]
"""Told of a layer's progress: its name, bytes so far, and bytes in all, as it is stored."""


@dataclass(frozen=True, slots=True)
class ContainerImage:
    """An image that was found, for one platform. ``manifest`` is its manifest's digest, where it has one.

    ``config_digest`` is the image's id: the same wherever the image lies.
    """

    name: str
    manifest: Digest | None
    config_digest: Digest
    config: ImageConfig
    layers: tuple[LayerBlob, ...]


def check_image(name: str, config: ImageConfig, layers: Sequence[object], arch: Arch | None) -> Arch:
    """The architecture; SourceError when it is not the wanted one, or layers and configuration do not fit together."""
    if config.os not in ("linux", ""):
        raise SourceError(f"{name}: an image for {config.os[:32]!r}, expected linux")
    found = ARCHITECTURES.get(config.architecture)
    if found is None or arch not in (None, found):
        wanted = next((theirs for theirs, ours in ARCHITECTURES.items() if ours is arch), "amd64 or arm64")
        raise SourceError(f"{name}: an image for architecture {config.architecture[:32]!r}, expected {wanted}")
    if len(layers) != len(config.diff_ids):
        raise SourceError(f"{name}: {len(layers)} layers, but {len(config.diff_ids)} diff_ids in its configuration")
    return found


def read_layers(image: ContainerImage, cache: LayerCache, files: ExitStack, report: Report) -> tuple[Tree, list[str]]:
    """The tree, and sentences about what it could not hold. The layers' files stay open in ``files``."""
    layers = Layers()
    stop = Event()

    def open_layer(number: int) -> BinaryIO:
        name, blob = _name(image, number), image.layers[number]

        def tell(done: int) -> None:
            if stop.is_set():  # nobody waits for it any more
                raise SourceError(f"{name}: given up")
            report(name, done, blob.content.size)

        file = cache.open(blob, name, tell)
        report(name, blob.content.size, blob.content.size)
        return file

    with ThreadPoolExecutor(max_workers=PARALLEL) as pool:
        opening = [pool.submit(open_layer, number) for number in range(len(image.layers))]
        try:
            for number, task in enumerate(opening):
                layers.apply(files.enter_context(task.result()), _name(image, number))
        except BaseException:
            stop.set()
            for task in opening:
                if not task.cancel() and task.exception() is None:
                    task.result().close()
            raise
    return layers.tree, layers.warnings()


def _name(image: ContainerImage, number: int) -> str:
    return f"{image.name}: layer {number} ({image.layers[number].diff_id.short})"

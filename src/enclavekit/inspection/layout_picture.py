# SPDX-License-Identifier: Apache-2.0
"""A picture of an image's layout, as SVG: its parts to scale, but small ones stay visible, and what PCRs cover."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 1000
MARGIN = 52
"""Left of the parts, for the names of the bands."""
SMALLEST = 16
BAND_HEIGHT, BAND_STEP = 12, 20
BAR_HEIGHT = 46
LABEL_WIDTH = 6.6
"""Of a letter, about."""


@dataclass(frozen=True, slots=True)
class Part:
    """Bytes of the file. ``look`` is one of the classes of the style sheet."""

    name: str
    offset: int
    size: int
    look: str


def layout_picture(parts: Sequence[Part], bands: Sequence[tuple[str, set[str]]]) -> str:
    """``bands`` are drawn above the parts that they name."""
    places = _places(parts)
    top = 6 + BAND_STEP * len(bands)
    drawn = [_band(number, name, covered, parts, places) for number, (name, covered) in enumerate(bands)]
    below = 0
    # From the right, so that no line crosses the label of a part before it.
    for part, (left, width) in zip(reversed(parts), reversed(places), strict=True):
        label = part.name
        title = f"{part.name}: {part.size} bytes at offset 0x{part.offset:x}"
        drawn.append(
            f'<g><title>{escape(title)}</title><rect class="c-{part.look}" x="{left:.1f}" y="{top}"'
            f' width="{max(width - 1.5, 1):.1f}" height="{BAR_HEIGHT}" rx="3"/>'
        )
        if len(label) * LABEL_WIDTH + 8 < width:
            drawn.append(f'<text class="on" x="{left + 7:.1f}" y="{top + 28}">{escape(label)}</text>')
        else:  # beside it there is no room: below, in turns
            row = below % 3
            below += 1
            y = top + BAR_HEIGHT + 16 + 14 * row
            middle = left + width / 2
            anchor = "end" if middle > WIDTH - 90 else "start"
            drawn.append(
                f'<line class="edge" x1="{middle:.1f}" y1="{top + BAR_HEIGHT}" x2="{middle:.1f}" y2="{y - 9}"/>'
                f'<text class="soft" x="{middle + (-4 if anchor == "end" else 4):.1f}" y="{y}"'
                f' text-anchor="{anchor}">{escape(label)}</text>'
            )
        drawn.append("</g>")
    height = top + BAR_HEIGHT + 16 + (14 * min(below, 3) if below else 0)
    inner = "".join(drawn)
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="Layout of the image">{inner}</svg>'


def _places(parts: Sequence[Part]) -> list[tuple[float, float]]:
    """Left edge and width of each: the least that can be seen, and the rest by size."""
    total = sum(part.size for part in parts) or 1
    room = WIDTH - MARGIN - SMALLEST * len(parts)
    places = []
    left = float(MARGIN)
    for part in parts:
        width = SMALLEST + max(room, 0) * part.size / total
        places.append((left, width))
        left += width
    return places


def _band(
    number: int, name: str, covered: set[str], parts: Sequence[Part], places: Sequence[tuple[float, float]]
) -> str:
    y = 4 + BAND_STEP * number
    drawn = [f'<text x="0" y="{y + 10}">{name}</text>']
    for part, (left, width) in zip(parts, places, strict=True):
        if part.name in covered:
            title = f"<title>{name} covers {escape(part.name)}</title>"
            drawn.append(
                f'<rect class="band" x="{left:.1f}" y="{y}" width="{max(width - 1.5, 1):.1f}" height="{BAND_HEIGHT}"'
                f' rx="3">{title}</rect>'
            )
    return "".join(drawn)

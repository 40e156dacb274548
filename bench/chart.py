"""Pictures of bench results as plain SVG: bars, by our own few lines."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple
from xml.sax.saxutils import escape

_COLOURS = ("#4472a8", "#c8553d", "#6a9955", "#b08ab8", "#9a9a9a")
_LEFT, _WIDTH, _BAR, _GAP = 230, 420, 15, 6


class Panel(NamedTuple):
    """Bars under one title; each is a label with its parts by name, laid end to end."""

    title: str
    bars: Sequence[tuple[str, Mapping[str, float]]]
    goal: float = 0.0  # a line across, if any


def draw(title: str, panels: Sequence[Panel]) -> str:
    """The panels below one another."""
    lines: list[str] = []
    top = 34
    for panel in panels:
        top = _panel(lines, panel, top) + 22
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_LEFT + _WIDTH + 90}" height="{top}" '
        'font-family="sans-serif" font-size="11">'
    )
    frame = f'<rect width="100%" height="100%" fill="#ffffff"/>{_text(10, 20, title, size=14)}'
    return "\n".join((head, frame, *lines, "</svg>", ""))


def _panel(lines: list[str], panel: Panel, top: int) -> int:
    names = list(dict.fromkeys(name for _, parts in panel.bars for name in parts))
    colours = {name: _COLOURS[index % len(_COLOURS)] for index, name in enumerate(names)}
    most = max([*(sum(parts.values()) for _, parts in panel.bars), panel.goal, 1e-9])
    lines.append(_text(10, top + 12, panel.title, size=12))
    if len(names) > 1:
        at = _LEFT
        for name in names:
            lines.append(f'<rect x="{at}" y="{top + 3}" width="9" height="9" fill="{colours[name]}"/>')
            lines.append(_text(at + 13, top + 12, name))
            at += 26 + 7 * len(name)
    top += 20
    begun = top
    for label, parts in panel.bars:
        lines.append(_text(_LEFT - 8, top + 12, label, anchor="end"))
        at_x = float(_LEFT)
        for name, value in parts.items():
            width = value / most * _WIDTH
            lines.append(f'<rect x="{at_x:.1f}" y="{top}" width="{width:.1f}" height="{_BAR}" fill="{colours[name]}"/>')
            at_x += width
        lines.append(_text(at_x + 5, top + 12, f"{sum(parts.values()):.3g}"))
        top += _BAR + _GAP
    if panel.goal:
        x = _LEFT + panel.goal / most * _WIDTH
        lines.append(
            f'<line x1="{x:.1f}" y1="{begun - 2}" x2="{x:.1f}" y2="{top}" stroke="#222222" stroke-dasharray="4 3"/>'
        )
    return top


def _text(x: float, y: float, text: str, *, anchor: str = "start", size: int = 11) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}">{escape(text)}</text>'

"""Draws docs/architecture.svg: the packages in their layers, and which imports which, from the real imports.

An arrow that follows from others is left out; so are arrows to the ground, which everything may import.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from html import escape
from pathlib import Path
from textwrap import wrap

ROOT = Path(__file__).parent.parent
GROUND = 3  # rows of the contract, from below, that are drawn without arrows
BOX, GAP, ROW, LINE = 204, 24, 132, 14


def layers() -> list[list[str]]:
    """The rows of the contract "Arrows in curation run down" that exist, from above."""
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    (contract,) = (each for each in config["contracts"] if each["type"] == "layers")
    rows = [[name.strip(" ()") for name in row.split("|")] for row in contract["layers"]]
    found = [[name for name in row if _modules(f"curation/{name}") is not None] for row in rows]
    return [row for row in found if row]


def _modules(place: str) -> list[str] | None:
    """The modules of a package, [] for a single module, None for what does not exist."""
    folder = ROOT / place
    if folder.is_dir():
        inner = {path.stem for path in folder.glob("*.py")} | {
            path.parent.name for path in folder.glob("*/__init__.py")
        }
        return sorted(name for name in inner if not name.startswith("__"))
    return [] if folder.with_suffix(".py").exists() else None


def arrows(names: Iterable[str]) -> set[tuple[str, str]]:
    """Which of these packages imports which, without what follows from other arrows."""
    import grimp

    graph = grimp.build_graph("curation", "flows", "unish_model")
    direct: dict[str, set[str]] = {name: set() for name in names}

    def package(module: str) -> str:
        parts = module.split(".")
        return parts[0] if parts[0] != "curation" else ".".join(parts[1:2])

    for module in graph.modules:
        for imported in graph.find_modules_directly_imported_by(module):
            one, other = package(module), package(imported)
            if one != other and one in direct and other in direct:
                direct[one].add(other)

    def reached(name: str, seen: set[str]) -> set[str]:
        for other in direct[name] - seen:
            seen.add(other)
            reached(other, seen)
        return seen

    return {
        (one, other)
        for one, others in direct.items()
        for other in others
        if not any(other in reached(between, set()) for between in others - {other})
    }


def svg() -> str:
    """The picture."""
    rows = layers()
    upper, ground = rows[:-GROUND], [name for row in rows[-GROUND:] for name in row]
    upper[0] = ["flows", *upper[0], "unish_model"]
    width = max(len(row) for row in upper) * (BOX + GAP) + GAP
    height = len(upper) * ROW + 110
    center: dict[str, tuple[float, float]] = {}
    boxes: list[str] = []
    for number, row in enumerate(upper):
        left = (width - len(row) * (BOX + GAP) + GAP) / 2
        for place, name in enumerate(row):
            x, y = left + place * (BOX + GAP), 20 + number * ROW
            center[name] = (x + BOX / 2, y)
            boxes.append(_box(name, x, y))
    lines, tips = [], []
    for one, other in sorted(arrows(center)):
        (x1, y1), (x2, y2) = center[one], center[other]
        y1 += ROW - 44  # siblings are independent, so every arrow goes down
        lines.append(f'<path d="M{x1:g} {y1:g} C{x1:g} {y1 + 40:g} {x2:g} {y2 - 46:g} {x2:g} {y2 - 6:g}"/>')
        tips.append(f'<path d="M{x2 - 4:g} {y2 - 8:g} L{x2 + 4:g} {y2 - 8:g} L{x2:g} {y2:g} z"/>')
    base = len(upper) * ROW + 20
    under = "".join(
        f'<text x="{GAP + 16}" y="{base + 44 + LINE * number}" class="small">{escape(line)}</text>'
        for number, line in enumerate(wrap(", ".join(sorted(ground)), 150))
    )
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif">',
            "<style>.name{font-size:15px;font-weight:bold}.small{font-size:11px;fill:#444}</style>",
            f'<rect width="{width}" height="{height}" fill="white"/>',
            '<g fill="none" stroke="#557" stroke-width="1.4" opacity="0.75">',
            *lines,
            "</g>",
            '<g fill="#557">',
            *tips,
            "</g>",
            *boxes,
            f'<rect x="{GAP}" y="{base}" width="{width - 2 * GAP}" height="70" rx="6" fill="#f3efe4" stroke="#a98"/>',
            f'<text x="{GAP + 16}" y="{base + 24}" class="name">the ground: everything may import it</text>',
            under,
            "</svg>",
            "",
        ]
    )


def _box(name: str, x: float, y: float) -> str:
    outside = name in ("flows", "unish_model")
    modules = _modules(name if outside else f"curation/{name}") or []
    lines = wrap(", ".join(modules), 32)[:4]
    fill = "#e6eef8" if outside else "#eef5ea"
    text = "".join(
        f'<text x="{x + 10:g}" y="{y + 36 + LINE * number:g}" class="small">{escape(line)}</text>'
        for number, line in enumerate(lines)
    )
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{BOX}" height="{ROW - 44}" rx="6" fill="{fill}" stroke="#688"/>'
        f'<text x="{x + 10:g}" y="{y + 19:g}" class="name">{name}</text>{text}'
    )

"""The chart of a run for the README: mails a second on a logarithmic scale, as an SVG that follows light and dark."""

from __future__ import annotations

import math
from html import escape
from pathlib import Path
from typing import Any

from tests.bench.figures import median

WIDTH, LEFT, RIGHT, TOP, ROW = 860, 330, 30, 62, 34
LOWEST = 100
#: Mails a second at the left edge.
OURS = ("redis", "one", "postgresql", "pipelining", "in_parts", "in_full")
CAPTION = (
    "Blue: Rolecast, every verdict, delivery and outcome recorded. Grey: what people use instead.",
    "Green: smtp-source, which renders and records nothing. Medians of one interleaved run.",
)
STYLE = """
text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; font-size: 15px; fill: #1c2430; }
.title { font-size: 17px; font-weight: 600; }
.small { font-size: 13px; fill: #566173; }
.line { stroke: #d9dee6; stroke-width: 1; }
.ours { fill: #1f55c9; } .other { fill: #8a94a6; } .bound { fill: #3f7d4e; }
.page { fill: #ffffff; }
@media (prefers-color-scheme: dark) {
text { fill: #e6eaf1; } .small { fill: #a3adbd; } .line { stroke: #333c4a; } .page { fill: #10141a; }
.ours { fill: #6d9bf5; } .other { fill: #7d8798; } .bound { fill: #6fb382; }
}
"""


def write(raw: dict[str, Any], path: Path) -> None:
    """Draw the raw results of a run to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(draw(raw), encoding="utf-8")


def draw(raw: dict[str, Any]) -> str:
    """The SVG: a bar for each sender, at its largest size, the fastest first."""
    bars = _bars(raw["broadcasts"], raw["labels"])
    highest = 10 ** math.ceil(math.log10(max((rate for _, _, rate, _ in bars), default=1000)))
    height = TOP + ROW * len(bars) + 82

    def across(rate: float) -> float:
        share = math.log(max(rate, LOWEST) / LOWEST) / math.log(highest / LOWEST)
        return LEFT + share * (WIDTH - LEFT - RIGHT - 90)

    spoken = escape("; ".join(f"{label} {rate:,.0f}" for _, label, rate, _ in bars))
    title = f"Mails a second to one relay on the same {raw['machine']['cores']} cores, logarithmic"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" aria-labelledby="t">',
        f'<title id="t">Mails a second, by sender: {spoken}</title>',
        f"<style>{STYLE}</style>",
        f'<rect class="page" width="{WIDTH}" height="{height}" rx="8"/>',
        f'<text class="title" x="20" y="32">{title}</text>',
    ]
    for power in range(int(math.log10(LOWEST)), int(math.log10(highest)) + 1):
        x = across(10**power)
        parts.append(f'<line class="line" x1="{x:.1f}" y1="{TOP - 10}" x2="{x:.1f}" y2="{height - 68}"/>')
        parts.append(f'<text class="small" x="{x:.1f}" y="{height - 50}" text-anchor="middle">{10**power:,}</text>')
    for index, (kind, label, rate, size) in enumerate(bars):
        y, wide = TOP + index * ROW, across(rate) - LEFT
        parts.append(f'<text x="{LEFT - 12}" y="{y + 17}" text-anchor="end">{escape(label)}</text>')
        parts.append(f'<rect class="{kind}" x="{LEFT}" y="{y}" width="{max(2, wide):.1f}" height="24" rx="3"/>')
        parts.append(f'<text x="{LEFT + max(2, wide) + 8:.1f}" y="{y + 17}">{rate:,.0f}</text>')
        parts.append(f"<!-- {escape(label)}: {size:,} mails -->")
    parts += [
        f'<text class="small" x="20" y="{height - 28 + 18 * index}">{line}</text>' for index, line in enumerate(CAPTION)
    ]
    return "\n".join([*parts, "</svg>", ""])


def _bars(broadcasts: list[dict[str, Any]], labels: dict[str, str]) -> list[tuple[str, str, float, int]]:
    """(kind, label, mails a second, mails) of each sender, the fastest first."""
    found = []
    for key, label in labels.items():
        mine = [one for one in broadcasts if one["name"] == key]
        if not mine or key.endswith("_command"):
            continue
        size = max(one["recipients"] for one in mine)
        rate = median([one["rate"] for one in mine if one["recipients"] == size])
        kind = "ours" if key in OURS else "bound" if key == "smtp_source" else "other"
        found.append((kind, label, rate, size))
    return sorted(found, key=lambda bar: -bar[2])

"""A method's branches as an inline SVG, from the lines of its `## Diagram`.

A line is a chain, `image @ A.draw -> z_t [no gradient] @ A.forward | z_t =`: behind `@` is the line of a box, found as
`Source.place` does, and `[EMA]` marks weights that are copied after a step. Boxes with the same words are the same box.
Time runs downwards, and each chain takes the first lane that is free.
"""

import re
import textwrap
from html import escape
from itertools import pairwise

from reporting.pages.source import Source

WIDTH, HEIGHT, ACROSS, DOWN = 104, 38, 112, 56  # of a box, and from one to the next
KINDS = {" [no gradient]": "stopped", " [EMA]": "average"}


def draw(lines: list[str], of: Source) -> str:
    boxes, edges = read(lines)
    depths = layers(boxes, edges)
    places = lanes(lines, depths)
    width = (max(lane for lane in places.values()) + 1) * ACROSS
    height = (max(depths.values()) + 1) * DOWN
    parts = [arrow(a, b, places, depths, boxes) for a, b in edges]
    parts += [box(name, of.place(at), kind, places[name], depths[name]) for name, (at, kind) in boxes.items()]
    return (
        f'<svg class="diagram" viewBox="0 0 {width} {height}" style="max-width:{width}px" role="group" '
        'aria-label="The branches; boxes lead to their lines"><defs><marker id="tip" viewBox="0 0 8 8" refX="7" '
        'refY="4" markerUnits="userSpaceOnUse" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0 8 4 0 8z"/></marker></defs>'
        + "".join(parts) + "</svg>"
    )  # fmt: skip


def words(box: str) -> str:
    return re.sub(r" @ .*| \[.*\]", "", box).strip()


def read(lines: list[str]) -> tuple[dict[str, list], list[tuple[str, str]]]:
    """Words of a box → [its place, its kind], and the arrows."""
    boxes, edges = {}, []
    for line in lines:
        chain = line.split(" -> ")
        for text in chain:
            found = boxes.setdefault(words(text), ["", ""])
            found[0] = found[0] or text.partition(" @ ")[2].strip()
            found[1] = found[1] or "".join(kind for mark, kind in KINDS.items() if mark in text)
        edges += [(words(a), words(b)) for a, b in pairwise(chain)]
    return boxes, list(dict.fromkeys(edges))


def layers(boxes: dict, edges: list) -> dict[str, int]:
    """How far down each box is: below all that lead to it; an arrow that would close a circle does not count."""
    before, kept = {name: set() for name in boxes}, []  # all from which a box can be reached
    for a, b in edges:
        if b not in before[a] and a != b:
            kept.append((a, b))
            for name in boxes:
                if name == b or b in before[name]:
                    before[name] |= before[a] | {a}
    depths = dict.fromkeys(boxes, 0)
    for _ in boxes:
        for a, b in kept:
            depths[b] = max(depths[b], depths[a] + 1)
    for name in boxes:  # what nothing leads to stands right above what it leads to
        if not before[name]:
            depths[name] = max(depths[name], min((depths[b] for a, b in kept if a == name), default=1) - 1)
    return depths


def lanes(lines: list[str], depths: dict[str, int]) -> dict[str, int]:
    places, taken = {}, set()
    for line in lines:
        chain = [words(text) for text in line.split(" -> ")]
        new = [name for name in dict.fromkeys(chain) if name not in places]
        if new:
            last = chain.index(new[-1])
            end = depths[chain[last + 1]] - 1 if last + 1 < len(chain) else depths[new[-1]]
            span = range(depths[new[0]], max(end, depths[new[-1]]) + 1)
            left = places.get(chain[0], 0)  # a branch goes to the right
            lane = next(i for i in range(left, 99) if not any((i, depth) in taken for depth in span))
            taken |= {(lane, depth) for depth in span}
            places |= dict.fromkeys(new, lane)
    return places


def box(name: str, line: int, kind: str, lane: int, depth: int) -> str:
    x, y = lane * ACROSS + 4, depth * DOWN + 8
    rows = textwrap.wrap(name, 15)
    middle = y + HEIGHT / 2 - 6.5 * (len(rows) - 1) + 4
    text = "".join(
        f'<tspan x="{x + WIDTH / 2}" y="{middle + 13 * i}">{escape(row)}</tspan>' for i, row in enumerate(rows)
    )
    html = f'<rect x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}" rx="5"/><text>{text}</text>'
    return f'<a class="{kind}" href="#L{line}" aria-label="{escape(name)}">{html}</a>'


def arrow(a: str, b: str, places: dict, depths: dict, boxes: dict) -> str:
    (x, y), (u, v) = ((places[n] * ACROSS + 4 + WIDTH / 2, depths[n] * DOWN + 8) for n in (a, b))
    if v > y:
        y += HEIGHT
        bend = f"C{x} {(y + v) / 2} {u} {(y + v) / 2}"
        if u == x and any(places[n] == places[a] and depths[a] < depths[n] < depths[b] for n in boxes):  # around them
            bend = f"C{x + 80} {y + 30} {u + 80} {v - 30}"
        elif u != x and depths[b] - depths[a] > 1:  # down the side first, then over
            bend = f"V{v - DOWN + HEIGHT} C{x} {v - 10} {u} {v - 20}"
    else:  # up again: along the side
        y, v, x, u = y + HEIGHT / 2, v + HEIGHT / 2, x + WIDTH / 2, u + WIDTH / 2
        bend = f"C{x + 8} {y} {u + 8} {v}"
    kind = min(filter(None, (boxes[a][1], boxes[b][1])), default="")  # "average" goes before "stopped"
    return f'<path class="{kind}" d="M{x} {y} {bend} {u} {v - (v > y)}" marker-end="url(#tip)"/>'

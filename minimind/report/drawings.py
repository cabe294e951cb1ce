"""Line charts, bars and graphs as SVG, coloured by the page's style, so light and dark.

Why not by a library of charts, docs/decisions/0017 says.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from grandalf.graphs import Edge, Graph, Vertex
from grandalf.layouts import SugiyamaLayout
from markupsafe import Markup, escape

WIDTH, HEIGHT, LEFT, RIGHT, BOTTOM, TOP = 340, 190, 46, 14, 24, 8
MOST_POINTS = 150  # of a line
NODE_WIDTH, NODE_HEIGHT, GAP = 128, 34, 22


class Line(NamedTuple):
    """One line of a chart; its name is for people."""

    name: str
    points: Sequence[tuple[float, float]]
    color: int = 0  # of the style's
    is_dashed: bool = False


def line_chart(lines: Sequence[Line], is_log: bool = False, x_name: str = "step") -> Markup:
    """Lines over one another; with the pointer on a point its values are shown."""
    height = math.log10 if is_log else float
    lines = [line._replace(points=_thinned(line.points)) for line in lines]
    if is_log:
        lines = [line._replace(points=[p for p in line.points if p[1] > 0]) for line in lines]
    points = [point for line in lines for point in line.points]
    if not points:
        return Markup("")
    xs, ys = [x for x, _ in points], [height(y) for _, y in points]
    left, right, low, high = min(xs), max(xs), min(ys), max(ys)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - left) / ((right - left) or 1)
        up = (height(y) - low) / (high - low) if high > low else 0.5
        return _round(LEFT + across * (WIDTH - LEFT - RIGHT)), _round(
            TOP + (1 - up) * (HEIGHT - TOP - BOTTOM)
        )

    parts = []
    for tick in _ticks(low, high):
        value = 10**tick if is_log else tick
        _, y = place(left, value)
        parts.append(f'<path class="grid" d="M{LEFT} {y}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4}" text-anchor="end">{value:.3g}</text>')
    for tick in _ticks(left, right):
        x, _ = place(tick, points[0][1])
        parts.append(f'<text x="{x}" y="{HEIGHT - 6}" text-anchor="middle">{tick:g}</text>')
    for line in lines:
        places = [place(*point) for point in line.points]
        path = "L".join(f"{x} {y}" for x, y in places)
        parts.append(
            f'<path class="line c{line.color}{" dashed" * line.is_dashed}" d="M{path or "0 0"}"/>'
        )
        for (px, py), (x, y) in zip(places, line.points, strict=True):
            parts.append(
                f'<circle class="point c{line.color}{" dashed" * line.is_dashed}" '
                f'cx="{px}" cy="{py}" r="{2.5 if line.is_dashed else 5}">'
                f"<title>{escape(line.name)}, {x_name} {x:g}: {y:.4g}</title></circle>"
            )
    said = "; ".join(f"{line.name} {line.points[-1][1]:.4g}" for line in lines if line.points)
    return _svg(WIDTH, HEIGHT, "chart", said, parts)


def bars(counts: Sequence[int], edges: Sequence[float], said: str) -> Markup:
    """A histogram; edges: of the bins, one more than counts."""
    width, height, most = 300, 90, max(counts)
    each = width / len(counts)
    parts = []
    for i, count in enumerate(counts):
        tall = _round((height - 20) * count / most)
        parts.append(
            f'<rect class="bar" x="{_round(i * each)}" y="{_round(height - 18 - tall)}" '
            f'width="{_round(each - 1)}" height="{tall}">'
            f"<title>{edges[i]:g}–{edges[i + 1]:g}: {count:,}</title></rect>"
        )
    for edge, anchor, x in ((edges[0], "start", 0), (edges[-1], "end", width)):
        parts.append(f'<text x="{x}" y="{height - 4}" text-anchor="{anchor}">{edge:g}</text>')
    return _svg(width, height, "bars", said, parts)


def graph_drawing(
    edges: Iterable[tuple[str, str]], labels: Mapping[str, tuple[str, str, str]], said: str
) -> Markup:
    """A graph in layers, each node a link.

    labels: of each node a second line, a class of the style, and where the link leads.
    """
    if not labels:
        return Markup("")
    nodes = {name: Vertex(name) for name in labels}
    for node in nodes.values():
        node.view = _Box()
    links = [(nodes[a], nodes[b]) for a, b in edges]
    places: dict[Vertex, tuple[float, float]] = {}
    wide = 0.0
    for component in Graph([*nodes.values()], [Edge(*link) for link in links]).C:
        layout = SugiyamaLayout(component)
        layout.xspace, layout.yspace = GAP / 2, GAP
        layout.init_all()
        layout.draw(3)
        start = wide + NODE_WIDTH / 2 - min(node.view.xy[0] for node in component.sV)
        for node in component.sV:
            x, y = node.view.xy
            places[node] = _round(x + start), _round(y)
        wide = max(places[node][0] for node in component.sV) + NODE_WIDTH / 2 + GAP
    top = min(y for _, y in places.values()) - NODE_HEIGHT
    places = {node: (x, _round(y - top)) for node, (x, y) in places.items()}
    parts = []
    for a, b in links:
        (ax, ay), (bx, by) = places[a], places[b]
        ay, by = ay + NODE_HEIGHT / 2, by - NODE_HEIGHT / 2
        bend = (ay + by) / 2
        parts.append(f'<path class="edge" d="M{ax} {ay}C{ax} {bend} {bx} {bend} {bx} {by}"/>')
    for name, node in nodes.items():
        (x, y), (second, style, link) = places[node], map(escape, labels[name])
        parts.append(
            f'<a href="{link}"><g class="node {style}">'
            f'<rect x="{x - NODE_WIDTH / 2}" y="{y - NODE_HEIGHT / 2}" rx="6" '
            f'width="{NODE_WIDTH}" height="{NODE_HEIGHT}"/>'
            f'<text x="{x}" y="{y - 2}" text-anchor="middle">{escape(name)}</text>'
            f'<text class="small" x="{x}" y="{y + 12}" text-anchor="middle">{second}</text>'
            "</g></a>"
        )
    tall = max(y for _, y in places.values()) + NODE_HEIGHT
    return _svg(wide, tall, "graph", said, parts, role="group")


class _Box:
    """The size of a node, as grandalf asks for it."""

    def __init__(self) -> None:
        self.w, self.h, self.xy = NODE_WIDTH, NODE_HEIGHT, (0.0, 0.0)


def _svg(
    width: float, height: float, style: str, said: str, parts: Sequence[str], role: str = "img"
) -> Markup:
    return Markup(
        f'<svg class="{style}" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
        f'height="{height:g}" role="{role}" aria-label="{escape(said)}">{"".join(parts)}</svg>'
    )


def _thinned(points: Sequence[tuple[float, float]]) -> Sequence[tuple[float, float]]:
    """So many of them as a chart has room for, first and last among them."""
    if len(points) <= MOST_POINTS:
        return points
    last = len(points) - 1
    return [points[round(i * last / (MOST_POINTS - 1))] for i in range(MOST_POINTS)]


def _ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers between two."""
    if high <= low:
        return [low]
    step = 10 ** math.floor(math.log10((high - low) / most))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= most)
    first, last = math.ceil(low / step), math.floor(high / step)
    return [float(f"{i * step:.6g}") for i in range(first, last + 1)]


def _round(value: float) -> float:
    return round(value, 1)

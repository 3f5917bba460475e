"""A plan as an SVG picture of the parts of files that go to each rank.

Every file is a bar whose length is the bytes of its tensors; of a single file, every layer is one. A tensor is a piece
of the bar, cut as the ranks cut it: along its first dim from left to right, along its second from top to bottom.
Tensors too small to see share a piece, cut from top to bottom by how much of them each rank owns.
"""

from __future__ import annotations

import colorsys
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from math import prod
from xml.sax.saxutils import escape

from lading.formats.manifest import by_layer
from lading.operations.plan import LoadPlan
from lading.planning.box import Box
from lading.planning.composition import pieces, tensors_of
from lading.system.display import human_bytes, runs_of

WIDTH, MARGIN, BAR, STEP = 1000.0, 24.0, 34.0, 64.0
"""The width of a bar, the margin of the picture, the height of a bar, and the step to the next one, in pixels."""

MOST_CELLS = 5_000
"""The most parts of tensors to draw; in a larger checkpoint, more tensors share a piece."""
MOST_BARS = 160
MOST_COLORS = 48
"""The most colors; among more ranks, neighbors share one."""
MOST_STRIPES = 6
MOST_TITLES = 2_000
MOST_NAMES = 8
"""The most names of tensors in a title."""

ALL, UNUSED = "#c9ced6", "#ffffff"
OUTSIDE = "in no layer"
"""The title of the tensors of a single file that belong to no layer."""
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")

Owners = frozenset[int]
"""The numbers of the colors of ranks, one for each rank if there are not too many."""
Cell = tuple[float, float, float, float]
"""Left, top, width and height, as fractions of a tensor."""
Part = tuple[Owners, Cell, float]
"""A part of a tensor: its owners, where to draw it, and its fraction of the tensor's bytes."""


def picture(plan: LoadPlan) -> str:
    """Return the picture of a plan, a document of at most a few hundred kilobytes."""
    palette = _Palette(plan.layout.ranks)
    tensors = _tensors(plan, palette)
    every_bar = _bars(plan, tensors)
    bars = every_bar[:MOST_BARS]
    # What is in no layer, such as an embedding, may be many times as large as a layer.
    longest = max((_bytes(each) for title, each in bars if title != OUTSIDE), default=0)
    scales = [WIDTH / max(longest, _bytes(each), 1) for _, each in bars]
    least = _least_width([each for _, each in bars], scales)

    canvas = _Canvas()
    y = MARGIN + 58
    for (title, each), scale in zip(bars, scales, strict=True):
        shrunk = ", drawn smaller" if _bytes(each) > longest else ""
        canvas.text(MARGIN, y, title, f"{human_bytes(_bytes(each))}{palette.per_rank(each)}{shrunk}")
        x = MARGIN
        for together in _runs(each, least / scale):
            width = _bytes(together) * scale
            parts = _shares(together) if len(together) > 1 else together[0].parts
            for owners, cell, _ in parts:
                canvas.cell(palette.fill(owners), x, y + 8, width, cell)
            canvas.outline(x, y + 8, width, _title(plan, together, palette))
            x += width
        y += STEP
    if more := len(every_bar) - len(bars):
        canvas.text(MARGIN, y, f"… and {more} more", "")
        y += STEP / 2

    return canvas.document(plan, palette, tensors, y)


@dataclass(frozen=True, slots=True)
class _Tensor:
    number: int
    shard: int
    bytes: int
    parts: Sequence[Part]


def _tensors(plan: LoadPlan, palette: _Palette) -> list[_Tensor]:
    """Return all tensors of the manifest that have bytes, with the owners of their parts."""
    manifest, layout = plan.manifest, plan.layout
    parts: dict[int, Sequence[Part]] = {}
    of_kind: list[Sequence[Part]] = []
    owners_of_kind = [palette.owners(kind.owned.tolist(), len(kind.boxes)) for kind in layout.known]
    for kind, owners in zip(layout.known, owners_of_kind, strict=True):
        owned = zip(owners, kind.boxes, strict=True)
        of_kind.append([(who, _cell(box, kind.shape), box.numel / prod(kind.shape)) for who, box in owned if box.numel])

    for i, (tensor, number) in enumerate(zip(layout.tensors, layout.kinds.tolist(), strict=True)):
        if i not in layout.composed:
            parts[tensor] = of_kind[number]
            continue
        source = layout.composed[i]
        found: dict[int, dict[int, list[Box]]] = {t: {} for t in tensors_of(source)}
        held: dict[tuple[int, int], int] = {}
        for n, box in enumerate(layout.known[number].boxes):
            for t, part in pieces(source, manifest.shapes, box):
                ends = (1 + (size - 1) * step for size, step in zip(part.sizes, part.steps, strict=True))
                found[t].setdefault(n, []).append(Box(part.starts, tuple(ends)))
                held[t, n] = held.get((t, n), 0) + prod(part.sizes)
        for t, by_part in found.items():
            shape = manifest.shapes[t]
            parts[t] = [
                (owners_of_kind[number][n], _cell(_around(boxes), shape), held[t, n] / prod(shape))
                for n, boxes in by_part.items()
            ]

    whole: Sequence[Part] = [(frozenset(), (0.0, 0.0, 1.0, 1.0), 1.0)]

    return [
        _Tensor(i, manifest.shard_ids[i], size, parts.get(i, whole))
        for i in range(len(manifest))
        if (size := manifest.nbytes(i))
    ]


def _bars(plan: LoadPlan, tensors: Sequence[_Tensor]) -> list[tuple[str, list[_Tensor]]]:
    """Return the bars with their titles: the layers of a single file, or the files."""
    shards = plan.manifest.shards
    if len(shards) == 1:
        layers = by_layer([plan.manifest.names[t.number] for t in tensors])
        if layers.keys() - {""}:
            return [(layer or OUTSIDE, [tensors[i] for i in places]) for layer, places in layers.items()]

    return [(shard.name, [t for t in tensors if t.shard == n]) for n, shard in enumerate(shards)]


def _bytes(tensors: Iterable[_Tensor]) -> int:
    return sum(t.bytes for t in tensors)


def _cell(box: Box, shape: tuple[int, ...]) -> Cell:
    left, width = (box.starts[0] / shape[0], box.sizes[0] / shape[0]) if shape else (0.0, 1.0)
    top, height = (box.starts[1] / shape[1], box.sizes[1] / shape[1]) if len(shape) > 1 else (0.0, 1.0)

    return left, top, width, height


def _around(boxes: Sequence[Box]) -> Box:
    """Return the smallest box that contains all of ``boxes``."""
    starts = tuple(map(min, zip(*(box.starts for box in boxes), strict=True)))
    ends = map(max, zip(*(box.ends for box in boxes), strict=True))

    return Box(starts, tuple(end - start for start, end in zip(starts, ends, strict=True)))


def _least_width(bars: Sequence[Sequence[_Tensor]], scales: Sequence[float]) -> float:
    """Return the width below which tensors share a piece, so that there are not too many cells."""
    least = 2.0
    while least < 2 * WIDTH:
        runs = (run for each, scale in zip(bars, scales, strict=True) for run in _runs(each, least / scale))
        if sum(len(run[0].parts) if len(run) == 1 else MOST_COLORS // 8 for run in runs) <= MOST_CELLS:
            break
        least *= 2

    return least


def _runs(tensors: Sequence[_Tensor], least: float) -> Iterator[list[_Tensor]]:
    """Yield tensors of at least ``least`` bytes alone, and smaller neighbors together."""
    for large, each in groupby(tensors, lambda t: t.bytes >= least):
        if large:
            yield from ([tensor] for tensor in each)
        else:
            yield list(each)


def _shares(tensors: Sequence[_Tensor]) -> Iterator[Part]:
    held: dict[Owners, float] = {}
    for tensor in tensors:
        for owners, _, fraction in tensor.parts:
            held[owners] = held.get(owners, 0.0) + tensor.bytes * fraction
    total, top = sum(held.values()), 0.0
    for owners, size in sorted(held.items(), key=lambda item: sorted(item[0])):
        yield owners, (0.0, top, 1.0, size / total), size / total
        top += size / total


def _title(plan: LoadPlan, tensors: Sequence[_Tensor], palette: _Palette) -> str:
    infos = [plan.manifest[t.number] for t in tensors[:MOST_NAMES]]
    lines = [f"{info.name} {info.dtype} {list(info.shape)}" for info in infos]
    if more := len(tensors) - len(infos):
        lines.append(f"… and {more} more")

    return "\n".join([*lines, f"{human_bytes(_bytes(tensors))}{palette.per_rank(tensors)}"])


class _Palette:
    """The colors of ranks; ranks that own the same share one.

    :param seats: ranks that own different things; the others are their copies.
    """

    def __init__(self, seats: int) -> None:
        self.seats = seats
        self.count = min(seats, MOST_COLORS)
        self.patterns: dict[Owners, str] = {}

    def owners(self, owned: Sequence[int], parts: int) -> list[Owners]:
        """Return for each part the colors of the ranks that own it."""
        found: list[set[int]] = [set() for _ in range(parts)]
        for seat, part in enumerate(owned):
            found[part].add(seat * self.count // self.seats)

        return [frozenset(each) for each in found]

    def color(self, number: int) -> str:
        lightness = (0.56, 0.42, 0.68)[number % 3]
        rgb = colorsys.hls_to_rgb((number / self.count + 0.58) % 1, lightness, 0.5)

        return "#" + "".join(f"{round(255 * part):02x}" for part in rgb)

    def fill(self, owners: Owners) -> str:
        if not owners:
            return UNUSED
        if len(owners) == self.count and self.count > 1:
            return ALL
        if len(owners) == 1:
            return self.color(next(iter(owners)))

        return f"url(#{self.patterns.setdefault(owners, f's{len(self.patterns)}')})"

    def seats_of(self, number: int) -> range:
        """Return the ranks, among those that own different things, that have a color."""
        return range(-(-number * self.seats // self.count), -(-(number + 1) * self.seats // self.count))

    def held(self, tensors: Iterable[_Tensor]) -> list[int]:
        """Return the bytes of tensors that the ranks of each color own, each rank by itself if it has a color."""
        found = [0.0] * self.count
        for tensor in tensors:
            for owners, _, fraction in tensor.parts:
                for number in owners:
                    found[number] += tensor.bytes * fraction

        return list(map(round, found))

    def per_rank(self, tensors: Iterable[_Tensor]) -> str:
        """Return the bytes of tensors that a rank owns, as the end of a note; empty if ranks share colors."""
        if self.count == 1 or self.count < self.seats:
            return ""
        held = self.held(tensors)
        least, most = human_bytes(min(held)), human_bytes(max(held))

        return f", {most} per rank" if least == most else f", {least} to {most} per rank"

    def definitions(self) -> Iterator[str]:
        for owners, name in self.patterns.items():
            colors = [self.color(n) for n in sorted(owners)[:MOST_STRIPES]]
            stripes = "".join(f'<path fill="{c}" d="M{4 * i} 0h4v8h-4z"/>' for i, c in enumerate(colors))
            yield (
                f'<pattern id="{name}" width="{4 * len(colors)}" height="8" patternUnits="userSpaceOnUse" '
                f'patternTransform="rotate(45)">{stripes}</pattern>'
            )


@dataclass(slots=True)
class _Canvas:
    paths: dict[str, list[str]] = field(default_factory=dict)
    outlines: list[str] = field(default_factory=list)
    titles: list[tuple[float, str]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)

    def cell(self, fill: str, x: float, y: float, width: float, cell: Cell) -> None:
        left, top, across, down = x + cell[0] * width, y + cell[1] * BAR, cell[2] * width, cell[3] * BAR
        self.paths.setdefault(fill, []).append(f"M{left:.2f} {top:.2f}h{across:.2f}v{down:.2f}h-{across:.2f}z")

    def outline(self, x: float, y: float, width: float, title: str) -> None:
        shape = f"M{x:.2f} {y:g}h{width:.2f}v{BAR:g}h-{width:.2f}z"
        self.outlines.append(shape)
        self.titles.append((width, f'<path d="{shape}"><title>{_escaped(title)}</title></path>'))

    def text(self, x: float, y: float, text: str, note: str) -> None:
        noted = f' <tspan class="n">{_escaped(note)}</tspan>' if note else ""
        self.texts.append(f'<text x="{x:g}" y="{y:g}">{_escaped(text)}{noted}</text>')

    def document(self, plan: LoadPlan, palette: _Palette, tensors: Sequence[_Tensor], y: float) -> str:
        y = self._legend(plan, palette, tensors, y + 8)
        axes = ", ".join(f"{axis} {size}" for axis, size in plan.sizes.items() if size > 1) or "one rank"
        title = f"{plan.name} on {plan.world_size} rank{'' if plan.world_size == 1 else 's'}"
        largest = sorted(self.titles, key=lambda item: -item[0])[:MOST_TITLES]
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH + 2 * MARGIN:g} {y:g}" '
            'font-family="sans-serif" font-size="13">',
            f"<title>{_escaped(title)}</title>",
            "<style>.n{fill:#667}.h{font-size:18px;font-weight:bold}</style>",
            f"<defs>{''.join(palette.definitions())}</defs>",
            f'<path fill="#fff" d="M0 0h{WIDTH + 2 * MARGIN:g}v{y:g}H0z"/>',
            f'<text class="h" x="{MARGIN:g}" y="{MARGIN + 14:g}">{_escaped(title)}</text>',
            f'<text class="n" x="{MARGIN:g}" y="{MARGIN + 34:g}">{axes}; {human_bytes(plan.checkpoint_bytes)} in '
            f"{len(plan.manifest)} tensors. Cut from left to right along dim 0, from top to bottom along dim 1.</text>",
            *(f'<path fill="{fill}" d="{"".join(shapes)}"/>' for fill, shapes in self.paths.items()),
            f'<path fill="none" stroke="#fff" stroke-width=".6" d="{"".join(self.outlines)}"/>',
            *self.texts,
            f'<g fill="transparent">{"".join(shape for _, shape in largest)}</g>',
            "</svg>",
        ]

        return "\n".join(parts) + "\n"

    def _legend(self, plan: LoadPlan, palette: _Palette, tensors: Sequence[_Tensor], y: float) -> float:
        held = palette.held(tensors) if palette.count == palette.seats else None
        entries = []
        for n in range(palette.count):
            ranks = [plan.copies_of(seat) for seat in palette.seats_of(n)]
            size = "" if held is None else f"{human_bytes(held[n])}{' each' if len(ranks[0]) > 1 else ''}"
            entries.append((palette.color(n), _ranks_text(ranks), size))
        if palette.count > 1:
            entries += [(ALL, "every rank", ""), ("stripes", "the ranks of these colors", "")]
        entries.append((UNUSED, "not needed", ""))
        for n, (color, text, size) in enumerate(entries):
            x, at = MARGIN + n % 4 * 250, y + n // 4 * 22
            if color == "stripes":
                shapes = "".join(
                    f'<path fill="{palette.color(i)}" d="M{x + 7 * i:g} {at:g}h7v14h-7z"/>' for i in range(2)
                )
            else:
                shapes = f'<path fill="{color}" stroke="#99a" stroke-width=".5" d="M{x:g} {at:g}h14v14h-14z"/>'
            self.texts.append(f"<g>{shapes}</g>")
            self.text(x + 20, at + 12, text, size)

        return y + -(-len(entries) // 4) * 22 + MARGIN


def _ranks_text(seats: Sequence[Sequence[int]]) -> str:
    """Return the ranks of one color; those of a seat are copies of one another."""
    first = _runs_text([ranks[0] for ranks in seats])
    copies = list(map(str, seats[0][1:]))
    if not copies:
        return f"rank{'' if len(seats) == 1 else 's'} {first}"
    if len(seats) > 1 or len(copies) > 3:
        return f"rank{'' if len(seats) == 1 else 's'} {first} and copies"

    return f"ranks {', '.join([first, *copies])}"


def _runs_text(ranks: Sequence[int]) -> str:
    """Return ascending numbers as text, consecutive ones as a range."""
    return ", ".join(f"{a}" if a == b else f"{a}–{b}" for a, b in runs_of(ranks))


def _escaped(text: str) -> str:
    """Return text escaped for XML: names of tensors and files may contain anything."""
    return escape(_NOT_XML.sub("\ufffd", text))

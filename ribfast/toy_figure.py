"""The toy experiment as one picture, drawn with OpenCV: examples with their gradient maps, and HGR as lines."""

from collections.abc import Sequence

import cv2
import numpy as np

from .toy import LAYERS, LOSSES, REGIONS, THRESHOLD, Measured

EXAMPLES = 4
# blue, vermilion and grey (BGR), told apart by the colour-blind too
COLOURS = {"digit": (178, 114, 0), "motif": (0, 94, 213), "background": (130, 130, 130)}
NAMES = {"rib": "L_RIB", "bce": "BCE"}
_INK, _FAINT, _PAPER = (40, 40, 40), (225, 225, 225), (255, 255, 255)
_FONT = cv2.FONT_HERSHEY_SIMPLEX
_SHIFT = 4  # bits of a fraction of a pixel in what OpenCV draws
_MARGIN, _CELL, _SPACE = 60, 160, 14  # the page's edge, an example's side, what lies between two
_COLUMNS = LAYERS + 1 + len(LOSSES)
_WIDTH = 2 * _MARGIN + _COLUMNS * _CELL + (_COLUMNS - 1) * _SPACE + 2 * _SPACE


def draw(found: dict[int, Measured]) -> np.ndarray:
    """(H, W, 3) uint8, BGR. The examples are the first seed's, the lines means over seeds; thin lines are seeds."""
    parts = [_examples(next(iter(found.values()))), _charts(list(found.values()))]
    return np.concatenate(parts)


def encode(picture: np.ndarray) -> bytes:
    done, png = cv2.imencode(".png", picture, [cv2.IMWRITE_PNG_COMPRESSION, 9])
    assert done, "OpenCV cannot encode PNG"
    return png.tobytes()


def _examples(measured: Measured) -> np.ndarray:
    """A row an image: the image, abs(G_k) of every layer, G_6 after each adaptation."""
    count, top = min(EXAMPLES, len(measured.drawn.labels)), 150
    canvas = _page(top + count * (_CELL + _SPACE) + 70)
    _write(canvas, "Gradients of each layer's output with respect to the image", (_MARGIN, 56), 1.0, weight=2)
    titles = ["image", *(f"layer {k}" for k in range(1, LAYERS)), "logit", *(f"logit, {NAMES[k]}" for k in LOSSES)]
    for column, title in enumerate(titles):
        _write(canvas, title, (_left(column) + _CELL // 2, top - 20), 0.66, anchor="middle")
    for row in range(count):
        image = 1 - measured.drawn.pixels[row, 0].numpy().clip(0, 1)
        y = top + row * (_CELL + _SPACE)
        _place(canvas, cv2.cvtColor(_bytes(image), cv2.COLOR_GRAY2BGR), _left(0), y)
        maps = [*measured.layer_maps[:, row], *(measured.adapted_maps[loss][row] for loss in LOSSES)]
        for column, values in enumerate(maps, 1):
            _place(canvas, _heat(values.numpy()), _left(column), y)
    _scale(canvas, canvas.shape[0] - 52)
    return canvas


def _left(column: int) -> int:
    """Of the examples' columns; a wider space sets the image and the adapted networks apart."""
    return _MARGIN + column * (_CELL + _SPACE) + _SPACE * ((column > 0) + (column > LAYERS))


def _scale(canvas: np.ndarray, y: int) -> None:
    """What the maps' colours mean, and where a pixel begins to count."""
    left, width, height = _left(1), 3 * _CELL, 18
    ramp = np.tile(np.linspace(0, 1, width, dtype=np.float32), (height, 1))
    canvas[y : y + height, left : left + width] = _heat(ramp)
    at = left + round(THRESHOLD * width)
    _line(canvas, [(at, y - 5), (at, y + height + 5)], _INK, 2)
    for value, x in ((0, left), (THRESHOLD, at), (1, left + width)):
        _write(canvas, f"{value:g}", (x, y + height + 26), 0.55, anchor="middle")
    text = f"abs(gradient) / its maximum over the image; above {THRESHOLD:g} a pixel counts as high"
    _write(canvas, text, (left + width + 30, y + height - 2), 0.6)


def _charts(seeds: Sequence[Measured]) -> np.ndarray:
    canvas, top, height = _page(760), 120, 500
    _write(canvas, "Share of each region's pixels with a high gradient (HGR)", (_MARGIN, 50), 1.0, weight=2)
    left, width = _MARGIN + 70, (_WIDTH - 2 * _MARGIN) // 2 - 270
    names = [*map(str, range(1, LAYERS)), "logit"]
    first = _Axes(
        canvas, (left, top, width, height), (1, LAYERS), "layer", list(zip(range(1, LAYERS + 1), names, strict=True))
    )
    ends = []
    for number, region in enumerate(REGIONS):
        lines = np.stack([measured.layers[:, number].numpy() for measured in seeds])
        ends.append((first.lines(np.arange(1, LAYERS + 1), lines, COLOURS[region]), region, COLOURS[region]))
    first.labels(ends)

    steps = len(seeds[0].steps[LOSSES[0]]) - 1
    every = max(1, -(-steps // 10))
    ticks = [(step, str(step)) for step in range(0, steps + 1, every)]
    left += (_WIDTH - 2 * _MARGIN) // 2 + 20
    second = _Axes(
        canvas, (left, top, width, height), (0, max(1, steps)), "updates, HGR of the logit's gradient", ticks
    )
    ends = []
    for number, region in enumerate(REGIONS):
        for loss in LOSSES:
            lines = np.stack([measured.steps[loss][:, number].numpy() for measured in seeds])
            end = second.lines(np.arange(steps + 1), lines, COLOURS[region], dashed=loss == "bce")
            ends.append((end, f"{region}, {NAMES[loss]}", COLOURS[region]))
    second.labels(ends)
    return canvas


class _Axes:
    """A chart of values from 0 to 1 within a box (left, top, width, height)."""

    def __init__(self, canvas, box, limits, title, ticks):
        self.canvas, self.limits = canvas, limits
        self.left, self.top, self.width, self.height = box
        right, bottom = self.left + self.width, self.top + self.height
        for value in np.linspace(0, 1, 6):
            y = self._y(value)
            _line(canvas, [(self.left, y), (right, y)], _INK if value == 0 else _FAINT, 2)
            _write(canvas, f"{value:.1f}", (self.left - 16, y + 8), 0.66, anchor="end")
        for value, name in ticks:
            _line(canvas, [(self._x(value), bottom), (self._x(value), bottom + 10)], _INK, 2)
            _write(canvas, name, (self._x(value), bottom + 40), 0.66, anchor="middle")
        _write(canvas, title, (self.left + self.width // 2, bottom + 86), 0.72, anchor="middle")

    def _x(self, value: float) -> float:
        low, high = self.limits
        return self.left + (value - low) / (high - low) * self.width

    def _y(self, value: float) -> float:
        return self.top + (1 - value) * self.height

    def lines(self, x: np.ndarray, values: np.ndarray, colour, dashed: bool = False) -> float:
        """values: (seeds, points). Returns the height at which the mean ends."""
        paths = [[(self._x(a), self._y(b)) for a, b in zip(x, row, strict=True)] for row in (*values, values.mean(0))]
        draw = _dashes if dashed else _line
        thin = tuple(round(255 - 0.35 * (255 - part)) for part in colour)
        for path in paths[:-1] if len(values) > 1 else ():
            draw(self.canvas, path, thin, 2)
        draw(self.canvas, paths[-1], colour, 5)
        return paths[-1][-1][1]

    def labels(self, ends: list[tuple[float, str, tuple]]) -> None:
        """Names at the lines' ends, apart from each other."""
        ends, apart = sorted(ends), 34
        heights = np.array(_rising([end[0] - number * apart for number, end in enumerate(ends)]))
        heights += apart * np.arange(len(ends))
        heights -= max(0, heights[-1] - self.top - self.height)
        for (_, text, colour), y in zip(ends, heights, strict=True):
            _write(self.canvas, text, (self.left + self.width + 18, y + 8), 0.68, colour, weight=2)


def _rising(values: list[float]) -> list[float]:
    """The nearest values that never fall (by squares): neighbours that do are pooled at their mean."""
    pools: list[tuple[float, int]] = []
    for value in values:
        count = 1
        while pools and pools[-1][0] > value:
            mean, more = pools.pop()
            value, count = (value * count + mean * more) / (count + more), count + more
        pools.append((value, count))
    return [mean for mean, count in pools for _ in range(count)]


def _page(height: int) -> np.ndarray:
    return np.full((height, _WIDTH, 3), _PAPER, np.uint8)


def _heat(values: np.ndarray) -> np.ndarray:
    return cv2.applyColorMap(_bytes(values), cv2.COLORMAP_VIRIDIS)


def _bytes(values: np.ndarray) -> np.ndarray:
    return (values.clip(0, 1) * 255).round().astype(np.uint8)


def _place(canvas: np.ndarray, picture: np.ndarray, x: int, y: int) -> None:
    canvas[y : y + _CELL, x : x + _CELL] = cv2.resize(picture, (_CELL, _CELL), interpolation=cv2.INTER_NEAREST)
    cv2.rectangle(canvas, (x - 1, y - 1), (x + _CELL, y + _CELL), _FAINT, 1)


def _line(canvas: np.ndarray, points, colour, thickness: int) -> None:
    points = np.round(np.array(points, np.float64) * (1 << _SHIFT)).astype(np.int32)
    cv2.polylines(canvas, [points[:, None]], False, colour, thickness, cv2.LINE_AA, _SHIFT)


def _dashes(canvas: np.ndarray, points, colour, thickness: int, on: float = 18, off: float = 14) -> None:
    """Of a length along the line, across its corners."""
    points = np.array(points, np.float64)
    along = np.concatenate([[0], np.hypot(*np.diff(points, axis=0).T).cumsum()])
    for start in np.arange(0, along[-1], on + off):
        end = min(start + on, along[-1])
        stops = [start, *along[(along > start) & (along < end)], end]
        _line(canvas, [[np.interp(stop, along, axis) for axis in points.T] for stop in stops], colour, thickness)


def _write(
    canvas: np.ndarray, text: str, at, scale: float, colour=_INK, weight: int = 1, anchor: str = "start"
) -> None:
    (width, _), _ = cv2.getTextSize(text, _FONT, scale, weight)
    x = at[0] - {"start": 0, "middle": width / 2, "end": width}[anchor]
    cv2.putText(canvas, text, (round(x), round(at[1])), _FONT, scale, colour, weight, cv2.LINE_AA)

"""Files and annotations to arrays: photographs as RGB, masks as the labels that they store."""

import os
import re
import struct
import zlib
from collections.abc import Iterable
from pathlib import Path

import cv2
import numpy as np

from ..errors import lacks_memory

_PNG, _JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8"
_GREY, _COLOUR, _PALETTE = 0, (2, 6), 3  # PNG's colour types
_START_OF_SCAN, _END_OF_IMAGE = 0xDA, 0xD9  # JPEG's markers
_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]")  # but those within a scan, and those that nothing follows


def read_image(path: str | os.PathLike, *, upright: bool) -> np.ndarray:
    """(H, W, 3) uint8 RGB of any file that OpenCV reads; grey is repeated, alpha dropped, 16 bits lose the lower 8.

    upright: turned as the camera's EXIF entry says, as people see it; else as stored, as PIL's open and the released
    codes have it.
    """
    flags = cv2.IMREAD_COLOR if upright else cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    image = _decode(Path(path), _complete(Path(path), "read_image"), flags, "read_image")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def read_mask(path: str | os.PathLike) -> np.ndarray:
    """(H, W) uint8 labels of a PNG: a palette's indices, grey samples as stored, or the colours of VOC's palette."""
    path = Path(path)
    data = _complete(path, "read_mask")
    if not data.startswith(_PNG) or len(data) < 33:
        raise ValueError(f"read_mask: expected a PNG, got {path}; save labels without loss, as PNG")
    depth, kind = data[24], data[25]
    if kind in (_GREY, _PALETTE):  # OpenCV would expand a palette to its colours
        mask = _decode(path, _as_grey(data), cv2.IMREAD_UNCHANGED, "read_mask")
        if depth < 8:  # OpenCV stretches samples to 0..255
            mask = (mask.astype(np.uint16) * (2**depth - 1) // 255).astype(np.uint8)
    else:
        mask = _decode(path, data, cv2.IMREAD_UNCHANGED, "read_mask")
        mask = _voc_labels(mask, path) if kind in _COLOUR else mask[..., 0]
    if mask.max() > 255:
        raise ValueError(f"read_mask: expected labels up to 255, got {mask.max()} in {path}")
    return mask.astype(np.uint8, copy=False)


def draw_regions(size: tuple[int, int], regions: Iterable[tuple[int, list | dict]], name: str) -> np.ndarray:
    """COCO's (label, segmentation) pairs, later ones on top -> (H, W) uint8 mask.

    A segmentation is a list of polygons [x, y, x, y, ...] or an RLE, compressed or not. A pixel belongs to a polygon
    if its centre lies inside (even-odd); pycocotools rounds the outline, so pixels on the rim can differ.
    """
    mask = np.zeros(size, np.uint8)
    for label, segmentation in regions:
        if isinstance(segmentation, dict):
            mask[_run_lengths(segmentation, size, name)] = label
            continue
        for polygon in segmentation:
            _fill(mask, np.asarray(polygon, np.float64).reshape(-1, 2), label)
    return mask


def encode_region(part: np.ndarray, corner: tuple[int, int], size: tuple[int, int]) -> dict:
    """A region, bool (h, w) with its upper left pixel at (y, x) of an image of (H, W), -> COCO's compressed RLE."""
    padded = np.zeros((part.shape[1], part.shape[0] + 2), bool)  # columns that begin and end outside the region
    padded[:, 1:-1] = part.T
    column, row = divmod(np.flatnonzero(padded[:, 1:] != padded[:, :-1]), part.shape[0] + 1)
    place = (corner[1] + column) * size[0] + corner[0] + row
    begin, end = place[::2], place[1::2]
    apart = begin[1:] != end[:-1]  # a run at the foot of a column may go on at the head of the next
    begin, end = begin[np.r_[True, apart][: len(begin)]], end[np.r_[apart, True][: len(end)]]
    edges = np.concatenate([[0], np.stack([begin, end], 1).ravel(), [size[0] * size[1]]])
    counts = np.diff(edges)
    return {"size": list(size), "counts": _compress(counts if counts[-1] else counts[:-1])}


def _fill(mask: np.ndarray, points: np.ndarray, label: int) -> None:
    """Toggles each row where an edge crosses the centres of its pixels: inside is what lies behind an odd number."""
    (x, y), (next_x, next_y) = points.T, np.roll(points, -1, 0).T
    top = int(np.clip(np.floor(y.min()), 0, len(mask)))
    part = mask[top : int(np.clip(np.ceil(y.max()), top, len(mask)))]
    centres = top + np.arange(len(part)) + 0.5
    row, edge = np.nonzero((y <= centres[:, None]) != (next_y <= centres[:, None]))
    crossing = x[edge] + (centres[row] - y[edge]) * (next_x - x)[edge] / (next_y - y)[edge]
    toggles = np.zeros((len(part), mask.shape[1] + 1), np.uint16)
    np.add.at(toggles, (row, np.ceil(crossing - 0.5).clip(0, mask.shape[1]).astype(np.intp)), 1)
    part[(toggles[:, :-1].cumsum(1) & 1).astype(bool)] = label


def _complete(path: Path, op: str) -> bytes:
    """A file's bytes. OpenCV paints what a truncated file lacks grey and says nothing, so the end is looked for."""
    data = path.read_bytes()
    cut = (data.startswith(_JPEG) and _is_cut(data)) or (data.startswith(_PNG) and data.rfind(b"IEND") < 0)
    if not data or cut:
        raise ValueError(f"{op}: expected a whole file, got {path}, which ends early; fetch it again")
    return data


def _is_cut(jpeg: bytes) -> bool:
    """Whether a JPEG has a scan, and no end after it. What follows the end is not looked at: telephones append films
    and further pictures, whose bytes look like markers here and there."""
    place, scanned = len(_JPEG), False
    while found := _MARKER.search(jpeg, place):
        kind, place = jpeg[found.end() - 1], found.end()
        if kind == _END_OF_IMAGE:
            return False
        scanned = scanned or kind == _START_OF_SCAN
        place += int.from_bytes(jpeg[place : place + 2], "big")  # what a segment holds, thumbnails too, is passed over
    return scanned


def _decode(path: Path, data: bytes, flags: int, op: str) -> np.ndarray:
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error as error:
        if lacks_memory(error):
            raise
        image = None  # of absurd sizes
    if image is None:
        raise ValueError(f"{op}: expected a picture that OpenCV reads, got {path}; fetch or convert it again")
    return image


def _as_grey(data: bytes) -> bytes:
    """A PNG whose samples are declared to be grey values: without its palette, transparency and gamma."""
    out, place = [_PNG], len(_PNG)
    while place + 8 <= len(data):
        (size,), kind = struct.unpack_from(">I", data, place), data[place + 4 : place + 8]
        if kind == b"IHDR":
            body = bytearray(data[place + 4 : place + 8 + size])
            body[4 + 9] = _GREY
            out.append(struct.pack(">I", size) + body + struct.pack(">I", zlib.crc32(body)))
        elif kind in (b"IDAT", b"IEND"):
            out.append(data[place : place + 12 + size])
        place += 12 + size
    return b"".join(out)


def _palette() -> np.ndarray:
    """VOC's 256 colours (256, 3) RGB: the bits of a label dealt in turn to red, green and blue, highest bit first."""
    labels = np.arange(256)
    colours = np.zeros((256, 3), np.uint8)
    for bit in range(8):
        for channel in range(3):
            colours[:, channel] |= ((labels >> (3 * bit + channel) & 1) << (7 - bit)).astype(np.uint8)
    return colours


def _code(rgb: np.ndarray) -> np.ndarray:
    return rgb[..., 0].astype(np.int32) << 16 | rgb[..., 1].astype(np.int32) << 8 | rgb[..., 2]


VOC_PALETTE = _palette()
_CODES = np.sort(_code(VOC_PALETTE))
_LABELS = np.argsort(_code(VOC_PALETTE)).astype(np.uint8)


def _voc_labels(bgr: np.ndarray, path: Path) -> np.ndarray:
    codes = _code(bgr[..., 2::-1]) if bgr.dtype == np.uint8 else np.full(bgr.shape[:2], -1)
    place = np.searchsorted(_CODES, codes).clip(max=255)
    unknown = _CODES[place] != codes
    if unknown.any():
        y, x = np.argwhere(unknown)[0]
        colour = tuple(int(value) for value in bgr[y, x, 2::-1])
        raise ValueError(f"read_mask: expected a palette, grey labels or VOC's colours, got the colour {colour} at "
                         f"({x}, {y}) of {path}; save labels as grey values")  # fmt: skip
    return _LABELS[place]


def _run_lengths(rle: dict, size: tuple[int, int], name: str) -> np.ndarray:
    counts = rle["counts"]
    if isinstance(counts, str):
        counts = _decompress(counts)
    counts = np.asarray(counts, np.int64)
    if tuple(rle["size"]) != tuple(size) or (counts < 0).any() or counts.sum() != size[0] * size[1]:
        raise ValueError(f"draw_regions: expected run lengths that fill {size[0]} x {size[1]} pixels, got "
                         f"{counts.sum()} of {rle['size']} for {name}")  # fmt: skip
    return np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(size[::-1]).T  # column by column


def _decompress(text: str) -> list[int]:
    """COCO's run lengths as text: 5 bits a character, lowest first; from the fourth on, differences to two before."""
    counts, value, shift = [], 0, 0
    for character in text:
        bits = ord(character) - 48
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            if bits & 16:
                value -= 1 << shift
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value, shift = 0, 0
    return counts


def _compress(counts: np.ndarray) -> str:
    """`_decompress`'s inverse: of each number as many groups of 5 bits as show its sign too."""
    values = counts.astype(np.int64)
    values[3:] -= counts[1:-2]
    places = np.arange(7)  # 2 ** 34 pixels
    more = np.where(values < 0, ~values, values)[:, None] >> (5 * places + 4) > 0
    used = np.column_stack([np.ones(len(values), bool), more[:, :-1]])
    groups = (values[:, None] >> 5 * places & 31) + 32 * more + 48
    return groups[used].astype(np.uint8).tobytes().decode()

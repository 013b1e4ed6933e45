"""Files that are odd but right, and files that are wrong, as they come from cameras, scanners and killed downloads."""

import struct

import cv2
import numpy as np

from ribfast.data.decode import VOC_PALETTE


def pixels(height=64, width=64):
    """Grey noise with a red rectangle towards the upper left."""
    noise = np.random.default_rng(height * width).integers(100, 140, (height, width, 1), dtype=np.uint8)
    picture = np.repeat(noise, 3, -1)
    picture[height // 8 : height // 2, width // 8 : width // 2] = 220, 30, 30
    return picture


def encoded(picture, suffix):
    return cv2.imencode(suffix, picture if picture.ndim == 2 else picture[..., ::-1])[1].tobytes()


def turned(picture, orientation=6):
    """A JPEG whose EXIF entry says how it is to be turned: by 6 a quarter, clockwise."""
    jpeg = encoded(picture, ".jpg")
    entry = struct.pack("<HHIHH", 0x0112, 3, 1, orientation, 0)
    exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 1) + entry + bytes(4)
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + jpeg[2:]


def cmyk(inks, height=64, width=64):
    """A JPEG of one colour of cyan, magenta, yellow and black (0 to 255), inverted as Photoshop writes it."""

    def segment(marker, body):
        return bytes((0xFF, marker)) + struct.pack(">H", len(body) + 2) + body

    def table(number, symbols):  # every code has 4 bits
        return bytes((number, 0, 0, 0, len(symbols), *[0] * 12, *symbols))

    frame = struct.pack(">BHHB", 8, height, width, 4) + b"".join(bytes((i, 0x11, 0)) for i in range(4))
    scan = bytes((4, *(x for i in range(4) for x in (i, 0)), 0, 63, 0))
    bits = ""
    for block in range(-(-height // 8) * -(-width // 8)):
        for ink in inks:
            level = 8 * (255 - ink - 128) * (block == 0)  # DC is 8 times the mean, and the same in all blocks
            size = abs(level).bit_length()
            bits += format(size, "04b")
            bits += format(level if level > 0 else level + (1 << size) - 1, f"0{size}b") if size else ""
            bits += "0000"  # nothing but DC
    bits += "1" * (-len(bits) % 8)
    body = int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\0")
    return b"".join((
        b"\xff\xd8", segment(0xEE, b"Adobe\0\x64\0\0\0\0\0"), segment(0xDB, bytes((0, *[1] * 64))),
        segment(0xC0, frame), segment(0xC4, table(0x00, range(12))), segment(0xC4, table(0x10, [0])),
        segment(0xDA, scan), body, b"\xff\xd9",
    ))  # fmt: skip


def gif(*frames):
    """An animation of frames (H, W) of VOC's labels below 128, in its colours."""
    height, width = frames[0].shape
    parts = [b"GIF89a", struct.pack("<HHBBB", width, height, 0xF6, 0, 0), VOC_PALETTE[:128].tobytes()]
    parts.append(b"!\xff\x0bNETSCAPE2.0\x03\x01\0\0\0")
    for frame in frames:
        codes = []  # of 8 bits, as long as the table is emptied before it grows beyond
        for place, label in enumerate(frame.ravel().tolist()):
            codes += [128] * (place % 100 == 0) + [label]
        data = bytes([*codes, 129])
        blocks = b"".join(bytes([len(data[i : i + 255])]) + data[i : i + 255] for i in range(0, len(data), 255))
        parts.append(
            b"!\xf9\x04\0\x0a\0\0\0," + struct.pack("<HHHHB", 0, 0, width, height, 0) + b"\x07" + blocks + b"\0"
        )
    return b"".join((*parts, b";"))


def webp(*frames):
    """An animation of pictures."""

    def chunk(name, body):
        return name + struct.pack("<I", len(body)) + body + b"\0" * (len(body) % 2)

    height, width = frames[0].shape[:2]
    sides = struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
    parts = [chunk(b"VP8X", b"\x02\0\0\0" + sides), chunk(b"ANIM", bytes(6))]
    for frame in frames:
        still = cv2.imencode(".webp", frame[..., ::-1], [cv2.IMWRITE_WEBP_QUALITY, 101])[1].tobytes()[12:]
        parts.append(chunk(b"ANMF", bytes(6) + sides + b"\x64\0\0\0" + still))
    return b"RIFF" + struct.pack("<I", 4 + sum(map(len, parts))) + b"WEBP" + b"".join(parts)


def odd():
    """name: (bytes, what they show), of files that are right."""
    square = pixels()
    grey = square[..., 1]
    deep = square.astype(np.uint16) * 257
    labels = np.zeros((64, 64), np.uint8)
    labels[16:48, 16:48] = 1
    sheet = np.dstack([square, np.full((64, 64), 30, np.uint8)])
    repeated = np.repeat(grey[..., None], 3, -1)
    high = pixels(80, 48)
    return {
        "grey8.jpg": (encoded(np.full((64, 64), 77, np.uint8), ".jpg"), np.full((64, 64, 3), 77)),
        "cmyk.jpg": (cmyk((0, 200, 200, 20)), np.full((64, 64, 3), (235, 51, 51))),
        "grey16.png": (encoded(grey.astype(np.uint16) * 257, ".png"), repeated),
        "rgb16.png": (encoded(deep, ".png"), square),
        "alpha.png": (cv2.imencode(".png", sheet[..., [2, 1, 0, 3]])[1].tobytes(), square),
        "turned.jpg": (turned(high), np.rot90(high, -1)),
        "dot.png": (encoded(pixels(1, 1), ".png"), pixels(1, 1)),
        "gif.gif": (gif(labels, 0 * labels), VOC_PALETTE[labels]),
        "webp.webp": (webp(square, 0 * square), square),
    }


def long():
    return {name: encoded(pixels(*size), ".png") for name, size in
            {"wide.png": (50, 10_000), "high.png": (10_000, 50)}.items()}  # fmt: skip


def bad():
    """Files that are none."""
    jpeg, png = encoded(pixels(), ".jpg"), encoded(pixels(), ".png")
    return {
        "cut.jpg": jpeg[: len(jpeg) // 2], "cut2.png": png[:-100], "empty.jpg": b"", "text.jpg": b"an apology\n",
        "head.jpg": jpeg[:30],
    }  # fmt: skip

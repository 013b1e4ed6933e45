import json
import pickle
import struct
import threading
import time
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from ribfast import data
from ribfast.data.decode import VOC_PALETTE, draw_regions, read_image, read_mask

MSRC = Path(__file__).parents[2] / "shared" / "data" / "msrc15"
GOLDEN = Path(__file__).parent / "golden" / "bicubic.npz"
COFFEE = Path(data.__file__).parents[1] / "assets" / "coffee.jpg"
RNG = np.random.default_rng(3)


def photo(height=40, width=60, suffix=".jpg"):
    """A smooth picture, encoded."""
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([128 + 100 * np.sin(x / 9 + channel) * np.cos(y / 7) for channel in range(3)], -1)
    return cv2.imencode(suffix, pixels.astype(np.uint8))[1].tobytes()


def png(samples, depth=8, kind=0, palette=None):
    """A PNG of the samples as they are: kind 0 grey, 2 RGB, 3 palette."""

    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    height, width = samples.shape[:2]
    rows = samples.reshape(height, -1)
    if depth < 8:
        bits = (rows[..., None] >> np.arange(depth - 1, -1, -1)) & 1
        rows = np.packbits(bits.reshape(height, -1).astype(np.uint8), axis=1)
    else:
        rows = rows.astype(f">u{depth // 8}").view(np.uint8).reshape(height, -1)
    body = zlib.compress(np.column_stack([np.zeros(height, np.uint8), rows]).tobytes())
    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    colours = b"" if palette is None else chunk(b"PLTE", palette.tobytes()) + chunk(b"tRNS", b"\0\x80")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + colours + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "photos"
    for name in ("a.jpg", "b.PNG", "deep/c.v2.jpeg", "d.jpg"):
        write(root / "images" / name, photo(suffix=".png" if name.endswith("PNG") else ".jpg"))
    write(root / "labels.csv", "image,labels\na.jpg,dog;cat\nb, cat ;cat\n\ndeep/c.v2.jpeg,\nd.jpg,horse\n")
    write(root / "masks" / "a.png", png(RNG.integers(0, 4, (40, 60))))
    write(root / "train.txt", "deep/c.v2\na\n")
    return root


def test_folder(folder):
    source = data.open_source(f"folder:{folder}")
    assert source.classes == ("cat", "dog", "horse") and len(source) == 4
    assert [item.name for item in source] == ["a", "b", "deep/c.v2", "d"]
    assert [item.classes for item in source] == [(0, 1), (0,), (), (2,)]
    expected = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0], [0, 0, 1]], dtype=torch.bool)
    assert torch.equal(source.labels(), expected)
    assert source.image(source[1]).shape == (40, 60, 3)
    assert source.mask(source[0], (40, 60)).max() == 3 and source.mask(source[1]) is None
    with pytest.raises(ValueError, match=r"Source.mask: expected 41 x 60 .* got 40 x 60"):
        source.mask(source[0], (41, 60))
    assert pickle.loads(pickle.dumps(source)) == source and hash(source)

    write(folder / "classes.txt", "horse\ndog\ncat\n")
    split = data.open_source(f"folder:{folder}", "train")
    assert split.classes == ("horse", "dog", "cat")
    assert [(item.name, item.classes) for item in split] == [("deep/c.v2", ()), ("a", (1, 2))]
    assert data.open_source(f"folder:{folder}", str(folder / "train.txt")) == split


@pytest.mark.parametrize(
    ("path", "content", "message"),
    [
        ("labels.csv", "image,labels\nz.jpg,cat\n", r"expected z.jpg in .*images, got no such image, .*labels.csv:2"),
        ("labels.csv", "image,labels\na.png,cat\n", r"expected a.png in .*labels.csv:2"),
        ("labels.csv", "image,labels\na.jpg,cat\na,dog\n", r"got a again in .*labels.csv:3, first in line 2"),
        ("labels.csv", "image,labels\n../a.jpg,cat\n", r"relative path without `..`, got '../a.jpg' in .*labels.csv:2"),
        ("labels.csv", "image,labels\n/a.jpg,cat\n", r"relative path without `..`, got '/a.jpg'"),
        ("labels.csv", "a.jpg,cat\n", r"expected the header image,labels, got 'a.jpg,cat' in .*labels.csv:1"),
        ("labels.csv", "image,labels\na.jpg,cat,dog\n", r"expected two columns, got 3 in .*labels.csv:2"),
        ("labels.csv", 'image,labels\n"a.jpg,cat\n', r"expected a table, got .*labels.csv:2"),
        ("labels.csv", "image,labels\na.jpg,\n", r"expected at least one class, got none"),
        ("labels.csv", b"image,labels\n\xff.jpg,cat\n", r"expected UTF-8, got .*labels.csv"),
        ("classes.txt", "dog\nhorse\n", r"expected labels of .*classes.txt, got 'cat' in .*labels.csv:2"),
        ("classes.txt", "dog\ncat\ndog\n", r"each name once, got dog in line 3 of .*classes.txt, first in line 1"),
        ("train.txt", "a\nnone\n", r"expected images of .*labels.csv, got none in .*train.txt:2"),
        ("train.txt", "a\nb\na.jpg\n", r"each name once, got a in line 3 of .*train.txt"),
        ("train.txt", "\n", r"expected at least one image, got none in .*train.txt; fill it"),
        ("images/b.jpg", photo(), r"expected one image called b, got b.* named in .*labels.csv:3"),
    ],
)
def test_folder_errors_name_the_place(folder, path, content, message):
    write(folder / path, content)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        data.open_source(f"folder:{folder}", "train")
    assert str(caught.value).startswith("open_source: expected")


def test_other_errors_of_opening(folder):
    for spec in ("zip:/tmp", "folder", "folder:", ""):
        with pytest.raises(ValueError, match="expected one of folder:PATH, voc:PATH, coco:PATH, got"):
            data.open_source(spec)
    with pytest.raises(FileNotFoundError, match=r"open_source: expected a folder, got .*nowhere"):
        data.open_source(f"folder:{folder}/nowhere")
    with pytest.raises(FileNotFoundError, match=r"got split 'val', which is neither; the lists there: train"):
        data.open_source(f"folder:{folder}", "val")
    (folder / "labels.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"expected a file, got .*labels.csv"):
        data.open_source(f"folder:{folder}")
    with pytest.raises(FileNotFoundError, match="expected VOC2012 or the VOCdevkit"):
        data.open_source(f"voc:{folder}")
    with pytest.raises(FileNotFoundError, match=r"no .*instances_train2014.json; the splits there: none"):
        data.open_source(f"coco:{folder}")


@pytest.mark.skipif(not MSRC.exists(), reason="no photographs beside the checkout")
def test_real_photographs():
    both = [data.open_source(f"folder:{MSRC}", split) for split in ("train", "val")]
    everything = data.open_source(f"folder:{MSRC}")
    assert [len(source) for source in (*both, everything)] == [276, 119, 395] and len(everything.classes) == 15
    assert not {item.name for item in both[0]} & {item.name for item in both[1]}
    for item in everything[::20]:
        mask = everything.mask(item, everything.image(item).shape[:2])
        assert set(np.unique(mask)) - {0, 255} == {index + 1 for index in item.classes}


@pytest.fixture
def voc(tmp_path):
    root = tmp_path / "VOCdevkit" / "VOC2012"
    objects = "<object><name>{}</name><part><name>head</name></part></object>"
    for name, labels in {"1": ["person", "dog", "person"], "2": ["tvmonitor"], "3": []}.items():
        write(root / "JPEGImages" / f"{name}.jpg", photo())
        write(root / "Annotations" / f"{name}.xml", f"<annotation>{''.join(map(objects.format, labels))}</annotation>")
    mask = np.zeros((40, 60), np.int64)
    mask[5:20, 7:30], mask[20:25] = 15, 255
    write(root / "SegmentationClass" / "1.png", png(mask, kind=3, palette=VOC_PALETTE))
    write(root / "SegmentationClass" / "2.png", png(mask, kind=3, palette=VOC_PALETTE))
    write(root / "ImageSets" / "Segmentation" / "train.txt", "1\n2\n")
    write(root / "ImageSets" / "Main" / "dog_trainval.txt", "1  1\n3 -1\n")
    return root, mask


def test_voc(voc):
    root, mask = voc
    source = data.open_source(f"voc:{root}")
    assert len(source.classes) == 20 and source.classes[11] == "dog" and source.classes[19] == "tvmonitor"
    assert [(item.name, item.classes) for item in source] == [("1", (11, 14)), ("2", (19,))]
    assert np.array_equal(source.mask(source[0]), mask)
    main = data.open_source(f"voc:{root.parent}", "dog_trainval")
    assert [(item.name, item.classes, item.mask is None) for item in main] == [("1", (11, 14), False), ("3", (), True)]

    lines = "/JPEGImages/2.jpg /SegmentationClassAug/2.png\n/JPEGImages/1.jpg /SegmentationClassAug/1.png\n"
    write(root / "ImageSets" / "Segmentation" / "train_aug.txt", lines)
    write(root / "SegmentationClassAug" / "2.png", png(np.full((40, 60), 3)))
    (root / "Annotations" / "2.xml").unlink()  # the mask knows
    source = data.open_source(f"voc:{root}")
    assert [(item.name, item.classes) for item in source] == [("2", (2,)), ("1", (11, 14))]
    assert (source.mask(source[0]) == 3).all() and np.array_equal(source.mask(source[1]), mask)


def test_voc_errors(voc):
    root, _ = voc
    write(root / "Annotations" / "2.xml", "<annotation><object>")
    with pytest.raises(ValueError, match=r"expected an annotation in XML, got .*2.xml"):
        data.open_source(f"voc:{root}")
    write(root / "Annotations" / "2.xml", "<annotation><object><name>yak</name></object></annotation>")
    with pytest.raises(ValueError, match=r"VOC's 20 classes, got 'yak' in .*2.xml"):
        data.open_source(f"voc:{root}")
    (root / "Annotations" / "3.xml").unlink()
    with pytest.raises(FileNotFoundError, match=r"3.xml or a mask to know the classes of .*dog_trainval.txt:2"):
        data.open_source(f"voc:{root}", "dog_trainval")
    (root / "JPEGImages" / "1.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"expected 1 in .*JPEGImages, got no such image, .*train.txt:1"):
        data.open_source(f"voc:{root}")


SQUARE = [10, 10, 30, 10, 30, 30, 10, 30]
RLE = {"size": [9, 13], "counts": "m05400MM0330000Q1L"}  # by pycocotools, of what test_regions builds


@pytest.fixture
def coco(tmp_path):
    root = tmp_path / "coco"
    content = {
        "images": [{"id": i, "file_name": f"{i}.jpg", "height": 40, "width": 60} for i in (5, 6, 7)],
        "categories": [{"id": 90, "name": "toothbrush"}, {"id": 1, "name": "person"}, {"id": 3, "name": "car"}],
        "annotations": [
            {"id": 1, "image_id": 5, "category_id": 3, "area": 25, "segmentation": [[12, 12, 17, 12, 17, 17, 12, 17]]},
            {"id": 2, "image_id": 5, "category_id": 90, "area": 400, "segmentation": [SQUARE], "iscrowd": 0},
            {"id": 3, "image_id": 6, "category_id": 1, "area": 300, "iscrowd": 1,
             "segmentation": {"size": [40, 60], "counts": [400, 300, 1700]}},
        ],
    }  # fmt: skip
    write(root / "annotations" / "instances_train2017.json", json.dumps(content))
    for name in (5, 6, 7):
        write(root / "images" / "train2017" / f"{name}.jpg", photo())
    write(root / "masks" / "train2017" / "7.png", png(np.full((40, 60), 2)))
    return root, content


def test_coco(coco):
    source = data.open_source(f"coco:{coco[0]}")
    assert source.classes == ("person", "car", "toothbrush")
    assert [(item.name, item.classes) for item in source] == [("5", (1, 2)), ("6", (0,)), ("7", ())]
    mask = source.mask(source[0], (40, 60))
    expected = np.zeros((40, 60), np.uint8)
    expected[10:30, 10:30], expected[12:17, 12:17] = 3, 2  # the small one on top
    assert np.array_equal(mask, expected)
    crowd = np.zeros(2400, np.uint8)
    crowd[400:700] = 255
    assert np.array_equal(source.mask(source[1]), crowd.reshape(60, 40).T)
    assert (source.mask(source[2]) == 2).all()


def test_coco_errors(coco):
    root, content = coco
    path = root / "annotations" / "instances_train2017.json"
    with pytest.raises(FileNotFoundError, match=r"of split 'val', .* the splits there: train2017"):
        data.open_source(f"coco:{root}", "val")
    for broken, message in (
        (content | {"annotations": [content["annotations"][0] | {"image_id": 9}]}, "annotation 1 is of an unknown"),
        (content | {"images": content["images"] * 2}, "each name once, got 5 in image 4 of"),
        (
            content | {"images": [content["images"][0] | {"file_name": "../5.jpg"}], "annotations": []},
            "relative path without",
        ),
        (content | {"annotations": [content["annotations"][0] | {"segmentation": [[1, 2, 3]]}]}, "an x without a y"),
        ({"images": []}, r"got .*instances_train2017.json: no 'categories'"),
        ([], "expected COCO's instances"),
    ):
        write(path, json.dumps(broken))
        with pytest.raises(ValueError, match=message):
            data.open_source(f"coco:{root}")
    write(path, "{")
    with pytest.raises(ValueError, match="expected COCO's instances"):
        data.open_source(f"coco:{root}")


def test_regions():
    runs = np.zeros((9, 13), np.uint8)
    runs[2:7, 3:9] = 1
    runs[4, 5], runs[8, 12] = 0, 1
    assert np.array_equal(draw_regions((9, 13), [(1, RLE)], "x"), runs)
    with pytest.raises(ValueError, match="expected run lengths that fill 9 x 14 pixels, got 117"):
        draw_regions((9, 14), [(1, RLE)], "x")
    outside = [-5, -5, 2.5, -5, 2.5, 2.6, -5, 2.6]
    ring = [4, 1, 9, 1, 9, 6, 4, 6, 4, 1, 6, 3, 6, 4, 7, 4, 7, 3, 6, 3]  # with a hole: even-odd
    mask = draw_regions((9, 13), [(7, [outside, ring]), (9, [[100, 100, 120, 100, 110, 130]])], "x")
    expected = np.zeros((9, 13), np.uint8)
    expected[:3, :2], expected[1:6, 4:9], expected[3, 6] = 7, 7, 0
    expected[:3, 2] = 0
    assert np.array_equal(mask, expected)
    disc = np.stack([20 + 12.3 * np.cos(angle := np.linspace(0, 2 * np.pi, 200)), 18 + 12.3 * np.sin(angle)], 1)
    y, x = np.mgrid[:40, :40] + 0.5
    inside = (x - 20) ** 2 + (y - 18) ** 2 < 12.3**2
    assert (draw_regions((40, 40), [(1, [disc.ravel().tolist()])], "x") != inside).sum() <= 2


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
@pytest.mark.parametrize("kind", [0, 3])
def test_masks_are_read_as_stored(depth, kind, tmp_path):
    labels = RNG.integers(0, 2**depth, (13, 21))
    palette = RNG.integers(0, 256, (2**depth, 3)).astype(np.uint8) if kind == 3 else None  # not VOC's
    path = write(tmp_path / "mask.png", png(labels, depth, kind, palette))
    assert np.array_equal(read_mask(path), labels)


def test_masks_of_other_kinds(tmp_path):
    labels = np.array([[0, 1, 7], [20, 255, 15]])
    colours = write(tmp_path / "colours.png", png(VOC_PALETTE[labels], kind=2))
    assert np.array_equal(read_mask(colours), labels)
    assert tuple(VOC_PALETTE[1]) == (128, 0, 0) and tuple(VOC_PALETTE[255]) == (224, 224, 192)
    assert np.array_equal(read_mask(write(tmp_path / "deep.png", png(labels, 16))), labels)
    with pytest.raises(ValueError, match=r"labels up to 255, got 300 in .*deep.png"):
        read_mask(write(tmp_path / "deep.png", png(labels + 45, 16)))
    with pytest.raises(ValueError, match=r"got the colour \(1, 2, 3\) at \(0, 0\) of .*colours.png"):
        read_mask(write(tmp_path / "colours.png", png(np.array([[[1, 2, 3]]]), kind=2)))
    with pytest.raises(ValueError, match=r"expected a PNG, got .*mask.jpg"):
        read_mask(write(tmp_path / "mask.jpg", photo()))


def test_masks_of_wrong_labels(folder):
    write(folder / "masks" / "a.png", png(np.full((40, 60), 9)))
    source = data.open_source(f"folder:{folder}")
    with pytest.raises(ValueError, match=r"labels 0..3 \(class \+ 1\) or 255, got 9 in .*a.png"):
        source.mask(source[0])


def test_pictures_become_rgb(tmp_path):
    red = np.zeros((5, 7, 3), np.uint8)
    red[..., 0] = 200
    assert np.array_equal(read_image(write(tmp_path / "a.png", png(red, kind=2)), upright=False), red)
    grey = RNG.integers(0, 256, (5, 7))
    for name, content in {"b.png": png(grey), "c.png": png(grey * 257, 16)}.items():
        image = read_image(write(tmp_path / name, content), upright=True)
        assert image.dtype == np.uint8 and np.array_equal(image, np.repeat(grey[..., None], 3, -1))
    alpha = cv2.imencode(".png", np.dstack([red[..., ::-1], np.full((5, 7), 30, np.uint8)]))[1].tobytes()
    assert np.array_equal(read_image(write(tmp_path / "d.png", alpha), upright=False), red)


def test_orientation(tmp_path):
    """EXIF says: turn clockwise by 90 degrees to see it upright."""
    jpeg = photo()
    entry = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)
    exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 1) + entry + bytes(4)
    turned = jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + jpeg[2:]
    path = write(tmp_path / "images" / "a.jpg", turned)
    stored = read_image(path, upright=False)
    assert stored.shape == (40, 60, 3)
    write(tmp_path / "labels.csv", "image,labels\na.jpg,dog\n")
    source = data.open_source(f"folder:{tmp_path}")
    assert np.array_equal(source.image(source[0]), np.rot90(stored, -1))


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_broken_pictures_are_refused(suffix, tmp_path):
    whole = photo(200, 300, suffix)
    path = tmp_path / f"a{suffix}"
    assert read_image(write(path, whole + b"\0\0trailing"), upright=True).shape == (200, 300, 3)
    for content in (b"", b"nothing", whole[:20], whole[: len(whole) // 2], whole[:-20]):
        with pytest.raises(
            ValueError, match=rf"read_image: expected a (whole file|picture that OpenCV reads), got {path}"
        ):
            read_image(write(path, content), upright=True)


def test_rescale_equals_pillows():
    golden = np.load(GOLDEN)
    for name in set(golden.files) - {"image"}:
        difference = np.abs(data.rescale(golden["image"], golden[name].shape[:2]).astype(int) - golden[name])
        assert difference.max() <= 1 and (difference > 0).mean() < 0.02, name


def test_rescale_against_pillow():
    pillow = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    image = read_image(COFFEE, upright=False)
    for scale in (0.5, 0.83, 1.5, 2.0):
        height, width = data.scaled_size(image.shape[:2], scale)
        expected = np.asarray(pillow.fromarray(image).resize((width, height), pillow.Resampling.BICUBIC))
        difference = np.abs(data.rescale(image, (height, width)).astype(int) - expected)
        assert difference.max() <= 2 and (difference > 0).mean() < 0.01 and (difference > 1).mean() < 1e-4


def test_sizes():
    assert data.scaled_size((375, 500), 0.5) == (188, 250) and data.scaled_size((5, 3), 0.5) == (2, 2)
    assert data.scaled_size((1, 9), 0.01) == (1, 1)
    image = RNG.integers(0, 256, (6, 9, 3), dtype=np.uint8)
    same = data.rescale(image, (6, 9))
    assert np.array_equal(same, image) and not np.shares_memory(same, image)
    assert data.rescale(image[:, ::-1], (3, 4)).flags.c_contiguous
    for call in (
        lambda: data.scaled_size((4, 4), 0),
        lambda: data.rescale(image, (0, 4)),
        lambda: data.rescale(image.astype(np.float32), (3, 4)),
        lambda: data.make_views(image[..., 0]),
        lambda: data.Augmentation(long_side=(9, 3)),
        lambda: data.Augmentation(crop=0),
    ):
        with pytest.raises(ValueError, match="expected"):
            call()


def test_views():
    image = RNG.integers(0, 256, (37, 50, 3), dtype=np.uint8)
    image.flags.writeable = False  # as caches hand it out
    views = data.make_views(image)
    alone = data.make_views(image, mirror=False)
    assert all(torch.equal(one, both[:1]) for one, both in zip(alone, views, strict=True))
    assert [tuple(view.shape) for view in views] == [(2, 3, *data.scaled_size((37, 50), s)) for s in (1, 0.5, 1.5, 2)]
    for view, scale in zip(views, (1, 0.5, 1.5, 2), strict=True):
        assert view.dtype == torch.float32 and view.is_contiguous() and torch.equal(view[1], view[0].flip(-1))
        pixels = data.rescale(image, view.shape[2:]) / 255.0
        expected = (pixels - data.IMAGENET.mean) / data.IMAGENET.std
        assert np.array_equal(view[0].numpy(), expected.astype(np.float32).transpose(2, 0, 1)), scale
    (view,) = data.make_views(image, [1], data.SYMMETRIC)
    np.testing.assert_allclose(view[0].permute(1, 2, 0), image / 127.5 - 1, atol=1e-6)


@pytest.mark.parametrize("flip", [True, False])
def test_augmentation_step_by_step(flip):
    """Against the steps as written: rescale, mirror, normalise, crop."""
    image = RNG.integers(0, 256, (50, 37, 3), dtype=np.uint8)
    augmentation = data.Augmentation(long_side=(20, 60), crop=40, flip=flip)
    for seed in range(40):
        rng = np.random.default_rng(seed)
        long_side = rng.integers(20, 61)
        mirrored = flip and rng.random() < 0.5
        resized = data.rescale(image, data.scaled_size((50, 37), long_side / 50))
        resized = resized[:, ::-1] if mirrored else resized
        pixels = ((resized / 255.0 - data.IMAGENET.mean) / data.IMAGENET.std).astype(np.float32)
        padded = np.zeros((120, 120, 3), np.float32)
        height, width = resized.shape[:2]
        padded[40 : 40 + height, 40 : 40 + width] = pixels
        begins = [rng.integers(abs(side - 40) + 1) * (1 if side > 40 else -1) for side in (height, width)]
        expected = padded[40 + begins[0] :, 40 + begins[1] :][:40, :40]
        crop = augmentation(image, np.random.default_rng(seed))
        assert crop.dtype == torch.float32 and np.array_equal(crop.permute(1, 2, 0).numpy(), expected), seed


def test_augmentation_reaches_every_size_and_place():
    image = np.full((8, 8, 3), 255, np.uint8)
    augmentation, rng, seen = data.Augmentation((3, 5), crop=4), np.random.default_rng(0), set()
    for _ in range(300):
        there = augmentation(image, rng)[0].numpy() != 0
        seen.add((there.sum(), *np.argwhere(there)[0]))
    assert seen == {(9, y, x) for y in (0, 1) for x in (0, 1)} | {(16, 0, 0)}


def test_prefetch_keeps_order_and_bounds():
    started, lock, most = [], threading.Lock(), 0

    def work(number):
        with lock:
            started.append(number)
        time.sleep(0.001 * (number % 3))
        return number * number

    for position, result in enumerate(data.prefetch(work, iter(range(40)), workers=3, ahead=5)):
        assert result == position**2
        with lock:
            most = max(most, len(started) - position - 1)
    assert position == 39 and 0 < most <= 5
    assert list(data.prefetch(str, [], workers=2)) == []
    assert list(data.prefetch(str, range(3), workers=0)) == ["0", "1", "2"]
    with pytest.raises(ValueError, match="ahead of at least 1"):
        data.prefetch(str, [], ahead=0)


def test_prefetch_raises_in_place_and_stops():
    def work(number):
        if number == 3:
            raise KeyError(number)
        return number

    def numbers():
        yield from range(3)
        raise RuntimeError("no more")

    for arguments, error in ((range(9), KeyError), (numbers(), RuntimeError)):
        found, iterator = [], data.prefetch(work, arguments, workers=2, ahead=3)
        with pytest.raises(error):
            for value in iterator:
                found.append(value)
        assert found == [0, 1, 2]
    iterator = data.prefetch(work, iter(int, 1), workers=2)  # endless
    assert next(iterator) == 0
    iterator.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ribfast-prefetch")]


def test_cache(folder):
    source = data.open_source(f"folder:{folder}")
    size = 40 * 60 * 3
    cache = data.ImageCache(source, 2 * size + 10)
    a, b, c, _ = source
    first = cache.image(a)
    assert np.array_equal(first, source.image(a)) and not first.flags.writeable
    cache.image(b)
    assert cache.image(a) is first and cache.bytes == 2 * size
    cache.image(c)  # in place of b, which was used longest ago
    assert cache.image(a) is first and cache.bytes == 2 * size
    small = data.ImageCache(source, size - 1)
    assert small.image(a) is not small.image(a) and small.bytes == 0

    def many(index):
        image = cache.image(source[index % 4])
        return cache.bytes <= cache.limit_bytes and image.shape == (40, 60, 3)

    assert all(data.prefetch(many, range(200), workers=4, ahead=8))


def test_what_follows_a_jpeg_s_end_is_not_looked_at(tmp_path):
    """Telephones append films, whose bytes look like markers; thumbnails before the scan have scans and ends too."""
    path, picture = tmp_path / "photo.jpg", np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    plain = cv2.imencode(".jpg", picture)[1].tobytes()
    progressive = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_PROGRESSIVE, 1, cv2.IMWRITE_JPEG_RST_INTERVAL, 2])[1]
    progressive, film = progressive.tobytes(), b"ftypmp4\xff\xda" + bytes(50)
    assert progressive.count(b"\xff\xda") > 2 and b"\xff\xd0" in progressive
    within = b"\xff\xe1" + struct.pack(">H", len(plain) + 2) + plain
    for jpeg in (plain, progressive, plain[:2] + within + plain[2:], plain[:-2] + b"\xff\xff\xff\xd9"):
        for after in (b"", film, plain, film + plain):
            path.write_bytes(jpeg + after)
            assert read_image(path, upright=True).shape == (64, 64, 3)
        for cut in (jpeg[:-2], jpeg[:-1], jpeg[: -len(plain) // 3], jpeg[:-2] + bytes(500), jpeg[:-40] + film):
            path.write_bytes(cut)
            with pytest.raises(ValueError, match=r"expected a whole file, got .*photo\.jpg, which ends early"):
                read_image(path, upright=True)


ODD_NAMES = (
    "Screenshot 2024-01-01 at 3.05.12\u202fPM.png", "a\u00a0b.png", "a\u3000b.png", "\U0001f468\u200d\U0001f469.png",
    "scan.tif.png", "a .png", " b.png", "\u3000.png", "scan.png", "deep/c.jpg.gif.png",
)  # fmt: skip


def test_names_that_people_have(tmp_path):
    """They stand in tables, in lists as they are written here, and in lists of files."""
    for name in ODD_NAMES:
        write(tmp_path / "images" / name, photo(suffix=".png"))
    write(tmp_path / "labels.csv", "image,labels\r\n" + "".join(f'"{name}",cat\r\n' for name in ODD_NAMES))
    source, spec = data.open_source(f"folder:{tmp_path}"), f"folder:{tmp_path}"
    assert [item.name for item in source] == [name.removesuffix(".png") for name in ODD_NAMES]
    assert [item.image for item in source] == [tmp_path / "images" / name for name in ODD_NAMES]
    write(tmp_path / "mine.txt", "".join(f"{item.name}\n" for item in source))
    assert data.open_source(spec, "mine").items == source.items
    write(tmp_path / "files.txt", "\r\n".join(ODD_NAMES))
    assert data.open_source(spec, "files").items == source.items
    write(tmp_path / "blanks.txt", "  scan.tif.png \n\tscan\n\n")
    assert data.open_source(spec, "blanks").items == (source[4], source[8])
    assert [item.name for item in data.open_images(tmp_path / "images", ("cat",))] == sorted(
        item.name for item in source
    )


def test_names_of_voc_and_coco(voc, coco):
    root, _ = voc
    write(root / "JPEGImages" / "a b.c.jpg", photo())
    write(root / "Annotations" / "a b.c.xml", "<annotation><object><name>dog</name></object></annotation>")
    write(root / "ImageSets" / "Main" / "mine.txt", "a b.c\n2 1\n")
    assert [item.name for item in data.open_source(f"voc:{root}", "mine")] == ["a b.c", "2"]
    root, content = coco
    content["images"][2]["file_name"] = "7.tif.jpg"
    (root / "images" / "train2017" / "7.jpg").rename(root / "images" / "train2017" / "7.tif.jpg")
    write(root / "annotations" / "instances_train2017.json", json.dumps(content))
    write(root / "mine.txt", "".join(f"{item.name}\n" for item in data.open_source(f"coco:{root}")))
    assert [item.name for item in data.open_source(f"coco:{root}", "train2017:mine")] == ["5", "6", "7.tif"]


@pytest.mark.parametrize("name", ["a\u2028b.png", "a\u2029b.png", "a\x0bb.png", "a\x85b.png", "a\tb.png"])
def test_names_that_no_line_can_hold(folder, name):
    write(folder / "images" / name, photo(suffix=".png"))
    write(folder / "labels.csv", f"image,labels\n{name},cat\n")
    with pytest.raises(
        ValueError, match=r"a name that a line of a list can hold, got control characters.*labels.csv:2"
    ):
        data.open_source(f"folder:{folder}")


@pytest.mark.parametrize(("there", "named", "message"), [
    ("x.HEIC", "x.HEIC", r"no such image but x.HEIC, of a kind that is not read, .* convert it to one of .jpg"),
    ("x.HEIC", "x", r"no such image but x.HEIC, of a kind"),
    ("y.JPG", "y.jpg", r"no such image but y.JPG, named in .*labels.csv:2; name it so"),
    ("Y.jpg", "y.jpg", r"no such image but Y.jpg, named"),
    ("y.png", "y.jpg", r"no such image but y.png, named"),
    ("cafe\u0301.png", "caf\u00e9.png", r"no such image but cafe\u0301.png with its letters composed otherwise"),
    ("d.png/e.png", "d.png", r"no such image but a folder d.png, .*; name the images in it"),
    ("z.png", "y.jpg", r"no such image, named in .*labels.csv:2; add it or remove the line"),
])  # fmt: skip
def test_images_that_are_nearly_there(folder, there, named, message):
    write(folder / "images" / there, photo())
    write(folder / "labels.csv", f"image,labels\n{named},cat\n")
    with pytest.raises(FileNotFoundError, match=message):
        data.open_source(f"folder:{folder}")


def test_folders_of_images_hold_other_files(tmp_path, caplog):
    for name in ("a.png", "._a.png", ".hidden/b.png", "b.HEIC", "c.HEIC", "Thumbs.db", ".DS_Store", "none"):
        write(tmp_path / name, photo(suffix=".png"))
    assert [item.name for item in data.open_images(tmp_path, ("cat",))] == ["a"]
    assert "left out: 4 files in" in caplog.text and "(.HEIC 2, .db 1, without suffix 1)" in caplog.text
    (tmp_path / "a.png").unlink()
    with pytest.raises(ValueError, match=r"got files of other kinds \(.HEIC 2, .*\); convert them"):
        data.open_images(tmp_path, ("cat",))


def test_classes_that_cannot_be(folder, coco):
    write(folder / "labels.csv", "image,labels\na.jpg,dog;background\n")
    with pytest.raises(ValueError, match=r"got one called background in folder:.*; take it out of the labels"):
        data.open_source(f"folder:{folder}")
    for count in (254, 255):
        write(folder / "labels.csv", "image,labels\na.jpg," + ";".join(f"c{i}" for i in range(count)) + "\n")
        if count == 254:
            assert len(data.open_source(f"folder:{folder}").classes) == count
    with pytest.raises(ValueError, match="at most 254 classes, as labels are 8 bits and 255 is none, got 255 in"):
        data.open_source(f"folder:{folder}")
    root, content = coco
    for name, message in (
        ("background", "got one called background in coco:"), ("car", "got 'car' of those with ids 1, 3; rename one"),
        (5, "category 1 is called 5, which is no text"), (None, "category 1 is called None, which is no text"),
    ):  # fmt: skip
        content["categories"][1]["name"] = name
        write(root / "annotations" / "instances_train2017.json", json.dumps(content))
        with pytest.raises(ValueError, match=message):
            data.open_source(f"coco:{root}")


def test_sizes_that_cannot_be(coco):
    root, content = coco
    path, spec = root / "annotations" / "instances_train2017.json", f"coco:{root}"
    for height, message in (
        ("40", "image 5.jpg has a height of '40' and a width of 60, no whole numbers of pixels"),
        (40.5, "a height of 40.5"), (-5, "a height of -5"), (None, "a height of None"), (True, "a height of True"),
        (float("inf"), "instances_train2017.json"), (10**9, "1000000000 x 60 pixels, more than a picture can have"),
    ):  # fmt: skip
        content["images"][0]["height"] = height
        write(path, json.dumps(content))
        with pytest.raises(ValueError, match=message):
            data.open_source(spec)
    for height, problems in ((40.0, []), (10**7, ["5"])):  # the second is never filled
        content["images"][0]["height"] = height
        write(path, json.dumps(content))
        found = data.scan(data.open_source(spec), required=False)
        assert [problem.name for problem in found.problems] == problems and found.images == 3
    assert "expected 40 x 60 pixels as" in found.problems[0].reason
    write(path, "[" * 100_000)
    with pytest.raises(ValueError, match=r"expected COCO's instances, got .*json: .*recursion"):
        data.open_source(spec)

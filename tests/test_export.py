import csv
import dataclasses
import errno
import json
import os
import struct

import cv2
import numpy as np
import pictures
import pytest

from ribfast import cli, data
from ribfast.data.decode import VOC_PALETTE, encode_region, read_image, read_mask
from ribfast.export import ExportConfig, export
from ribfast.store import Store, open_masks

RNG = np.random.default_rng(5)
CLASSES = ("square", "disc", "star")


def jpeg(size=(40, 60), turn=None):
    """turn: EXIF's orientation."""
    y, x = np.mgrid[: size[0], : size[1]]
    pixels = np.stack([128 + 100 * np.sin(x / 9 + channel) * np.cos(y / 7) for channel in range(3)], -1)
    content = cv2.imencode(".jpg", pixels.astype(np.uint8))[1].tobytes()
    if turn is None:
        return content
    entry = struct.pack("<HHIHH", 0x0112, 3, 1, turn, 0)
    exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 1) + entry + bytes(4)
    return content[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + content[2:]


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


@pytest.fixture
def folder(tmp_path):
    """a: a JPEG; b/c: a PNG in a folder; d.v 2: turned by EXIF; e: no class."""
    root = tmp_path / "photos"
    write(root / "images" / "a.JPG", jpeg())
    write(
        root / "images" / "b" / "c.png", cv2.imencode(".png", RNG.integers(0, 256, (31, 47, 3), np.uint8))[1].tobytes()
    )
    write(root / "images" / "d.v 2.jpg", jpeg(turn=6))
    write(root / "images" / "e.jpg", jpeg((17, 19), turn=1))
    write(root / "labels.csv", "image,labels\na,square;disc\nb/c,disc\nd.v 2,square;disc\ne,\n")
    write(root / "classes.txt", "\n".join(CLASSES))
    write(root / "train.txt", "a\nb/c\nd.v 2\ne\n")
    return root


@pytest.fixture
def masks(tmp_path):
    """A run's: noise of both classes, two discs that touch in a corner, unsure pixels; e: background alone."""
    store = Store(tmp_path / "run")
    noise = RNG.choice([0, 0, 0, 1, 2, 255], (40, 60)).astype(np.uint8)
    discs = np.zeros((31, 47), np.uint8)
    discs[:8, :9], discs[8:20, 9:30], discs[25:, 40:] = 2, 2, 2
    tall = np.ones((60, 40), np.uint8)  # runs go on from column to column
    tall[10:20, 5:9] = 255
    for name, mask in {"a": noise, "b/c": discs, "d.v 2": tall, "e": np.zeros((17, 19), np.uint8)}.items():
        store.save_mask(name, mask)
    return store


def opened(folder):
    return data.open_source(f"folder:{folder}")


def contents(root):
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}


def test_regions_equal_pycocotools():
    peer = pytest.importorskip("pycocotools.mask")
    for height, width in ((1, 1), (1, 7), (6, 1), (2, 3), (13, 9), (151, 129)):
        for share in (0, 0.03, 0.5, 0.97, 1):
            part = RNG.random((height, width)) < share
            for above, left, below, right in ((0, 0, 0, 0), (0, 2, 0, 3), (4, 0, 5, 0), (1, 1, 1, 1)):
                whole = np.pad(part, ((above, below), (left, right))).astype(np.uint8)
                found = encode_region(part, (above, left), whole.shape)
                expected = peer.encode(np.asfortranarray(whole))
                assert found == {"size": expected["size"], "counts": expected["counts"].decode()}
    large = np.zeros((3000, 4001), np.uint8)  # runs and differences of several characters
    large[5:2900, 100:3900], large[::7, ::3], large[1000:1200] = 1, 1, 0
    expected = peer.encode(np.asfortranarray(large))
    assert encode_region(large.astype(bool), (0, 0), large.shape)["counts"] == expected["counts"].decode()


def test_regions_are_read_back():
    for shape in ((1, 1), (5, 4), (63, 129)):
        for share in (0, 0.4, 1):
            mask = (RNG.random(shape) < share).astype(np.uint8)
            region = encode_region(mask.astype(bool), (0, 0), shape)
            assert np.array_equal(data.decode.draw_regions(shape, [(1, region)], "x"), mask)


def test_voc_folder(folder, masks, tmp_path):
    out, seen = tmp_path / "out", []
    result = export(opened(folder), masks.load_mask, out, progress=lambda *said: seen.append(said))
    assert (result.images, result.encoded, result.renamed, result.annotations) == (4, 2, 2, 0)
    stems = {"a": "a", "b/c": "b_c", "d.v 2": "d_v_2", "e": "e"}
    root = out / "VOC2012"
    expected = {
        f"{place}/{stem}.png" for place in ("SegmentationClass", "SegmentationClassAug") for stem in stems.values()
    }
    expected |= {f"JPEGImages/{stem}.jpg" for stem in stems.values()} | {"classes.txt", "names_train.csv"}
    expected |= {"ImageSets/Segmentation/train.txt", "ImageSets/SegmentationAug/train.txt"}
    assert contents(root) == expected
    assert (root / "classes.txt").read_text() == "background\nsquare\ndisc\nstar\n"
    with open(root / "names_train.csv", newline="") as table:
        assert list(csv.reader(table)) == [["name", "exported"], ["b/c", "b_c"], ["d.v 2", "d_v_2"]]
    assert seen[-1] == (8, 8, "e") and [done for done, *_ in seen] == [*range(9)]
    assert (root / "JPEGImages" / "a.jpg").read_bytes() == (folder / "images" / "a.JPG").read_bytes()
    assert (root / "JPEGImages" / "e.jpg").read_bytes() == (
        folder / "images" / "e.jpg"
    ).read_bytes()  # EXIF turns nothing
    source = opened(folder)
    for item in source:
        path = root / "JPEGImages" / f"{stems[item.name]}.jpg"
        image = source.image(item)
        assert path.read_bytes().startswith(b"\xff\xd8")
        for upright in (True, False):  # whatever a tool makes of EXIF
            stored = read_image(path, upright=upright)
            assert stored.shape == image.shape and (item.name == "b/c" or np.abs(stored.astype(int) - image).mean() < 2)
        for place in ("SegmentationClass", "SegmentationClassAug"):
            written = (root / place / f"{stems[item.name]}.png").read_bytes()
            assert written == masks.mask_path(item.name).read_bytes()
            assert VOC_PALETTE.tobytes() in written and written[25] == 3


def test_voc_folder_as_its_tools_read_it(folder, masks, tmp_path):
    """mmsegmentation adds suffixes to a line; deeplab-pytorch splits it at blanks, and the image's name at dots."""
    source, out = opened(folder), tmp_path / "out"
    export(source, masks.load_mask, out, ExportConfig(name="train_aug"))
    root = out / "VOC2012"
    lists = {place: root / "ImageSets" / place / "train_aug.txt" for place in ("Segmentation", "SegmentationAug")}
    names = lists["Segmentation"].read_text().splitlines()
    lines = [line.split(" ") for line in lists["SegmentationAug"].read_text().splitlines()]
    image_module = pytest.importorskip("PIL.Image")
    for item, name, (image, mask) in zip(source, names, lines, strict=True):
        assert image.split("/")[-1].split(".")[0] == name
        for photo, labels in (
            (root / "JPEGImages" / f"{name}.jpg", root / "SegmentationClass" / f"{name}.png"),
            (os.path.join(root, image[1:]), os.path.join(root, mask[1:])),
        ):
            seen = np.asarray(image_module.open(labels), dtype=np.int32)
            assert np.array_equal(seen, masks.load_mask(item.name))
            assert cv2.imread(str(photo), cv2.IMREAD_COLOR).shape[:2] == seen.shape
            assert image_module.open(photo).size == seen.shape[::-1]


def test_voc_folder_is_a_source(folder, masks, tmp_path):
    export(opened(folder), masks.load_mask, tmp_path / "out")
    source = data.open_source(f"voc:{tmp_path / 'out'}")
    assert [item.name for item in source] == ["a", "b_c", "d_v_2", "e"]
    assert [item.classes for item in source] == [(0, 1), (1,), (0,), ()]
    for item, name in zip(source, ("a", "b/c", "d.v 2", "e"), strict=True):
        mask = source.mask(item, source.image(item).shape[:2])
        assert np.array_equal(mask, masks.load_mask(name))


@pytest.mark.parametrize("link", ["copy", "hard", "symbolic"])
@pytest.mark.parametrize("format", ["voc", "coco"])
def test_links(link, format, folder, masks, tmp_path):
    out, config = tmp_path / "out", ExportConfig(format=format, link=link, workers=0)
    path = out / ("VOC2012/JPEGImages/a.jpg" if format == "voc" else "train2017/a.JPG")
    for again in ("copy", "hard", "symbolic", link, link):  # each in place of any other
        export(opened(folder), masks.load_mask, out, dataclasses.replace(config, link=again))
    original = folder / "images" / "a.JPG"
    assert path.read_bytes() == original.read_bytes() == jpeg()
    assert path.is_symlink() == (link == "symbolic") and path.samefile(original) == (link != "copy")
    assert not [name for name in contents(out) if name.endswith(".partial")]


def test_file_systems_without_links(folder, masks, tmp_path, monkeypatch):
    def refuse(*paths):
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(OSError, match=r"expected a file system that links .*a\.jpg, got .*; copy instead"):
        export(opened(folder), masks.load_mask, tmp_path / "out", ExportConfig(link="hard", workers=0))
    export(opened(folder), masks.load_mask, tmp_path / "out")
    found = Store(tmp_path / "out" / "VOC2012" / "SegmentationClass", flat=True)
    assert np.array_equal(found.load_mask("b_c"), masks.load_mask("b/c"))


@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("unsure", ["omit", "crowd"])
def test_coco_as_pycocotools_reads_it(regions, unsure, folder, masks, tmp_path):
    coco = pytest.importorskip("pycocotools.coco")
    peer = pytest.importorskip("pycocotools.mask")
    out, config = tmp_path / "out", ExportConfig("coco", regions=regions, unsure=unsure)
    result = export(opened(folder), masks.load_mask, out, config)
    known = coco.COCO(str(out / "annotations" / "instances_train2017.json"))
    assert [known.cats[number]["name"] for number in known.getCatIds()] == list(CLASSES)
    assert sorted(known.imgs) == [1, 2, 3, 4] and sorted(known.anns) == [*range(1, result.annotations + 1)]
    for number, name in enumerate(("a", "b/c", "d.v 2", "e"), 1):
        mask, seen = masks.load_mask(name), np.zeros(masks.load_mask(name).shape, np.uint8)
        image = known.imgs[number]
        assert (image["height"], image["width"]) == mask.shape and (out / "train2017" / image["file_name"]).is_file()
        ids = known.getAnnIds(number)
        for annotation in known.loadAnns(ids):
            drawn = known.annToMask(annotation).astype(bool)
            region = annotation["segmentation"]
            assert annotation["area"] == drawn.sum() == peer.area(region) and annotation["bbox"] == list(
                peer.toBbox(region)
            )
            if annotation["iscrowd"]:
                assert np.array_equal(drawn, mask == 255)
                continue
            assert not seen[drawn].any()
            seen[drawn] = annotation["category_id"]
            if not regions:
                assert np.array_equal(drawn, mask == annotation["category_id"])
            else:
                assert cv2.connectedComponents(drawn.astype(np.uint8))[0] == 2
        assert np.array_equal(seen, np.where(mask == 255, 0, mask))
    crowds = [known.anns[number] for number in known.getAnnIds(iscrowd=True)]
    labels = {"omit": [], "crowd": [(1, 1), (1, 2), (3, 1), (3, 2)]}[unsure]
    assert [(each["image_id"], each["category_id"]) for each in crowds] == labels
    assert len(known.getAnnIds(2, iscrowd=False)) == (2 if regions else 1)  # corners that touch are one


@pytest.mark.parametrize("regions", [False, True])
def test_coco_is_a_source(regions, folder, masks, tmp_path):
    source, out = opened(folder), tmp_path / "out"
    export(source, masks.load_mask, out, ExportConfig("coco", regions=regions, unsure="crowd"))
    again = data.open_source(f"coco:{out}")
    assert again.classes == source.classes
    assert [(item.name, item.classes) for item in again] == [(item.name, item.classes) for item in source]
    for item, before in zip(again, source, strict=True):
        image = again.image(item)
        assert np.array_equal(again.mask(item, image.shape[:2]), masks.load_mask(item.name))
        assert image.shape == source.image(before).shape
    export(source, masks.load_mask, tmp_path / "omitted", ExportConfig("coco", regions=regions))
    again = data.open_source(f"coco:{tmp_path / 'omitted'}")
    for item in again:
        mask = masks.load_mask(item.name)
        assert np.array_equal(again.mask(item), np.where(mask == 255, 0, mask))


def test_masks_alone(folder, masks, tmp_path):
    source = opened(folder)
    export(source, masks.load_mask, tmp_path / "voc", ExportConfig(images=False, convert=False))
    assert not (tmp_path / "voc" / "VOC2012" / "JPEGImages").exists()
    export(source, masks.load_mask, tmp_path / "coco", ExportConfig("coco", images=False, convert=False))
    assert contents(tmp_path / "coco") == {"annotations/instances_train2017.json"}


def test_all_problems_before_anything_is_written(folder, masks, tmp_path):
    write(folder / "images" / "b_c.jpg", jpeg())
    write(folder / "images" / "e.jpg", jpeg()[:-300])
    write(folder / "images" / "f.jpg", jpeg())
    write(folder / "labels.csv", "image,labels\na,disc\nb/c,disc\nb_c,disc\nd.v 2,disc\ne,\nf,star\n")
    masks.save_mask("a", np.full((40, 60), 200))
    masks.save_mask("b_c", np.zeros((40, 61), np.uint8))
    begun, out = [], tmp_path / "out"
    with pytest.raises(ValueError, match=r"^export: expected 6 images without problems, got 7 problems; ") as stop:
        export(opened(folder), masks.load_mask, out, ExportConfig(convert=False), begin=lambda: begun.append(1))
    said = str(stop.value)
    for text in (
        "a: scan: expected labels 0..3 (class + 1) or 255, got 200",
        f"b/c: export: expected a JPEG, got {folder}/images/b/c.png; say --convert",
        "b_c: scan: expected a mask of the image's 40 x 60 pixels, got 40 x 61",
        "d.v 2: export: expected a photograph that EXIF does not turn",
        f"e: read_image: expected a whole file, got {folder}/images/e.jpg",
        "f: Store.load_mask: expected a mask of f, got no",
        "b_c: export: expected names that differ without folders, dots and blanks, got b/c too; rename one",
    ):
        assert text in said
    assert not begun and not out.exists()


@pytest.fixture
def others(tmp_path, masks):
    """Another data set: b_c is another photograph, a the first one's."""
    root = tmp_path / "others"
    write(root / "images" / "a.jpg", jpeg())
    write(root / "images" / "b_c.jpg", jpeg((31, 47)))
    write(root / "labels.csv", "image,labels\na,disc\nb_c,disc\n")
    write(root / "classes.txt", "\n".join(CLASSES))
    masks.save_mask("b_c", np.ones((31, 47), np.uint8))
    return root


def whole(root):
    return {name: (root / name).read_bytes() for name in contents(root)}


def test_photographs_of_other_lists_stay(folder, others, masks, tmp_path):
    out, config = tmp_path / "out", ExportConfig(name="val")
    export(opened(folder), masks.load_mask, out)
    before = whole(out)
    with pytest.raises(ValueError, match=r"got 1 problem; (.|\n)*  b_c: export: expected what .*train\.txt calls b_c, "
                                         r"got another photograph; rename it or choose another --out$"):  # fmt: skip
        export(opened(others), masks.load_mask, out, config)
    assert whole(out) == before
    (out / "VOC2012" / "ImageSets" / "Segmentation" / "train.txt").unlink()  # either list names it
    with pytest.raises(ValueError, match="calls b_c, got another photograph; "):
        export(opened(others), masks.load_mask, out, config)
    write(others / "labels.csv", "image,labels\na,disc\n")
    export(opened(others), masks.load_mask, out, config)
    assert (out / "VOC2012" / "ImageSets" / "Segmentation" / "val.txt").read_text() == "a\n"
    assert (out / "VOC2012" / "JPEGImages" / "b_c.jpg").read_bytes() == before["VOC2012/JPEGImages/b_c.jpg"]


@pytest.mark.parametrize("link", ["copy", "symbolic"])
def test_a_photograph_may_be_in_several_lists(link, folder, masks, tmp_path):
    out = tmp_path / "out"
    export(opened(folder), masks.load_mask, out, ExportConfig(link=link))
    before = whole(out)
    masks.save_mask("b/c", np.ones((31, 47), np.uint8))
    export(opened(folder), masks.load_mask, out, ExportConfig(name="trainval"))  # b/c and d.v 2: encoded anew
    after = whole(out)
    assert [name for name in before if after[name] != before[name]] == [
        name for name in before if name.startswith("VOC2012/SegmentationClass") and name.endswith("/b_c.png")
    ]
    lists = [out / "VOC2012" / "ImageSets" / "Segmentation" / f"{name}.txt" for name in ("train", "trainval")]
    assert lists[0].read_text() == lists[1].read_text() == "a\nb_c\nd_v_2\ne\n"
    with pytest.raises(ValueError, match=r"2 problems(.|\n)*got another photograph, or the same encoded otherwise; "):
        export(opened(folder), masks.load_mask, out, ExportConfig(name="val", quality=80))


@pytest.mark.parametrize("images", [(False, False), (False, True), (True, False)])
def test_without_photographs_masks_tell(images, folder, others, masks, tmp_path):
    out = tmp_path / "out"
    export(opened(folder), masks.load_mask, out, ExportConfig(images=images[0]))
    before, config = whole(out), ExportConfig(name="val", images=images[1])
    with pytest.raises(ValueError, match=r"got 1 problem; (.|\n)*  b_c: .*calls b_c, got another mask; rename it "):
        export(opened(others), masks.load_mask, out, config)
    assert whole(out) == before
    masks.save_mask("b_c", masks.load_mask("b/c"))
    assert export(opened(others), masks.load_mask, out, config).images == 2


def test_a_list_is_replaced_by_one_of_its_name(folder, others, masks, tmp_path):
    export(opened(folder), masks.load_mask, tmp_path / "out")
    export(opened(others), masks.load_mask, tmp_path / "out")
    root = tmp_path / "out" / "VOC2012"
    assert (root / "ImageSets" / "Segmentation" / "train.txt").read_text() == "a\nb_c\n"
    assert (root / "JPEGImages" / "b_c.jpg").read_bytes() == (others / "images" / "b_c.jpg").read_bytes()
    assert not (root / "names_train.csv").exists()


@pytest.mark.parametrize("format", ["voc", "coco"])
def test_classes_of_other_lists_stay(format, folder, others, masks, tmp_path):
    out, config, begun = tmp_path / "out", ExportConfig(format, name="val"), []
    export(opened(folder), masks.load_mask, out, ExportConfig(format))
    before = whole(out)
    write(others / "labels.csv", "image,labels\na,disc\n")
    for classes in (("disc", "square", "star"), CLASSES[:2], (*CLASSES, "moon")):
        write(others / "classes.txt", "\n".join(classes))
        with pytest.raises(ValueError, match=rf"^export: expected the classes of {out}.*{', '.join(CLASSES)}, got .*"
                                             rf"{', '.join(classes)}; choose another --out$"):  # fmt: skip
            export(opened(others), masks.load_mask, out, config, begin=lambda: begun.append(1))
    assert whole(out) == before and not begun
    if format == "coco":  # where it stands alone, a list brings its own
        assert export(opened(others), masks.load_mask, out, ExportConfig(format)).images == 1
        assert data.open_source(f"coco:{out}").classes == (*CLASSES, "moon")
    write(others / "classes.txt", "\n".join(CLASSES))
    export(opened(others), masks.load_mask, tmp_path / "new", config)
    export(opened(folder), masks.load_mask, tmp_path / "new", ExportConfig(format))
    assert [item.name for item in data.open_source(f"{format}:{tmp_path / 'new'}", "val")] == ["a"]


def test_names_and_places_that_cannot_be(folder, masks, tmp_path):
    long = "/".join(["x" * 100] * 3)
    write(folder / "images" / f"{long}.jpg", jpeg())
    write(folder / "labels.csv", f"image,labels\n{long},disc\n")
    masks.save_mask(long, np.zeros((40, 60), np.uint8))
    with pytest.raises(ValueError, match="expected at most 251 bytes without folders, got more; rename it"):
        export(opened(folder), masks.load_mask, tmp_path / "out")
    export(opened(folder), masks.load_mask, tmp_path / "out", ExportConfig("coco"))
    again = data.open_source(f"coco:{tmp_path / 'out'}")
    with pytest.raises(ValueError, match=r"expected a photograph outside of .*out, got "):
        export(again, masks.load_mask, tmp_path / "out", ExportConfig("coco", link="symbolic"))
    assert again.image(again[0]).shape == (40, 60, 3)
    for wrong in (
        {"name": "a/b"},
        {"name": ".a"},
        {"regions": True},
        {"unsure": "crowd"},
        {"quality": 0},
        {"workers": -1},
    ):
        with pytest.raises(ValueError, match="ExportConfig: expected"):
            ExportConfig(**wrong)


def test_the_command(folder, masks, tmp_path, capsys):
    out = tmp_path / "out"
    words = [
        "export",
        "--data",
        f"folder:{folder}",
        "--masks",
        str(masks.folder),
        "--out",
        str(out),
        "--format",
        "coco",
    ]
    assert cli.main(words) == 0
    said = capsys.readouterr().err
    assert (
        "no mask holds a pixel of star" in said and "pixels are unsure and will be background; --unsure crowd" in said
    )
    assert "4 images, 1 of them encoded anew, 0 renamed, 4 annotations" in said
    before = (out / "annotations" / "instances_train2017.json").read_bytes()
    assert cli.main(words) == 0 and (out / "annotations" / "instances_train2017.json").read_bytes() == before
    capsys.readouterr()
    write(folder / "half.txt", "a\ne\n")
    assert cli.main([*words, "--split", "half"]) == 1
    said = capsys.readouterr().err
    assert "got another " in said and "or say --keep to mix both\n" in said and "--overwrite" not in said
    assert not (out / "annotations" / "instances_half.json").exists()
    assert cli.main([*words, "--split", "half", "--keep"]) == 0
    assert [item.name for item in data.open_source(f"coco:{out}", "half")] == ["a", "e"]
    assert (out / "annotations" / "instances_train2017.json").read_bytes() == before
    written = json.loads((out / "config.json").read_text())
    assert written["command"] == "export" and len(written["before"]) == 1
    assert cli.main([*words[:5], "--out", str(folder)]) == 1
    assert "expected an --out apart from the data" in capsys.readouterr().err
    assert cli.main([*words[:5], "--out", str(folder / "masks" / "..")]) == 1  # the same folder
    assert "expected an --out apart from the data" in capsys.readouterr().err
    write(tmp_path / "theirs" / "notes.txt", "mine")
    assert cli.main([*words[:5], "--out", str(tmp_path / "theirs")]) == 1
    assert "expected an empty --out, or one that `export` began" in capsys.readouterr().err
    masks.mask_path("a").unlink()
    assert cli.main([*words[:5], "--out", str(tmp_path / "other")]) == 1
    assert "got 1 problem; " in capsys.readouterr().err and not (tmp_path / "other").exists()
    (out / "config.json").write_text('{"command": "masks"}')
    assert cli.main(words) == 1 and "which `masks` began" in capsys.readouterr().err


def test_a_drawn_data_set(tmp_path):
    """Its own masks, through both formats."""
    source = data.open_source(pictures.draw(tmp_path / "data", 5))
    store = open_masks(tmp_path / "data" / "masks")
    for format in ("voc", "coco"):
        export(source, store.load_mask, tmp_path / format, ExportConfig(format))
        again = data.open_source(f"{format}:{tmp_path / format}")
        assert [item.classes for item in again] == [item.classes for item in source]
        for item in source:
            assert np.array_equal(read_mask(item.mask), again.mask(next(i for i in again if i.name == item.name)))

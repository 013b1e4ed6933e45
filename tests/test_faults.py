"""What users meet: bad images, bad tables, full disks, bad weights and hostile files, through the commands."""

import json
import re
import shutil

import broken
import faults
import numpy as np
import pytest
from faults import own as own
from faults import place as place

from ribfast import cli, data
from ribfast.store import Store, open_masks

READING = ("cam", "rib", "masks", "masks irn", "predict")  # commands that go on without what they cannot read
TRAINING = ("train-classifier", "train-irn", "train-seg")


def failures(folder):
    """Names and reasons, of a stage or of a run."""
    lines = [json.loads(line) for line in (folder / "failures.jsonl").read_text().splitlines()]
    return {line["name"]: line.get("error") or line["reason"] for line in lines}


@pytest.mark.parametrize("name", broken.odd())
def test_odd_images_are_what_people_see(name, tmp_path):
    content, shown = broken.odd()[name]
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / name).write_bytes(content)
    (tmp_path / "labels.csv").write_text(f"image,labels\n{name},square\n")
    source = data.open_source(f"folder:{tmp_path}")
    image = source.image(source[0])
    assert image.shape == shown.shape
    assert np.abs(image.astype(int) - shown).mean() < (6 if name.endswith(".jpg") else 1e-9)  # turned otherwise: 17


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Images that are right, odd and bad; with a list of the good ones, and maps of these."""
    place = faults.Place(tmp_path_factory.mktemp("mixed"))
    shutil.rmtree(place.photos / "masks")
    place.add({name: content for name, (content, _) in broken.odd().items()})
    place.add(broken.bad())
    (place.photos / "good.txt").write_text("\n".join(faults.PLAIN + faults.ODD))
    assert cli.main(place.words("cam", place.maps, split="good")) == 0
    return place


@pytest.mark.parametrize("command", READING)
def test_bad_images_stop_no_other(mixed, command, tmp_path, capsys):
    more = ["--others", "good"] if command == "rib" else []  # else the bad ones are drawn, and left out, too
    assert cli.main([*mixed.words(command, tmp_path / "all"), *more]) == cli.INCOMPLETE
    found = failures(tmp_path / "all")
    assert list(found) == faults.BAD
    for name, path in zip(faults.BAD, broken.bad(), strict=True):
        assert str(mixed.photos / "images" / path) in found[name] and "again" in found[name]
    assert f"{len(faults.BAD)} failed" in capsys.readouterr().err
    assert cli.main([*mixed.words(command, tmp_path / "good", split="good"), *more]) == 0
    whole = faults.results(tmp_path / "good")
    assert len(whole) == len(faults.PLAIN + faults.ODD) - (command in ("cam", "rib"))  # one without classes
    assert faults.results(tmp_path / "all") == whole
    store = Store(tmp_path / "all")
    shape = store.load("turned").size if command in ("cam", "rib") else store.load_mask("turned").shape
    assert shape == (48, 80)  # of the upright photograph


@pytest.mark.parametrize("command", TRAINING)
def test_training_names_all_bad_images_at_once(own, command, tmp_path, capsys):
    own.add(broken.bad())
    masks = open_masks(own.photos / "masks")
    for name in faults.BAD:
        masks.save_mask(name, np.zeros((64, 64), np.uint8))
    assert cli.main(own.words(command, tmp_path / "out")) == cli.FAILED
    said = capsys.readouterr().err
    assert all(str(own.photos / "images" / path) in said for path in broken.bad())
    assert f"got {len(faults.BAD)} problems; mend these, or take the images off the list; `ribfast scan`" in said
    assert not (tmp_path / "out").exists()


def test_a_training_s_validation_is_looked_at_too(own, tmp_path, capsys):
    own.add({"cut.jpg": broken.bad()["cut.jpg"]})
    (own.photos / "good.txt").write_text("\n".join(faults.PLAIN))
    (own.photos / "other.txt").write_text("p0\ncut\n")
    words = [*own.words("train-classifier", tmp_path / "out", split="good"), "--validation", "other"]
    assert cli.main(words) == cli.FAILED and "cut.jpg, which ends early" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_run_goes_on_without_coco_s_bad_images(place, tmp_path, capsys):
    """p2 is none; p3 and p7, of both classes, share one with every other image, and fail to be adapted."""
    spec, run = faults.as_coco(place, tmp_path / "coco"), tmp_path / "run"
    (tmp_path / "coco" / "train2017" / "p2.png").write_bytes(b"nothing")
    words = [*place.words("run", run, data=spec), "--set", "rib.disjoint=true", "--no-segmenter"]
    for _ in range(2):
        assert cli.main(words) == cli.INCOMPLETE
        assert list(failures(run)) == ["p2"] and "p2.png" in failures(run)["p2"]
        assert (run / "images-after-rib.txt").read_text().split() == ["p0", "p1", "p4", "p5", "p6", "p8"]
        assert sorted(Store(run / "cam").names()) == ["p0", "p1", "p3", "p4", "p5", "p6", "p7"]
        assert Store(run / "masks").mask_names() == ["p0", "p1", "p4", "p5", "p6", "p8"]
    assert "6 images" in capsys.readouterr().out


def test_lists_of_coco_s_images(place, tmp_path, capsys):
    spec = faults.as_coco(place, tmp_path / "coco")
    listed = tmp_path / "few.txt"
    listed.write_text("p3\np1.png\n")
    for split in (f"train2017:{listed}", f":{listed}"):
        source = data.open_source(spec, split)
        assert [item.name for item in source] == ["p3", "p1"] == list(source.drawings)
        assert [item.classes for item in source] == [(0, 1), (1,)]
    listed.write_text("p3\nnone\n")
    assert cli.main(["scan", "--data", spec, "--split", f":{listed}"]) == cli.FAILED
    assert f"instances_train2017.json, got none in {listed}:2; add its labels" in capsys.readouterr().err


TABLES = {
    "bom": b"\xef\xbb\xbfimage,labels\na.jpg,cat;dog\nb.jpg,dog\n",
    "crlf": b"image,labels\r\na.jpg,cat;dog\r\nb.jpg,dog\r\n",
    "quoted": b'image,labels\n"a.jpg","cat;dog"\n"b.jpg",dog\n',
    "blanks": b" image , labels \n a.jpg , cat ; dog ;\nb,  dog\n",
    "empty lines": b"\n,\nimage,labels\n\n,\na.jpg,dog;cat\n \nb.jpg,dog\n\n",
    "twice": b"image,labels\na.jpg,cat;dog\nb.jpg,dog\na,dog;cat;cat\nb.jpg,dog\n",
}
WRONG_TABLES = {
    "unknown": (b"image,labels\na.jpg,cat\nb.jpg,cow\n", "labels of .*classes.txt, got 'cow' in .*labels.csv:3; add"),
    "other labels": (b"image,labels\na.jpg,cat\nb.jpg,dog\na.jpg,dog\n", "got a again in .*labels.csv:4, first in line "
                     "2; remove one, or put all labels of an image in one line"),
    "missing": (b"image,labels\na.jpg,cat\nc.jpg,dog\nd.jpg,dog\n", "expected c.jpg in .*images, got no such image, "
                r"named in .*labels.csv:3; add it or remove the line \(1 more lines"),
    "header": (b"photo,class\na.jpg,cat\n", "header image,labels, got 'photo,class' in .*labels.csv:1; add it"),
    "none": (b"", "expected the header image,labels, got '' in .*labels.csv:1; add it"),
    "semicolons": (b"image;labels\na.jpg;cat\n", "header image,labels, got 'image;labels' in .*labels.csv:1"),
    "latin-1": (b"image,labels\na.jpg,cat\nb.jpg,c\xe4t\n", "expected UTF-8, got .*labels.csv:3: .*; save it as UTF-8"),
    "utf-16": ("image,labels\na.jpg,cat\n".encode("utf-16"), "expected UTF-8, got .*labels.csv:1: .*; save it as"),
    "columns": (b"image,labels\na.jpg,cat\nb.jpg,cat,dog\n", "two columns, got 3 in .*labels.csv:3; separate labels"),
    "quote": (b'image,labels\na.jpg,cat\n"b.jpg,dog\n', "expected a table, got .*labels.csv:3: .*; correct it"),
    "no name": (b"image,labels\n,cat\n", "expected an image, got none in .*labels.csv:2; name it or remove the line"),
    "outside": (b"image,labels\n../a.jpg,cat\n", r"without `..`, got '../a.jpg' in .*labels.csv:2; rename it"),
}  # fmt: skip


@pytest.fixture
def table(tmp_path):
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / "images" / name).write_bytes(broken.encoded(broken.pixels(), ".jpg"))
    (tmp_path / "classes.txt").write_bytes(b"\xef\xbb\xbfcat\r\ndog\r\n\r\n")
    return tmp_path / "labels.csv"


@pytest.mark.parametrize("kind", TABLES)
def test_tables_as_programs_write_them(table, kind, capsys):
    table.write_bytes(TABLES[kind])
    assert cli.main(["scan", "--data", f"folder:{table.parent}", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["images"] == 2 and {name: own["images"] for name, own in facts["classes"].items()} == {
        "cat": 1, "dog": 2}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG_TABLES)
@pytest.mark.parametrize("command", ["scan", "run"])
def test_tables_that_are_wrong(table, kind, command, capsys, tmp_path):
    content, said = WRONG_TABLES[kind]
    table.write_bytes(content)
    words = ["scan"] if command == "scan" else ["run", "--out", str(tmp_path / "out")]
    assert cli.main([*words, "--data", f"folder:{table.parent}"]) == cli.FAILED
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"ribfast {command}: open_source: expected") and re.search(said, line)
    assert not (tmp_path / "out").exists()

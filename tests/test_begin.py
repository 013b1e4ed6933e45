"""Folders of results: whose they are, what is refused in them, what --overwrite removes."""

import argparse
import errno
import json
import shutil
import threading

import numpy as np
import pytest
from faults import as_coco
from faults import own as own
from faults import place as place

from ribfast import begin, cli, config, data, files, models
from ribfast.pipeline import CamConfig
from ribfast.store import Store


def files_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_out_among_the_data(place, tmp_path, capsys):
    """Ground truth would be removed, results taken for images and masks."""
    before = files_of(place.photos)
    commands = ("cam", "rib", "masks", "predict", "train-classifier", "train-irn", "train-seg", "export", "run")
    tried = [(command, "", []) for command in commands]
    tried += [("masks", "", ["--overwrite"]), ("predict", "", ["--keep"])]
    tried += [("masks", out, []) for out in ("masks", "images", "images/deep", "../photos/masks/deep")]
    for command, out, more in tried:
        assert cli.main([*place.words(command, place.photos / out), *more]) == cli.FAILED, (command, out)
        said = capsys.readouterr().err
        assert "expected an --out apart from the data" in said and "--keep" not in said, (command, out)
    assert files_of(place.photos) == before
    maps = tmp_path / "set" / "maps"  # data where maps, and --overwrite, would go
    shutil.copytree(place.photos, maps)
    assert cli.main(place.words("cam", maps.parent, data=f"folder:{maps}")) == cli.FAILED
    assert "apart from the data" in capsys.readouterr().err
    assert cli.main(place.words("masks", place.photos / "run")) == 0  # from where the data takes nothing
    shutil.rmtree(place.photos / "run")


def test_places_of_data(place, tmp_path):
    spec = as_coco(place, tmp_path / "coco")
    names = [path.relative_to(tmp_path / "coco").as_posix() for path in data.places_of(spec)]
    assert names == [".", "annotations", "images", "masks", "train2017"]
    kit = tmp_path / "VOCdevkit"
    (kit / "VOC2012" / "JPEGImages").mkdir(parents=True)
    root, *read = data.places_of(f"voc:{kit}")
    assert root == kit / "VOC2012" and read[0] == root / "JPEGImages" and len(read) == 5
    with pytest.raises(ValueError, match="expected one of folder:PATH"):
        data.places_of("zip:x")


def test_overwrite_removes_what_the_command_made(place, tmp_path, capsys):
    out, theirs = Store(tmp_path / "out"), Store(tmp_path / "theirs")
    out.save_mask("mine", np.zeros((4, 4), int))
    cam = place.words("cam", out.folder)
    assert cli.main([*cam, "--overwrite"]) == cli.FAILED and "say --keep to add to them" in capsys.readouterr().err
    assert cli.main([*cam, "--keep"]) == 0
    kept = json.loads((out.folder / "config.json").read_text())["before"]
    assert cli.main([*cam, "--overwrite"]) == cli.FAILED
    assert "went on with files of another program; choose another --out" in capsys.readouterr().err
    assert out.mask_names() == ["mine"] and len(out.names()) == 8
    assert cli.main(cam) == 0 and json.loads((out.folder / "config.json").read_text())["before"] == kept
    assert cli.main(place.words("cam", theirs.folder)) == 0
    rib = place.words("rib", theirs.folder)
    assert cli.main([*rib, "--overwrite"]) == cli.FAILED and "which `cam` began" in capsys.readouterr().err
    theirs.save_mask("mine", np.zeros((4, 4), int))
    assert cli.main([*place.words("cam", theirs.folder), "--overwrite"]) == 0
    assert theirs.mask_names() == ["mine"] and "8 made, 0 there before" in capsys.readouterr().err


def test_maps_of_other_labels(own, tmp_path, capsys):
    """Which images have lost or won since, or another data set's by the same names."""
    cam, table = own.words("cam", tmp_path / "cam"), own.photos / "labels.csv"
    assert cli.main(cam) == 0
    text = table.read_text()
    table.write_text(text.replace("p0.png,square", "p0.png,square;disc").replace("p1.png,disc", "p1.png,"))
    capsys.readouterr()
    assert cli.main(cam) == cli.FAILED
    said = capsys.readouterr().err
    assert "expected maps of the classes that images are labelled with, got others of p0, p1 in" in said
    assert cli.main([*cam, "--keep"]) == 0
    assert "0 made, 7 there before" in capsys.readouterr().err  # p1 has no classes any more
    assert cli.main([*cam, "--overwrite"]) == 0 and cli.main(cam) == 0
    assert Store(tmp_path / "cam").read("p0").keys.tolist() == [0, 1]
    shutil.copy(own.photos / "images" / "p0.png", own.photos / "images" / "new.png")
    table.write_text(table.read_text() + "new.png,disc\n")  # others are made as they were
    capsys.readouterr()
    assert cli.main(cam) == 0 and "1 made, 7 there before" in capsys.readouterr().err


def test_a_training_is_not_lost_by_its_command(place, tmp_path, capsys):
    made = {"train-classifier": "classifier", "train-irn": "irn", "train-seg": "segmenter"}
    for command, name in made.items():
        for left in (f"{name}.safetensors", "unfinished.safetensors"):
            out = tmp_path / command / left
            out.mkdir(parents=True)
            (out / left).write_bytes(b"of hours")
            words = place.words(command, out)
            for more in ([], ["--cycle"]) if command == "train-seg" else ([],):
                assert cli.main([*words, *more]) == cli.FAILED
                said = capsys.readouterr().err
                assert f"one, {left}; go on with it by resume (--resume), train anew by overwrite (--overwrite)" in said
                assert files_of(out) == {left: b"of hours"}
        parser, _ = cli._parser_of(command, words)
        with pytest.raises(SystemExit):
            parser.parse_args([*words[1:], "--resume", "--overwrite"])
    out = tmp_path / "train-classifier" / "classifier.safetensors"
    assert cli.main([*place.words("train-classifier", out), "--epochs", "1", "--overwrite"]) == 0
    assert sorted(files_of(out)) == ["classifier.safetensors", "config.json", "metrics.jsonl"]
    assert models.load_checkpoint(out / "classifier.safetensors")


@pytest.mark.parametrize("numbers", [(1, 2), (1, 1)], ids=["other options", "the same"])
def test_two_that_begin_at_once(tmp_path, monkeypatch, numbers):
    """Both have found an empty folder; with other options, one of them is refused."""
    both, write, waited, found = threading.Barrier(2), config.write, set(), []

    def wait_once(*given, **facts):
        if threading.get_ident() not in waited:
            waited.add(threading.get_ident())
            both.wait(60)
        return write(*given, **facts)

    def start(number):
        options = argparse.Namespace(out=tmp_path / "out", command="cam", keep=False, overwrite=False)
        try:
            begin.begin(options, CamConfig(scales=(float(number),)), begin.INDIFFERENT)
            found.append(number)
        except config.AnotherRun as error:
            found.append(error)

    monkeypatch.setattr(config, "write", wait_once)
    threads = [threading.Thread(target=start, args=(number,)) for number in numbers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    began = [number for number in found if isinstance(number, int)]
    kept = json.loads((tmp_path / "out" / "config.json").read_text())
    assert len(found) == 2 and len(began) == (1 if numbers == (1, 2) else 2)
    assert kept["config"]["scales"] == [began[0]] and "before" not in kept


@pytest.mark.parametrize("links", [True, False])
def test_a_new_file_takes_no_others_place(tmp_path, monkeypatch, links):
    def refused(*_):
        raise OSError(errno.EPERM, "no links")

    if not links:
        monkeypatch.setattr(files.os, "link", refused)
    path = tmp_path / "file"
    assert files.write(path, b"one", new=True) and not files.write(path, b"two", new=True)
    assert path.read_bytes() == b"one" and [*tmp_path.iterdir()] == [path]
    assert files.write(path, b"two") and path.read_bytes() == b"two"

import dataclasses
import json

import numpy as np
import pictures
import pytest

from ribfast import cli, data
from ribfast.store import open_masks


@pytest.fixture
def folder(tmp_path):
    pictures.draw(tmp_path / "data", 6, (48, 64))
    return tmp_path / "data"


def spoil(folder):
    """An image cut short, one that is none, masks of another size and label, a mask cut short, a mask gone."""
    image = folder / "images" / "p0.png"
    image.write_bytes(image.read_bytes()[:-200])
    (folder / "images" / "p1.png").write_bytes(b"nothing")
    masks = open_masks(folder / "masks")
    masks.save_mask("p1", np.full((48, 64), 2))
    masks.save_mask("p2", np.zeros((48, 63), np.uint8))
    masks.save_mask("p3", np.full((48, 64), 200))
    mask = masks.mask_path("p4")
    mask.write_bytes(mask.read_bytes()[:-20])
    masks.mask_path("p5").unlink()


@pytest.mark.parametrize("workers", [0, 3])
def test_whole_data_is_counted(folder, workers):
    source, seen = data.open_source(f"folder:{folder}"), []
    open_masks(folder / "masks").save_mask("p5", np.full((48, 64), 255))
    found = data.scan(source, workers=workers, progress=lambda *said: seen.append(said))
    expected = sum(np.bincount(source.mask(item).ravel(), minlength=256) for item in source)
    assert found.pixels.tolist() == [*expected[:3], expected[255]] and found.pixels.sum() == 6 * 48 * 64
    assert (found.images, found.masks, found.problems, found.absent()) == (6, 6, (), [])
    assert seen == [(0, 6, ""), *((number, 6, f"p{number - 1}") for number in range(1, 7))]
    found.check("train")
    wider = dataclasses.replace(source, classes=(*pictures.CLASSES, "star"))
    assert data.scan(wider, workers=workers).absent() == ["star"]


@pytest.mark.parametrize("own", [True, False])
def test_every_problem_is_found(folder, own):
    spoil(folder)
    source = data.open_source(f"folder:{folder}")
    masks = None if own else open_masks(folder / "masks").load_mask
    found = data.scan(source, masks)
    reasons = dict(found.problems)
    assert [problem.name for problem in found.problems] == ["p0", "p1", "p2", "p3", "p4", "p5"]
    assert f"expected a whole file, got {folder}/images/p0.png, which ends early" in reasons["p0"]
    assert f"expected a picture that OpenCV reads, got {folder}/images/p1.png" in reasons["p1"]
    assert "48 x 64 pixels" in reasons["p2"] and "got 48 x 63" in reasons["p2"]
    assert "labels 0..2 (class + 1) or 255, got 200" in reasons["p3"]
    assert f"expected a whole file, got {folder}/masks/p4.png, which ends early" in reasons["p4"]
    assert ("expected a mask of" if own else "got no") in reasons["p5"] and "p5.png" in reasons["p5"]
    assert (found.images, found.masks, found.pixels.sum()) == (6, 0, 0)
    with pytest.raises(ValueError, match=r"^train: expected 6 images without problems, got 6 problems; mend ") as stop:
        found.check("train")
    assert str(stop.value).splitlines()[1:] == [f"  {name}: {reason}" for name, reason in found.problems]


def test_masks_may_be_left_out(folder):
    (folder / "masks" / "p2.png").unlink()
    source = data.open_source(f"folder:{folder}")
    assert [problem.name for problem in data.scan(source).problems] == ["p2"]
    found = data.scan(source, required=False)
    assert (found.masks, found.problems) == (5, ())
    many = dataclasses.replace(source, classes=tuple(map(str, range(300))))
    assert len(data.scan(many, required=False).absent()) == 298


def test_an_image_and_its_mask_may_both_be_wrong(folder):
    (folder / "images" / "p1.png").write_bytes(b"")
    (folder / "masks" / "p1.png").write_bytes(b"")
    found = data.scan(data.open_source(f"folder:{folder}"))
    assert [problem.name for problem in found.problems] == ["p1", "p1"]
    assert "images/p1.png" in found.problems[0].reason and "masks/p1.png" in found.problems[1].reason


def test_masks_of_a_function(folder):
    source = data.open_source(f"folder:{folder}")
    masks = {item.name: source.mask(item) for item in source[:3]}
    masks["p1"], masks["p2"] = masks["p1"].astype(np.int64), masks["p2"][None]
    reasons = dict(data.scan(source, masks.__getitem__).problems)
    assert list(reasons) == ["p1", "p2", "p3", "p4", "p5"]
    assert "a mask (H, W) in uint8, got int64 (48, 64)" in reasons["p1"] and "got uint8 (1, 48, 64)" in reasons["p2"]
    assert reasons["p3"] == "scan: expected a mask, got none; make it first"
    with pytest.raises(ZeroDivisionError):
        data.scan(source, lambda name: 1 // 0)


def test_what_else_must_hold(folder):
    def also(item, image, mask):
        assert image.shape == (48, 64, 3) and mask.shape == (48, 64)
        if item.name in ("p2", "p4"):
            raise ValueError(f"too dark: {item.name}")

    source = data.open_source(f"folder:{folder}")
    found = data.scan(source, also=also)
    assert found.problems == (("p2", "too dark: p2"), ("p4", "too dark: p4")) and found.masks == 4


def test_an_empty_list_and_many_problems(folder):
    source = data.open_source(f"folder:{folder}")
    empty = data.scan(dataclasses.replace(source, items=()))
    with pytest.raises(ValueError, match=r"got 1 problem; mend(.|\n)*the list: scan: expected at least one image"):
        empty.check("train")
    many = dataclasses.replace(source, items=source.items * 2)
    found = data.scan(many, {}.__getitem__)
    with pytest.raises(ValueError, match="got 12 problems") as stop:
        found.check("train")
    lines = str(stop.value).splitlines()
    assert len(lines) == 12 and lines[-1] == "  and 2 more"


def test_the_command(folder, capsys):
    words = ["scan", "--data", f"folder:{folder}"]
    assert cli.main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "6 images, 6 with masks without problems" and [line.split()[0] for line in lines[1:]] == [
        "background", "square", "disc", "ignored"]  # fmt: skip
    assert sum(float(line.split("%")[0].split()[-1]) for line in lines[1:]) == pytest.approx(100, abs=0.05)
    spoil(folder)
    assert cli.main([*words, "--json"]) == cli.INCOMPLETE
    facts = json.loads(capsys.readouterr().out)
    assert {each["name"] for each in facts["problems"]} == {"p0", "p1", "p2", "p3", "p4"} and facts["images"] == 6
    assert facts["classes"]["disc"]["images"] == 2
    assert cli.main([*words, "--masks"]) == cli.INCOMPLETE and "p5: " in capsys.readouterr().out
    assert cli.main([*words, "--workers", "0"]) == cli.FAILED and "of at least 1" in capsys.readouterr().err

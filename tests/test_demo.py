"""`ribfast demo`: `run` on drawn pictures, or on one's own."""

import json
import re

import pictures
import pytest
from trainings import weights as weights

from ribfast import cli, run
from ribfast.store import Store

TINY = {
    "classifier": "epochs=2 batch=4 long_side=48,56 crop=48",
    "cam": "scales=1.0",
    "rib": "steps=2 n_others=2 scales=1.0 loss_scales=1.0",
    "segmenter": "steps=2 batch=2 crop=49 save_every=2 frozen=0",
    "report": "resamples=0",
}


def words(out):
    given = ["demo", "--out", str(out), "--workers", "1"]
    return given + [word for stage, fields in TINY.items() for field in fields.split() for word in
                    ("--set", f"{stage}.{field}")]  # fmt: skip


def test_from_nothing_to_a_report(tmp_path, monkeypatch, capsys):
    out = tmp_path / "new" / "demo"
    given = [*words(out), "--pictures", "8", "--seed", "2"]
    command = cli.COMMANDS["rib"]

    def killed(options, settings):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setitem(cli.COMMANDS, "rib", cli.dataclasses.replace(command, run=killed))
        assert cli.main(given) == 130
    assert "interrupted; the same command goes on where it was" in capsys.readouterr().err
    drawn = {path: path.stat().st_mtime_ns for path in (out / "pictures").rglob("*.*")}
    assert cli.main(given) == 0
    assert drawn == {path: path.stat().st_mtime_ns for path in (out / "pictures").rglob("*.*")}
    shown = capsys.readouterr().out
    names = {"cam": 8, "rib": 8, "masks": 8, "ppmg": 8, "relabelled": 8, "predicted": 2}
    mious = {}
    for name, images in names.items():
        mious[name] = 100 * json.loads((out / name / "evaluation.json").read_text())["reported"]["miou"]
        assert f"  {name:<12} {mious[name]:6.2f}   {images} images" in shown
    gain = re.search(r"RIB's maps gain ([+-]\d+\.\d\d) points over the CAM", shown)[1]
    assert gain == f"{mious['rib'] - mious['cam']:+.2f}"
    assert shown.splitlines()[-1] == str(out / "report.html")
    page = (out / "report.html").read_text()
    assert all(f'"{name}"' in page for name in names if name != "predicted")
    assert len(Store(out / "rib").names()) == 8
    assert json.loads((out / "classifier" / "config.json").read_text())["config"]["frozen_trunk"] is False
    assert cli.main([*given[:-1], "3"]) == 1 and "another seed (here 3, there 2)" in capsys.readouterr().err
    assert (
        cli.main([*words(out), "--seed", "2"]) == 1
        and "another pictures (here 160, there 8)" in capsys.readouterr().err
    )


def test_few_pictures_train_as_many_do(tmp_path, capsys):
    """With the demo's own constants, to which trainings of few steps are more sensitive."""
    given = ["demo", "--out", str(tmp_path), "--pictures", "8", "--seed", "1", "--quiet", "--json"]
    assert cli.main([*given, "--set", "report.resamples=0", "--set", "rib.steps=2"]) == 0
    mious = json.loads(capsys.readouterr().out)["mious"]
    assert 0.2 < mious["cam"] < 1 and 0.2 < mious["relabelled"] < 1


def test_of_photographs_it_is_run(tmp_path, weights, capsys):
    photos = pictures.draw(tmp_path / "photos", 9)
    given = [*words(tmp_path / "demo"), "--data", photos, "--weights", str(weights), "--network", "resnet10"]
    given += ["--set", "rib.disjoint=false"]
    assert cli.main([*given, "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    settings = cli.config.make(run.RunConfig, {"network": "resnet10", "workers": 1}, "shown")
    fields = [f"{stage}.{field}" for stage, text in TINY.items() for field in text.split()]
    settings = cli.dataclasses.replace(settings, set=(*fields, "rib.disjoint=false"))
    here = run.Given(photos, None, None, tmp_path / "demo", weights, None)
    expected = run.stages(here, settings, run.Facts(9, True))
    assert lines == [f"ribfast {stage.command} {cli.shlex.join(stage.line(here))}" for stage in expected]
    assert cli.main(given) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name:<12}" in shown for name in ("cam", "rib", "masks", "ppmg", "predicted"))
    assert "points over the CAM" in shown and shown.endswith(f"{tmp_path / 'demo' / 'report.html'}\n")
    assert not (tmp_path / "demo" / "pictures").exists()


def test_refuses(tmp_path, capsys):
    out = ["demo", "--out", str(tmp_path / "demo")]
    assert cli.main([*out, "--split", "train"]) == 1
    assert "--split and --validation with --data" in capsys.readouterr().err
    assert cli.main([*out, "--data", "folder:x", "--pictures", "8"]) == 1
    assert "--pictures without --data" in capsys.readouterr().err
    assert cli.main([*out, "--pictures", "0"]) == 1 and "at least 4 training images" in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()
    (tmp_path / "mine" / "pictures" / "images").mkdir(parents=True)
    (tmp_path / "mine" / "pictures" / "images" / "0000.png").write_bytes(b"mine")
    for more in ([], ["--remake"]):
        assert cli.main(["demo", "--out", str(tmp_path / "mine"), *more]) == 1
        assert "a folder of pictures that were drawn, or none, got" in capsys.readouterr().err
    assert (tmp_path / "mine" / "pictures" / "images" / "0000.png").read_bytes() == b"mine"
    with pytest.raises(ValueError, match="masks and compared to name each method once, got ppmg and ppmg"):
        run.RunConfig(masks="ppmg", compared=("ppmg",))

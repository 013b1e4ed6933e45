"""`ribfast run`: the stages' commands, one after another."""

import hashlib
import json
import os
import shlex
import shutil

import pictures
import pytest
from trainings import weights as weights

from ribfast import cli, run
from ribfast.claims import Claims
from ribfast.store import Store, open_masks

SMALL = {
    "classifier": "epochs=1 batch=4 crop=64 long_side=48,72",
    "cam": "scales=1.0",
    "rib": "steps=2 n_others=2 disjoint=false",
    "segmenter": "steps=3 batch=4 crop=57 save_every=1 frozen=0",
}


@pytest.fixture
def words(tmp_path, weights):
    photos = pictures.draw(tmp_path / "photos", 9)
    given = ["run", "--data", photos, "--out", str(tmp_path / "run"), "--network", "resnet10", "--device", "cpu"]
    given += ["--weights", str(weights), "--seed", "3"]
    for stage, fields in SMALL.items():
        given += [word for field in fields.split() for word in ("--set", f"{stage}.{field}")]
    return given


def digests(folder):
    """Of what stages made, apart from times and places."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.suffix in (".safetensors", ".npz", ".png")
    }


def test_makes_everything_and_goes_on_after_a_kill(words, tmp_path, monkeypatch, capsys):
    assert cli.main(words) == 0
    out = tmp_path / "run"
    shown = capsys.readouterr().out
    names = ["cam", "rib", "masks", "predicted"]
    for name in names:
        found = json.loads((out / name / "evaluation.json").read_text())["reported"]["miou"]
        assert f"  {name:<12} {100 * found:6.2f}   9 images" in shown
    assert len(Store(out / "rib").names()) == 8 and len(list((out / "masks" / "masks").iterdir())) == 9
    page = (out / "report.html").read_text()
    assert all(f'"{name}"' in page for name in names) and list((out / "rib" / "steps").iterdir())
    whole = digests(out)
    assert {"classifier/classifier.safetensors", "segmenter/segmenter.safetensors"} <= set(whole)

    broken = tmp_path / "broken"
    again = [str(broken) if word == str(out) else word for word in words]
    for stage in ("rib", "predict"):  # stopped as each of them begins
        command = cli.COMMANDS[stage]

        def killed(options, settings):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setitem(cli.COMMANDS, stage, cli.dataclasses.replace(command, run=killed))
            assert cli.main(again) == 130
        assert "interrupted; the same command goes on where it was" in capsys.readouterr().err
    assert cli.main([*again, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert list(said["mious"]) == names and said["complete"] and said["report"] == str(broken / "report.html")
    assert digests(broken) == whole
    before = {path: path.stat().st_mtime_ns for path in broken.rglob("*.npz")}
    assert cli.main(again) == 0 and before == {path: path.stat().st_mtime_ns for path in broken.rglob("*.npz")}
    assert cli.main([*again, "--seed", "4"]) == 1 and "another seed (here 4, there 3)" in capsys.readouterr().err
    assert cli.main([*again, "--set", "rib.steps=3"]) == 1 and "another fields" in capsys.readouterr().err


def test_each_stage_is_a_command(words, tmp_path, capsys):
    assert cli.main([*words, "--dry-run", "--masks", "irn", "--segmenter"]) == 0
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert not (tmp_path / "run").exists()
    assert [line[:2] for line in lines] == [["ribfast", name] for name in (
        "train-classifier", "cam", "eval", "rib", "eval", "masks", "train-irn", "masks", "eval", "train-seg", "predict",
        "eval", "report")]  # fmt: skip
    assert lines[3][lines[3].index("--steps") + 1] == "2"
    for line in lines:
        cli._parse(line[1], line[2:])
    cam = [word.replace(str(tmp_path / "run"), str(tmp_path / "apart")) for word in lines[1][1:]]
    train = [word.replace(str(tmp_path / "run"), str(tmp_path / "apart")) for word in lines[0][1:]]
    assert cli.main(train) == 0 and cli.main(cam) == 0
    assert cli.main([*words, "--rib", "none", "--no-segmenter"]) == 0
    assert digests(tmp_path / "apart" / "cam") == digests(tmp_path / "run" / "cam")
    assert sorted(path.name for path in (tmp_path / "run").iterdir() if path.is_dir()) == ["cam", "classifier", "masks"]


@pytest.mark.parametrize(
    "preset, masks, rib",
    [("light", "irn", "none"), ("light", "irn", "fast"), ("light", "ppmg", "paper"), ("light", "par", "released"),
     ("voc", "irn", "released"), ("released", "irn", "released"), ("paper", "irn", "paper"), ("fast", "irn", "fast"),
     ("voc", "pamr", "none"), ("voc", "crf", "paper"), ("coco", "irn", "coco"), ("coco", "threshold", "fast"),
     ("drawn", "crf", "fast"), ("drawn", "irn", "none"), ("shown", "par", "paper")],
)  # fmt: skip
def test_every_choice_is_one_that_commands_know(preset, masks, rib, tmp_path):
    settings = cli.config.make(run.RunConfig, {"masks": masks, "rib": rib, "cycle": True}, preset)
    given = run.Given("folder:x", "a", "b", tmp_path, None, None, {})
    found = run.stages(given, settings, masked=True)
    assert {stage.name for stage in found if stage.command != "eval"} <= set(run.STAGES)
    for stage in found:
        cli._parse(stage.command, stage.words)


def test_images_that_cannot_be_read_are_left_out(words, tmp_path, capsys):
    images = tmp_path / "photos" / "images"
    (images / "p2.png").write_bytes(b"nothing")
    (images / "p5.png").write_bytes(b"")
    assert cli.main([*words, "--no-segmenter", "--rib", "none"]) == 3
    out = tmp_path / "run"
    failed = [json.loads(line) for line in (out / "failures.jsonl").read_text().splitlines()]
    assert [each["name"] for each in failed] == ["p2", "p5"] and "p2.png" in failed[0]["reason"]
    assert "left out: 2 of 9 images" in capsys.readouterr().err
    assert sorted(p.stem for p in (out / "masks" / "masks").iterdir()) == [f"p{i}" for i in (0, 1, 3, 4, 6, 7, 8)]
    before = digests(out)
    assert cli.main([*words, "--no-segmenter", "--rib", "none"]) == 3 and digests(out) == before
    for path in images.iterdir():
        path.write_bytes(b"")
    shutil.rmtree(out)
    assert cli.main([*words, "--no-segmenter"]) == 1
    assert "expected images that can be read, got 9 that cannot" in capsys.readouterr().err


def test_images_that_fail_on_the_way_are_left_out_from_there(words, tmp_path, capsys):
    """Those with both classes share one with every other image."""
    words = [word for word in words if word != "rib.disjoint=false"]
    del words[words.index("rib.n_others=2") + 1]  # its --set
    for _ in range(2):
        assert cli.main(words) == 3
        out = tmp_path / "run"
        assert len(Store(out / "cam").names()) == 8 and len(Store(out / "rib").names()) == 6
        left = [f"p{i}" for i in (0, 1, 2, 4, 5, 6, 8)]
        assert (out / "images-after-rib.txt").read_text().split() == left
        for stage in ("masks", "predicted"):
            assert sorted(p.stem for p in (out / stage / "masks").iterdir()) == left
    assert "7 images" in capsys.readouterr().out


def test_a_trained_classifier_and_data_without_masks(words, tmp_path, weights, capsys):
    assert cli.main([*words, "--no-segmenter", "--rib", "none"]) == 0
    trained = tmp_path / "run" / "classifier" / "classifier.safetensors"
    shutil.rmtree(tmp_path / "photos" / "masks")
    out = str(tmp_path / "other")
    words = [out if word == str(tmp_path / "run") else word for word in words]
    assert cli.main([*words, "--classifier", str(trained), "--validation", "few"]) == 1
    assert "expected the list" in capsys.readouterr().err
    (tmp_path / "photos" / "few.txt").write_text("p0\np1\n")
    assert cli.main([*words, "--classifier", str(trained), "--validation", "few", "--rib", "none"]) == 0
    assert "mIoU" not in capsys.readouterr().out
    assert sorted(p.name for p in (tmp_path / "other").iterdir() if p.is_dir()) == [
        "cam", "masks", "predicted", "segmenter"]  # fmt: skip
    assert open_masks(tmp_path / "other" / "predicted").load_mask("p1").shape == (64, 64)
    assert len(list((tmp_path / "other" / "predicted" / "masks").iterdir())) == 2


def test_one_run_at_a_time(words, tmp_path, capsys):
    other = Claims(tmp_path / "run" / "claims")
    assert other.take("run")
    assert cli.main(words) == 1
    said = f"expected one run in {tmp_path / 'run'}, got another that is at it, process {os.getpid()} of the machine "
    assert (
        f"{said}{os.uname().nodename}; wait for it" in capsys.readouterr().err
        and not (tmp_path / "run" / "config.json").exists()
    )
    other.close()


def test_refuses(words, tmp_path, monkeypatch, capsys):
    for word in ("rib", "rib.lr", "walk.lr=1", ".lr=1", "rib.=1"):
        assert cli.main([*words, "--set", word]) == 1
        assert "expected --set STAGE.FIELD=VALUE with a stage of classifier, cam, rib" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:  # before anything is made
        cli.main([*words, "--set", "segmenter.lr=much"])
    assert stopped.value.code == 2 and "ribfast train-seg: error: argument --lr" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setenv("WORLD_SIZE", "3")
        assert cli.main(words) == 1
    assert (
        "batches that 3 processes can share, got 4 of classifier; say --set classifier.batch=N"
        in capsys.readouterr().err
    )
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="a cycle with a segmenter"):
        run.RunConfig(cycle=True, segmenter=False)
    with pytest.raises(ValueError, match="tensorflow_padding with mobilenet_v2"):
        run.RunConfig(network="resnet10", tensorflow_padding=True)

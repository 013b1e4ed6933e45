"""`ribfast run`: the stages' commands, one after another."""

import hashlib
import json
import os
import shlex
import shutil

import pictures
import pytest
from trainings import weights as weights

from ribfast import claims, cli, models, run
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
    assert digests(broken) == whole
    assert cli.main([*again, "--set", "rib.steps=3"]) == 1
    said = capsys.readouterr().err
    assert f"expected to go on in {broken}/rib as it began, got another steps (here 3, there 2); say --remake" in said


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
     ("voc", "pamr", "none"), ("voc", "crf", "paper"), ("coco", "irn", "paper"), ("coco", "threshold", "fast"),
     ("drawn", "crf", "fast"), ("drawn", "irn", "none"), ("shown", "par", "paper")],
)  # fmt: skip
def test_every_choice_is_one_that_commands_know(preset, masks, rib, tmp_path):
    settings = cli.config.make(run.RunConfig, {"masks": masks, "rib": rib, "cycle": True}, preset)
    given = run.Given("folder:x", "a", "b", tmp_path, None, None)
    found = run.stages(given, settings, run.Facts(9, True, True))
    assert {stage.name for stage in found if stage.command != "eval"} <= set(run.STAGES)
    for stage in found:
        cli._parse(stage.command, stage.line(given))


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
    (images / "p2.png").write_bytes((images / "p0.png").read_bytes())
    assert cli.main([*words, "--no-segmenter", "--rib", "none"]) == 3 and digests(out) == before
    assert "1 of them can be read now (p2): say --remake" in capsys.readouterr().err
    assert cli.main([*words, "--no-segmenter", "--rib", "none", "--remake"]) == 3
    assert [line.split('"')[3] for line in (out / "failures.jsonl").read_text().splitlines()] == ["p5"]
    assert open_masks(out / "masks").has_mask("p2") and not open_masks(out / "masks").has_mask("p5")
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
        assert (out / "images-segmenter.txt").read_text().split() == left
        assert sorted(p.stem for p in (out / "masks" / "masks").iterdir()) == left
        assert Store(out / "masks").failures().keys() == {"p3", "p7"}
        assert len(list((out / "predicted" / "masks").iterdir())) == 9
    assert "7 images" in capsys.readouterr().out


def test_a_failure_that_passes(words, tmp_path, monkeypatch, capsys):
    """The next start makes what failed; what was trained without it says so, and is made anew where that is asked."""
    out, save, away = tmp_path / "run", Store.save, {"p1"}

    def fails(store, name, *facts, **more):
        if name in away and store.folder.name == "rib":
            raise ValueError("a disk that is away")
        save(store, name, *facts, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "save", fails)
        assert cli.main(words) == 3
    assert "p1: a disk that is away" in capsys.readouterr().err and "p1" not in open_masks(out / "masks").mask_names()
    assert len((out / "images-segmenter.txt").read_text().split()) == 8
    assert cli.main(words) == 3
    said = capsys.readouterr()
    assert "segmenter was trained without 1 of the images that are there now (p1): say --remake" in said.err
    assert "masks" in said.out and "9 images" in said.out and open_masks(out / "masks").has_mask("p1")
    maps = {path: path.stat().st_mtime_ns for path in out.rglob("*.npz")}
    assert cli.main([*words, "--remake"]) == 0 and not (out / "images-segmenter.txt").exists()
    assert maps == {path: path.stat().st_mtime_ns for path in out.rglob("*.npz")}
    whole = str(tmp_path / "whole")
    assert cli.main([whole if word == str(out) else word for word in words]) == 0
    assert digests(tmp_path / "whole") == digests(out)

    before = (out / "segmenter" / "segmenter.safetensors").read_bytes()
    changed = [*words, "--set", "segmenter.lr=0.001"]
    assert cli.main(changed) == 1
    assert "segmenter as it began, got another lr (here 0.001, there" in capsys.readouterr().err
    assert cli.main([*changed, "--remake"]) == 0
    assert "made otherwise (another lr (here 0.001" in capsys.readouterr().err
    assert (out / "segmenter" / "segmenter.safetensors").read_bytes() != before
    assert maps == {path: path.stat().st_mtime_ns for path in out.rglob("*.npz")}
    assert cli.main(words[:5] + ["--config", str(out / "config.json"), "--dry-run"]) == 0
    assert "--lr 0.001" in capsys.readouterr().out.splitlines()[-4]

    with monkeypatch.context() as patch:
        patch.setattr(Store, "save", fails)
        away |= {f"p{n}" for n in range(6)}
        assert cli.main([*changed, "--remake", "--seed", "5"]) == 1
    assert "rib: expected few images to fail, got 6 of 9, the first of which is p" in capsys.readouterr().err


def test_other_methods_take_up_what_they_can(words, tmp_path, monkeypatch, capsys):
    """Maps in another tool's format; then RIB's in their place, one of which fails, so that a mask goes."""
    words, out, save = [*words, "--set", "cam.format=irn"], tmp_path / "run", Store.save
    assert cli.main([*words, "--rib", "none"]) == 0
    shown = capsys.readouterr().out
    assert "cam" in shown and "predicted" in shown and (out / "cam" / "maps" / "p0.npy").is_file()

    def fails(store, name, *facts, **more):
        if name == "p1" and store.folder.name == "rib":
            raise ValueError("away")
        save(store, name, *facts, **more)

    mine = out / "masks" / "mine.txt"
    mine.write_text("kept")
    monkeypatch.setattr(Store, "save", fails)
    assert cli.main([*words, "--remake"]) == 3
    said = capsys.readouterr()
    assert "made otherwise (another list of images): made anew" in said.err and "points over the CAM" not in said.out
    assert "p1" not in (out / "images-segmenter.txt").read_text().split() and mine.read_text() == "kept"
    assert not open_masks(out / "masks").has_mask("p1") and len(open_masks(out / "predicted").mask_names()) == 9
    (out / "masks" / "masks" / "p0.png").unlink()
    assert cli.main([*words, "--set", "masks.batch=1", "--json"]) == 3  # is made again
    again = Claims(out / "masks" / "claims")
    assert again.take("another")
    assert cli.main([*words, "--remake", "--set", "masks.background=0.5"]) == 1
    assert "expected nobody at work in" in capsys.readouterr().err and open_masks(out / "masks").has_mask("p0")
    again.close()


def test_masks_and_images_of_each_split_as_they_are(words, tmp_path, capsys):
    """Ground truth of a few images to predict alone, one of which cannot be read."""
    photos, out = tmp_path / "photos", tmp_path / "run"
    (photos / "train.txt").write_text("".join(f"p{n}\n" for n in (0, 1, 2, 4, 8)))
    (photos / "val.txt").write_text("p3\np5\np6\np7\n")
    for name in "012468":
        (photos / "masks" / f"p{name}.png").unlink()
    (photos / "images" / "p7.png").write_bytes(b"nothing")
    words = [*words, "--split", "train", "--validation", "val", "--rib", "none"]
    assert cli.main([*words, "--dry-run"]) == 0
    lines = [line.split()[1:] for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines] == ["train-classifier", "cam", "masks", "train-seg", "predict", "eval", "report"]
    assert cli.main([*words, "--json"]) == 3
    said = json.loads(capsys.readouterr().out)
    assert [*said["mious"]] == ["predicted"] and not said["complete"]
    assert (out / "images-validation-with-masks.txt").read_text().split() == ["p3", "p5"]
    assert open_masks(out / "predicted").mask_names() == ["p3", "p5", "p6"]
    assert json.loads((out / "predicted" / "evaluation.json").read_text())["images"] == 2
    assert '"p7"' in (out / "failures.jsonl").read_text()


def test_what_would_stop_it_later_is_said_at_once(words, tmp_path, weights, capsys):
    def refused(*more):
        assert cli.main([*words, *more]) == 1 and not (tmp_path / "run").exists()
        return capsys.readouterr().err

    assert "--set rib.FIELD=VALUE with a field of anchor_batches, anchored" in refused("--set", "rib.stepz=3")
    for word in ("cam.out=x", "cam.shard=0/2", "segmenter.resume=false"):
        assert f"got {word.partition('.')[2].partition('=')[0]}" in refused("--set", word)
    table = tmp_path / "photos" / "labels.csv"
    before = table.read_text()
    table.write_text(before.replace("disc", "square").replace("square;square", "square"))
    shared = [word for word in words if word != "rib.disjoint=false"]
    del shared[shared.index("rib.n_others=2") + 1]
    assert cli.main(shared) == 1
    assert "images that share no class with one another" in capsys.readouterr().err
    table.write_text(before)
    trained = tmp_path / "c.safetensors"
    model = models.cam_classifier("resnet18", 2)
    models.save_checkpoint(trained, model.state_dict(), model.metadata())
    del words[words.index("--network") : words.index("--network") + 2]
    words += ["--classifier", str(trained)]
    assert cli.main([*words, "--dry-run"]) == 0
    assert capsys.readouterr().out.count("--network resnet18") == 1
    assert f"expected network as {trained} has it, resnet18, got resnet10" in refused("--network", "resnet10")
    assert cli.main([*words, "--dry-run", "--set", "irn.epochs=9"]) == 0
    capsys.readouterr()
    assert cli.main([*words, "--dry-run", "--tuned", "--constants", "coco"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rib, masks = (next(line for line in lines if f"ribfast {name} " in line) for name in ("rib", "masks"))
    assert "--tau 0.5" in rib and "--stop-logit 1000.0" in rib and "--preset fast" in rib
    assert f"--background-from {tmp_path}/run/rib/evaluation.json" in masks


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
    assert f"{said}{os.uname().nodename}; wait for it" in capsys.readouterr().err
    assert not (tmp_path / "run" / "config.json").exists()
    other.close()


def test_a_run_after_one_that_another_machine_died_with(words, tmp_path, monkeypatch, capsys):
    """As a job that is queued again has it. It has the folder, and then fails for what it is given."""
    monkeypatch.setattr(claims, "PATIENCE", 0.3)
    folder = tmp_path / "run" / "claims"
    folder.mkdir(parents=True)
    Claims(folder)._path("run", 0).write_text(json.dumps(["elsewhere", [1, 1]]))
    (folder / ".killed").write_bytes(b"")
    assert cli.main([*words, "--set", "classifier.lr=1e30"]) == 1
    said = capsys.readouterr().err
    assert "waiting for a sign of life of process 1 of the machine elsewhere" in said and "expected a finite" in said
    assert not folder.exists()


def test_refuses(words, tmp_path, monkeypatch, capsys):
    for word in ("rib", "rib.lr", "walk.lr=1", ".lr=1", "rib.=1"):
        with pytest.raises(SystemExit):
            cli.main([*words, "--set", word])
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

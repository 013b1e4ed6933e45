import json
import logging
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pictures
import pytest
import torch

from ribfast import cli, config, data, models, progress
from ribfast.claims import Claims
from ribfast.processes import choose_device
from ribfast.store import Store


@dataclass(frozen=True)
class Sample:
    """Every kind of field."""

    # above the field,
    # in two lines
    rate: float = 0.5
    steps: int = 3  # beside it: 100 %
    flip: bool = True
    scales: tuple[float, ...] = (1.0, 2.0)
    sides: tuple[int, int] = (3, 4)
    kind: Literal["a", "b"] = "a"
    place: Path | None = None
    limit: int | None = field(default=7, metadata={"help": "said in its metadata"})

    def __post_init__(self):
        if self.rate < 0:
            raise ValueError(f"Sample: expected rate of at least 0, got {self.rate}")

    @classmethod
    def plain(cls):
        return cls()

    @classmethod
    def fast(cls):
        return cls(steps=1, limit=None)

    @classmethod
    def of(cls, needed):
        return cls(steps=needed)


@pytest.fixture
def ran(monkeypatch):
    """The configurations that the command `sample` ran with."""
    seen = []

    def run(options, settings):
        seen.append(settings)
        if settings.steps == 13:
            raise ValueError("steps: expected another number, got 13")
        if settings.steps == 14:
            raise KeyError("a bug")

    command = cli.Command("a sample", "test_cli:Sample", lambda parser: None, run)
    monkeypatch.setitem(cli.COMMANDS, "sample", command)
    return seen


def refused(capsys, *words):
    with pytest.raises(SystemExit) as stop:
        cli.main(list(words))
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_fields_become_options(ran, tmp_path, capsys):
    assert cli.main(["sample"]) == 0 and ran[-1] == Sample()
    words = "--rate 2 --steps 4 --no-flip --scales 1,.5,3 --sides 5,6 --kind b --place a/b --limit none"
    assert cli.main(["sample", *words.split()]) == 0
    assert ran[-1] == Sample(2.0, 4, False, (1.0, 0.5, 3.0), (5, 6), "b", Path("a/b"), None)
    assert cli.main(["sample", "--preset", "fast", "--flip"]) == 0 and ran[-1] == Sample.fast()
    path = tmp_path / "fields.json"
    path.write_text(json.dumps({"steps": 9, "scales": [1], "limit": 2, "rate": 1}))
    assert cli.main(["sample", "--preset", "fast", "--config", str(path), "--limit", "5"]) == 0
    assert ran[-1] == Sample(steps=9, scales=(1.0,), limit=5, rate=1.0)
    path.write_text("\ufeff" + path.read_text(), "utf-8")  # as some editors save it
    assert cli.main(["sample", "--config", str(path)]) == 0 and ran[-1].steps == 9
    assert f"expected a JSON file of fields, got no {path}x; check" in refused(capsys, "sample", "--config", f"{path}x")
    config.write(path, ran[-2], beside=Path("x"))
    assert cli.main(["sample", "--config", str(path)]) == 0 and ran[-1] == ran[-3]
    with pytest.raises(SystemExit) as stop:
        cli.main(["sample", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    for text in ("above the field, in two lines (default: 0.5)", "beside it: 100 % (default: 3)", "--no-flip",
                 "said in its metadata (default: 7)", "plain, fast (default: plain)", "--kind {a,b}"):  # fmt: skip
        assert text in said


@pytest.mark.parametrize(("words", "message"), [
    ("--preset slow", "invalid choice: 'slow'"),
    ("--speed 3", "unrecognized arguments: --speed 3"),
    ("--step 3", "unrecognized arguments: --step 3"),
    ("--steps 1.5", "argument --steps: expected an integer, got '1.5'"),
    ("--rate fast", "argument --rate: expected a number, got 'fast'"),
    ("--sides 1", "argument --sides: expected 2 values (an integer, an integer), got '1'"),
    ("--scales 1,x", "argument --scales: expected a list of numbers, got '1,x'"),
    ("--kind c", "argument --kind: expected one of a, b, got 'c'"),
    ("--limit some", "argument --limit: expected an integer or none, got 'some'"),
    ("--rate -1", "Sample: expected rate of at least 0, got -1.0"),
])  # fmt: skip
def test_wrong_options_are_named(ran, words, message, capsys):
    assert message in refused(capsys, "sample", *words.split()) and not ran


@pytest.mark.parametrize(("text", "message"), [
    ('{"speed": 1}', "expected fields of rate, steps"),
    ('{"steps": 1.5}', "steps: expected an integer, got 1.5"),
    ('{"steps": true}', "steps: expected an integer, got True"),
    ('{"flip": 1}', "flip: expected true or false, got 1"),
    ('{"sides": [1]}', "sides: expected 2 values"),
    ('{"scales": "1,2"}', "scales: expected a list of numbers, got '1,2'"),
    ('{"place": 3}', "place: expected a path or none, got 3"),
    ("[1]", "expected an object of fields, got a list"),
    ("{", "expected JSON"),
    ("[" * 100_000, "expected JSON"),
])  # fmt: skip
def test_wrong_files_are_named(ran, text, message, tmp_path, capsys):
    (tmp_path / "fields.json").write_text(text)
    assert message in refused(capsys, "sample", "--config", str(tmp_path / "fields.json")) and not ran


def test_errors_are_a_line_and_bugs_are_not(ran, capsys):
    assert cli.main(["sample", "--steps", "13"]) == 1
    assert capsys.readouterr().err == "ribfast sample: steps: expected another number, got 13\n"
    with pytest.raises(ValueError, match="another number"):
        cli.main(["sample", "--steps", "13", "--debug"])
    with pytest.raises(KeyError):
        cli.main(["sample", "--steps", "14"])
    assert not logging.getLogger("ribfast").handlers
    assert "invalid choice: 'nothing'" in refused(capsys, "nothing")
    assert cli.main(["cam", "--data", "folder:none", "--checkpoint", "none", "--out", "none"]) == 1
    assert capsys.readouterr().err.startswith("ribfast cam: open_source: expected a folder, got none")


def test_commands_list_themselves(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    said = capsys.readouterr().out
    for name in cli.COMMANDS:
        assert f"  {name} " in said
        with pytest.raises(SystemExit) as stop:
            cli.main([name, "--help"])
        assert stop.value.code == 0


def test_every_option_says_what_it_is(capsys):
    """Beside its default; what must be given stands in the line of usage."""
    for name, command in cli.COMMANDS.items():
        for method in command.config if isinstance(command.config, dict) else ("",):
            parser, _ = cli._parser_of(name, ["--method", method] if method else [])
            for action in parser._actions:
                text = re.sub(r"\(default: [^()]*\)$", "", action.help or "").strip()
                assert text, (name, action.option_strings)
                assert "None" not in text, (name, text)  # which is typed none
            usage = parser.format_usage()
            for action in parser._actions:
                if action.required and action.option_strings:
                    assert f"{action.option_strings[0]} {action.metavar} " in usage, (name, usage)
    assert "(--maps FOLDER | --masks FOLDER) " in cli._parser_of("eval", [])[0].format_usage()
    assert cli._parser_of("completion", [])[0].format_usage() == "usage: ribfast completion {bash,zsh,fish} [OPTIONS]\n"
    assert cli.main([]) == 2
    said = capsys.readouterr()
    assert said.out == "" and all(f"  {name} " in said.err for name in cli.COMMANDS)


def test_devices_that_cannot_be():
    for name in ("mps", "xpu", "meta", "cpu:0", "cuda:x", "cuda:-1", "CUDA", "", "cuda:\u0663", "cpu\n"):
        with pytest.raises(ValueError, match=r"device: expected auto, cpu, cuda or cuda:N, got"):
            choose_device(name)
    assert choose_device("cpu") == torch.device("cpu")


def test_documents_show_options_that_exist(capsys):
    root = Path(cli.__file__).parents[1]
    text = "\n".join(path.read_text() for path in (root / "README.md", *(root / "docs").glob("*.md")))
    text = text.replace("\\\n", " ")
    shown = re.findall(r"^(?:\w+=\S+ |srun )*(?:torchrun .* -m )?ribfast ([a-z-]+) ?(.*)$", text, flags=re.M)
    assert {name for name, _ in shown} == set(cli.COMMANDS)
    for name, words in shown:
        with pytest.raises(SystemExit):
            cli.main([name, "--help"])
        said = capsys.readouterr().out
        for option in re.findall(r"--[a-z-]+", words):
            assert option in said, (name, option)


class Screen:
    def __init__(self, terminal):
        self.terminal, self.text = terminal, ""

    def isatty(self):
        return self.terminal

    def write(self, text):
        self.text += text

    def flush(self):
        pass


def test_progress_is_a_bar_on_terminals_alone(caplog, monkeypatch):
    clock = [50.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    with caplog.at_level("INFO", "ribfast"):
        screen = Screen(True)
        bar = progress.Progress(screen, title="looking")
        bar(10, 110)
        assert "] 10/110 " in screen.text and "/s" not in screen.text and caplog.messages == ["looking"]
        for done in range(11, 111):
            clock[0] += 0.02
            bar(done, 110, "loss 0.1")
        assert screen.text.endswith("] 110/110 50/s, 0:00 left  loss 0.1\n") and "a second" not in screen.text
        assert 10 < screen.text.count("\r") < 50
        bar(110, 110, "")
        assert caplog.messages == ["looking", "110 of 110 in 2 s, 50/s"]
        bar(0, 30, "")  # counts anew
        clock[0] += 75
        bar(30, 30, "")
        assert caplog.messages[2:] == ["30 of 30 in 1:15, 2.5 s each"]
        bar(0, 30, "")
        clock[0] += 1.9
        bar(30, 30, "")
        assert len(caplog.messages) == 3
        caplog.clear()
        screen = Screen(False)
        lines = progress.Progress(screen)
        for done in range(4):
            lines(done, 100, "a")
            clock[0] += 20
        lines(100, 100, "a")
    assert screen.text == ""
    assert caplog.messages == ["2 of 100, 20.0 s each, 32:40 left: a", "100 of 100 in 1:20, 1.25/s"]  # fmt: skip
    paces = {1e-9: "1000000/s", 1 / 5543: "5540/s", 1 / 98.76: "98.8/s", 0.3125: "3.2/s", 1.0: "1/s", 2.0: "2.0 s each"}
    assert {each: progress._pace(each) for each in paces} == paces


def test_from_pictures_to_an_evaluation(tmp_path, capsys):
    torch.manual_seed(0)
    spec, out = pictures.draw(tmp_path / "data", 6), tmp_path / "trained"
    small = "--network resnet10 --epochs 1 --batch 5 --long-side 48,64 --crop 48 --lr 0.001 --workers 1 --device cpu"
    assert cli.main(["train-classifier", "--data", spec, "--out", str(out), *small.split()]) == 0
    written = json.loads((out / "config.json").read_text())
    assert written["config"]["long_side"] == [48, 64] and written["command"] == "train-classifier"
    assert written["options"]["data"] == spec
    checkpoint, maps = out / "classifier.safetensors", tmp_path / "maps"
    cam = ["cam", "--data", spec, "--checkpoint", str(checkpoint), "--out", str(maps), "--scales", "1,0.5"]
    assert cli.main(cam) == 0
    assert "5 made, 0 there before, 1 without classes, 0 failed" in capsys.readouterr().err
    assert cli.main([*cam, "--workers", "1"]) == 0
    assert "0 made, 5 there before" in capsys.readouterr().err
    assert cli.main([*cam[:-1], "1"]) == 1
    said = capsys.readouterr().err
    assert "got another scales (here [1.0], there [1.0, 0.5]); choose another --out, or say --keep" in said
    assert cli.main([*cam, "--normalization", "symmetric"]) == 1
    assert "got another classifier (here {" in (said := capsys.readouterr().err) and "'symmetric'" in said
    assert cli.main([*cam, "--format", "irn", "--high-res"]) == 1
    said = capsys.readouterr().err
    assert "another format (here irn, there npz), high_res (here True, there False); choose" in said
    state = {name: value + 0.001 for name, value in models.load_checkpoint(checkpoint).items()}
    models.save_checkpoint(checkpoint, state, models.read_metadata(checkpoint))
    assert cli.main(cam) == 1
    assert re.search(r"got another checkpoint \(here \w{12}, there \w{12}\); choose", capsys.readouterr().err)
    first = (maps / "config.json").read_text()
    assert cli.main([*cam, "--keep"]) == 0 and "0 made, 5 there before" in capsys.readouterr().err
    kept = json.loads((maps / "config.json").read_text())
    assert (
        kept["before"] == [json.loads(first)]
        and kept["inputs"]["checkpoint"] != json.loads(first)["inputs"]["checkpoint"]
    )
    assert cli.main([*cam, "--keep"]) == 0 and cli.main(cam) == 0  # it is this checkpoint's now
    assert json.loads((maps / "config.json").read_text())["before"] == kept["before"]
    capsys.readouterr()
    assert cli.main([*cam, "--overwrite", "--shard", "0/2"]) == 1
    assert "expected one process for --overwrite" in capsys.readouterr().err and len(Store(maps).names()) == 5
    other = Claims(maps / "claims")
    assert other.take("of a process that is at it") and cli.main([*cam, "--overwrite"]) == 1
    assert "expected nobody at work in" in capsys.readouterr().err and len(Store(maps).names()) == 5
    other.close()
    assert cli.main([*cam[:-1], "1", "--overwrite"]) == 0 and "5 made, 0 there before" in capsys.readouterr().err
    assert "before" not in json.loads((maps / "config.json").read_text())
    assert len((maps / "metrics.jsonl").read_text().splitlines()) == 6
    assert cli.main([*cam, "--overwrite"]) == 0 and "5 made, 0 there before" in capsys.readouterr().err
    assert "not allowed with argument" in refused(capsys, *cam, "--overwrite", "--keep")

    evaluate = ["eval", "--data", spec, "--maps", str(maps)]
    assert cli.main([*evaluate, "--thresholds", "0:1:0.1"]) == 0
    said, result = capsys.readouterr().out, json.loads((maps / "evaluation.json").read_text())
    assert "best" in said and "background" in said and len(result["mious"]) == 11
    assert "precision  recall" in said and "95 % of 1000 resamples of the images" in said
    assert result["best"]["miou"] == max(result["mious"]) and set(result["ious"]) == {"background", *pictures.CLASSES}
    other = tmp_path / "other"
    assert cli.main([*evaluate, "--threshold-from", str(maps / "evaluation.json"), "--out", str(other)]) == 0
    assert "chosen on other images" in capsys.readouterr().out
    assert cli.main([*cam, "--json", "--quiet"]) == 0
    said = capsys.readouterr()
    expected = {"made": 0, "kept": 5, "without_classes": 1, "elsewhere": 0, "failed": {}}
    assert json.loads(said.out) == expected and said.err == ""
    assert cli.main([*evaluate, "--thresholds", "0:1:0.1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out).items() <= result.items()
    shown = ["eval", "--data", spec, "--masks", str(tmp_path / "data" / "masks"), "--out", str(other / "masks")]
    assert cli.main(shown) == 0 and re.search(r"mean +100\.00\n", capsys.readouterr().out)
    assert json.loads((other / "masks" / "evaluation.json").read_text())["reported"] == {"miou": 1.0}
    assert cli.main([*shown, "--threshold-from", str(maps / "evaluation.json")]) == 1
    assert "expected --threshold-from with --maps" in capsys.readouterr().err
    assert "not allowed with argument" in refused(capsys, *shown, "--maps", str(maps))
    assert "one of the arguments --maps --masks is required" in refused(capsys, *shown[:3])
    assert json.loads((other / "evaluation.json").read_text())["reported"]["threshold"] == result["best"]["threshold"]

    assert json.loads((maps / "config.json").read_text())["command"] == "cam"
    (tmp_path / "data" / "images" / "p0.png").write_bytes(b"nothing")
    Store(maps).path("p0").unlink()
    assert cli.main(cam) == 3
    assert "p0.png" in (said := capsys.readouterr().err) and "1 failed" in said
    assert "p0.png" in json.loads((maps / "failures.jsonl").read_text())["error"]
    assert cli.main(evaluate) == 1 and "got none of p0; make them first" in capsys.readouterr().err
    (maps / "config.json").write_text("{")
    assert cli.main(cam) == 1 and "expected a run's configuration in" in capsys.readouterr().err


def test_open_classifier(tmp_path):
    path = tmp_path / "plain.safetensors"
    for name in models.NAMES:
        with torch.device("meta"):
            names = dict.fromkeys(models.cam_classifier(name, 3).state_dict())
        assert models._network(names, path) == name
    for name in ("resnet10", "mobilenet_v2"):
        models.save_checkpoint(path, models.cam_classifier(name, 3).state_dict())
        model = models.open_classifier(path)
        assert (model.name, model.n_classes, model.normalization, model.classes) == (name, 3, "imagenet", None)
    model = models.open_classifier(path, tensorflow_padding=True)
    assert model.tensorflow_padding and model.normalization == "symmetric"
    model.classes = ("a", "b", "ü")
    models.save_checkpoint(path, model.state_dict(), model.metadata())
    again = models.open_classifier(path, n_classes=3)
    assert (again.classes, again.tensorflow_padding, again.normalization) == (model.classes, True, "symmetric")
    with pytest.raises(ValueError, match="classifier of the data's 4 classes, got 3"):
        models.open_classifier(path, n_classes=4)
    with pytest.raises(ValueError, match="expected normalization of imagenet, symmetric, caffe, got 'x'"):
        models.open_classifier(path, normalization="x")
    backbone = {name: value for name, value in model.state_dict().items() if name != "classifier.weight"}
    models.save_checkpoint(path, backbone)
    with pytest.raises(ValueError, match=r"a backbone \(mobilenet_v2\), without classifier\.weight"):
        models.open_classifier(path)
    models.save_checkpoint(path, {"classifier.weight": torch.zeros(3, 512, 1, 1), "layer1.0.x": torch.zeros(1)})
    with pytest.raises(ValueError, match="expected the tensors of one of resnet10"):
        models.open_classifier(path)
    path.write_bytes(b"\xff" * 20)
    with pytest.raises(ValueError, match="expected a safetensors file"):
        models.read_metadata(path)
    assert models.read_metadata(tmp_path / "none.pth") == {}


def test_data_that_a_command_does_not_find(tmp_path, capsys):
    spec = pictures.draw(tmp_path / "data", 3)
    words = ["train-classifier", "--data", spec, "--out", str(tmp_path / "out"), "--split", "none"]
    assert cli.main(words) == 1 and "expected the list" in capsys.readouterr().err
    words = ["eval", "--data", spec, "--maps", str(tmp_path / "none")]
    assert cli.main(words) == 1 and "expected a folder of maps" in capsys.readouterr().err
    assert data.open_source(spec).classes == pictures.CLASSES

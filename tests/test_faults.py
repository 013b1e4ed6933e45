"""What users meet: bad images, bad tables, full disks, bad weights and hostile files, through the commands."""

import errno
import io
import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import zipfile

import broken
import cv2
import faults
import numpy as np
import pytest
import torch
from faults import own as own
from faults import place as place

from ribfast import cli, data, models
from ribfast.pipeline import cam
from ribfast.rib import slots
from ribfast.store import Store, open_masks
from ribfast.train import loop

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
    shutil.copytree(tmp_path / "coco" / "train2017", tmp_path / "coco" / "val2017")  # of the same names
    notes = tmp_path / "coco" / "annotations"
    shutil.copy(notes / "instances_train2017.json", notes / "instances_val2017.json")
    (tmp_path / "coco" / "val2017" / "p2.png").write_bytes((tmp_path / "coco" / "val2017" / "p1.png").read_bytes())
    (tmp_path / "coco" / "val2017" / "p0.png").write_bytes(b"nothing")
    words = [*place.words("run", run, data=spec), "--rib", "released", "--set", "rib.disjoint=true", "--no-segmenter"]
    words += ["--split", "train2017", "--validation", "val2017"]
    for _ in range(2):
        assert cli.main(words) == cli.INCOMPLETE
        assert list(failures(run)) == ["p2", "p0"] and "p2.png" in failures(run)["p2"]
        for name, missing in (("images.txt", 2), ("images-validation.txt", 0)):
            assert (run / name).read_text().split() == [f"p{n}" for n in range(9) if n != missing]
        assert [*Store(run / "rib").failures()] == [*Store(run / "masks").failures()] == ["p3", "p7"]
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


WRITING = ("cam", "rib", "masks", "predict", *TRAINING, "report", "export")
SLOW = ("rib", "predict", "train-irn", "train-seg")  # to run twice


def out_of(command, folder):
    return folder / ("report.html" if command == "report" else "out")


def fill_up(monkeypatch, number):
    """The disk is full from the number-th file on."""
    count, fsync = [], os.fsync

    def full(descriptor):
        count.append(descriptor)
        if len(count) >= number:
            raise OSError(errno.ENOSPC, "full")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)


@pytest.mark.parametrize("command", [pytest.param(c, marks=[pytest.mark.faults] * (c in SLOW)) for c in WRITING])
def test_a_full_disk_is_said_and_the_command_goes_on_after(place, command, tmp_path, monkeypatch, capsys):
    words = place.words(command, out_of(command, tmp_path / "cut"))
    again = [*words, "--resume"] if command in TRAINING else words
    with monkeypatch.context() as patch:
        fill_up(patch, 1 if command == "report" else 3)
        assert cli.main(words) == cli.FAILED
    (said,) = [line for line in capsys.readouterr().err.splitlines() if "no space" in line]
    assert re.fullmatch(rf"ribfast {command}: no space left for {tmp_path}/cut/.*: \d+ bytes free; free some and run "
                        rf"it again, or choose another folder", said)  # fmt: skip
    left = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert ".partial" not in left
    assert cli.main(again) == 0
    assert cli.main(place.words(command, out_of(command, tmp_path / "whole"))) == 0
    if command == "report":
        assert (tmp_path / "cut" / "report.html").read_bytes() == (tmp_path / "whole" / "report.html").read_bytes()
    else:
        assert faults.results(tmp_path / "cut") == faults.results(tmp_path / "whole") != {}


@pytest.fixture
def disk(tmp_path):
    """Mounts a file system of its own."""
    mounted = []

    def mount(options):
        folder = tmp_path / "disk"
        folder.mkdir(exist_ok=True)
        words = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"nothing can be mounted: {done.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("command", [*WRITING, "run"])
def test_folders_that_cannot_be_written(place, command, disk, capsys):
    folder = disk("ro,size=64k")
    assert cli.main(place.words(command, out_of(command, folder))) == cli.FAILED
    said = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(rf"ribfast {command}: expected to be allowed to write {folder}/.*, got read-only file system; "
                        rf"give the right, or choose another folder", said)  # fmt: skip
    assert not any(folder.iterdir())


READERS = {  # of each network, the commands
    "checkpoint": ("cam", "rib"), "irn": ("masks irn",), "segmenter": ("predict",), "weights": (*TRAINING, "run"),
}  # fmt: skip
COMMANDS = [(command, network) for network, commands in READERS.items() for command in commands]


@pytest.mark.parametrize(
    "command, network, value", [*((*each, float("nan")) for each in COMMANDS), ("cam", "checkpoint", float("inf"))]
)
def test_weights_that_are_not_finite(place, command, network, value, tmp_path, capsys):
    wrong, whole = tmp_path / "wrong.safetensors", place.networks[network]
    state = models.load_checkpoint(whole)
    state["layer3.0.conv2.weight"][5, 4, 1, 2] = value
    models.save_checkpoint(wrong, state, models.read_metadata(whole))
    assert cli.main(place.words(command, tmp_path / "out", **{network: wrong})) == cli.FAILED
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"expected finite weights, got NaN or infinity in layer3.0.conv2.weight of {wrong}; train or" in said
    assert not [*tmp_path.rglob("out/*.safetensors")] and not (tmp_path / "out" / "maps").exists()


class Hostile:
    """Pickled, a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def safetensors(header, body=bytes(64)):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def entry(**changes):
    return {"conv1.weight": {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]} | changes}


HOSTILE = {  # checkpoints of bytes
    "a header of exabytes": struct.pack("<Q", 2**63) + b'{"conv1.weight": ',
    "a deep header": safetensors(b"[" * 200_000),
    "a list": safetensors([]),
    "terabytes": safetensors(entry(shape=[10**12])),
    "terabytes of nothing": safetensors(entry(shape=[10**12], data_offsets=[0, 0])),
    "beyond any number": safetensors(entry(shape=[10**30])),
    "beyond the file": safetensors(entry(data_offsets=[0, 10**15])),
    "before the file": safetensors(entry(data_offsets=[-64, 0])),
    "an unknown type": safetensors(entry(dtype="PYTHON")),
    "no offsets": safetensors({"conv1.weight": {}}),
    "a quarter of a number": safetensors(entry(data_offsets=[1, 64])),
    "metadata that is a list": safetensors({"__metadata__": [1], **entry()}),
    "empty": b"",
}


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("command, network", [("cam", "checkpoint"), ("train-classifier", "weights")])
def test_hostile_safetensors(place, command, network, kind, tmp_path, capsys):
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(HOSTILE[kind])
    assert cli.main(place.words(command, tmp_path / "out", **{network: path})) == cli.FAILED
    (line,) = capsys.readouterr().err.splitlines()
    assert str(path) in line and line.startswith(f"ribfast {command}: ") and not (tmp_path / "out").exists()


@pytest.mark.parametrize("command, network, form", [*((*each, "torch") for each in COMMANDS), *(
    ("cam", "checkpoint", form) for form in ("legacy", "pickle", "wrapped"))])  # fmt: skip
def test_checkpoints_run_nothing(place, command, network, form, tmp_path, capsys):
    path, harmed = tmp_path / "hostile.pth", tmp_path / "harmed"
    thing = Hostile(os.system, f"touch {harmed}")
    if form == "pickle":
        path.write_bytes(pickle.dumps(thing, protocol=2))
    else:
        content = {"state_dict": {"conv1.weight": thing}} if form == "wrapped" else thing
        torch.save(content, path, _use_new_zipfile_serialization=form != "legacy")
    assert cli.main(place.words(command, tmp_path / "out", **{network: path})) == cli.FAILED
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"got {path}: it holds more than tensors, or is cut short; save a state dict alone" in said
    assert not harmed.exists()


@pytest.mark.parametrize("name, text", [
    ("classes", "3"), ("classes", "[1, 2]"), ("classes", "[" * 100_000), ("crop", "much"), ("crop", "900000000"),
])  # fmt: skip
def test_hostile_metadata(place, name, text, tmp_path, capsys):
    network, command = ("irn", "masks irn") if name == "crop" else ("checkpoint", "cam")
    path, whole = tmp_path / "hostile.safetensors", place.networks[network]
    models.save_checkpoint(path, models.load_checkpoint(whole), models.read_metadata(whole) | {name: text})
    assert cli.main(place.words(command, tmp_path / "out", **{network: path})) == cli.FAILED
    assert re.search(rf"expected .*, got .* in {path}; train it again", capsys.readouterr().err)


def test_tensors_larger_than_their_file(place, tmp_path, capsys):
    path = tmp_path / "hostile.pth"
    state = models.load_checkpoint(place.networks["checkpoint"])
    state["classifier.weight"] = torch.zeros(1).as_strided((2, 512, 10**5, 10**5), (0, 0, 0, 0))
    torch.save(state, path)
    assert cli.main(place.words("cam", tmp_path / "out", checkpoint=path)) == cli.FAILED
    assert f"got classifier.weight of (2, 512, 100000, 100000) in {path}'s" in capsys.readouterr().err


def npz(**claimed):
    """Maps of a 64 x 64 photograph, whose headers may claim other shapes."""
    file = io.BytesIO()
    arrays = {"keys": np.array([0]), "cam": np.zeros((1, 16, 16), np.float16), "size": np.array([64, 64])}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in arrays.items():
            header = np.lib.format.header_data_from_array_1_0(array) | {"shape": claimed.get(name, array.shape)}
            content = io.BytesIO()
            np.lib.format.write_array_header_1_0(content, header)
            archive.writestr(f"{name}.npy", content.getvalue() + array.tobytes())
    return file.getvalue()


def npy(**changes):
    """IRN's maps of a 64 x 64 photograph, or others."""
    whole = {"keys": torch.tensor([0]), "cam": torch.zeros(1, 16, 16), "high_res": np.zeros((1, 64, 64), np.float32)}
    file = io.BytesIO()
    np.save(file, np.array(whole | changes, dtype=object), allow_pickle=True)
    return file.getvalue()


def hostile_maps(harmed):
    thing = Hostile(os.system, f"touch {harmed}")
    large = torch.zeros(1).as_strided((1, 10**6, 10**6), (0, 0, 0))
    return {
        "terabytes.npz": npz(cam=(1, 10**6, 10**6)), "keys.npz": npz(keys=(10**13,)), "size.npz": npz(size=(10**30,)),
        "negative.npz": npz(cam=(-1, 16, 16)), "code.npz": npy(keys=thing), "cut.npz": npz()[:200],
        "keys.npy": npy(keys=thing), "cam.npy": npy(cam=thing), "high_res.npy": npy(high_res=thing),
        "terabytes.npy": npy(cam=large), "large.npy": npy(high_res=Hostile(np.ndarray, (1, 10**7, 10**6), "f4")),
        "unfilled.npy": npy(high_res=Hostile(np.ndarray, (1, 10**5, 10**4), "f4")),  # 4 GB, if they were written to
    }  # fmt: skip


@pytest.mark.parametrize("kind", hostile_maps(""))
@pytest.mark.parametrize("command", ["masks", "eval", "report"])
def test_hostile_maps(place, command, kind, tmp_path, capsys):
    harmed, maps = tmp_path / "harmed", tmp_path / "maps"
    maps.mkdir()
    for name in faults.PLAIN:
        (maps / f"{name}.{kind[-3:]}").write_bytes(npz() if kind.endswith("npz") else npy())
    path = maps / f"p0.{kind[-3:]}"
    path.write_bytes(hostile_maps(harmed)[kind])
    goes_on = command == "masks" and kind.endswith("npz")  # of .npy, one is looked at to know the format
    code = cli.main(place.words(command, out_of(command, tmp_path), maps=maps))
    assert code == (cli.INCOMPLETE if goes_on else cli.FAILED) and not harmed.exists()
    said = capsys.readouterr().err
    assert re.search(rf"Store.load: expected .* got {path}: .*; remove it and make it again", said)


def interrupted(words, monkeypatch):
    """A training that stops after its first pause."""
    pause = loop._Training._pause

    def stop(*arguments):
        pause(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop._Training, "_pause", stop)
        assert cli.main(words) == cli.INTERRUPTED


@pytest.mark.parametrize("command", ["train-classifier", pytest.param("train-seg", marks=pytest.mark.faults)])
def test_resumed_trainings_notice_what_is_cut_short(place, command, tmp_path, monkeypatch, capsys):
    out, whole = tmp_path / "out", tmp_path / "whole"
    assert cli.main(place.words(command, whole)) == 0
    words = place.words(command, out)
    interrupted(words, monkeypatch)
    state, journal = out / "unfinished.safetensors", out / "metrics.jsonl"
    content = state.read_bytes()
    for size in (len(content) // 2, len(content) - 1, 100, 0):
        state.write_bytes(content[:size])
        capsys.readouterr()
        assert cli.main([*words, "--resume"]) == cli.FAILED
        said = capsys.readouterr().err
        assert f"expected a safetensors file, got {state}: " in said
        assert f"or remove {state}, and the training begins anew" in said and state.read_bytes() == content[:size]
    state.write_bytes(content)
    journal.write_bytes(journal.read_bytes()[:-20])
    assert cli.main([*words, "--resume"]) == 0
    assert re.search(r"passed over line \d of .*metrics.jsonl, which is no whole record", capsys.readouterr().err)
    assert faults.results(out) == faults.results(whole)
    (checkpoint,) = out.glob("*.safetensors")
    checkpoint.write_bytes(checkpoint.read_bytes()[:-5])
    reader = {"train-classifier": ("cam", "checkpoint"), "train-seg": ("predict", "segmenter")}[command]
    assert cli.main(place.words(reader[0], tmp_path / "next", **{reader[1]: checkpoint})) == cli.FAILED
    assert f"got {checkpoint}: " in (said := capsys.readouterr().err) and "reaches beyond the file; make or" in said


def test_maps_and_facts_that_are_cut_short_are_noticed(place, tmp_path, capsys):
    out, words = tmp_path / "cam", place.words("cam", tmp_path / "cam")
    assert cli.main(words) == 0
    whole, path, journal = faults.results(out), out / "maps" / "p1.npz", out / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-40])
    journal.write_bytes(journal.read_bytes()[:-20])
    assert cli.main(words) == 0 and "passed over line 9 of" in capsys.readouterr().err
    assert cli.main(place.words("masks", tmp_path / "masks", maps=out)) == cli.INCOMPLETE
    assert f"got {path}: " in failures(tmp_path / "masks")["p1"] and "remove it" in failures(tmp_path / "masks")["p1"]
    path.unlink()  # as it says
    assert cli.main(words) == 0 and faults.results(out) == whole
    assert cli.main(place.words("masks", tmp_path / "masks", maps=out)) == 0
    assert cli.main(place.words("masks", tmp_path / "others")) == 0
    assert faults.results(tmp_path / "masks") == faults.results(tmp_path / "others")
    (out / "config.json").write_text('{"config": ')
    assert (
        cli.main(words) == cli.FAILED
        and "config.json, got no JSON object; choose another --out" in capsys.readouterr().err
    )


def test_adapting_goes_on_with_fewer_images_where_memory_runs_out(place, tmp_path, monkeypatch, capsys):
    few = tmp_path / "few.txt"
    few.write_text("p0\np1\np2\np4\n")
    assert cli.main(place.words("rib", tmp_path / "whole", split=few)) == 0
    begin, busy = slots.Slot.begin, set()

    def limited(slot, job):
        begin(slot, job)
        busy.add(slot)
        if len(busy) > 2:
            busy.clear()
            raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(slots.Slot, "begin", limited)
    assert cli.main([*place.words("rib", tmp_path / "out", split=few), "--concurrency", "4"]) == 0
    assert "memory ran out: from 3 images at once to 1" in capsys.readouterr().err
    assert faults.results(tmp_path / "out") == faults.results(tmp_path / "whole")


@pytest.mark.parametrize("command", [*READING[:3], "predict", "scan"])
def test_an_image_that_lacks_memory_is_tried_alone_and_stops_no_other(place, command, tmp_path, monkeypatch, capsys):
    """p1 does always; p2, p3 and p5 while others are read beside them, each another way."""
    assert command == "scan" or cli.main(place.words(command, tmp_path / "whole")) == 0
    read, seen = data.Source.image, []
    lacks = {"p1": MemoryError(), "p2": RuntimeError("DefaultCPUAllocator: can't allocate memory"),
             "p3": cv2.error("Failed to allocate"), "p5": OSError(errno.ENOMEM, "Cannot allocate memory")}  # fmt: skip
    lacks["p3"].code = cv2.Error.STS_NO_MEM

    def image(source, item):
        seen.append(item.name)
        if item.name in lacks and (item.name == "p1" or seen.count(item.name) == 1):
            raise lacks[item.name]
        return read(source, item)

    monkeypatch.setattr(data.Source, "image", image)
    if command == "scan":
        assert cli.main([*place.words(command), "--json"]) == cli.INCOMPLETE
        (problem,) = json.loads(capsys.readouterr().out)["problems"]
        assert problem["name"] == "p1" and problem["reason"].startswith("scan: not enough memory: MemoryError;")
        return
    assert cli.main(place.words(command, tmp_path / "out")) == cli.INCOMPLETE
    assert list(failures(tmp_path / "out")) == ["p1"]
    assert failures(tmp_path / "out")["p1"] == "not enough memory: MemoryError; reduce the image, or free some"
    whole = {name: content for name, content in faults.results(tmp_path / "whole").items() if "p1." not in name}
    found = faults.results(tmp_path / "out")
    assert found.keys() == whole.keys() and (command == "rib" or found == whole)  # whose others are drawn without p1
    assert not (tmp_path / "out" / "claims").exists()


def test_a_network_that_lacks_memory_for_an_image_alone(place, tmp_path, monkeypatch):
    merge, before = cam.merge_cams, []

    def limited(maps, keys, size, *more):
        if list(keys) == [0, 1]:
            before.append(len(list(tmp_path.rglob("*.npz"))))
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")
        return merge(maps, keys, size, *more)

    monkeypatch.setattr(cam, "merge_cams", limited)
    assert cli.main(place.words("cam", tmp_path / "out")) == cli.INCOMPLETE
    assert {*failures(tmp_path / "out")} == {"p3", "p7"} and Store(tmp_path / "out").names() == [
        "p0", "p1", "p2", "p4", "p5", "p6"]  # fmt: skip
    assert before[2:] == [6, 6]  # once all others are in the store


def test_scan_finds_everything_at_once(mixed, capsys):
    assert cli.main([*mixed.words("scan"), "--json"]) == cli.INCOMPLETE
    facts = json.loads(capsys.readouterr().out)
    assert facts["images"] == len(faults.PLAIN + faults.ODD + faults.BAD)
    assert [problem["name"] for problem in facts["problems"]] == faults.BAD
    assert cli.main(mixed.words("scan")) == cli.INCOMPLETE
    shown = capsys.readouterr().out.splitlines()
    for problem in facts["problems"]:
        assert f"{problem['name']}: {problem['reason']}" in shown

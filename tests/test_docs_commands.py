"""Every command line that the README and docs show runs, in their order, on data and networks that are small."""

import contextlib
import importlib
import io
import json
import re
import shlex
import shutil
import string
import subprocess
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch.distributed.run import get_args_parser

from ribfast import cli, config, models
from ribfast.data import VOC_CLASSES
from ribfast.store import Store

ROOT = Path(__file__).parents[1]
DOCUMENTS = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
SIDE = 48
# what is added to each command's line, where the last option counts; as --set has it, for `run` and `demo`
SMALL = {
    "train-classifier": "epochs=1 batch=2 crop=32 long_side=32,48 workers=1 precision=float32",
    "eader": "adversary=resnet10 localiser_steps=1 adversary_steps=1",
    "cam": "scales=1 workers=1",
    "rib": "steps=2 n_others=2 scales=1 loss_scales=1 others_crop=32 others_long_side=32,48 anchor_batches=1 workers=1 "
    "precision=float32",
    "masks": "iterations=1 log2_steps=2 workers=1",
    "train-irn": "epochs=1 batch=2 crop=32 radius=2 workers=1",
    "train-seg": "steps=2 batch=2 crop=33 save_every=2 workers=1 precision=float32",
    "predict": "scales=1 iterations=1 workers=1",
    "eval": "resamples=9 workers=1",
    "report": "resamples=9 images=2 workers=1",
    "export": "workers=1",
    "bench": "seconds=0.001 height=32 width=32 classes=2 threads=1",
    "toy": "seeds=0 images=4 training_images=64 epochs=1 steps=1",
}
PLAIN = {"scan", "info", "completion"}  # which have no configuration and need none
STAGES = {
    "classifier": "train-classifier", "cam": "cam", "rib": "rib", "labels": "masks", "irn": "train-irn",
    "masks": "masks", "ppmg": "masks", "segmenter": "train-seg", "predicted": "predict", "report": "report",
}  # fmt: skip
TRAINED = {"train-classifier", "train-irn", "train-seg", "run"}  # whose --network may be a smaller one
# what documents take for made before they begin
GIVEN = {"docs/data.md": {"masks": "voc", "crf": "photos"}}
# of runs beside those that show a preset, which run whole
SOME_STAGES = ("--rib", "none", "--masks", "crf", "--no-segmenter", "--no-relabel")
SLURM = {"SLURM_NNODES": "2", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node1", "head": "node1"}


def picture(rng, boxes):
    """(image, mask): boxes of the classes' colours on noise."""
    image = rng.integers(90, 150, (SIDE, SIDE, 3), np.uint8)
    mask = np.zeros((SIDE, SIDE), np.uint8)
    for number, label in enumerate(boxes):
        left, width = number * SIDE // len(boxes), max(6, SIDE // len(boxes) - 3)
        colour = np.random.default_rng(label).integers(0, 255, 3, np.uint8)
        image[12:36, left : left + width], mask[12:36, left : left + width] = colour, label
    return image, mask


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, np.ndarray):
        cv2.imwrite(str(path), content[..., ::-1] if content.ndim == 3 else content)
    else:
        path.write_text(content)


def make_voc(root):
    """Four photographs with five classes each."""
    rng = np.random.default_rng(0)
    for number in range(4):
        labels = [5 * number + k + 1 for k in range(5)]
        image, mask = picture(rng, labels)
        put(root / "JPEGImages" / f"2007_{number:06}.jpg", image)
        put(root / "SegmentationClassAug" / f"2007_{number:06}.png", mask)
        objects = "".join(f"<object><name>{VOC_CLASSES[label - 1]}</name></object>" for label in labels)
        put(root / "Annotations" / f"2007_{number:06}.xml", f"<annotation>{objects}</annotation>")
    names = [f"2007_{number:06}" for number in range(4)]
    for split in ("train", "val"):
        put(root / "ImageSets" / "Segmentation" / f"{split}.txt", "\n".join(names) + "\n")


def make_coco(root):
    rng, names = np.random.default_rng(1), ("cat", "dog", "cup")
    for split in ("train2014", "val2014"):
        images, notes = [], []
        for number in range(4):
            label = number % 3 + 1
            image, _ = picture(rng, [label])
            put(root / split / f"{split}_{number}.jpg", image)
            images.append({"id": number, "file_name": f"{split}_{number}.jpg", "height": SIDE, "width": SIDE})
            notes.append({"id": number, "image_id": number, "category_id": label, "area": 1080, "iscrowd": 0,
                          "segmentation": [[0, 12, 45, 12, 45, 36, 0, 36]]})  # fmt: skip
        categories = [{"id": number, "name": name} for number, name in enumerate(names, 1)]
        content = {"images": images, "annotations": notes, "categories": categories}
        put(root / "annotations" / f"instances_{split}.json", json.dumps(content))
    put(root / "few.txt", "train2014_0\ntrain2014_2\n")
    return names


def make_photos(root):
    rng, rows = np.random.default_rng(2), ["image,labels"]
    for number in range(6):
        image, mask = picture(rng, [number % 2 + 1])
        put(root / "images" / f"p{number}.jpg", image)
        put(root / "masks" / f"p{number}.png", mask)
        rows.append(f"p{number}.jpg,{('cat', 'dog')[number % 2]}")
    put(root / "labels.csv", "\n".join(rows) + "\n")
    put(root / "train.txt", "p0\np1\np2\np3\n")
    put(root / "val.txt", "p4\np5\n")
    return ("cat", "dog")


def make_networks(root, classes):
    """Files by the names in the documents; ResNets are of ten layers, whatever their names say."""
    torch.manual_seed(0)

    def backbone(name):
        state = models.cam_classifier(name, 2).state_dict()
        return {tensor: value for tensor, value in state.items() if not tensor.startswith("classifier")}

    ten = backbone("resnet10")
    for name in ("resnet18-imagenet", "resnet50-imagenet", "resnet101-imagenet"):
        torch.save(ten | {"fc.weight": torch.zeros(1000, 512), "fc.bias": torch.zeros(1000)}, root / f"{name}.pth")
    torch.save(backbone("mobilenet_v2"), root / "mobilenet_v2.pth")
    head = {"classifier.weight": torch.randn(20, 512, 1, 1) * 0.05}
    torch.save({f"resnet50.{name}": value for name, value in ten.items()} | head, root / "res50_cam.pth")
    irn = models.irn_network("resnet10").tensors()
    irn = {name if name.startswith("fc") else f"resnet50.{name}": x for name, x in irn.items() if "mean" not in name}
    irn |= {f"resnet50.{name}": x for name, x in ten.items() if "running" in name}
    torch.save(irn | {"fc_dp7.4.running_mean": torch.zeros(2)}, root / "res50_irn.pth")
    for name, own in classes.items():
        model = models.cam_classifier("resnet10", len(own))
        model.classes = own
        models.save_checkpoint(root / f"{name}.safetensors", model.state_dict(), model.metadata())


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Left as it is: here kernels are called, not tested, and filling it takes as long as small networks do."""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    make_voc(root / "VOCdevkit" / "VOC2012")
    classes = {"coco": make_coco(root / "COCO"), "classifier": make_photos(root / "photos")}
    shutil.copytree(root / "photos" / "images", root / "holiday")
    make_networks(root, classes)
    put(root / "prediction.json", json.dumps({"scales": [1], "iterations": 1}))
    return root


@pytest.fixture
def here(world, tmp_path, monkeypatch):
    """A working folder in which the names of the documents are there."""
    for path in world.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def made_before(kind, folder):
    """Masks of the data, as a run's folder."""
    place = Path("photos/masks" if kind == "photos" else "VOCdevkit/VOC2012/SegmentationClassAug")
    for path in place.glob("*.png"):
        Store(folder).save_mask(path.stem, cv2.imread(str(path), cv2.IMREAD_GRAYSCALE))


def blocks(text):
    return re.findall(r"^```bash\n(.*?)^```$", text, flags=re.S | re.M)


def lines(block):
    """What a shell takes for a line each."""
    return [line.strip() for line in block.replace("\\\n", " ").split("\n") if line.strip()]


def small(words):
    """Options that make a command of the documents small."""
    name, rest = words[0], words[1:]
    light = any("mobilenet" in word for word in rest)

    def fields(command):
        return dict(each.split("=") for each in SMALL[command].split())

    network = [] if light or name not in TRAINED else ["--network", "resnet10"]
    if name in ("run", "demo"):
        found = {stage: fields(command) for stage, command in STAGES.items()}
        sets = [f"{stage}.{field}={value}" for stage, own in found.items() for field, value in own.items()]
        own = [word for each in sets for word in ("--set", each)] + ["--workers", "1"]
        own += SOME_STAGES if name == "demo" or "--set" in rest else ()
        return [*network, *own, *(["--pictures", "4"] if name == "demo" and "--data" not in rest else [])]
    chosen = fields(name) | (fields("eader") if "eader" in rest else {})
    if name == "cam" and "pmm" in rest:
        chosen |= {"crop": "32", "stride": "16"}
    if "--cycle" in rest:
        chosen["prediction"] = "prediction.json"
    return network + [word for field, value in chosen.items() for word in (f"--{field.replace('_', '-')}", value)]


def run(words, *more):
    """A ribfast command line."""
    name = words[0]
    assert name in cli.COMMANDS and (name in SMALL or name in PLAIN or name in ("run", "demo")), f"no rule for {name}"
    assert cli.main([*words, *([] if name in PLAIN else small(words)), *more]) == 0


def check_batches(words, world):
    """Of the trainings that a line starts, which so many processes share."""
    started = [words]
    if words[0] == "run":
        with contextlib.redirect_stdout(io.StringIO()) as said:
            assert cli.main([*words, "--dry-run"]) == 0
        started = [shlex.split(line)[1:] for line in said.getvalue().splitlines()]
    for name, *rest in started:
        if name in TRAINED:
            _, settings = cli._parse(name, rest)
            assert settings.batch % world == 0, f"{name}: {settings.batch} images for {world} processes"


def check_line(line, monkeypatch, variables=None):
    words = shlex.split(line, comments=True)
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        monkeypatch.setenv(*words.pop(0).split("="))
    if variables is not None:
        words = [string.Template(word).substitute(variables) for word in words]
    match words:
        case []:
            pass
        case ["ribfast", *rest]:
            run(rest)
        case ["torchrun", *rest]:
            found = get_args_parser().parse_args(rest)
            assert found.module and found.training_script == "ribfast"
            words = found.training_script_args
            check_batches(words, int(found.nnodes.partition(":")[0]) * int(found.nproc_per_node))
            run(words, *(SOME_STAGES if words[0] == "run" else ()))
        case ["make", *targets]:
            subprocess.run(["make", "-n", "-C", str(ROOT), *targets], check=True, capture_output=True)
        case ["pip", "install", what]:
            assert what == "." or re.fullmatch(r"[a-z][a-z0-9-]*", what)
        case _:
            pytest.fail(f"no rule for {line}; add one to {Path(__file__).name}")


def check_script(block, folder, monkeypatch):
    """A job of SLURM's: its options are options, and what it starts runs here, as one process."""
    path = folder / "job.sh"
    path.write_text(block)
    subprocess.run(["bash", "-n", path], check=True)
    started = 0
    for line in lines(block):
        if line.startswith("#SBATCH"):
            assert re.fullmatch(r"#SBATCH --[a-z-]+(=[\w@-]+)?", line), line
        elif line.startswith("srun "):
            check_line(line.removeprefix("srun "), monkeypatch, SLURM)
            started += 1
        elif not line.startswith("#"):
            assert re.match(r"(export )?\w+=", line), f"no rule for {line}"
    assert started


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_line_runs(document, here, monkeypatch):
    monkeypatch.setattr(cli, "Progress", lambda title="": lambda *said: None)
    for folder, kind in GIVEN.get(document, {}).items():
        made_before(kind, here / folder)
    for block in blocks((ROOT / document).read_text()):
        if block.startswith("#!"):
            check_script(block, here, monkeypatch)
            continue
        for line in lines(block):
            try:
                check_line(line, monkeypatch)
            except BaseException as error:
                error.add_note(f"{document}: {line}")
                raise


def test_no_line_stands_elsewhere():
    """In blocks that are not run: of no language, or another."""
    for document in DOCUMENTS:
        for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / document).read_text(), flags=re.S | re.M):
            assert language in ("", "bash", "cpp", "python"), (document, language)
            assert language == "bash" or not re.search(r"^\W*(ribfast|torchrun|make|pip) ", block, re.M), (
                document,
                block,
            )


def told_presets(text):
    """command, and its method where it names one -> the presets of the tables of methods.md, which begin so."""
    found = {}
    for commands, rows in re.findall(r"^\| preset of (.*?) \|.*\n\|---\|---\|\n((?:\|.*\n)+)", text, flags=re.M):
        names = {word for row in rows.splitlines() for word in re.findall(r"`(\w+)`", row.split("|")[1])}
        found |= dict.fromkeys(re.findall(r"`([^`]+)`", commands), names)
    return found


def test_every_preset_is_told():
    told, wanted = told_presets((ROOT / "docs" / "methods.md").read_text()), {}
    for name, command in cli.COMMANDS.items():
        methods = command.config if isinstance(command.config, dict) else {"": command.config}
        for number, (method, place) in enumerate(methods.items()):
            module, _, kind = (place or "").partition(":")
            names = config.presets(getattr(importlib.import_module(module), kind)) if place else []
            if names:
                wanted[f"{name} --method {method}" if number else name] = set(names)
    assert told == wanted


def test_options_in_text_exist(capsys):
    for document in DOCUMENTS:
        for name, words in re.findall(r"`ribfast ([a-z-]+)( [^`]*)?`", (ROOT / document).read_text()):
            method = re.findall(r"--method (\w+)", words)
            with pytest.raises(SystemExit):
                cli.main([name, *(["--method", *method] if method else []), "--help"])
            said = capsys.readouterr().out
            for option in re.findall(r"--[a-z-]+", words):
                assert option in said, (document, name, option)

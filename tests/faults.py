"""What the tests of faults share: a small data set with every network trained on nothing, and all commands' lines."""

import hashlib
import json
import shutil

import broken
import numpy as np
import pictures
import pytest
import torch

from ribfast import cli, data, models

PLAIN = [f"p{i}" for i in range(9)]
ODD = [name.rpartition(".")[0] for name in broken.odd()]
BAD = [name.rpartition(".")[0] for name in broken.bad()]
TRAINED = "--network resnet10 --batch 4 --device cpu"
CLASSIFIER = f"{TRAINED} --epochs 2 --crop 64 --long-side 48,72"
RIB = "--scales 1.0 --loss-scales 1.0 --steps 2 --n-others 2 --no-disjoint --others-crop 40 --others-long-side 32,48"
SMALL = {  # of run's stages
    "classifier": "epochs=1 batch=4 crop=64 long_side=48,72",
    "cam": "scales=1.0",
    "rib": "disjoint=false steps=2 n_others=2 scales=1.0 loss_scales=1.0 others_crop=40 others_long_side=32,48",
    "segmenter": "steps=3 batch=4 crop=57 save_every=1 frozen=0",
}


class Place:
    """A folder with photos/, untrained networks by what they are for, and the commands' lines."""

    def __init__(self, folder):
        self.folder, self.photos = folder, folder / "photos"
        self.data = pictures.draw(self.photos, len(PLAIN))
        torch.manual_seed(0)
        trained = models.cam_classifier("resnet10", 2)
        state = {name: value for name, value in trained.state_dict().items() if not name.endswith("batches_tracked")}
        # features that neither vanish nor explode
        state |= {name: value * 0.6 for name, value in state.items() if name.endswith("bn2.weight")}
        trained.classes = pictures.CLASSES
        segmenter, irn = models.segmenter("resnet10", 2), models.irn_network("resnet10")
        segmenter.classes, irn.crop = pictures.CLASSES, 64
        backbone = {name: value for name, value in state.items() if not name.startswith("classifier")}
        self.networks = {name: folder / f"{name}.safetensors" for name in ("weights", "checkpoint", "irn", "segmenter")}
        models.save_checkpoint(self.networks["weights"], backbone)
        models.save_checkpoint(self.networks["checkpoint"], state, trained.metadata())
        models.save_checkpoint(self.networks["irn"], irn.tensors(), irn.metadata())
        models.save_checkpoint(self.networks["segmenter"], segmenter.tensors(), segmenter.metadata())
        self.maps = folder / "maps"

    def add(self, files, label="square"):
        """Photographs, at the end of the table."""
        with open(self.photos / "labels.csv", "a") as table:
            for name, content in files.items():
                (self.photos / "images" / name).write_bytes(content)
                table.write(f"{name},{label}\n")

    def words(self, command, out=None, **given):
        """A command's line; given: other networks, maps, data or masks than this place's, and --split."""
        known = self.networks | {"data": self.data, "maps": self.maps, "masks": self.photos / "masks"} | given
        line = {
            "cam": "--data {data} --checkpoint {checkpoint} --scales 1.0 --device cpu",
            "rib": "--data {data} --checkpoint {checkpoint} --precision float32 --device cpu " + RIB,
            "masks": "--data {data} --maps {maps} --device cpu",
            "masks irn": "--data {data} --maps {maps} --preset irn --irn {irn} --device cpu",
            "predict": "--data {data} --checkpoint {segmenter} --device cpu",
            "train-classifier": "--data {data} --weights {weights} " + CLASSIFIER,
            "train-irn": f"--data {{data}} --weights {{weights}} --labels {{masks}} {TRAINED} --epochs 1 --crop 80",
            "train-seg": "--data {data} --weights {weights} --preset light " + TRAINED
            + " --steps 3 --crop 57 --save-every 1 --frozen 0",
            "report": "--data {data} --stage cam={maps}",
            "export": "--data {data} --masks {masks}",
            "eval": "--data {data} --maps {maps}",
            "scan": "--data {data}",
            "run": "--data {data} --weights {weights} --network resnet10 --device cpu --seed 3 "
            + " ".join(f"--set {stage}.{field}" for stage, fields in SMALL.items() for field in fields.split()),
        }[command].format(**known)  # fmt: skip
        line += f" --split {given['split']}" if "split" in given else ""
        return [command.split()[0], *line.split(), *([] if out is None else ["--out", str(out)])]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """With maps of all images; not to be changed."""
    made = Place(tmp_path_factory.mktemp("faults"))
    assert cli.main(made.words("cam", made.maps)) == 0
    return made


@pytest.fixture
def own(tmp_path):
    """One for a test alone."""
    return Place(tmp_path / "own")


def as_coco(place, folder):
    """The place's photographs as COCO's, with boxes of what its masks hold."""
    source, images, annotations = data.open_source(place.data), [], []
    shutil.copytree(place.photos / "images", folder / "train2017")
    for number, item in enumerate(source, 1):
        images.append({"id": number, "file_name": item.image.name, "height": 64, "width": 64})
        for label in item.classes:
            y, x = np.nonzero(source.mask(item) == label + 1)
            box = [int(x.min()), int(y.min()), int(x.max()) + 1, int(y.max()) + 1]
            corners = [box[i] for i in (0, 1, 2, 1, 2, 3, 0, 3)]
            annotations.append({"id": len(annotations) + 1, "image_id": number, "category_id": label + 1,
                                "area": 1.0, "segmentation": [corners]})  # fmt: skip
    (folder / "annotations").mkdir()
    categories = [{"id": number, "name": name} for number, name in enumerate(pictures.CLASSES, 1)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations" / "instances_train2017.json").write_text(json.dumps(content))
    return f"coco:{folder}"


def results(folder):
    """Digests of what a command made, and the numbers of its evaluations, apart from times and places."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".safetensors", ".npz", ".npy", ".png", ".jpg"):
            found[str(path.relative_to(folder))] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif path.name == "evaluation.json":
            facts = json.loads(path.read_text())
            found[str(path.relative_to(folder))] = {name: facts[name] for name in ("images", "ious", "reported")}
    return found

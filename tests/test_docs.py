"""What is written agrees with what was measured and with what is there."""

import csv
import importlib.util
import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
REGIONS = ("digit", "motif", "background")


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_readme_shows_the_committed_results():
    tables = script("tables")
    text = tables.README.read_text()
    assert tables.with_table(text) == text, "run `python benchmarks/tables.py`"


def test_the_toy_experiment_is_told_as_it_was_measured():
    rows = list(csv.DictReader((ROOT / "benchmarks" / "results" / "toy.csv").read_text().splitlines()))

    def mean(what, index, loss, region):
        key = {"what": what, "index": str(index), "loss": loss, "region": region}
        values = [float(row["hgr"]) for row in rows if key.items() <= row.items()]
        assert len(values) == 3
        return sum(values) / 3

    last = {(loss, region): mean("step", 10, loss, region) for loss in ("rib", "bce") for region in REGIONS}
    expected = [mean("layer", layer, "", "motif") for layer in (5, 6)] + [last["rib", "motif"], last["bce", "motif"]]
    expected += [mean("layer", 6, "", "background"), last["rib", "background"]]
    section = (ROOT / "README.md").read_text().partition("### The bottleneck itself")[2].partition("\n#")[0]
    assert re.findall(r"(\d+) %", section) == [f"{100 * value:.0f}" for value in expected]
    text, variants = (ROOT / "docs" / "toy.md").read_text(), script("toy_variants")
    assert variants.table() in text, "put in what `table()` of benchmarks/toy_variants.py says"
    shown = {"after L_RIB": [last["rib", region] for region in REGIONS]}
    shown |= {"after BCE": [last["bce", region] for region in REGIONS]}
    for layer in range(1, 7):
        name = "the logit" if layer == 6 else f"layer {layer}"
        shown[name] = [mean("layer", layer, "", region) for region in REGIONS]
    for name, values in shown.items():
        assert f"| {name} | {' | '.join(f'{value:.2f}' for value in values)} |" in text


def test_the_demo_is_told_as_it_was_measured():
    demo, text = script("demo"), (ROOT / "README.md").read_text()
    section = text.partition("### The demo")[2].partition("\n#")[0]
    assert demo.table() in section, "put in what `table()` of benchmarks/demo.py says"
    rows = json.loads(demo.RESULTS.read_text())["rows"]
    gains = [row["rib"] - row["cam"] for row in rows]
    assert len(rows) >= 3 and f"{sum(gains) / len(gains):.1f} points of mIoU" in section
    assert f"{min(rows, key=lambda row: row['load'][0])['seconds']} seconds" in section


def test_named_files_and_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for name in ("README.md", "CONTRIBUTING.md", "docs/performance.md", "docs/toy.md"):
        text = (ROOT / name).read_text()
        for link in re.findall(r"\]\(([\w/.]+)\)", text):
            assert ((ROOT / name).parent / link).exists(), link
        for target in re.findall(r"`make (?:VENV=none )?([a-z-]+)", text):
            assert f"\n{target}:" in makefile, target


def test_readme_examples_run(tmp_path):
    """With arrays of the shapes that they name."""
    import numpy as np
    import torch

    text = (ROOT / "README.md").read_text()
    code, classifiers, sources, adapting, masking, replacement = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    sides = {"maps_1x": (24, 32), "maps_05x": (12, 16), "maps_15x": (36, 47), "maps_2x": (47, 63)}
    names = {name: torch.rand(2, 3, *side) for name, side in sides.items()}
    names |= {"maps": torch.randn(2, 3, 24, 32), "present": torch.ones(2, 3, dtype=torch.bool)}
    names |= {"maps_a": [names["maps_1x"]], "maps_b": [names["maps_2x"]]}
    names |= {"images": torch.zeros(1, 12, 14, 3, dtype=torch.uint8), "p": torch.rand(1, 3, 12, 14).softmax(1)}
    names |= {"labels": torch.randint(3, (1, 12, 14), dtype=torch.uint8)}
    names |= {"cam": torch.rand(2, 12, 14), "boundary": torch.rand(12, 14)}
    names |= {"photos": torch.rand(1, 3, 12, 14), "class_maps": torch.rand(1, 2, 12, 14)}
    names |= {"features": torch.randn(30, 4), "values": torch.randn(30, 6), "unary": torch.rand(3, 30)}
    exec(code, names)
    assert names["probabilities"].shape == (1, 3, 12, 14)
    assert names["pooled"].shape == (2, 3) and names["cams"].shape == (3, 375, 500) and len(names["many"]) == 2
    from ribfast import models

    names = {"checkpoint": tmp_path / "weights.safetensors", "photos": torch.randn(1, 3, 48, 64)}
    models.save_checkpoint(names["checkpoint"], models.cam_classifier("resnet50", 20).state_dict())
    exec(classifiers, names)
    assert names["cams"].shape == (1, 20, 3, 4)
    import cv2

    from ribfast import data

    names = {"photos": tmp_path / "photos", "out": tmp_path / "maps"}
    (names["photos"] / "images").mkdir(parents=True)
    (names["photos"] / "masks").mkdir()
    mask = np.zeros((48, 64), np.uint8)
    mask[8:24, 8:32] = 1
    for folder, picture in (("images", np.zeros((48, 64, 3), np.uint8)), ("masks", mask)):
        cv2.imwrite(str(names["photos"] / folder / "a.png"), picture)
    (names["photos"] / "labels.csv").write_text("image,labels\na.png,cat\n")
    (names["photos"] / "train.txt").write_text("a\n")

    def maps_of(scales):
        assert [view.shape[2:] for view in scales] == [data.scaled_size((48, 64), s) for s in (1, 0.5, 1.5, 2)]
        maps = mask[None] * np.float32(0.25)
        return maps[:, ::4, ::4], maps

    names["maps_of"] = maps_of
    exec(sources, names)
    assert names["threshold"] == 0.1 and names["miou"] > 0.98  # enlarged maps have rounder corners
    names = {"classifier": models.cam_classifier("resnet18", 20)}
    sides = [(round(96 * scale), round(128 * scale)) for scale in (1, 0.5, 1.5, 2)]
    names |= {"views": [torch.randn(2, 3, *side) for side in sides]}
    names["others"] = lambda step: (torch.randn(2, 3, 48, 48), torch.arange(20).expand(2, -1) == 5)
    exec(adapting.replace("steps=10", "steps=3"), names)
    assert names["result"].high_res.shape == (2, 96, 128) and names["result"].keys == [3, 11]
    classifier = models.cam_classifier("resnet18", 20)
    names = {"photo": np.zeros((48, 64, 3), np.uint8), "maps": torch.rand(2, 48, 64), "strided": torch.rand(2, 12, 16)}
    names |= {"cat_map": names["maps"][0], "dog_map": names["maps"][1]}
    names |= {"irn": models.irn_network("resnet18").eval(), "classifier": classifier.eval()}
    exec(masking, names)
    assert names["labels"].shape == (48, 64) and names["maps"].shape == (2, 48, 64)
    names = {"np": np, "width": 12, "height": 9, "photo": np.zeros((9, 12, 3), np.uint8)}
    names["softmax"] = torch.rand(21, 9, 12).softmax(0).numpy()
    exec(replacement, names)
    assert names["labels"].shape == (9, 12)

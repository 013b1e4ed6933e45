"""What is written agrees with what was measured and with what is there."""

import importlib.util
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_readme_shows_the_committed_results():
    spec = importlib.util.spec_from_file_location("tables", ROOT / "benchmarks" / "tables.py")
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    text = tables.README.read_text()
    assert tables.with_table(text) == text, "run `python benchmarks/tables.py`"


def test_named_files_and_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for name in ("README.md", "CONTRIBUTING.md", "docs/performance.md"):
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
    code, classifiers, sources, adapting, replacement = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    sides = {"maps_1x": (24, 32), "maps_05x": (12, 16), "maps_15x": (36, 47), "maps_2x": (47, 63)}
    names = {name: torch.rand(2, 3, *side) for name, side in sides.items()}
    names |= {"maps": torch.randn(2, 3, 24, 32), "present": torch.ones(2, 3, dtype=torch.bool)}
    names |= {"maps_a": [names["maps_1x"]], "maps_b": [names["maps_2x"]]}
    names |= {"images": torch.zeros(1, 12, 14, 3, dtype=torch.uint8), "p": torch.rand(1, 3, 12, 14).softmax(1)}
    names |= {"labels": torch.randint(3, (1, 12, 14), dtype=torch.uint8)}
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
    names = {"np": np, "width": 12, "height": 9, "photo": np.zeros((9, 12, 3), np.uint8)}
    names["softmax"] = torch.rand(21, 9, 12).softmax(0).numpy()
    exec(replacement, names)
    assert names["labels"].shape == (9, 12)

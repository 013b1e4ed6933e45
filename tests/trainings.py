"""What the tests of both trainings share."""

import json

import pictures
import pytest
import torch

from ribfast import data, models


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return data.open_source(pictures.draw(tmp_path_factory.mktemp("data") / "pictures", 9))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return backbone("resnet10", tmp_path_factory.mktemp("weights") / "backbone.safetensors")


def backbone(name, path):
    """One whose features neither vanish nor explode."""
    torch.manual_seed(0)
    state = models.cam_classifier(name, 1).state_dict()
    state = {name: value for name, value in state.items() if not name.startswith("classifier")}
    state |= {name: value * 0.6 for name, value in state.items() if name.endswith("bn2.weight")}
    models.save_checkpoint(path, state)
    return path


def lines(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]

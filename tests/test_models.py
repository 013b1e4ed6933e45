import os
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from ribfast import models
from ribfast.models.mobilenet import SamePadded

GOLDEN = Path(__file__).parent / "golden" / "rib_gap.npz"
WEIGHTS = Path(__file__).parents[2] / "shared" / "weights"
NO_WEIGHTS = pytest.mark.skipif(not WEIGHTS.exists(), reason="no real weights beside the checkout")


def golden_weight(name, shape):
    """What the golden runs were made with: drawn by each tensor's name."""
    draw = np.random.default_rng(zlib.crc32(name.encode()))
    if name.endswith("running_mean"):
        return draw.normal(0, 0.1, shape)
    if name.endswith("running_var"):
        return draw.uniform(0.5, 1.5, shape)
    if len(shape) == 1:
        if name.endswith("bias"):
            return draw.normal(0, 0.05, shape)
        return draw.uniform(0.8, 1.2, shape) * (0.3 if ".bn3." in name else 1.0)
    if name.startswith("classifier"):
        return draw.normal(0, 1, shape) * 0.004
    return draw.normal(0, 1, shape) * np.sqrt(2 / int(np.prod(shape[1:])))


def golden_state(model):
    names = [name for name in model.state_dict() if not name.endswith("num_batches_tracked")]
    return {
        name: torch.from_numpy(golden_weight(name, tuple(model.state_dict()[name].shape))).float() for name in names
    }


@pytest.mark.parametrize("name", models.NAMES)
def test_strides_and_what_trains(name):
    model = models.cam_classifier(name, 5)
    images = torch.randn(1, 3, 43, 68)
    trunk = model.trunk(images)
    assert trunk.shape[2:] == (6, 9) and not trunk.requires_grad
    maps = model(images)
    assert maps.shape == (1, 5, 3, 5) and torch.equal(maps, model.maps(trunk))
    maps.sum().backward()
    backbone, classifier = model.trained_parameters()
    assert all(p.grad is not None for p in backbone + classifier)
    trained = {id(p) for p in backbone + classifier}
    frozen = [p for p in model.parameters() if id(p) not in trained]
    assert frozen and all(p.grad is None and not p.requires_grad for p in frozen)
    assert sum(p.numel() for p in frozen) == sum(p.numel() for m in model.trunk_modules for p in m.parameters())


def test_batch_norm_keeps_its_statistics():
    model = models.cam_classifier("resnet18", 3).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model(torch.randn(4, 3, 33, 47) * 5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_first_map_equals_the_golden_runs():
    data = np.load(GOLDEN)
    model = models.cam_classifier("resnet50", 20)
    models.load_into(model, golden_state(model))
    base = torch.from_numpy(data["base"])
    with torch.no_grad():
        upright, mirrored = model(torch.stack([base, base.flip(-1)])).relu()
    total = (upright + mirrored.flip(-1)).sum().double()
    torch.testing.assert_close(total, torch.tensor(data["sums"][0]), rtol=1e-4, atol=0)


def test_tensorflow_padding():
    layer = SamePadded(1, 1, 3, 2, bias=False)
    torch.nn.init.ones_(layer.weight)
    ones = torch.ones(1, 1, 4, 5)
    # rows: none padded before, one after; columns (an odd number): one before and one after
    assert torch.equal(layer(ones)[0, 0], torch.tensor([[6.0, 9.0, 6.0], [4.0, 6.0, 4.0]]))
    wide = models.cam_classifier("mobilenet_v2", 2, tensorflow_padding=True)
    assert wide(torch.randn(1, 3, 65, 98)).shape == (1, 2, 5, 7)


def as_irn_writes_it(state):
    """Every tensor several times: of the ResNet, of its stages, of a list of these."""
    stages = {"conv1": "0.0", "bn1": "0.1", "layer1": "0.4", "layer2": "1.0", "layer3": "2.0", "layer4": "3.0"}
    written = {}
    for name, value in state.items():
        if name == "classifier.weight":
            written |= {name: value, "newly_added.0.weight": value}
            continue
        first, _, rest = name.partition(".")
        stage, place = stages[first].split(".")
        written |= {f"resnet50.{name}": value, f"stage{int(stage) + 1}.{place}.{rest}": value}
        written |= {f"backbone.{stage}.{place}.{rest}": value}
    return written | {"resnet50.fc.weight": torch.zeros(1000, 512), "resnet50.fc.bias": torch.zeros(1000)}


@pytest.mark.parametrize("form", ["irn", "stages alone", "safetensors", "wrapped"])
def test_checkpoints_of_every_writer(form, tmp_path):
    model, path = models.cam_classifier("resnet18", 20), tmp_path / "weights.pth"
    state = {name: value for name, value in model.state_dict().items() if not name.endswith("num_batches_tracked")}
    if form == "safetensors":
        path = tmp_path / "weights.safetensors"
        models.save_checkpoint(path, state | {"empty": torch.zeros(0, 3), "half": torch.ones(2).half()})
        loaded = models.load_checkpoint(path)
        assert loaded.pop("empty").shape == (0, 3) and loaded.pop("half").dtype == torch.float16
    else:
        written = as_irn_writes_it(state)
        if form == "stages alone":
            written = {name: value for name, value in written.items() if not name.startswith("resnet50.")}
        torch.save({"state_dict": state} if form == "wrapped" else written, path)
        loaded = models.load_checkpoint(path)
    assert loaded.keys() == state.keys() and all(torch.equal(loaded[name], state[name]) for name in state)
    other = models.cam_classifier("resnet18", 20)
    models.load_into(other, loaded)
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(other(images), model(images))


def test_refuses_wrong_checkpoints(tmp_path):
    model = models.cam_classifier("resnet18", 4)
    state = dict(model.state_dict())
    with pytest.raises(ValueError, match=r"a resnet50, got a checkpoint without .* and with"):
        models.load_into(models.cam_classifier("resnet50", 4), state)
    with pytest.raises(ValueError, match=r"expected classifier.weight of shape \(5, 512, 1, 1\), a classifier of 5"):
        models.load_into(models.cam_classifier("resnet18", 5), state)
    backbone = {name: value for name, value in state.items() if name != "classifier.weight"}
    with pytest.raises(ValueError, match=r"without classifier.weight .* pass classifier=False"):
        models.load_into(model, backbone)
    models.load_into(model, backbone, classifier=False)
    with pytest.raises(ValueError, match=r"finite weights, got NaN or infinity in bn1.weight"):
        models.load_into(model, state | {"bn1.weight": torch.full((64,), float("nan"))})
    for name, content in {
        "a.pth": b"nothing",
        "b.safetensors": b"\x05\0\0\0\0\0\0\0{true",
        "c.safetensors": b"",
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=r"load_checkpoint: expected a (state|safetensors)"):
            models.load_checkpoint(tmp_path / name)
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="expected a dict of tensors, got a list"):
        models.load_checkpoint(tmp_path / "list.pth")
    with pytest.raises(FileNotFoundError, match="expected a file"):
        models.load_checkpoint(tmp_path / "none.pth")
    with pytest.raises(ValueError, match="expected one of resnet10"):
        models.cam_classifier("vgg", 4)
    with pytest.raises(ValueError, match="n_classes of at least 1, got 0"):
        models.cam_classifier("resnet18", 0)


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("harmed",)


@pytest.mark.parametrize("prefix", ["model.", "module.", "backbone.", "net.encoder.", "module.model."])
def test_names_that_trainers_wrap(prefix, tmp_path):
    for network in ("resnet10", "mobilenet_v2"):
        state = models.cam_classifier(network, 3).state_dict()
        torch.save({"state_dict": {prefix + name: value for name, value in state.items()}}, tmp_path / "lit.pth")
        assert models.open_classifier(tmp_path / "lit.pth").name == network
        state["other.weight"] = torch.zeros(1)  # which nothing fits
        torch.save({prefix + name: value for name, value in state.items()}, tmp_path / "lit.pth")
        with pytest.raises(ValueError, match=r"with other.weight beside"):
            models.open_classifier(tmp_path / "lit.pth")


def test_what_a_file_holds_is_named(tmp_path):
    """Of a network in another's place, and of another size."""
    made = {"a classifier": models.cam_classifier("resnet10", 2), "IRN's network": models.irn_network("resnet10"),
            "a segmenter": models.segmenter("resnet10", 2)}  # fmt: skip
    openers = {"a classifier": models.open_classifier, "IRN's network": models.open_irn,
               "a segmenter": models.open_segmenter}  # fmt: skip
    for kind, network in made.items():
        path = tmp_path / f"{network.name if hasattr(network, 'name') else 'irn'}.safetensors"
        tensors = network.tensors() if hasattr(network, "tensors") else network.state_dict()
        models.save_checkpoint(path, tensors)
        for wanted, opener in openers.items():
            if wanted != kind:
                with pytest.raises(ValueError, match=rf"got {path}, {kind} on resnet10[,;]"):
                    opener(path)
        said = rf"tensors of a resnet18, got {path}, {kind} on resnet10, .*; choose network resnet10, which they fit"
        with pytest.raises(ValueError, match=said):
            openers[kind](path, network="resnet18")
        if kind != "a classifier":
            with pytest.raises(ValueError, match=rf"tensors of a resnet10, got {path}, {kind} on resnet10, without"):
                state = models.load_checkpoint(path)
                models.load_into(models.cam_classifier("resnet10", 2), state, classifier=False, path=path)


@pytest.mark.parametrize(("change", "message"), [
    (lambda value: value.to(torch.float8_e4m3fn), "of torch.float8_e4m3fn in"),
    (lambda value: value.to(torch.complex64), "of torch.complex64 in"),  # whose imaginary part would be dropped
    (lambda value: value.to("meta"), "of no values in"),
    (lambda value: value.flatten(1).to_sparse(), "of torch.sparse_coo in"),
])  # fmt: skip
def test_tensors_that_are_no_weights(change, message, tmp_path):
    state = models.cam_classifier("resnet10", 2).state_dict()
    state["conv1.weight"] = change(state["conv1.weight"])
    torch.save(state, tmp_path / "odd.pth")
    with pytest.raises(ValueError, match=rf"expected tensors of .*torch.float32.*, got conv1.weight {message}"):
        models.load_checkpoint(tmp_path / "odd.pth")


def test_pickles_run_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"conv1.weight": Hostile()}, tmp_path / "hostile.pth")
    with pytest.raises(ValueError, match="expected a state dict of tensors alone"):
        models.load_checkpoint(tmp_path / "hostile.pth")
    assert not (tmp_path / "harmed").exists()


@NO_WEIGHTS
@pytest.mark.parametrize("name", ["mobilenet_v2", "resnet18", "resnet50"])
def test_real_weights_see_a_cup(name, tmp_path):
    """The bundled photograph shows a cup of coffee; ImageNet calls such a mug, an espresso or a cup."""
    import cv2

    if name == "mobilenet_v2":
        path = WEIGHTS / "mobilenet_v2_imagenet.pth"
    else:
        path = tmp_path / "decoded.pth"
        subprocess.run([sys.executable, WEIGHTS / "decode.py", WEIGHTS / f"ktb_{name}.pth", path], check=True)
    model = models.cam_classifier(name, 1000, **({"tensorflow_padding": True} if name == "mobilenet_v2" else {}))
    models.load_into(model, models.load_checkpoint(path), classifier=False)
    whole = torch.load(path, weights_only=True)
    head = "classifier.1" if name == "mobilenet_v2" else "fc"
    weight, bias = whole[f"{head}.weight"].float(), whole[f"{head}.bias"].float()
    image = cv2.imread(str(Path(models.__file__).parents[1] / "assets" / "coffee.jpg"))[:, :, ::-1].copy()
    pixels = torch.from_numpy(image).permute(2, 0, 1).float()
    if name == "mobilenet_v2":
        pixels = pixels / 127.5 - 1
    else:
        mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        pixels = (pixels / 255 - mean[:, None, None]) / deviation[:, None, None]
    with torch.no_grad():
        features = model.tail(model.trunk(pixels[None])).mean((2, 3))
    best = (features @ weight.T + bias)[0].topk(3).indices.tolist()
    assert {504, 967, 968} & set(best)

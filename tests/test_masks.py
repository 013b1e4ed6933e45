"""From class maps to masks: every method on small photographs, and the stage and commands around them."""

import dataclasses
import json
import shutil

import numpy as np
import pictures
import pytest
import torch

from ribfast import config, data, masks, models, ops
from ribfast.cams import enlarge_cams
from ribfast.cli import main
from ribfast.masks import MaskConfig
from ribfast.pipeline import MasksConfig, make_masks
from ribfast.pipeline import masks as stage
from ribfast.store import Store, open_masks

METHODS = ["threshold", "crf", "labels", "ppmg", "par", "pamr", "irn"]
SIZE = (51, 70)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return pictures.draw(tmp_path_factory.mktemp("data") / "pictures", 6, SIZE)


@pytest.fixture(scope="module")
def source(folder):
    return data.open_source(folder)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return models.irn_network("mobilenet_v2").eval()


@pytest.fixture(scope="module")
def maps(source, tmp_path_factory):
    """Of the images that have classes: blurred versions of their masks."""
    store = Store(tmp_path_factory.mktemp("maps"))
    for item in source:
        if item.classes:
            mask = torch.from_numpy(source.mask(item))
            planes = torch.stack([(mask == key + 1).float() for key in item.classes])
            cam = torch.nn.functional.adaptive_avg_pool2d(planes, tuple(-(-side // 4) for side in SIZE))
            store.save(item.name, item.classes, cam / cam.amax((1, 2), keepdim=True).clamp(min=1e-5), size=SIZE)
    return store


def preset(method, **changes):
    return dataclasses.replace(getattr(MasksConfig, method)(), device="cpu", padded=0, **changes)


def test_memory_is_bounded_by_pixels_at_once(source, maps, monkeypatch, tmp_path):
    """Those of large photographs are made one after another, and are the same."""
    counts, together, found = [], masks.make_masks, []

    def counted(images, *more):
        counts[-1].append(len(images))
        return together(images, *more)

    monkeypatch.setattr(masks, "make_masks", counted)
    for pixels in (1, 2 * SIZE[0] * SIZE[1], stage.PIXELS):
        counts.append([])
        monkeypatch.setattr(stage, "PIXELS", pixels)
        store = Store(tmp_path / str(pixels))
        make_masks(source, maps, store, preset("crf"))
        found.append([store.load_mask(item.name).tobytes() for item in source])
    assert counts == [[1] * 5, [2, 2, 1], [5]] and found[0] == found[1] == found[2]


def by_hand(item, source, maps, method, network):
    """One image alone, by the functions that the methods are made of."""
    image, own = source.image(item), maps.load(item.name)
    keys, large, cam = own.keys.tolist(), torch.from_numpy(own.high_res), own.cam
    picture, c = torch.from_numpy(image), preset(method)
    names = torch.tensor([0, *(key + 1 for key in keys)], dtype=torch.uint8)
    with_background = torch.cat([torch.full((1, *SIZE), c.background), large])
    if method == "threshold":
        return names[with_background.argmax(0)]
    if method == "crf":
        return names[ops.dense_crf_labels([picture], [with_background.argmax(0).byte()], len(keys) + 1)[0].int()]
    if method == "labels":
        return masks.confident_labels(picture, large, keys)
    if method == "ppmg":
        return masks.ppmg(picture, dict(zip(keys, large.clamp(0, 1), strict=True)))
    if method == "irn":
        return masks.walk_labels(cam, keys, masks.boundaries(network, image, padded=0), SIZE)
    refined = ops.refine(picture.permute(2, 0, 1)[None], with_background[None], method=method)
    return names[refined[0].argmax(0)]


@pytest.mark.parametrize("method", METHODS)
def test_every_method(source, maps, network, method, tmp_path):
    store = Store(tmp_path)
    network_of = {"network": network} if method == "irn" else {}
    made = make_masks(source, maps, store, preset(method, batch=4), **network_of)
    assert (made.made, made.kept, made.without_classes, made.failed) == (6, 0, 1, {})
    differ = 0
    for item in source:
        found = store.load_mask(item.name)
        if item.classes:
            expected = by_hand(item, source, maps, method, network).numpy()
            differ += (found != expected).mean()
            assert set(np.unique(found)) <= {0, 255, *(key + 1 for key in item.classes)}
        else:
            assert not found.any()
    assert differ / 5 < 1e-3  # images that run together may round otherwise
    again = make_masks(source, maps, store, preset(method), **network_of)
    assert (again.made, again.kept) == (0, 6)


def test_fields_reach_their_methods(network):
    """A method's constants change its masks: of smooth maps, on a photograph that is mostly noise."""
    image = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    cam = torch.nn.functional.interpolate(torch.rand(1, 2, 5, 6), (13, 18), mode="bilinear")[0] ** 3
    arguments = [image], [cam], [enlarge_cams(cam, SIZE)], [[0, 1]]
    changes = {
        "threshold": [{"background": 0.8}],
        "crf": [{"background": 0.8}, {"bilateral": (50.0, 5.0, 60.0)}, {"iterations": 0}],
        "labels": [{"foreground": 0.95}, {"background": 0.29}],
        "ppmg": [{"power": 2.0}, {"least": 0.7}, {"cv_scale": 2.0}, {"iterations": 0}],
        "par": [{"background": 0.8}, {"dilations": (1,)}],
        "irn": [{"background": 0.9}, {"power": 6.0}, {"log2_steps": 1}],
    }
    for method, fields in changes.items():
        usual = masks.make_masks(*arguments, preset(method), network)[0]
        for field in fields:
            assert not torch.equal(masks.make_masks(*arguments, preset(method, **field), network)[0], usual), (
                method,
                field,
            )


def test_presets_are_the_published_constants():
    rib, labels, ppmg = MaskConfig.rib(), MaskConfig.rib_labels(), MaskConfig.ppmg()
    assert (rib.background, rib.power, rib.beta, rib.log2_steps, rib.radius) == (0.27, 1.3, 10, 8, 5)
    assert (labels.foreground, labels.background) == (0.35, 0.17)
    assert (ppmg.power, ppmg.least, ppmg.cv_scale, ppmg.gaussian, ppmg.bilateral) == (
        11,
        0.05,
        0.3,
        (3, 10),
        (80, 13, 10),
    )
    assert MaskConfig.coco().background == 0.22 and MaskConfig.irn().background == 0.25
    assert config.presets(MasksConfig)[0] == "crf"


def test_one_bad_image_stops_nothing(source, maps, tmp_path):
    """Maps that are missing, and of another size, are named; the others' masks are made."""
    some = Store(tmp_path / "maps")
    for item in source[1:5]:
        own = maps.load(item.name)
        size = (20, 20) if item is source[2] else SIZE
        cam = own.cam[:, : -(-size[0] // 4), : -(-size[1] // 4)]
        some.save(item.name, own.keys, cam, size=size)
    store = Store(tmp_path / "masks")
    made = make_masks(source, some, store, preset("crf", batch=2))
    assert made.made == 4 and made.failed.keys() == {source[0].name, source[2].name} == store.failures().keys()
    assert "expected maps of" in made.failed[source[0].name]
    assert "expected maps of the photograph's (51, 70) pixels, got (20, 20)" in made.failed[source[2].name]
    assert make_masks(source, maps, store, preset("crf")).made == 2 and not store.failures()


def test_maps_that_are_none_stop_nothing(source, maps, network, tmp_path):
    """NaN, other classes, negative values in files of other tools: that image fails by name, in a block with others."""
    bad, good = source[0], source[1]
    own, other = maps.load(bad.name), maps.load(good.name)
    spoilt = {
        "NaN or infinity": (own.keys, own.cam * float("nan"), own.high_res * float("nan")),
        "they are another data set's": (torch.tensor([300]), own.cam[:1], own.high_res[:1]),
    }
    for number, (reason, (keys, cam, high_res)) in enumerate(spoilt.items()):
        store = Store(tmp_path / str(number), "irn")
        for item in source[2:5]:
            store.save(item.name, *maps.load(item.name)[:3])
        store.save(good.name, good.classes, other.cam, other.high_res)
        content = {"keys": keys, "cam": cam, "high_res": np.asarray(high_res)}
        np.save(store.path(bad.name), np.array(content, dtype=object), allow_pickle=True)
        for method in ("threshold", "labels", "ppmg", "irn"):
            made = make_masks(source, store, Store(tmp_path / f"{number}{method}"), preset(method),
                              **({"network": network} if method == "irn" else {}))  # fmt: skip
            assert made.made == 5 and made.failed.keys() == {bad.name}, (method, reason)
            assert reason in made.failed[bad.name]


def test_refusals(source, maps, tmp_path):
    with pytest.raises(ValueError, match="expected IRN's network for method irn, got none; train it first"):
        make_masks(source, maps, Store(tmp_path), preset("irn"))
    wrong = {"background": 1, "confidence": 2, "iterations": -1, "dilations": (), "least": float("nan"), "power": -2,
             "beta": 0, "gaussian": (0, 3), "radius": 1}  # fmt: skip
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=f"expected .*{name}"):
            MaskConfig(**{name: value})
    with pytest.raises(ValueError, match="shard: expected i/n"):
        MasksConfig(shard="9/4")
    with pytest.raises(ValueError, match="expected 0 <= background <= foreground < 1"):
        MaskConfig(method="labels", background=0.5, foreground=0.3)


def test_commands_from_maps_to_a_trained_network_to_masks(folder, source, maps, tmp_path, capsys):
    """labels -> train-irn -> masks, and what they refuse."""
    given = ["--data", folder, "--maps", str(maps.folder), "--device", "cpu"]
    assert main(["masks", *given, "--preset", "labels", "--out", str(tmp_path / "labels")]) == 0
    small = ["--network", "mobilenet_v2", "--crop", "64", "--radius", "4", "--epochs", "1", "--batch", "2"]
    train = ["train-irn", "--data", folder, "--labels", str(tmp_path / "labels"), "--out", str(tmp_path / "irn")]
    assert main([*train, *small, "--device", "cpu", "--workers", "0"]) == 0
    trained = tmp_path / "irn" / "irn.safetensors"
    walk = ["masks", *given, "--preset", "rib", "--padded", "0", "--out", str(tmp_path / "walked")]
    assert main(walk) == 1 and "expected --irn with method irn" in capsys.readouterr().err
    assert main([*walk, "--irn", str(trained)]) == 0
    network, item = models.open_irn(trained), source[0]
    own = maps.load(item.name)
    edge = masks.boundaries(network, source.image(item), padded=0)
    expected = masks.walk_labels(own.cam, own.keys, edge, SIZE, background=0.27, power=1.3)
    assert (open_masks(tmp_path / "walked").load_mask(item.name) == expected.numpy()).mean() > 0.999
    assert main([*walk, "--irn", str(trained), "--background", "0.5"]) == 1  # another run's masks are there
    assert "background (here 0.5, there 0.27)" in capsys.readouterr().err
    capsys.readouterr()
    assert main(["masks", *given, "--out", str(tmp_path / "walked")]) == 1  # crf's in place of rib's
    assert "method (here crf, there irn)" in capsys.readouterr().err
    assert main(["train-irn", *train[1:-1], str(tmp_path / "labels"), *small]) == 1
    assert "which `masks` began; choose another --out" in capsys.readouterr().err
    before = sorted((tmp_path / "walked").rglob("*.png"))
    with pytest.raises(SystemExit):
        main([*walk, "--irn", str(trained), "--overwrite", "--confidence", "2"])
    assert sorted((tmp_path / "walked").rglob("*.png")) == before
    evaluated = ["eval", "--data", folder, "--masks", str(tmp_path / "walked")]
    assert main(evaluated) == 0 and "IoU" in capsys.readouterr().out


def test_what_no_run_made_is_not_touched(folder, source, maps, tmp_path, capsys):
    """--overwrite removes what this command made: neither ground truth nor the maps of another run."""
    root = tmp_path / "photographs"
    shutil.copytree(folder.removeprefix("folder:"), root)
    given = ["masks", "--data", f"folder:{root}", "--maps", str(maps.folder), "--device", "cpu", "--out"]
    others = tmp_path / "others"  # in the same form, and not this data's
    shutil.copytree(root, others)
    for out, said in ((root, "expected an --out apart from the data"), (others, "no config.json that says whose")):
        for more in ([], ["--overwrite"]):
            assert main([*given, str(out), *more]) == 1
            assert said in capsys.readouterr().err
        assert len(list((out / "masks").glob("*.png"))) == 6 and not (out / "config.json").exists()
    cams = tmp_path / "cams"
    shutil.copytree(maps.folder, cams)
    config.write(cams / "config.json", MasksConfig(), command="cam")
    count = len(list(cams.rglob("*.npz")))
    for inner in (cams, cams / "maps"):
        assert main([*given[:4], str(inner), *given[5:], str(cams), "--overwrite"]) == 1
        assert "which `cam` began; choose another --out" in capsys.readouterr().err
    assert len(list(cams.rglob("*.npz"))) == count == 5
    assert main([*given, str(tmp_path / "masks")]) == 0
    assert main([*given, str(tmp_path / "masks"), "--overwrite"]) == 0
    assert main([*given, str(tmp_path / "ppmg"), "--preset", "ppmg", "--background-from", "x.json"]) == 1
    assert "expected --background-from with a method that cuts maps at one threshold" in capsys.readouterr().err


def test_masks_of_maps_that_were_made_anew(folder, maps, tmp_path, capsys):
    """A run that goes on is told apart from one on other maps in the same place."""
    cams = tmp_path / "cams"
    shutil.copytree(maps.folder, cams)
    config.write(cams / "config.json", MasksConfig(), command="cam", inputs={"checkpoint": "1" * 64})
    given = ["masks", "--data", folder, "--maps", str(cams), "--device", "cpu", "--out", str(tmp_path / "masks")]
    assert main(given) == 0 and main(given) == 0
    config.write(cams / "config.json", MasksConfig(), command="cam", inputs={"checkpoint": "2" * 64})
    assert main(given) == 1 and "got another run" in capsys.readouterr().err


def test_background_from_an_evaluation(folder, source, maps, tmp_path):
    """The threshold that was best for maps is what their masks are cut at."""
    assert main(["eval", "--data", folder, "--maps", str(maps.folder), "--out", str(tmp_path)]) == 0
    best = tmp_path / "evaluation.json"
    given = ["--data", folder, "--maps", str(maps.folder), "--device", "cpu", "--out", str(tmp_path / "masks")]
    assert main(["masks", *given, "--preset", "threshold", "--background-from", str(best)]) == 0
    threshold = json.loads(best.read_text())["best"]["threshold"]
    item = source[0]
    own = maps.load(item.name)
    assert torch.equal(torch.from_numpy(own.high_res), enlarge_cams(own.cam, SIZE))
    expected = (own.high_res > np.float32(threshold)).any(0)
    assert ((Store(tmp_path / "masks").load_mask(item.name) > 0) == expected).all()

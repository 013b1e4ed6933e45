import dataclasses

import numpy as np
import pictures
import pytest
import torch
from test_claims import die_with
from torch.nn import functional as F

from ribfast import data, models
from ribfast.cams import merge_cams, multi_crop_cams
from ribfast.metrics import Confusion, PerImage, bootstrap_interval
from ribfast.pipeline import (
    AdaptConfig,
    CamConfig,
    EvaluateConfig,
    MasksConfig,
    evaluate_maps,
    evaluate_masks,
    make_cams,
    make_masks,
)
from ribfast.store import Store, open_masks


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return data.open_source(pictures.draw(tmp_path_factory.mktemp("data") / "pictures", 6, (51, 70)))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = models.cam_classifier("resnet18", 2)
    model.classes = pictures.CLASSES
    return model


def naive(model, image, classes, normalization=data.IMAGENET):
    """As IRN computes it."""
    height, width = image.shape[:2]
    small = large = 0
    for scale in (1.0, 0.5, 1.5, 2.0):
        pixels = torch.from_numpy(data.rescale(image, (round(height * scale), round(width * scale))))
        mean, std = (torch.tensor(part)[:, None, None] for part in normalization)
        view = (pixels.permute(2, 0, 1) / 255 - mean) / std
        with torch.no_grad():
            maps = model(torch.stack([view, view.flip(-1)])).relu()
        summed = (maps[0] + maps[1].flip(-1))[None]
        quarter = -(-height // 4), -(-width // 4)
        small = small + F.interpolate(summed, quarter, mode="bilinear", align_corners=False)[0]
        padded = -(-height // 16) * 16, -(-width // 16) * 16
        large = large + F.interpolate(summed, padded, mode="bilinear", align_corners=False)[0, :, :height, :width]
    return [(m / (m.amax((1, 2), keepdim=True) + 1e-5))[list(classes)] for m in (small, large)]


@pytest.mark.parametrize("normalization", ["imagenet", "symmetric"])
def test_cams_equal_the_naive_ones(source, model, normalization, tmp_path):
    model = copied(model, normalization)
    store = Store(tmp_path, "irn")
    made = make_cams(source, model, store, CamConfig(device="cpu"))
    assert (made.made, made.kept, made.without_classes, made.failed) == (5, 0, 1, {})
    known = store.metrics()
    assert known.keys() == {item.name for item in source} and not store.failures()
    assert known["p5"] == {"skipped": "no classes"} and "p5" not in store and known["p0"]["seconds"] > 0
    for item in source[:-1]:
        maps = store.load(item.name)
        small, large = naive(model, source.image(item), item.classes, data.NORMALIZATIONS[normalization])
        assert maps.keys.tolist() == list(item.classes)
        torch.testing.assert_close(maps.cam, small, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(torch.from_numpy(maps.high_res), large, rtol=1e-3, atol=1e-3)


def test_cams_of_crops(source, model, tmp_path):
    config = CamConfig(scales=(1.0, 1.5), crop=48, stride=32, device="cpu")
    store = Store(tmp_path, high_res=True)
    assert make_cams(source, model, store, config).made == 5
    for item in source[:-1]:
        maps = store.load(item.name)
        expected = multi_crop_cams(model, source.image(item), item.classes, scales=(1.0, 1.5), crop=48, stride=32)
        torch.testing.assert_close(torch.from_numpy(maps.high_res), expected, rtol=0, atol=1e-3)
        corner = expected[:, 48:51, 68:70].mean((1, 2))  # of a size that is no multiple of 4, what there is
        torch.testing.assert_close(maps.cam[:, 12, 17].float(), corner, rtol=0, atol=1e-3)
    assert (CamConfig.pmm().crop, CamConfig.pmm().stride, max(CamConfig.pmm().scales)) == (448, 300, 3.0)
    with pytest.raises(ValueError, match="expected 0 < stride <= crop, got stride 300 and crop 48"):
        CamConfig(crop=48)


@pytest.mark.parametrize("crop", [0, 24])
def test_large_photographs_are_reduced_and_their_maps_are_not(source, model, crop, tmp_path):
    config = CamConfig(scales=(1.0, 0.5), crop=crop, stride=crop or 300, device="cpu", largest=None)
    whole, same, store = (Store(tmp_path / name, high_res=True) for name in ("whole", "same", "reduced"))
    for own, largest in ((whole, None), (same, 70), (store, 35)):
        assert make_cams(source, model, own, dataclasses.replace(config, largest=largest)).made == 5
    for item in source[:-1]:
        assert same.path(item.name).read_bytes() == whole.path(item.name).read_bytes()
        image, maps = data.reduce_to(source.image(item), 35), store.load(item.name)
        assert image.shape == (26, 35, 3) and maps.size == (51, 70) and maps.cam.shape[1:] == (13, 18)
        if crop:
            expected = multi_crop_cams(model, image, item.classes, scales=config.scales, crop=crop, stride=crop)
        else:
            with torch.no_grad():
                views = [model(view) for view in data.make_views(image, config.scales)]
            expected = merge_cams(views, item.classes, (26, 35))[1]
        expected = F.interpolate(expected[None], (51, 70), mode="bilinear")[0]
        difference = (torch.from_numpy(maps.high_res) - expected).abs().mean()
        assert difference < 0.03  # enlarged at once; 0.11 where they are enlarged to other multiples of 16
    assert evaluate_maps(source, store, EvaluateConfig("0.1:0.6:0.1"))["images"] == 6
    masked = make_masks(source, store, Store(tmp_path / "masks"), MasksConfig(device="cpu"))
    assert (masked.made, masked.without_classes) == (6, 1)
    for wrong in (CamConfig, AdaptConfig):
        with pytest.raises(ValueError, match="largest of at least 1, or none, got"):
            wrong(largest=0)


def copied(model, normalization):
    copy = models.cam_classifier(model.name, model.n_classes)
    models.load_into(copy, model.state_dict())
    copy.classes, copy.normalization = model.classes, normalization
    return copy


def test_merging_takes_sums_without_mirrors(model):
    """Rectified maps, mirrors turned back and added beforehand, merge to the same."""
    maps = [torch.randn(2, 3, *side) for side in ((4, 5), (2, 3), (7, 8))]
    summed = [(m[:1].relu() + m[1:].relu().flip(-1)) for m in maps]
    for found, expected in zip(merge_cams(summed, torch.tensor([2, 0]), (51, 70)), merge_cams(maps, (2, 0), (51, 70)),
                               strict=True):  # fmt: skip
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert found.shape == (2, 51, 70) and found.amax() <= 1


def test_killed_runs_go_on_and_shards_make_the_same_files(source, model, tmp_path):
    config = CamConfig(scales=(1.0, 0.5), device="cpu")
    whole = Store(tmp_path / "whole")
    make_cams(source, model, whole, config)

    def killed(done, total, name):
        if done == 3:
            raise KeyboardInterrupt

    broken = Store(tmp_path / "broken")
    with pytest.raises(KeyboardInterrupt):
        make_cams(source, model, broken, config, progress=killed)
    kept = len(broken.names())
    assert kept >= 2
    again = make_cams(source, model, broken, config)
    assert again.kept == kept and again.made == 5 - kept
    parts = Store(tmp_path / "parts")
    made = [make_cams(source, model, parts, dataclasses.replace(config, shard=f"{i}/3")).made for i in range(3)]
    assert made == [2, 2, 1]
    for store in (broken, parts):
        assert store.names() == whole.names() == ["p0", "p1", "p2", "p3", "p4"]
        for name in whole.names():
            assert store.path(name).read_bytes() == whole.path(name).read_bytes()
        assert (store.folder / "metrics.jsonl").read_text().count("no classes") == 1


def test_one_of_several_begins_with_its_share_and_goes_on_with_the_rest(source, model, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    store, seen = Store(tmp_path), []
    config = CamConfig(scales=(1.0,), device="cpu")
    made = make_cams(source, model, store, config, progress=lambda *facts: seen.append(facts))
    assert seen == [(i + 1, 6, name) for i, name in enumerate(("", "p1", "p3", "p4", "p2", "p0"))]
    assert (made.made, made.elsewhere, made.without_classes) == (5, 0, 1) and not (tmp_path / "claims").exists()


def test_what_others_make_meanwhile_counts(model, tmp_path):
    """Here by the hand of the one that is told of the first image."""
    source = data.open_source(pictures.draw(tmp_path / "data", 12, (48, 60)))
    store, seen = Store(tmp_path / "out"), []

    def other(done, total, name):
        seen.append((done, total))
        if done == 2:
            for later in ("p8", "p9"):
                store.record(later, seconds=1.0)
                store.path(later).write_bytes(store.path(name).read_bytes())
            store.fail("p10", "by another")

    config = CamConfig(scales=(1.0,), device="cpu", workers=0)
    made = make_cams(source, model, store, config, progress=other)
    assert (made.made, made.elsewhere, made.failed) == (8, 2, {"p10": "by another"}) and seen[-1] == (12, 12)


def test_an_unreadable_image_stops_no_other(model, tmp_path):
    spec = pictures.draw(tmp_path / "data", 4)
    bad, good = tmp_path / "data" / "images" / "p1.png", tmp_path / "data" / "images" / "p0.png"
    bad.write_bytes(b"nothing")
    source, store = data.open_source(spec), Store(tmp_path / "out")
    made = make_cams(source, model, store, CamConfig(scales=(1.0,), device="cpu"))
    assert made.made == 2 and list(made.failed) == ["p1"] and "p1.png" in store.failures()["p1"]
    bad.write_bytes(good.read_bytes())
    made = make_cams(source, model, store, CamConfig(scales=(1.0,), device="cpu"))
    assert (made.made, made.kept, made.failed) == (1, 2, {}) and store.failures() == {}


def test_what_three_processes_died_with_is_a_failure_until_the_next_start(source, model, tmp_path, caplog):
    die_with(tmp_path / "claims", "maps p1", "maps p1", "maps p1 by itself", "maps p2", "maps p2", "maps p3")
    store, seen, config = Store(tmp_path), [], CamConfig(scales=(1.0,), device="cpu")
    made = make_cams(source, model, store, config, progress=lambda *facts: seen.append(facts))
    assert made.made == 4 and list(made.failed) == ["p1"] and store.failures() == made.failed
    assert made.failed["p1"].startswith("3 processes died with it, ") and store.deaths() == {"p1": 3}
    assert [name for _, _, name in seen] == ["", "p0", "p3", "p4", "p1", "p2"] and seen[-1][:2] == (6, 6)
    assert "2 processes died with maps p2, or what was beside it: it is taken by itself" in caplog.text
    assert not (tmp_path / "claims").exists()
    die_with(tmp_path / "claims", "maps p1 by itself")  # the next start's, which tried it
    made = make_cams(source, model, store, config)
    assert made.failed["p1"].startswith("4 processes died with it") and store.deaths() == {"p1": 4}
    caplog.clear()
    assert make_cams(source, model, store, config).made == 1 and not store.failures() and not store.deaths()
    assert "4 processes died with maps p1" in caplog.text


def test_refuses_a_classifier_of_other_classes(source, model, tmp_path):
    other = models.cam_classifier("resnet18", 3)
    with pytest.raises(ValueError, match=r"data's classes \(square, disc\), got one of 3"):
        make_cams(source, other, Store(tmp_path))
    swapped = dataclasses.replace(source, classes=("disc", "square"))
    with pytest.raises(ValueError, match=r"data's classes \(disc, square\), got one of square, disc"):
        make_cams(swapped, model, Store(tmp_path))
    for text in ("1", "2/2", "a/b", "-1/2"):
        with pytest.raises(ValueError, match="expected i/n"):
            CamConfig(shard=text)
    with pytest.raises(ValueError, match="expected scales above 0"):
        CamConfig(scales=())


def test_evaluation_of_maps_that_are_right(source, tmp_path):
    store = Store(tmp_path, high_res=True)
    with pytest.raises(FileNotFoundError, match=r"maps of 6 images .* got none of p0, p1, p2, p3, p4"):
        evaluate_maps(source, store)
    for item in source[:-1]:
        mask = source.mask(item)
        high_res = np.stack([np.where(mask == c + 1, 0.5, 0.1875) for c in item.classes])
        store.save(item.name, item.classes, np.zeros((len(item.classes), 13, 18)), high_res)
    result = evaluate_maps(source, store, EvaluateConfig("0.1:0.6:0.1"))
    assert result["thresholds"] == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6] and result["images"] == 6
    assert result["best"] == {"threshold": 0.2, "miou": 1.0, "at_end": False} and result["mious"][0] < 0.5
    for measure in ("ious", "precision", "recall", "f1"):
        assert result[measure] == {"background": 1.0, "square": 1.0, "disc": 1.0}
    assert result["interval"] == {"low": 1.0, "high": 1.0, "confidence": 0.95, "resamples": 1000, "seed": 0}
    result = evaluate_maps(source, store, EvaluateConfig("0.1:0.6:0.1"), threshold=0.55)
    assert result["reported"]["threshold"] == 0.55 and result["reported"]["miou"] < 0.4
    assert result["best"]["threshold"] == 0.2 and len(result["thresholds"]) == 7
    bare = dataclasses.replace(source, items=tuple(dataclasses.replace(i, mask=None) for i in source))
    with pytest.raises(ValueError, match="expected images with masks, got 6 without any"):
        evaluate_maps(bare, store)
    for text in ("0.1", "0:1", "0:1:0", "1:0:0.1", "a:b:c", "0:1:1e-3", "0:1:1e-9"):
        with pytest.raises(ValueError, match="expected thresholds lowest:highest:step"):
            EvaluateConfig(text)


def noisy(source, store, rng):
    """Maps that are right here and there."""
    for item in source:
        if item.classes:
            mask = source.mask(item)[::4, ::4]
            cam = np.stack([0.5 * (mask == c + 1) + 0.5 * rng.random(mask.shape) for c in item.classes])
            high_res = cam.repeat(4, 1).repeat(4, 2)[:, :51, :70]
            store.save(item.name, item.classes, cam, high_res)


@pytest.mark.parametrize("format", ["npz", "npz, high_res", "irn", "pmm"])
def test_evaluation_equals_the_loaded_maps_one_by_one(source, format, tmp_path):
    store = Store(tmp_path, format.partition(",")[0], high_res="," in format)
    noisy(source, store, np.random.default_rng(4))
    results = [evaluate_maps(source, store, EvaluateConfig("0:0.9:0.1", workers=w, resamples=50)) for w in (0, 1, 3)]
    assert results[0] == results[1] == results[2]
    result, thresholds = results[0], results[0]["thresholds"]
    at, images = thresholds.index(result["reported"]["threshold"]), PerImage(2)
    for index, threshold in enumerate(thresholds):
        confusion = Confusion(2)
        for item in source:
            mask = source.mask(item)
            labels = np.zeros(mask.shape, int)
            if item.classes:
                maps = store.load(item.name)
                stacked = np.concatenate([np.full((1, *mask.shape), np.float32(threshold)), maps.high_res])
                labels = np.array([0, *(maps.keys + 1).tolist()])[stacked.argmax(0)]
            confusion.add(labels, mask)
            if index == at:
                images.add_matrix(Confusion(2).count(labels, mask))
        assert result["mious"][index] == pytest.approx(confusion.miou(), rel=1e-12)
        if index == at:
            for measure, values in (("ious", confusion.iou()), ("precision", confusion.precision()),
                                    ("recall", confusion.recall()), ("f1", confusion.f1())):  # fmt: skip
                assert list(result[measure].values()) == values.tolist()
    low, high = bootstrap_interval(images.numbers(), resamples=50)
    assert (result["interval"]["low"], result["interval"]["high"]) == (low, high) and low < result["best"][
        "miou"
    ] < high
    without = evaluate_maps(source, store, EvaluateConfig("0:0.9:0.1", resamples=0))
    assert without.pop("interval") is None and without == {k: v for k, v in result.items() if k != "interval"}


def test_evaluation_refuses(source, tmp_path):
    store = Store(tmp_path)
    noisy(source, store, np.random.default_rng(4))
    store.save("p1", [1], np.zeros((1, 13, 17)), size=(51, 68))
    with pytest.raises(ValueError, match=r"evaluate: p1: expected maps of the mask's size \(51, 70\), got \(51, 68\)"):
        evaluate_maps(source, store)
    store.save("p1", [2], np.zeros((1, 13, 18)), size=(51, 70))
    with pytest.raises(ValueError, match=r"evaluate: p1: .*each key once and in 0..1, got \[2\]"):
        evaluate_maps(source, store)
    for options in ({"workers": -1}, {"resamples": -1}, {"confidence": 1.0}):
        with pytest.raises(ValueError, match="EvaluateConfig: expected"):
            EvaluateConfig(**options)


def test_evaluation_of_masks(source, tmp_path):
    store, confusion, rng, images = Store(tmp_path), Confusion(2), np.random.default_rng(1), PerImage(2)
    with pytest.raises(FileNotFoundError, match=r"expected masks of 6 images .* got none of p0"):
        evaluate_masks(source, store)
    for item in source:
        mask = source.mask(item)
        labels = np.where(rng.random(mask.shape) < 0.3, rng.integers(0, 3, mask.shape), mask)
        matrix = confusion.count(labels, mask)
        confusion.matrix += matrix
        images.add_matrix(matrix)
        labels[(labels == 0) & (rng.random(mask.shape) < 0.1)] = 255  # unsure: background
        store.save_mask(item.name, labels)
    config = EvaluateConfig(resamples=50)
    result = evaluate_masks(source, store, config)
    assert result == evaluate_masks(source, open_masks(tmp_path / "masks"), dataclasses.replace(config, workers=0))
    assert result["reported"] == {"miou": confusion.miou()} and 0.05 < result["unsure"] < 0.1
    assert list(result["ious"].values()) == confusion.iou().tolist()
    assert (result["interval"]["low"], result["interval"]["high"]) == bootstrap_interval(images.numbers(), resamples=50)
    store.save_mask("p2", np.full((51, 70), 3))
    with pytest.raises(ValueError, match=r"evaluate: p2: .*labels of 0 to 2, got 3"):
        evaluate_masks(source, store)
    store.save_mask("p2", np.zeros((70, 51), int))
    with pytest.raises(
        ValueError, match=r"evaluate: p2: expected labels of the mask's size \(51, 70\), got \(70, 51\)"
    ):
        evaluate_masks(source, store)

import dataclasses
import json
import shutil

import cv2
import numpy as np
import pictures
import pytest
import torch
from torch.nn import functional as F

from ribfast import data, models, ops, pipeline
from ribfast.cli import main
from ribfast.data.decode import VOC_PALETTE
from ribfast.pipeline import PredictConfig, predict_masks
from ribfast.segment import label_probabilities
from ribfast.store import Store

SIZES = ((40, 56), (40, 56), (33, 61), (1, 1), (3, 90))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A network that has learnt nothing, whose labels differ all the same."""
    torch.manual_seed(0)
    model = models.segmenter("mobilenet_v2", 2)
    with torch.no_grad():
        for name, p in model.head.named_parameters():
            p.normal_(0, 0.3 if name.endswith("weight") else 0.0)
    model.classes = pictures.CLASSES
    path = tmp_path_factory.mktemp("checkpoint") / "segmenter.safetensors"
    models.save_checkpoint(path, model.tensors(), model.metadata())
    return path


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "photos" / "below").mkdir(parents=True)
    for number, size in enumerate(SIZES):
        image = cv2.resize(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8), size[::-1], interpolation=cv2.INTER_CUBIC)
        cv2.imwrite(str(tmp_path / "photos" / ("below" if number == 2 else "") / f"p{number}.png"), image)
    return tmp_path / "photos"


def test_any_folder_of_photographs(checkpoint, folder, tmp_path, capsys):
    (folder / "broken.jpg").write_bytes(b"\xff\xd8nothing")
    out = tmp_path / "out"
    words = ["predict", "--images", str(folder), "--checkpoint", str(checkpoint), "--out", str(out)]
    assert main([*words, "--scales", "1,1.5", "--batch", "3"]) == 3
    assert "5 made, 0 there before, 0 without classes, 1 failed" in capsys.readouterr().err
    store, model = Store(out), models.open_segmenter(checkpoint)
    assert store.mask_names() == ["below/p2", "p0", "p1", "p3", "p4"]
    assert list(store.failures()) == ["broken"] and "a picture that OpenCV reads" in store.failures()["broken"]
    seen = set()
    for name, size in zip(("p0", "p1", "below/p2", "p3", "p4"), SIZES, strict=True):
        image = data.open_images(folder / f"{name}.png", pictures.CLASSES)
        (found,) = label_probabilities(model, [image.image(image[0])], scales=(1.0, 1.5))
        labels = store.load_mask(name)
        assert labels.shape == size and (labels == found.argmax(0).numpy()).mean() > 0.999
        seen |= {*np.unique(labels)}
    assert len(seen) > 1
    bgr = cv2.imread(str(store.mask_path("p0")), cv2.IMREAD_COLOR)
    assert np.array_equal(bgr[..., ::-1], VOC_PALETTE[store.load_mask("p0")])
    assert json.loads((out / "config.json").read_text())["config"]["scales"] == [1.0, 1.5]
    (folder / "broken.jpg").unlink()
    assert main([*words, "--scales", "1"]) == 1 and "another scales" in capsys.readouterr().err
    assert main([*words, "--overwrite"]) == 0 and "5 made" in capsys.readouterr().err


def test_refinement_and_known_classes(checkpoint, tmp_path):
    source, model = data.open_source(pictures.draw(tmp_path / "data", 4)), models.open_segmenter(checkpoint)
    plain, known, refined = (Store(tmp_path / name) for name in ("plain", "known", "refined"))
    predict_masks(source, model, plain)
    predict_masks(source, model, known, PredictConfig(known=True))
    terms = dict(gaussian=(2.0, 3.0), bilateral=(30.0, 5.0, 9.0), iterations=4)
    predict_masks(source, model, refined, PredictConfig(crf=True, **terms))
    for item in source:
        image = source.image(item)
        (found,) = label_probabilities(model, [image])
        assert (plain.load_mask(item.name) == found.argmax(0).numpy()).all()
        better = ops.dense_crf([torch.from_numpy(image)], [-found.clamp(min=1e-5).log()], **terms)[0]
        assert (refined.load_mask(item.name) == better.argmax(0).numpy()).mean() > 0.999
        assert {*np.unique(known.load_mask(item.name))} <= {0, *(key + 1 for key in item.classes)}
        absent = [key + 1 for key in range(2) if key not in item.classes]
        found[absent] = 0
        assert (known.load_mask(item.name) == found.argmax(0).numpy()).all()
    assert any((plain.load_mask(i.name) != refined.load_mask(i.name)).any() for i in source)
    assert any((plain.load_mask(i.name) != known.load_mask(i.name)).any() for i in source)


def test_classes_that_are_known_are_not_lost_to_others(tmp_path, monkeypatch):
    """The network is sure of a class that the photograph does not hold, and prefers the other one to background."""
    source, model = data.open_source(pictures.draw(tmp_path / "data", 2)), models.segmenter("mobilenet_v2", 2)
    first = dataclasses.replace(source, items=source[:1])
    logits = torch.tensor([-20.0, 0.0, 20.0])  # of background, of the class that is there, of the other one

    def sure(model, images, **options):
        return [logits.softmax(0)[:, None, None].expand(3, *image.shape[:2]).clone() for image in images]

    monkeypatch.setattr(pipeline.predict, "label_probabilities", sure)
    for crf in (False, True):
        predict_masks(first, model, Store(tmp_path / str(crf)), PredictConfig(known=True, crf=crf))
        assert (Store(tmp_path / str(crf)).load_mask("p0") == 1).all()


def test_one_photograph_ends_nothing(checkpoint, folder, tmp_path, monkeypatch):
    source, model = data.open_images(folder, pictures.CLASSES), models.open_segmenter(checkpoint)

    def short_of_memory(model, images, **options):
        if any(image.shape[:2] == (3, 90) for image in images):
            raise RuntimeError("CUDA out of memory. Tried to allocate\nmore")
        return label_probabilities(model, images, **options)

    monkeypatch.setattr(pipeline.predict, "label_probabilities", short_of_memory)
    store = Store(tmp_path / "out")
    made = predict_masks(source, model, store)
    said = "not enough memory: CUDA out of memory. Tried to allocate; reduce the image, or free some"
    assert (made.made, made.failed) == (4, {"p4": said})
    assert store.failures() == made.failed and store.mask_names() == ["below/p2", "p0", "p1", "p3"]


def test_other_photographs_or_classes_are_not_mixed(checkpoint, folder, tmp_path, capsys):
    out, other, words = tmp_path / "out", tmp_path / "other", ["predict", "--checkpoint", str(checkpoint)]
    assert main([*words, "--images", str(folder), "--out", str(out)]) == 0
    masks = {name: Store(out).mask_path(name).read_bytes() for name in Store(out).mask_names()}
    shutil.copytree(folder, other)
    assert main([*words, "--images", str(other), "--out", str(out)]) == 1
    assert "another photographs" in capsys.readouterr().err
    assert main([*words, "--images", str(folder), "--out", str(folder / "masks")]) == 1
    assert "whose masks would be taken for photographs" in capsys.readouterr().err
    spec = pictures.draw(tmp_path / "data", 3)
    wrong = tmp_path / "wrong.safetensors"
    models.save_checkpoint(wrong, models.segmenter("mobilenet_v2", 5).tensors(), {"network": "mobilenet_v2"})
    again = ["predict", "--checkpoint", str(wrong), "--data", spec, "--out", str(out), "--overwrite"]
    assert (
        main(again) == 1 and "a segmenter of the data's classes (square, disc), got one of 5" in capsys.readouterr().err
    )
    assert {name: Store(out).mask_path(name).read_bytes() for name in Store(out).mask_names()} == masks


def test_large_photographs_are_reduced(checkpoint, folder, tmp_path):
    source, model = data.open_images(folder / "p0.png", pictures.CLASSES), models.open_segmenter(checkpoint)
    store = Store(tmp_path / "out")
    predict_masks(source, model, store, PredictConfig(largest=28))
    (found,) = label_probabilities(model, [data.rescale(source.image(source[0]), (20, 28))])
    expected = F.interpolate(found.argmax(0)[None, None].byte(), size=(40, 56), mode="nearest-exact")[0, 0].numpy()
    assert np.array_equal(store.load_mask("p0"), expected)


def test_shards_are_parts_of_the_whole(checkpoint, folder, tmp_path):
    source, model = data.open_images(folder, pictures.CLASSES), models.open_segmenter(checkpoint)
    whole, parts = Store(tmp_path / "whole"), Store(tmp_path / "parts")
    seen = []
    predict_masks(source, model, whole, progress=lambda *facts: seen.append(facts[:2]))
    assert seen == [(i, 5) for i in range(6)]
    for shard in ("0/2", "1/2"):
        predict_masks(source, model, parts, PredictConfig(shard=shard, batch=1))
    assert parts.mask_names() == whole.mask_names()
    for name in whole.mask_names():
        assert (parts.load_mask(name) == whole.load_mask(name)).mean() > 0.999
    made = predict_masks(source, model, whole)
    assert (made.made, made.kept) == (0, 5)


def test_refuses(checkpoint, folder, tmp_path, capsys):
    model = models.open_segmenter(checkpoint)
    with pytest.raises(ValueError, match=r"segmenter of the data's classes \(a, b, c\), got one of square, disc"):
        predict_masks(data.open_images(folder, ("a", "b", "c")), model, Store(tmp_path / "out"))
    for wrong in (dict(scales=()), dict(window=8, stride=9), dict(window=-1), dict(batch=0), dict(largest=0)):
        with pytest.raises(ValueError, match="PredictConfig: expected"):
            PredictConfig(**wrong)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"expected images .* in .*empty, got none"):
        data.open_images(tmp_path / "empty", ("a",))
    (folder / "p0.jpg").write_bytes((folder / "p0.png").read_bytes())
    with pytest.raises(ValueError, match="names that differ without suffix, got p0"):
        data.open_images(folder, ("a",))
    words = ["predict", "--images", str(folder), "--checkpoint", str(checkpoint), "--out", str(tmp_path / "out")]
    assert main([*words, "--known"]) == 1 and "of which no classes are known" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

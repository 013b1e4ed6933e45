import contextlib
import dataclasses
import json
import shutil

import cv2
import groups
import numpy as np
import pytest
import torch
from torch.nn import functional as F
from trainings import lines
from trainings import source as source
from trainings import weights as weights

from ribfast import data, models, pipeline, reference
from ribfast.cli import main
from ribfast.metrics import Confusion
from ribfast.segment import label_probabilities
from ribfast.store import Store
from ribfast.train import SegmentationConfig, train_segmenter

SMALL = SegmentationConfig("resnet10", 6, 4, lr=0.003, rescale=(0.75, 1.25), crop=57, save_every=2, workers=2,
                           device="cpu")  # fmt: skip


def tensors(path):
    return models.load_checkpoint(path)


def test_segmenters_are_learned(source, weights, tmp_path):
    seen, config = [], dataclasses.replace(SMALL, steps=24, batch=8, save_every=8, lr=0.01)
    path = train_segmenter(
        source, config, tmp_path, weights=weights, validation=source, progress=lambda *facts: seen.append(facts[:2])
    )
    steps = [line for line in lines(tmp_path) if "loss" in line]
    assert [line["step"] for line in steps] == list(range(24)) and seen == [(i, 24) for i in range(25)]
    assert steps[-1]["loss"] < 0.3 * steps[0]["loss"]
    checks = [line for line in lines(tmp_path) if "validation_miou" in line]
    assert [line["step"] for line in checks] == [7, 15, 23] and checks[-1]["validation_miou"] > 0.6
    model, confusion = models.open_segmenter(path), Confusion(2)
    assert model.classes == source.classes and models.read_metadata(path)["chosen"] == "last"
    for item in source:
        (found,) = label_probabilities(model, [source.image(item)], mirror=False)
        confusion.add(found.argmax(0).numpy(), source.mask(item))
    assert checks[-1]["validation_miou"] == pytest.approx(confusion.miou(), abs=1e-6)


@pytest.mark.parametrize("fit", [None, "clamp"])
def test_steps_are_those_of_plain_sgd(source, weights, tmp_path, fit):
    """Written out for two steps, with the photographs whole: heads at ten times the rate, their biases at twenty
    without decay, batch normalisation as it is."""
    config = dataclasses.replace(SMALL, steps=2, rescale=(1.0, 1.0), crop=64, flip=False, lr=1e-3, auxiliary=0.4)
    config = dataclasses.replace(config, under_fitting=fit, beta=9.0, k=0.9)
    path = train_segmenter(source, config, tmp_path, weights=weights)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = models.segmenter("resnet10", 2, auxiliary=True)
    model.fill(models.load_checkpoint(weights), heads=False)
    model.train()
    images = torch.stack([data.make_views(source.image(i), (1.0,))[0][0] for i in source])
    labels = torch.stack([torch.from_numpy(source.mask(i)) for i in source])
    order, momenta, losses = np.random.default_rng([0, 0]).permutation(9), {}, []
    for step in range(2):
        chosen = torch.from_numpy(order[4 * step : 4 * step + 4])
        both = [
            F.cross_entropy(F.interpolate(x, (64, 64), mode="bilinear"), labels[chosen].long(), reduction="none")
            for x in model(images[chosen])
        ]
        main_loss, auxiliary = (loss.clamp(max=0.9).mean() if fit else loss.mean() for loss in both)
        loss = main_loss + 0.4 * auxiliary
        losses.append(loss.item())
        model.zero_grad()
        loss.backward()
        rate = 1e-3 * (1 - step / 2) ** 0.9
        with torch.no_grad():
            for name, p in model.named_parameters():
                if ".bn" in name or ".downsample.1" in name or p.grad is None:
                    continue
                head = not name.startswith("backbone.")
                scale, decay = (20, 0) if head and p.ndim == 1 else (10, 5e-4) if head else (1, 5e-4)
                grad = p.grad + decay * p
                momenta[name] = grad if step == 0 else 0.9 * momenta[name] + grad
                p -= rate * scale * momenta[name]
    assert [line["loss"] for line in lines(tmp_path)] == pytest.approx(losses, rel=1e-4)
    trained = tensors(path)
    for name, value in model.tensors().items():
        torch.testing.assert_close(trained[name], value, rtol=1e-3, atol=1e-5, msg=name)


def test_resumed_training_equals_an_uninterrupted_one(source, weights, tmp_path):
    config = dataclasses.replace(SMALL, steps=7, choose="best", under_fitting="pow", beta=9.0)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    given = dict(weights=weights, validation=source)
    expected = tensors(train_segmenter(source, config, whole, **given))

    def killed(done, total, text):
        if done == 5:  # after the pause at 4
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_segmenter(source, config, broken, **given, progress=killed)
    assert not (broken / "segmenter.safetensors").exists()
    with pytest.raises(ValueError, match=r"another lr \(here 0.5, there 0.003\)"):
        train_segmenter(source, dataclasses.replace(config, lr=0.5), broken, **given, resume=True)
    fewer = dataclasses.replace(source, items=source[:8])
    with pytest.raises(ValueError, match="got another data"):
        train_segmenter(fewer, config, broken, **given, resume=True)
    steps = []
    again = dataclasses.replace(config, workers=0, cache_mib=64)
    path = train_segmenter(source, again, broken, **given, resume=True, progress=lambda d, t, s: steps.append(d))
    assert steps == [4, 5, 6, 7]
    found = tensors(path)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    strip = [
        [{k: v for k, v in line.items() if k not in ("began", "seconds")} for line in lines(out)]
        for out in (whole, broken)
    ]
    assert strip[0] == strip[1]
    assert sorted(p.name for p in broken.iterdir()) == ["best.safetensors", "metrics.jsonl", "segmenter.safetensors"]


def test_the_last_weights_are_kept_unless_the_best_are_asked_for(source, weights, tmp_path, caplog):
    config = dataclasses.replace(SMALL, steps=6, lr=0.02)
    given = dict(weights=weights, validation=source)
    last = tensors(train_segmenter(source, config, tmp_path / "last", **given))
    assert "best" not in caplog.text
    path = train_segmenter(source, dataclasses.replace(config, choose="best"), tmp_path / "best", **given)
    mious = [line["validation_miou"] for line in lines(tmp_path / "best") if "validation_miou" in line]
    known = models.read_metadata(path)
    assert known["chosen"] == "best on the validation's ground truth"
    assert float(known["validation_miou"]) == max(mious) and int(known["steps"]) == 2 * (1 + mious.index(max(mious)))
    assert "the best of 3 on the validation's ground truth" in caplog.text
    same = all(torch.equal(last[name], value) for name, value in tensors(path).items())
    assert same == (mious.index(max(mious)) == 2)
    with pytest.raises(ValueError, match="expected a validation split to choose the best weights on, got none"):
        train_segmenter(source, dataclasses.replace(config, choose="best"), tmp_path / "none", weights=weights)


@pytest.mark.parametrize("balanced", [False, True])
def test_parts_of_a_batch_add_up(source, weights, tmp_path, balanced):
    config = dataclasses.replace(SMALL, steps=2, balanced=balanced)
    found = [
        train_segmenter(source, dataclasses.replace(config, parts=parts), tmp_path / str(parts), weights=weights)
        for parts in (1, 4)
    ]
    losses = [[line["loss"] for line in lines(path.parent)] for path in found]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    one, four = map(tensors, found)
    for name, value in one.items():
        torch.testing.assert_close(four[name], value, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.processes
def test_two_processes_share_each_batch(source, weights, tmp_path):
    command = ["-m", "ribfast", "train-seg", "--data", f"folder:{source[0].image.parents[1]}"]
    command += ["--out", str(tmp_path / "two")]
    command += ["--weights", str(weights), "--network", "resnet10", "--steps", "6", "--batch", "4", "--lr", "0.003"]
    command += ["--rescale", "0.75,1.25", "--crop", "57", "--save-every", "2", "--workers", "1", "--device", "cpu"]
    command += ["--under-fitting", "clamp", "--beta", "1.0", "--balanced"]
    with groups.ranks(*command) as children:
        config = dataclasses.replace(SMALL, under_fitting="clamp", beta=1.0, balanced=True)
        alone = train_segmenter(source, config, tmp_path / "one", weights=weights)
        for code, _, said in groups.ended(children):
            assert code == 0, said[-2000:]
    both = [[line["loss"] for line in lines(tmp_path / name)] for name in ("one", "two")]
    assert both[0] == pytest.approx(both[1], rel=1e-3)
    found, expected = tensors(tmp_path / "two" / "segmenter.safetensors"), tensors(alone)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=2e-5, msg=name)


def test_what_is_frozen_does_not_move(source, weights, tmp_path):
    config = dataclasses.replace(SMALL, steps=2, frozen=3, train_norms=True)
    found, start = tensors(train_segmenter(source, config, tmp_path, weights=weights)), tensors(weights)
    moved = {name for name, value in start.items() if name in found and not torch.equal(found[name], value)}
    assert moved and all(name.startswith(("layer3", "layer4")) for name in moved)
    assert {"layer3.0.bn1.weight", "layer4.0.bn2.bias"} <= moved and not any("running" in name for name in moved)


def test_mobilenet_in_bfloat16_on_other_masks(source, tmp_path):
    config = dataclasses.replace(SMALL, network="mobilenet_v2", precision="bfloat16", steps=1, auxiliary=0.4)
    masks = {item.name: np.full((64, 64), 255, np.uint8) for item in source}
    for mask in masks.values():
        mask[:8] = 1
    path = train_segmenter(source, config, tmp_path / "16", labels=masks)
    (found,) = lines(tmp_path / "16")
    assert found["loss"] == pytest.approx(found["main"] + 0.4 * found["auxiliary"])
    assert all(value.dtype == torch.float32 for value in tensors(path).values())
    train_segmenter(source, dataclasses.replace(config, precision="float32"), tmp_path / "32", labels=masks)
    (exact,) = lines(tmp_path / "32")
    assert found["loss"] != exact["loss"] and found["loss"] == pytest.approx(exact["loss"], rel=0.02)


def test_every_problem_is_named_before_the_first_step(source, weights, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(source[0].image.parents[1], folder)
    (folder / "images" / "p1.png").write_bytes((folder / "images" / "p1.png").read_bytes()[:200])
    cv2.imwrite(str(folder / "masks" / "p2.png"), np.zeros((64, 63), np.uint8))
    cv2.imwrite(str(folder / "masks" / "p3.png"), np.full((64, 64), 7, np.uint8))
    broken, seen = data.open_source(f"folder:{folder}"), []
    with pytest.raises(ValueError, match="train_segmenter: expected 9 images without problems, got 3") as caught:
        train_segmenter(broken, SMALL, tmp_path / "out", weights=weights, scanned=lambda *facts: seen.append(facts[0]))
    for said in ("p1.png, which ends early", "64 x 64 pixels as", "got 7 in"):
        assert said in str(caught.value)
    assert seen == list(range(10)) and not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="expected images, got none"):
        train_segmenter(dataclasses.replace(source, items=()), SMALL, tmp_path / "out")
    with pytest.raises(ValueError, match=r"expected labels of 9 images in .*, got none of p0, p1, p2 and 6 more"):
        train_segmenter(source, SMALL, tmp_path / "out", labels=tmp_path / "nothing")
    unmasked = dataclasses.replace(source, items=tuple(dataclasses.replace(i, mask=None) for i in source))
    with pytest.raises(ValueError, match="expected masks of 9 images, got none of p0"):
        train_segmenter(unmasked, SMALL, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_wrong_leaves_an_earlier_run_alone(source, weights, tmp_path, capsys):
    folder, out = source[0].image.parents[1], tmp_path / "out"
    words = ["train-seg", "--data", f"folder:{folder}", "--out", str(out), "--network", "resnet10", "--steps", "1"]
    words += ["--batch", "4", "--crop", "57", "--workers", "0", "--device", "cpu"]
    good = [*words, "--weights", str(weights)]
    assert main(good) == 0, capsys.readouterr().err
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert "data" in json.loads(before["config.json"])["inputs"]
    wrong = tmp_path / "wrong.safetensors"
    models.save_checkpoint(wrong, models.cam_classifier("mobilenet_v2", 2).state_dict())
    few = tmp_path / "few"
    few.mkdir()
    for arguments, said in (
        (["--weights", str(tmp_path / "none.pth")], "expected a file, got"),
        (["--weights", str(wrong)], f"a resnet10, got {wrong}, a classifier on mobilenet_v2, without"),
        (["--weights", str(weights), "--masks", str(few)], "got none of p0"),
        (["--weights", str(weights), "--under-fitting", "pow", "--k", "2"], "k above 0, and at most 1 as a power"),
        (["--weights", str(weights), "--batch", "7", "--parts", "2"], "a batch that 2 parts can share"),
    ):
        with contextlib.suppress(SystemExit):
            assert main([*words, "--lr", "0.5", "--overwrite", *arguments]) == 1
        assert said in capsys.readouterr().err
        assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_a_validation_is_looked_at_first(source, weights, tmp_path):
    items = (dataclasses.replace(source[0], mask=None), *source[1:3])
    validation = dataclasses.replace(source, items=items)
    with pytest.raises(ValueError, match="train_segmenter: expected 3 images without problems, got 1 problem"):
        train_segmenter(source, SMALL, tmp_path / "out", weights=weights, validation=validation)
    assert not (tmp_path / "out").exists()


def test_resuming_takes_the_same_labels_and_validation(source, weights, tmp_path):
    masks = tmp_path / "masks"
    masks.mkdir()
    for item in source:
        cv2.imwrite(str(masks / f"{item.name}.png"), source.mask(item))
    config = dataclasses.replace(SMALL, choose="best")
    given = dict(weights=weights, validation=source)

    def killed(done, total, text):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_segmenter(source, config, tmp_path / "out", labels=masks, **given, progress=killed)
    with pytest.raises(ValueError, match=r"as .* began, got another labels"):
        train_segmenter(source, config, tmp_path / "out", **given, resume=True)
    labels = cv2.imread(str(masks / "p0.png"), cv2.IMREAD_UNCHANGED)
    cv2.imwrite(str(masks / "p0.png"), labels[:, ::-1])
    with pytest.raises(ValueError, match=r"as .* began, got another labels"):
        train_segmenter(source, config, tmp_path / "out", labels=masks, **given, resume=True)
    cv2.imwrite(str(masks / "p0.png"), labels)
    fewer = dataclasses.replace(source, items=source[:3])
    with pytest.raises(ValueError, match=r"as .* began, got another validation"):
        train_segmenter(source, config, tmp_path / "out", labels=masks, weights=weights, validation=fewer, resume=True)
    train_segmenter(source, config, tmp_path / "out", labels=masks, validation=source, resume=True)


def test_weights_of_another_input_are_refused(source, tmp_path):
    path = tmp_path / "classifier.safetensors"
    model = models.cam_classifier("resnet10", 2)
    model.normalization = "symmetric"
    models.save_checkpoint(path, model.state_dict(), model.metadata())
    with pytest.raises(ValueError, match=r"for normalization imagenet, got .*, trained with symmetric"):
        train_segmenter(source, SMALL, tmp_path / "out", weights=path)


def test_a_class_without_a_pixel_is_said(source, weights, tmp_path, caplog):
    masks = {item.name: np.where(source.mask(item) == 2, 0, source.mask(item)).astype(np.uint8) for item in source}
    train_segmenter(source, dataclasses.replace(SMALL, steps=1), tmp_path, labels=masks, weights=weights)
    assert "no pixel is of disc" in caplog.text


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("steps", 0, "steps of at least 1"),
        ("parts", 3, "a batch that 3 parts can share, got 4"),
        ("save_every", 0, "save_every of at least 1"),
        ("beta", -1.0, "beta of at least 0"),
        ("k", 0.0, "k above 0"),
        ("normalization", "caffe", "caffe and normalization caffe together"),
        ("frozen", 6, "at most 5 frozen depths"),
        ("caffe", True, "caffe with resnet50 or resnet101"),
        ("rescale", (0.0, 1.0), r"0 < rescale\[0\]"),
        ("tensorflow_padding", True, "tensorflow_padding with mobilenet_v2"),
        ("crop", 0, "crop of at least 1"),
    ],
)
def test_refuses_configurations(field, value, said):
    with pytest.raises(ValueError, match=f"expected {said}"):
        dataclasses.replace(SMALL, **{field: value})


@pytest.mark.slow
def test_compiled_steps_are_the_same(source, weights, tmp_path):
    config = dataclasses.replace(SMALL, steps=3, auxiliary=0.4)
    for compiled in (False, True):
        train_segmenter(
            source, dataclasses.replace(config, compile=compiled), tmp_path / str(compiled), weights=weights
        )
    plain, found = ([line["loss"] for line in lines(tmp_path / name)] for name in ("False", "True"))
    assert found == pytest.approx(plain, rel=1e-4)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.parametrize("parts", [1, 2])
def test_graphed_steps_are_the_same(source, weights, tmp_path, parts):
    config = dataclasses.replace(SMALL, steps=4, auxiliary=0.4, parts=parts, device="cuda", under_fitting="clamp")
    for graphs in (False, True):
        train_segmenter(source, dataclasses.replace(config, graphs=graphs), tmp_path / str(graphs), weights=weights)
    plain, found = ([line["loss"] for line in lines(tmp_path / name)] for name in ("False", "True"))
    assert found == pytest.approx(plain, rel=1e-3)


def test_a_cycle_trains_on_what_it_predicted(source, weights, tmp_path, capsys):
    folder, out = source[0].image.parents[1], tmp_path / "out"
    prediction = tmp_path / "prediction.json"
    prediction.write_text(json.dumps({"scales": [1.0], "mirror": False}))
    words = ["train-seg", "--data", f"folder:{folder}", "--weights", str(weights), "--out", str(out), "--cycle"]
    words += ["--prediction", str(prediction), "--network", "resnet10", "--steps", "6", "--batch", "4", "--lr", "0.01"]
    words += ["--crop", "57", "--under-fitting", "clamp", "--device", "cpu", "--auxiliary", "0.4", "--workers", "0"]
    assert main(words) == 0, capsys.readouterr().err
    first, store = models.open_segmenter(out / "first" / "segmenter.safetensors"), Store(out / "first")
    assert store.mask_names() == sorted(item.name for item in source)
    config = pipeline.PredictConfig(crf=True, mirror=False)
    for item in source[:2]:
        image = source.image(item)
        (found,) = label_probabilities(first, [image], mirror=False)
        refined = reference.dense_crf(
            torch.from_numpy(image), -found.clamp(min=1e-5).log(), gaussian=config.gaussian, bilateral=config.bilateral
        )
        assert (refined.argmax(0).numpy() == store.load_mask(item.name)).mean() > 0.995
    training = json.loads(models.read_metadata(out / "segmenter.safetensors")["training"])
    assert training["under_fitting"] is None
    plain = dataclasses.replace(SMALL, lr=0.01, rescale=(0.5, 1.5), auxiliary=0.4, save_every=1000, workers=0)
    again = train_segmenter(source, plain, tmp_path / "again", weights=weights, labels=out / "first" / "masks")
    cycled = tensors(out / "segmenter.safetensors")
    assert all(torch.equal(cycled[name], value) for name, value in tensors(again).items())
    before = (out / "segmenter.safetensors").stat().st_mtime_ns
    assert main([*words, "--resume"]) == 0 and (out / "segmenter.safetensors").stat().st_mtime_ns == before
    assert main(words[: words.index("--cycle")] + ["--prediction", str(prediction)]) == 1
    assert "expected --prediction with --cycle" in capsys.readouterr().err


def test_a_cycle_keeps_nothing_of_another(source, weights, tmp_path):
    config = dataclasses.replace(SMALL, steps=2, under_fitting="clamp", device="cpu")
    given = dict(weights=weights, prediction=pipeline.PredictConfig(mirror=False))
    others = {item.name: np.full((64, 64), 2, np.uint8) for item in source}
    pipeline.train_cycle(source, config, tmp_path, labels=others, **given)
    old = (tmp_path / "segmenter.safetensors").read_bytes()
    assert Store(tmp_path / "first").mask_names()

    def killed(stage):
        if stage != "first":
            return None

        def progress(done, total, text):
            if done == total:
                raise KeyboardInterrupt

        return progress

    with pytest.raises(KeyboardInterrupt):
        pipeline.train_cycle(source, config, tmp_path, **given, overwrite=True, progress=killed)
    assert not (tmp_path / "segmenter.safetensors").exists() and not Store(tmp_path / "first").mask_names()
    path = pipeline.train_cycle(source, config, tmp_path, **given, resume=True)
    assert path.read_bytes() != old
    straight = pipeline.train_cycle(source, config, tmp_path / "straight", **given)
    assert path.read_bytes() == straight.read_bytes()
    with pytest.raises(ValueError, match=r"got another scales .*; remove .*masks"):
        other = pipeline.PredictConfig(mirror=False, scales=(0.5,))
        pipeline.train_cycle(source, config, tmp_path, weights=weights, prediction=other, resume=True)
    with pytest.raises(ValueError, match="expected a prediction of all images, got shard 0/2"):
        pipeline.train_cycle(source, config, tmp_path, prediction=pipeline.PredictConfig(shard="0/2"))
    train_segmenter(source, SMALL, tmp_path / "plain", weights=weights)
    with pytest.raises(ValueError, match="where a training without one began"):
        pipeline.train_cycle(source, config, tmp_path / "plain", **given, resume=True)

"""Training by adversarial erasing: against the specification, and as a training."""

import dataclasses
import os
import threading

import groups
import numpy as np
import pytest
import torch
from trainings import lines
from trainings import source as source
from trainings import weights as weights

from ribfast import data, models, pipeline, reference
from ribfast.cli import main
from ribfast.processes import Processes
from ribfast.store import Store
from ribfast.train import ClassifierConfig, EaderConfig, loop, train_classifier, train_eader
from ribfast.train.adversarial import EaderTask
from ribfast.train.classifier import ClassifierTask

SMALL = EaderConfig("resnet10", 2, 4, adversary="resnet10", lr=0.003, long_side=(48, 72), crop=64, localiser_steps=2,
                    adversary_steps=1, workers=2, device="cpu")  # fmt: skip
HERE = Processes(0, 1, torch.device("cpu"))


def begun(source, weights, **fields):
    """A task, ready for steps, and a batch of all images."""
    task = EaderTask(source, dataclasses.replace(SMALL, **fields), weights, weights, None)
    task.begin(filled=False)
    task.model.train()
    rng = np.random.default_rng(0)
    return task, [torch.stack(column) for column in zip(*(task.load(i, rng) for i in range(9)), strict=True)]


def gradients(network):
    return {name: p.grad for name, p in network.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("regulariser", ["mean", "sum"])
@pytest.mark.parametrize("attention", ["cam", "gradcam"])
def test_losses_and_gradients_are_the_specification_s(source, weights, attention, regulariser):
    fields = {"attention": attention, "regulariser": regulariser, "erasing": 0.7, "regularisation": 0.01}
    task, batch = begun(source, weights, sharpness=20.0, **fields)
    networks = task.model.localiser, task.model.adversary
    expected = reference.adversarial_losses(*networks, *batch, sharpness=20.0, **fields)
    for step, own, loss in zip((0, 2), networks, expected, strict=True):
        task.model.zero_grad()
        wanted = torch.autograd.grad(loss, [p for p in own.parameters() if p.requires_grad], retain_graph=True)
        task.begin_step(step, batch, HERE)
        found = task.losses(task.model, batch, HERE)["loss"]
        assert found.item() == pytest.approx(loss.item(), rel=1e-5)
        found.backward()
        grads = gradients(task.model)
        name = "localiser" if own is networks[0] else "adversary"
        trained = [f"{name}.{n}" for n, p in own.named_parameters() if p.requires_grad]
        assert list(grads) == trained  # and nothing of the other
        for name, grad in zip(trained, wanted, strict=True):
            largest = grad.abs().max().item()
            torch.testing.assert_close(
                grads[name], grad, rtol=2e-3, atol=2e-3 * largest + 1e-9, msg=lambda m, name=name: f"{name}: {m}"
            )


def test_what_attention_and_size_change(source, weights):
    """Grad-CAM's maps are CAM's, times a constant; only the classifier's gradient is another. Sums are means, times
    pixels."""
    found = {}
    for attention in ("cam", "gradcam"):
        task, batch = begun(source, weights, attention=attention, erasing=0.7)
        task.begin_step(0, batch, HERE)
        losses = task.losses(task.model, batch, HERE)
        losses["loss"].backward()
        found[attention] = losses, gradients(task.model)
    (cam, grads), (gradcam, others) = found.values()
    for name in cam:
        assert cam[name].item() == pytest.approx(gradcam[name].item(), rel=1e-5)
    torch.testing.assert_close(grads["localiser.layer4.0.conv2.weight"], others["localiser.layer4.0.conv2.weight"],
                               rtol=1e-3, atol=1e-6)  # fmt: skip
    difference = grads["localiser.classifier.weight"] - others["localiser.classifier.weight"]
    assert difference.abs().max() > 0.01 * grads["localiser.classifier.weight"].abs().max()
    task, batch = begun(source, weights, regulariser="sum", regularisation=1e-3)
    task.begin_step(0, batch, HERE)
    losses = task.losses(task.model, batch, HERE)
    size = losses["loss"] - losses["classification"] - 0.05 * losses["left"]
    assert size.item() == pytest.approx(1e-3 * 64 * 64 * losses["attended"].item(), rel=1e-3)


def test_grad_cam_in_closed_form_is_autograd_s(source, weights):
    task, (images, targets) = begun(source, weights, attention="gradcam")
    localiser = task.model.localiser
    task.model.fold()
    _, attention = task.model("localiser", localiser.trunk(images))
    features = localiser.tail(localiser.trunk(images))
    logits = localiser.classifier(features).mean((2, 3))
    expected = reference.grad_cam(features, logits, targets.bool())
    which, present = targets.nonzero(as_tuple=True)
    torch.testing.assert_close(attention[which, present], expected, rtol=1e-4, atol=1e-7)
    # the last of them, as one would write it by hand
    (grads,) = torch.autograd.grad(logits[which[-1], present[-1]], features)
    by_hand = (grads[which[-1]].mean((1, 2))[:, None, None] * features[which[-1]]).sum(0)
    torch.testing.assert_close(attention[which[-1], present[-1]], by_hand, rtol=1e-4, atol=1e-7)


def test_nothing_runs_that_the_loss_does_not_need(source, weights):
    task, batch = begun(source, weights)
    calls, kept, pairs = [], [], int(batch[1].sum())
    for step, expected in {
        0: [("localiser", "trunk", False, 9), ("localiser", "tail", True, 9), ("adversary", "trunk", True, pairs),
            ("adversary", "tail", True, pairs)],
        2: [("localiser", "trunk", False, 9), ("localiser", "tail", False, 9), ("adversary", "trunk", False, pairs),
            ("adversary", "tail", True, pairs)],
    }.items():  # fmt: skip
        task.begin_step(step, batch, HERE)
        for role, network in task.model.resting.items():  # in which everything runs
            for name, module in (("trunk", network.layer2), ("tail", network.layer4)):
                module.register_forward_hook(
                    lambda m, i, out, what=(role, name): calls.append((*what, out.requires_grad, len(out)))
                )
        calls.clear(), kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
            task.losses(task.model, batch, HERE)["loss"].backward()
        assert calls == expected  # each once, and images and pairs all at once
        if step == 2:  # of the localiser nothing is kept for a gradient
            networks = (task.model.resting["localiser"], task.model.localiser)
            assert not {p.data_ptr() for network in networks for p in network.parameters()} & set(kept)
        assert all(p.grad is None for network in task.model.resting.values() for p in network.parameters())
        task.model.zero_grad()


@pytest.mark.parametrize("networks", [("resnet10", "resnet10"), ("resnet10", "mobilenet_v2")], ids="-".join)
def test_steps_are_those_of_plain_sgd(source, weights, tmp_path, networks, device):
    """Written out for four steps: two of the localiser, one of the adversary, one of the localiser, each moved by its
    own momentum alone."""
    config = dataclasses.replace(SMALL, network=networks[0], adversary=networks[1], long_side=(64, 64), flip=False)
    # a sharpness of a hundred makes much of rounding
    config = dataclasses.replace(config, sharpness=20.0, adversary_lr_scale=0.5, device=device)
    path = train_eader(source, config, tmp_path, weights=weights)
    torch.manual_seed(0)
    localiser = models.cam_classifier(networks[0], 2)
    models.load_into(localiser, models.load_checkpoint(weights), classifier=False)
    torch.manual_seed(1)
    adversary = models.cam_classifier(networks[1], 2)
    images = torch.stack([data.make_views(source.image(i), (1.0,))[0][0] for i in source])
    labels, losses = source.labels().float(), []
    optimizers = [
        torch.optim.SGD([p for p in network.parameters() if p.requires_grad], rate, momentum=0.9, weight_decay=1e-4)
        for network, rate in ((localiser, 0.003), (adversary, 0.0015))
    ]
    for step, turn in enumerate((0, 0, 1, 0)):
        order = np.random.default_rng([0, step // 2]).permutation(9)
        chosen = torch.from_numpy(order[step % 2 * 4 : step % 2 * 4 + 4])
        loss = reference.adversarial_losses(localiser, adversary, images[chosen], labels[chosen], sharpness=20.0)[turn]
        losses.append(loss.item())
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        optimizers[turn].step()
    found = [line for line in lines(tmp_path) if "loss" in line]
    assert [line["loss"] for line in found] == pytest.approx(losses, rel=1e-3)
    assert ["left" in line for line in found] == [True, True, False, True] and found[3]["lr"] == 0.003
    trained = models.load_checkpoint(path)
    for name, value in localiser.state_dict().items():
        if name in trained:
            torch.testing.assert_close(
                trained[name], value, rtol=1e-3, atol=2e-5, msg=lambda m, name=name: f"{name}: {m}"
            )


def test_another_normalisation_of_the_adversary_s(source, weights):
    """It is shown what it would be, had the photographs been normalised as its own."""
    task, (images, _) = begun(source, None, adversary_normalization="symmetric", flip=False, long_side=(64, 64))
    shown = []
    task.begin_step(0, [images, source.labels().float()], HERE)
    task.model.resting["adversary"].through = lambda erased: shown.append(erased) or torch.zeros(len(erased), 2, 1, 1)
    task.losses(task.model, [images, source.labels().float()], HERE)
    attention = task.model.localiser(images)[task.image, task.present]
    own = torch.stack([data.make_views(source.image(i), (1.0,), data.SYMMETRIC)[0][0] for i in source])
    expected, _ = reference.erase(own, attention, task.image)
    torch.testing.assert_close(shown[0], expected, rtol=1e-4, atol=1e-4)


def test_resumed_training_equals_an_uninterrupted_one(source, weights, tmp_path):
    config = dataclasses.replace(SMALL, epochs=4)
    whole, broken, given = tmp_path / "whole", tmp_path / "broken", dict(weights=weights, adversary_weights=weights)
    expected = models.load_checkpoint(train_eader(source, config, whole, **given))

    def killed(done, total, text):
        if done == 6:  # of 8, in the adversary's turn, after which the state of the fourth is there
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_eader(source, config, broken, **given, progress=killed)
    with pytest.raises(ValueError, match=r"another attention \(here gradcam, there cam\)"):
        train_eader(source, dataclasses.replace(config, attention="gradcam"), broken, **given, resume=True)
    with pytest.raises(ValueError, match=r"another .*method \(here bce, there eader\)"):
        train_classifier(source, ClassifierConfig("resnet10", device="cpu"), broken, resume=True)
    other = tmp_path / "other.safetensors"
    models.save_checkpoint(other, models.cam_classifier("resnet10", 2).state_dict())
    with pytest.raises(ValueError, match="another adversary_weights"):
        train_eader(source, config, broken, weights=weights, adversary_weights=other, resume=True)
    found = models.load_checkpoint(train_eader(source, config, broken, **given, resume=True))
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    assert sorted(p.name for p in broken.iterdir()) == ["classifier.safetensors", "metrics.jsonl"]
    strip = [
        [{k: v for k, v in line.items() if k not in ("began", "seconds")} for line in lines(out)]
        for out in (whole, broken)
    ]
    assert strip[0] == strip[1]


@pytest.mark.processes
def test_two_processes_share_each_batch(source, weights, tmp_path):
    """Through the command, whose losses are those of one process."""
    command = ["-m", "ribfast", "train-classifier", "--method", "eader", "--network", "resnet10"]
    command += ["--adversary", "resnet10"]
    command += ["--data", f"folder:{source[0].image.parents[1]}", "--weights", str(weights)]
    command += ["--adversary-weights", str(weights), "--out", str(tmp_path / "two"), "--epochs", "2", "--batch", "4"]
    command += ["--lr", "0.003", "--long-side", "48,72", "--crop", "64", "--localiser-steps", "2"]
    command += ["--adversary-steps", "1", "--device", "cpu", "--workers", "1"]
    with groups.ranks(*command) as children:
        alone = train_eader(source, SMALL, tmp_path / "one", weights=weights, adversary_weights=weights)
        for code, _, said in groups.ended(children):
            assert code == 0, said[-2000:]
    both = [[line["loss"] for line in lines(tmp_path / name)] for name in ("one", "two")]
    assert both[0] == pytest.approx(both[1], rel=2e-3)
    found, expected = models.load_checkpoint(tmp_path / "two" / "classifier.safetensors"), models.load_checkpoint(alone)
    for name in expected:
        torch.testing.assert_close(
            found[name], expected[name], rtol=1e-3, atol=5e-5, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_the_result_is_an_ordinary_checkpoint(source, weights, tmp_path):
    config = dataclasses.replace(SMALL, normalization="symmetric", precision="bfloat16", batch=100, localiser_steps=1)
    path = train_eader(source, config, tmp_path / "trained", weights=weights, validation=source)
    plain = train_classifier(source, ClassifierConfig("resnet10", 1, 4, long_side=(48, 72), crop=64, device="cpu"),
                             tmp_path / "plain", weights=weights)  # fmt: skip
    trained, other = models.load_checkpoint(path), models.load_checkpoint(plain)
    assert {n: (t.shape, t.dtype) for n, t in trained.items()} == {n: (t.shape, t.dtype) for n, t in other.items()}
    model = models.open_classifier(path)
    assert (model.name, model.classes, model.normalization) == ("resnet10", source.classes, "symmetric")
    store = Store(tmp_path / "maps")
    pipeline.make_cams(source, model, store, pipeline.CamConfig(scales=(1.0,), device="cpu"))
    assert store.names() == [item.name for item in source if item.classes]
    assert [line["validation_map"] for line in lines(tmp_path / "trained") if "validation_map" in line]


def test_images_without_classes_and_batches_of_them(source, weights, tmp_path):
    """What has no class has no pair; in a step without pairs the adversary has gradients of zero."""
    few = tuple(dataclasses.replace(item, classes=()) if i % 3 else item for i, item in enumerate(source))
    config = dataclasses.replace(SMALL, batch=1, epochs=1)
    train_eader(dataclasses.replace(source, items=few), config, tmp_path, weights=weights)
    found = [line for line in lines(tmp_path) if "loss" in line]
    assert len(found) == 9 and all(np.isfinite(line["loss"]) for line in found)
    assert any(line["loss"] == 0 == line["pairs"] for line in found if "left" not in line)


def test_what_is_idle_keeps_no_gradients():
    """On a GPU gradients stay, as zeros: the momentum of what is idle would go on moving it."""
    devices = torch.device("cpu"), torch.device("cuda")
    assert [loop.keeps_gradients(ClassifierTask, device) for device in devices] == [False, True]
    assert [loop.keeps_gradients(EaderTask, device) for device in devices] == [False, False]


def test_both_networks_learn(source, weights, tmp_path):
    """On discs and squares."""
    config = dataclasses.replace(SMALL, epochs=14, batch=9, lr=0.1, long_side=(64, 64), localiser_steps=4)
    config = dataclasses.replace(config, adversary_steps=1, classifier_lr_scale=10.0)
    train_eader(source, config, tmp_path, weights=weights, adversary_weights=weights)
    found = [line for line in lines(tmp_path) if "loss" in line]
    localiser, adversary = ([line for line in found if ("left" in line) == own] for own in (True, False))
    assert localiser[-1]["classification"] < 0.8 * localiser[0]["classification"]
    assert adversary[-1]["loss"] < adversary[0]["loss"]


def test_refuses_what_cannot_train(source, weights, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"adversary_weights: expected a file, got .*none\.pth"):
        train_eader(source, SMALL, tmp_path, adversary_weights=tmp_path / "none.pth")
    with pytest.raises(ValueError, match="train_eader: expected images with labels"):
        unlabelled = tuple(dataclasses.replace(item, classes=()) for item in source)
        train_eader(dataclasses.replace(source, items=unlabelled), SMALL, tmp_path)
    other = tmp_path / "other.safetensors"
    models.save_checkpoint(other, models.cam_classifier("mobilenet_v2", 2).state_dict())
    with pytest.raises(ValueError, match=r"a resnet10, got .*, a .* without"):
        train_eader(source, SMALL, tmp_path, weights=weights, adversary_weights=other)
    with pytest.raises(
        ValueError, match=r"more steps than the localiser's first turn of 200, got 4, .*lower localiser"
    ):
        train_eader(source, dataclasses.replace(SMALL, localiser_steps=200), tmp_path, weights=weights)
    with pytest.raises(ValueError, match="train_classifier: expected a configuration of method bce, got eader"):
        train_classifier(source, SMALL, tmp_path)
    with pytest.raises(ValueError, match="train_eader: expected a configuration of method eader, got bce"):
        train_eader(source, ClassifierConfig(), tmp_path)
    pixels = tmp_path / "symmetric.safetensors"
    models.save_checkpoint(
        pixels, models.load_checkpoint(weights), {"network": "resnet10", "normalization": "symmetric"}
    )
    with pytest.raises(ValueError, match=r"adversary_normalization imagenet, .* set adversary_normalization to that"):
        train_eader(source, SMALL, tmp_path, weights=weights, adversary_weights=pixels)
    models.save_checkpoint(pixels, models.load_checkpoint(weights), {"network": "resnet50"})
    with pytest.raises(ValueError, match=r"expected weights for adversary resnet10, .* set adversary to that"):
        train_eader(source, SMALL, tmp_path, weights=weights, adversary_weights=pixels)
    for field, value in {"attention": "grad-cam", "regulariser": "Mean", "adversary_normalization": "caffe"}.items():
        with pytest.raises(ValueError, match=f"EaderConfig: {field}: expected one of"):
            dataclasses.replace(SMALL, **{field: value})
    bad = {"localiser_steps": 0, "adversary_steps": 0, "erasing": -1.0, "sharpness": float("nan"), "momentum": -1.0}
    for field, value in bad.items():
        with pytest.raises(ValueError, match=f"EaderConfig: expected {field} of at least"):
            dataclasses.replace(SMALL, **{field: value})
    for field in ("level", "sharpness"):
        with pytest.raises(ValueError, match="level and sharpness of at most a million"):
            dataclasses.replace(SMALL, **{field: 1e300})
    with pytest.raises(ValueError, match="adversary_tensorflow_padding with an adversary of mobilenet_v2"):
        dataclasses.replace(SMALL, adversary_tensorflow_padding=True)
    assert not (tmp_path / "classifier.safetensors").exists()


def test_presets():
    assert EaderConfig.released() == EaderConfig() and EaderConfig.paper().regulariser == "sum"
    assert (EaderConfig().lr, EaderConfig().momentum, EaderConfig().epochs, EaderConfig().crop) == (0.01, 0.9, 10, 448)


def test_the_command_s_methods(source, weights, tmp_path, capsys):
    begin = ["train-classifier", "--data", f"folder:{source[0].image.parents[1]}", "--device", "cpu", "--crop", "64"]
    small = ["--network", "resnet10", "--epochs", "1", "--batch", "4", "--long-side", "48,72"]
    turns = ["--localiser-steps", "1"]
    out = ["--out", str(tmp_path / "a")]
    assert main([*begin, *small, *out, *turns, "--method", "eader", "--preset", "paper", "--attention", "gradcam"]) == 0
    written = tmp_path / "a" / "config.json"
    assert '"regulariser": "sum"' in written.read_text() and '"method": "eader"' in written.read_text()
    again = ["--config", str(written), "--out", str(tmp_path / "b")]
    assert main([*begin, *again]) == 0  # the file says which method
    pipe = tmp_path / "pipe"  # which can be read once
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=['{"method": "eader", "level": 2e6}'])
    writer.start()
    with pytest.raises(SystemExit):
        main([*begin, "--config", str(pipe), "--out", str(tmp_path / "c")])
    writer.join()
    assert "of at most a million, got 2000000.0" in capsys.readouterr().err
    (tmp_path / "odd.json").write_text('{"method": ["eader"]}')
    with pytest.raises(SystemExit):
        main([*begin, "--config", str(tmp_path / "odd.json"), "--out", str(tmp_path / "c")])
    assert "method: expected one of bce, got ['eader']" in capsys.readouterr().err
    same = [models.load_checkpoint(tmp_path / name / "classifier.safetensors") for name in "ab"]
    assert all(torch.equal(same[0][name], same[1][name]) for name in same[0])
    with pytest.raises(SystemExit):
        main([*begin, *out, "--erasing", "0.1"])
    assert "--erasing" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*begin, *out, "--method", "gan"])
    assert "--method: expected one of bce, eader, got 'gan'" in capsys.readouterr().err
    assert main([*begin, *small, *out, "--adversary-weights", str(weights)]) == 1
    assert "expected --adversary-weights with --method eader" in capsys.readouterr().err
    for method, option in (("bce", False), ("eader", True)):
        with pytest.raises(SystemExit):
            main(["train-classifier", "--method", method, "--help"])
        shown = capsys.readouterr().out
        assert (
            ("--adversary-steps" in shown) == option and "--method {bce,eader}" in shown and "(default: bce)" in shown
        )


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "mobilenet_v2"])
@pytest.mark.parametrize("padding", [False, True], ids=["", "tensorflow"])
def test_folded_networks_compute_the_same(name, padding):
    if padding and name != "mobilenet_v2":
        pytest.skip("TensorFlow's padding is MobileNetV2's")
    torch.manual_seed(0)
    model = models.cam_classifier(name, 3, tensorflow_padding=padding)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 0.9)
            torch.nn.init.normal_(module.bias, 0, 0.1)
            torch.nn.init.normal_(module.running_mean, 0, 0.1)
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
    images = torch.randn(2, 3, 65, 48)
    expected = model.through(images)
    atol = 1e-4 * expected.abs().max().item()
    torch.testing.assert_close(models.folded(model).through(images), expected, rtol=1e-3, atol=atol)
    model.double()  # in which no rounding carries an activation over ReLU's kink, beyond which gradients differ
    before = {n: t.clone() for n, t in model.state_dict().items()}
    twin, images = models.folded(model), images.double().requires_grad_()
    found, expected = twin.through(images), model.through(images)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9 * expected.abs().max().item())
    assert not any(p.requires_grad for p in twin.parameters()) and found.requires_grad
    grads = [torch.autograd.grad(maps.square().sum(), images)[0] for maps in (found, expected)]
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-9 * grads[1].abs().max().item())
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    weights = torch.func.functional_call(twin, models.trained_folded(model), (images.detach(),))
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    grads = [torch.autograd.grad(maps.square().sum(), own.values()) for maps in (weights, model(images.detach()))]
    for name, found, expected in zip(own, *grads, strict=True):
        atol = 1e-9 * expected.abs().max().item()
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=atol, msg=lambda m, n=name: f"{n}: {m}")
    with pytest.raises(TypeError, match="expected a CamClassifier, got Sequential"):
        models.folded(torch.nn.Sequential(torch.nn.BatchNorm2d(3)))

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from ribfast import data, models
from ribfast.segment import label_probabilities


def settled(model):
    """Random weights whose features neither vanish nor explode, and heads that tell labels apart."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.startswith(("head.", "auxiliary.")):
                p.normal_(0, 0.1 if p.ndim > 1 else 1)
        for name, value in model.backbone.state_dict().items():
            if name.endswith("running_mean"):
                value.normal_(0, 0.1)
            elif name.endswith(("bn2.weight", "bn3.weight")):
                value.mul_(0.5)
    return model


def test_resnets_have_stride_8_and_deeplabs_dilations():
    model = models.segmenter("resnet50", 4).eval()
    with torch.no_grad():
        assert [tuple(x.shape) for x in model(torch.zeros(2, 3, 65, 81))] == [(2, 5, 9, 11)]
    convolutions = {name: module for name, module in model.backbone.named_modules() if name.endswith("conv2")}
    assert convolutions["layer2.0.conv2"].stride == (2, 2)
    assert all(c.dilation == (2, 2) and c.stride == (1, 1) for n, c in convolutions.items() if n.startswith("layer3"))
    assert all(c.dilation == (4, 4) for n, c in convolutions.items() if n.startswith("layer4"))
    assert [c.dilation[0] for c in model.head.children()] == [6, 12, 18, 24]
    assert not any(module.training for module in model.train().backbone.modules())


def test_the_light_head_follows_the_image_and_no_other_of_its_batch():
    model = settled(models.segmenter("mobilenet_v2", 3, auxiliary=True))
    images = torch.randn(2, 3, 70, 94)
    with torch.no_grad():
        (both,), (alone,) = model.train(False)(images), model(images[:1])
        assert both.shape == (2, 4, 9, 12)
        torch.testing.assert_close(both[:1], alone, rtol=1e-4, atol=1e-5)
        main, auxiliary = model.train()(images)
    torch.testing.assert_close(main, both)
    assert auxiliary.shape == (2, 4, 5, 6)


def caffe_state(prefix, n_labels):
    """A network's tensors as deeplab-pytorch names them."""
    draw, state = torch.Generator().manual_seed(0), {}

    def layer(name, channels, out, kernel, gain=1.0):
        fan = channels * kernel * kernel
        state[f"{prefix}{name}.conv.weight"] = torch.randn(out, channels, kernel, kernel, generator=draw) / fan**0.5
        for part, low, high in (("weight", 0.5, 1.5), ("bias", -0.2, 0.2), ("running_mean", -0.2, 0.2)):
            state[f"{prefix}{name}.bn.{part}"] = gain * (low + (high - low) * torch.rand(out, generator=draw))
        state[f"{prefix}{name}.bn.running_var"] = 0.5 + torch.rand(out, generator=draw)
        state[f"{prefix}{name}.bn.num_batches_tracked"] = torch.tensor(1)

    layer("layer1.conv1", 3, 64, 7)
    channels = 64
    for number, (count, width) in enumerate(zip((3, 4, 6, 3), (64, 128, 256, 512), strict=True), 2):
        for block in range(1, count + 1):
            name = f"layer{number}.block{block}"
            layer(f"{name}.reduce", channels, width, 1)
            layer(f"{name}.conv3x3", width, width, 3)
            layer(f"{name}.increase", width, 4 * width, 1, gain=0.3)
            if block == 1:
                layer(f"{name}.shortcut", channels, 4 * width, 1)
            channels = 4 * width
    for number in range(4):
        state[f"{prefix}aspp.c{number}.weight"] = torch.randn(n_labels, channels, 3, 3, generator=draw) / 100
        state[f"{prefix}aspp.c{number}.bias"] = torch.randn(n_labels, generator=draw)
    return state


def caffe_forward(state, x):
    """DeepLab-v2 as Caffe has it, written out: strides in the first 1x1, the pooling's size rounded up; BGR images."""

    def layer(x, name, stride=1, padding=0, dilation=1, relu=True):
        x = F.conv2d(x, state[f"{name}.conv.weight"], None, stride, padding, dilation)
        parts = (state[f"{name}.bn.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
        x = F.batch_norm(x, *parts)
        return x.relu() if relu else x

    x = F.max_pool2d(layer(x, "layer1.conv1", 2, 3), 3, 2, 1, ceil_mode=True)
    for number, (count, stride, dilation) in enumerate(((3, 1, 1), (4, 2, 1), (6, 1, 2), (3, 1, 4)), 2):
        for block in range(1, count + 1):
            name, step = f"layer{number}.block{block}", stride if block == 1 else 1
            y = layer(x, f"{name}.reduce", step)
            y = layer(layer(y, f"{name}.conv3x3", 1, dilation, dilation), f"{name}.increase", relu=False)
            x = (y + (layer(x, f"{name}.shortcut", step, relu=False) if block == 1 else x)).relu()
    rates = (6, 12, 18, 24)
    return sum(F.conv2d(x, state[f"aspp.c{i}.weight"], state[f"aspp.c{i}.bias"], 1, r, r) for i, r in enumerate(rates))


@pytest.mark.parametrize("prefix", ["", "base.", "module.scale."])
def test_deeplab_pytorchs_files_compute_the_same(prefix, tmp_path):
    state = caffe_state("", 5)
    torch.save({prefix + name: value for name, value in state.items()}, path := tmp_path / "deeplab.pth")
    model = models.open_segmenter(path, n_classes=4)
    assert (model.name, model.caffe, model.normalization) == ("resnet50", True, "caffe")
    image = np.random.default_rng(0).integers(0, 256, (66, 83, 3), dtype=np.uint8)
    bgr = torch.from_numpy(image[..., ::-1].astype(np.float32) - (104.008, 116.669, 122.675)).float()
    with torch.no_grad():
        expected = caffe_forward(state, bgr.permute(2, 0, 1)[None])
        (found,) = model(data.make_views(image, (1.0,), data.NORMALIZATIONS["caffe"], mirror=False)[0])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    other = models.segmenter("resnet50", 9, caffe=True)
    other.fill(models.load_checkpoint(path), heads=False)  # of another number of labels
    assert torch.equal(other.backbone.layer4[2].conv3.weight, state["layer5.block3.increase.conv.weight"])
    with pytest.raises(ValueError, match="expected weights of torchvision's layers, got Caffe's; set caffe to true"):
        models.segmenter("resnet50", 4).fill(models.load_checkpoint(path), heads=False)
    with pytest.raises(ValueError, match=r"a resnet50, got a checkpoint without .* and with caffe"):
        models.load_into(models.cam_classifier("resnet50", 4), models.load_checkpoint(path), classifier=False)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_checkpoints_give_the_same_network_again(name, tmp_path):
    model, path = settled(models.segmenter(name, 3, auxiliary=True)), tmp_path / "segmenter.safetensors"
    model.classes, model.backbone.normalization = ("a", "b", "c"), "symmetric"
    models.save_checkpoint(path, model.tensors(), model.metadata())
    again, images = models.open_segmenter(path), torch.randn(1, 3, 64, 64)
    assert (again.classes, again.normalization, again.name, again.training) == (
        ("a", "b", "c"),
        "symmetric",
        name,
        False,
    )
    with torch.no_grad():
        assert torch.equal(again(images)[0], model.eval()(images)[0])
    classifier = tmp_path / "classifier.safetensors"
    models.save_checkpoint(classifier, models.cam_classifier(name, 3).state_dict())
    again.fill(models.load_checkpoint(classifier), heads=False)
    with pytest.raises(ValueError, match=rf"a trained segmenter, with head\., got .*, a classifier on {name}; name"):
        models.open_segmenter(classifier)
    with pytest.raises(ValueError, match="a segmenter of the data's 7 classes, got 3 in"):
        models.open_segmenter(path, n_classes=7)
    with pytest.raises(ValueError, match="open_classifier: expected a trained classifier"):
        models.open_classifier(path)


def test_refuses_what_there_is_not():
    for wrong, said in (
        (dict(name="vgg", n_classes=3), "segmenter: expected one of resnet10"),
        (dict(name="resnet18", n_classes=0), "n_classes of at least 1"),
        (dict(name="resnet18", n_classes=255), "at most 254 classes"),
        (dict(name="resnet18", n_classes=3, caffe=True), "caffe with resnet50 or resnet101, got resnet18"),
        (dict(name="resnet50", n_classes=3, tensorflow_padding=True), "tensorflow_padding with mobilenet_v2 alone"),
    ):
        with pytest.raises(ValueError, match=said):
            models.segmenter(**wrong)


def photographs():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((60, 85), (60, 85), (97, 50))]


def test_probabilities_are_the_mean_over_scales_and_mirrors():
    model, images = settled(models.segmenter("mobilenet_v2", 3)), photographs()
    found = label_probabilities(model, images, scales=(1.0, 0.75, 1.5))
    for image, own in zip(images, found, strict=True):
        total, size = 0, image.shape[:2]
        for scale in (1.0, 0.75, 1.5):
            for flipped in (False, True):
                view = data.make_views(image[:, ::-1].copy() if flipped else image, (scale,), mirror=False)[0]
                with torch.no_grad():
                    logits = F.interpolate(model(view)[0], size=size, mode="bilinear", align_corners=False)[0]
                total = total + (logits.flip(-1) if flipped else logits).softmax(0)
        assert own.shape == (4, *size)
        # a rescaled mirror and a mirrored rescaled image differ by a level of 255 here and there
        torch.testing.assert_close(own, total / 6, rtol=0, atol=0.02)
        torch.testing.assert_close(own.sum(0), torch.ones(size))
    (alone,) = label_probabilities(model, images[1:2], scales=(1.0, 0.75, 1.5))
    torch.testing.assert_close(alone, found[1], rtol=1e-4, atol=1e-5)
    (plain,) = label_probabilities(model, images[:1], mirror=False)
    with torch.no_grad():
        logits = model(data.make_views(images[0], (1.0,), mirror=False)[0])[0]
    torch.testing.assert_close(plain, F.interpolate(logits, size=(60, 85), mode="bilinear")[0].softmax(0))


def test_windows_average_logits_where_they_overlap():
    model, image = settled(models.segmenter("mobilenet_v2", 3)), photographs()[2]
    (found,) = label_probabilities(model, [image], mirror=False, window=48, stride=32)
    view = data.make_views(image, (1.0,), mirror=False)[0]
    sums, cover = torch.zeros(4, 97, 50), torch.zeros(97, 50)
    for y in (0, 32, 49):
        for x in (0, 2):
            with torch.no_grad():
                logits = model(view[..., y : y + 48, x : x + 48])[0]
            sums[:, y : y + 48, x : x + 48] += F.interpolate(logits, size=(48, 48), mode="bilinear")[0]
            cover[y : y + 48, x : x + 48] += 1
    torch.testing.assert_close(found, (sums / cover).softmax(0), rtol=1e-3, atol=1e-5)
    (small,) = label_probabilities(model, [image[:20, :30].copy()], mirror=False, window=48)  # padded
    padded = F.pad(data.make_views(image[:20, :30].copy(), (1.0,), mirror=False)[0], (0, 18, 0, 28))
    with torch.no_grad():
        logits = F.interpolate(model(padded)[0], size=(48, 48), mode="bilinear")[0, :, :20, :30]
    torch.testing.assert_close(small, logits.softmax(0), rtol=1e-3, atol=1e-5)
    with pytest.raises(ValueError, match="0 < stride <= window, got stride 60 and window 48"):
        label_probabilities(model, [image], window=48, stride=60)
    with pytest.raises(ValueError, match="at least one scale"):
        label_probabilities(model, [image], scales=())

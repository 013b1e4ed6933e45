import pytest
import torch
from test_models import as_irn_writes_it
from torch import nn
from torch.nn import functional as F

from ribfast import models


def network(name="resnet18", **options):
    """Branches whose norms do more than normalise, on a backbone whose features neither vanish nor explode."""
    torch.manual_seed(1)
    model = models.irn_network(name, **options)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.GroupNorm):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.3)
        for parameter, value in model.backbone.named_parameters():
            if parameter.endswith("bn2.weight"):
                value.mul_(0.6)
        model.branches.mean_shift.running_mean.copy_(torch.tensor([0.25, -1.5]))
    return model


def plain(state, images, features):
    """Both branches by their tensors' names alone."""
    height, width = features[1].shape[2:]

    def layer(name, x, groups, enlarged=1):
        y = F.conv2d(x, state[f"{name}.0.weight"])
        y = F.group_norm(y, groups, state[f"{name}.1.weight"], state[f"{name}.1.bias"])
        if enlarged > 1:
            y = F.interpolate(y, scale_factor=enlarged, mode="bilinear", align_corners=False)
        return y.relu()

    edges = [
        layer(f"fc_edge{i + 1}", x, 4, by) for i, (x, by) in enumerate(zip(features, (1, 1, 2, 4, 4), strict=True))
    ]
    edges = torch.cat([x[..., :height, :width] for x in edges], 1)
    boundary = F.conv2d(edges, state["fc_edge6.weight"], state["fc_edge6.bias"])
    one, two, three = (layer(f"fc_dp{i + 1}", features[i], g) for i, g in enumerate((8, 16, 16)))
    four, five = (layer(f"fc_dp{i + 1}", features[i], 16, 2) for i in (3, 4))
    coarse = [x[..., : three.shape[2], : three.shape[3]] for x in (three, four, five)]
    six = layer("fc_dp6", torch.cat(coarse, 1), 16, 2)[..., :height, :width]
    seven = layer("fc_dp7", torch.cat([one, two, six], 1), 16)
    return boundary, F.conv2d(seven, state["fc_dp7.3.weight"]) - state["mean_shift.running_mean"].view(1, 2, 1, 1)


@pytest.mark.parametrize("name", ["mobilenet_v2", "resnet18", "resnet50"])
@pytest.mark.parametrize("size", [(43, 70), (4, 1)])
def test_branches_at_any_size(name, size):
    model = network(name)
    images = torch.randn(2, 3, *size)
    stages = model.backbone.stages(images)
    strides = [tuple(-(-side // stride) for side in size) for stride in (4, 4, 8, 16, 16)]
    assert [tuple(x.shape[2:]) for x in stages] == strides
    assert tuple(x.shape[1] for x in stages) == model.backbone.stage_channels
    assert torch.equal(stages[-1], model.backbone.tail(model.backbone.trunk(images)))
    found, expected = model(images), plain(model.tensors(), images, stages)
    assert found[0].shape == (2, 1, *strides[0]) and found[1].shape == (2, 2, *strides[0])
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5)


def test_only_branches_train():
    model = network().train()
    assert model.branches.training and not model.backbone.training
    images = torch.randn(2, 3, 32, 40)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    boundary, displacement = model(images)
    (boundary.sum() + displacement.sum()).backward()
    assert all(p.grad is not None for p in model.branches.parameters())
    assert all(p.grad is None and not p.requires_grad for p in model.backbone.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    shift = model.branches.mean_shift.running_mean[:, None, None]
    torch.testing.assert_close(model.eval()(images)[1], displacement - shift)


def test_boundaries_of_images_and_mirrors():
    model = network()
    views = [torch.randn(2, 3, *size) for size in ((33, 50), (40, 37), (64, 70))]
    found = model.boundaries(views, 64)
    assert [tuple(x.shape) for x in found] == [(9, 13), (10, 10), (16, 18)]
    for view, own in zip(views, found, strict=True):
        rows, columns = own.shape
        large = torch.zeros(2, 3, 64, max(64, view.shape[3]))
        large[..., : view.shape[2], : view.shape[3]] = view
        logits = model(large)[0][:, 0, :rows, :columns].detach()
        expected = ((logits[0] + logits[1].flip(-1)) / 2).sigmoid()
        torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-5)
    model.crop = 64
    torch.testing.assert_close(model.boundaries(views), found)
    as_they_are = model.boundaries(views[:1], 0)[0]
    assert (as_they_are - found[0]).abs().max() > 1e-3  # GroupNorm sees what is padded
    same = views[2][..., :48]
    upright, mirrored = model.boundaries([same, same.flip(0)], 0)
    torch.testing.assert_close(mirrored, upright.flip(-1))
    assert model.boundaries([], 0) == []


def as_released(model, prefix, old):
    """IRN's res50_irn.pth: tensors of modules that are listed several times, indices of pixels, ImageNet's head."""
    own, written = model.branches.state_dict(), {}
    backbone = {n: x for n, x in model.backbone.state_dict().items() if not n.startswith("classifier")}
    stages = {"conv1": "1.0", "bn1": "1.1", "layer1": "2.0", "layer2": "3.0", "layer3": "4.0", "layer4": "5.0"}
    for name, value in backbone.items():
        first, _, rest = name.partition(".")
        stage, place = stages[first].split(".")
        written |= {f"resnet50.{name}": value, f"stage{stage}.{place}.{rest}": value}
        written |= {f"backbone.{int(stage) - 1}.{place}.{rest}": value}
    for name, value in own.items():
        if name == "mean_shift.running_mean":
            written |= {"fc_dp7.4.running_mean": value, "dp_layers.6.4.running_mean": value}
            if old:
                written |= {"fc_dp7.4.running_var": torch.ones(2), "fc_dp7.4.num_batches_tracked": torch.tensor(7)}
            else:
                written[name] = value
            continue
        kind, number, rest = name[:-2].partition("fc_")[2], name.split(".")[0][-1], name.split(".", 1)[1]
        written[name] = value
        written[f"{'edge' if kind.startswith('edge') else 'dp'}_layers.{int(number) - 1}.{rest}"] = value
    written |= {"path_indices0": torch.zeros(1, 2, 9, dtype=torch.long), "disp_target": torch.zeros(1, 2, 9, 1)}
    if old:
        written |= {"ind_from": torch.zeros(1, 4, dtype=torch.long), "ind_to": torch.zeros(4, dtype=torch.long)}
    return {prefix + name: value for name, value in written.items()}


@pytest.mark.parametrize(("prefix", "old"), [("", False), ("module.", True)])
def test_opens_irns_own_files(prefix, old, tmp_path):
    model, path = network(), tmp_path / "res50_irn.pth"
    torch.save(as_released(model, prefix, old), path)
    other = models.open_irn(path)
    assert other.backbone.name == "resnet18" and other.normalization == "imagenet" and not other.training
    state = model.tensors()
    assert other.tensors().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in other.tensors().items())
    images = torch.randn(1, 3, 32, 47)
    for own, found in zip(model(images), other(images), strict=True):
        assert torch.equal(own, found)


def test_checkpoints_say_what_they_are(tmp_path):
    path = tmp_path / "irn.safetensors"
    model = network("mobilenet_v2", tensorflow_padding=True)
    model.backbone.normalization, model.crop = "symmetric", 96
    models.save_checkpoint(path, model.tensors(), model.metadata())
    other = models.open_irn(path)
    assert (other.normalization, other.crop) == ("symmetric", 96) and other.backbone.tensorflow_padding
    images = torch.randn(1, 3, 40, 47)
    assert torch.equal(other(images)[0], model(images)[0])
    models.save_checkpoint(path, model.tensors())
    assert not models.open_irn(path).backbone.tensorflow_padding and models.open_irn(path).crop == 512
    other = models.open_irn(path, tensorflow_padding=True)
    assert other.normalization == "symmetric" and torch.equal(other(images)[1], model(images)[1])
    backbone = models.cam_classifier("mobilenet_v2", 3)
    fresh = models.irn_network("mobilenet_v2")
    before = fresh.branches.fc_edge1[0].weight.clone()
    fresh.fill(backbone.state_dict(), branches=False)
    assert torch.equal(fresh.backbone.features[18][0].weight, backbone.features[18][0].weight)
    assert torch.equal(fresh.branches.fc_edge1[0].weight, before)


def test_refuses_wrong_files(tmp_path):
    model, path = network(), tmp_path / "wrong.pth"
    state = model.tensors()

    def refused(opened, content, match):
        torch.save(content, path)
        with pytest.raises(ValueError, match=match):
            opened(path)

    classifier = models.cam_classifier("resnet18", 20).state_dict()
    refused(
        models.open_irn,
        classifier,
        r"expected IRN's network, with fc_edge6.weight, got .*, a classifier on resnet18; name",
    )
    refused(models.open_irn, as_irn_writes_it(classifier), "a classifier on resnet18; name IRN's, or train")
    classifier.pop("classifier.weight")
    refused(models.open_irn, classifier, r"a backbone \(resnet18\); name IRN's, or train")
    refused(
        models.open_classifier,
        state,
        "expected a trained classifier, got .*, IRN's network on resnet18, without classifier",
    )
    less = {name: value for name, value in state.items() if not name.startswith("fc_dp7")}
    refused(
        models.open_irn,
        less,
        r"IRN's branches on resnet18, got .*, IRN's network on resnet18, without fc_dp7.0.weight, fc_dp7.1.bias",
    )
    wide = state | {"fc_edge4.0.weight": torch.zeros(32, 1024, 1, 1)}
    refused(models.open_irn, wide, r"expected fc_edge4.0.weight of shape \(32, 256, 1, 1\) got \(32, 1024, 1, 1\)")
    ill = state | {"fc_edge6.bias": torch.tensor([float("nan")])}
    refused(models.open_irn, ill, "finite weights, got NaN or infinity in fc_edge6.bias")
    torch.save(state, path)
    with pytest.raises(ValueError, match=r"a resnet50, got .*, IRN's network on resnet18, .*; choose network resnet18"):
        models.open_irn(path, network="resnet50")
    with pytest.raises(ValueError, match="open_irn: expected normalization of imagenet, symmetric, caffe"):
        models.open_irn(path, normalization="none")

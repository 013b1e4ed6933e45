"""The adaptation engine against the released implementation's numbers and against `reference.rib`."""

import dataclasses
import tracemalloc
from pathlib import Path

import numpy as np
import pictures
import pytest
import torch
from test_models import golden_state
from torch import nn
from torch.nn import functional as F

from ribfast import cli, data, models, reference
from ribfast.pipeline import AdaptConfig, adapt_maps
from ribfast.rib import Draws, Engine, Job, RIBConfig, Target, adapt
from ribfast.rib.canvas import Canvas, arrange, arrange_roomily
from ribfast.rib.step import Rows
from ribfast.store import Store

FOLDERS = [Path(__file__).parent / "golden", Path(__file__).parents[2] / "shared" / "golden"]
GOLDEN = ["explode", "gap", "gndrp_one_class", "gndrp_three_classes", "stop"]


def views_of(base, scales=(1.0, 0.5, 1.5, 2.0)):
    height, width = base.shape[1:]
    views = [
        F.interpolate(base[None], (round(height * s), round(width * s)), mode="bilinear", align_corners=False)
        for s in scales
    ]
    return [torch.cat([view, view.flip(-1)]) for view in views]


@pytest.fixture(scope="module")
def golden_model():
    model = models.cam_classifier("resnet50", 20)
    models.load_into(model, golden_state(model))
    return model


def golden_run(name):
    """(numbers, target, others, config) of one of the released implementation's runs."""
    path = next((folder / f"rib_{name}.npz" for folder in FOLDERS if (folder / f"rib_{name}.npz").exists()), None)
    if path is None:
        pytest.skip(f"rib_{name}.npz is not there")
    numbers = np.load(path)
    base = torch.from_numpy(numbers["base"])
    config = RIBConfig.released(
        steps=int(numbers["max_steps"]),
        lr=float(numbers["lr"]),
        tau=float(numbers["tau"]),
        pooling={"gndp": "gndrp", "gap": "gap"}[str(numbers["pooling"])],
        weight_decay=float(numbers["weight_decay"]),
        momentum=float(numbers["momentum"]),
        stop_logit=float(numbers["stop_logit"]),
        explode_level=float(numbers["explode_level"]),
        explode_area=float(numbers["explode_area"]),
        disjoint=False,
    )
    target = Target(views_of(base), numbers["target"].tolist(), tuple(base.shape[1:]))
    return (
        numbers,
        target,
        lambda k: (torch.from_numpy(numbers["xb"][k]), torch.from_numpy(numbers["yb"][k]) > 0),
        config,
    )


def check_golden(result, numbers, close):
    assert result.steps == numbers["steps"] and result.stopped == numbers["stopped"]
    assert result.keys == numbers["keys"].tolist()
    for i, maps in enumerate(result.maps):
        close(maps, numbers[f"raw{i}"])
    close(result.cam, numbers["cam"])
    close(result.high_res, numbers["high_res"])


def within_a_thousandth(found, expected):
    expected = torch.from_numpy(expected)
    assert (found.cpu() - expected).abs().max() <= 1e-3 * expected.abs().max()


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_runs(golden_model, name, device):
    numbers, target, others, config = golden_run(name)
    result = adapt(golden_model.to(device), [target], others, config)[0]
    golden_model.cpu()
    check_golden(result, numbers, within_a_thousandth)


def test_golden_run_among_targets_of_other_sizes(golden_model):
    numbers, target, others, config = golden_run("gap")
    targets = [
        Target(views_of(torch.randn(3, *size)), [c], size) for size, c in (((40, 72), 3), ((33, 57), 2), ((16, 16), 9))
    ]
    before = {name: value.clone() for name, value in golden_model.state_dict().items()}
    results = adapt(golden_model, [targets[0], target, *targets[1:]], others, config)
    check_golden(results[1], numbers, within_a_thousandth)
    for one, result in zip(targets, [results[0], *results[2:]], strict=True):
        expected, steps, stopped = reference.rib(golden_model, one.views, one.classes, others, config)
        assert (result.steps, result.stopped) == (steps, stopped)
        for found, maps in zip(result.maps, expected, strict=True):
            within_a_thousandth(found, maps.numpy())
    assert all(torch.equal(value, before[name]) for name, value in golden_model.state_dict().items())


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_16_bits_stay_close(golden_model, precision):
    if precision == "float16" and not torch.cuda.is_available():
        pytest.skip("convolutions in float16 are hundreds of times slower on a CPU")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    numbers, target, others, config = golden_run("gndrp_one_class")
    config = dataclasses.replace(config, precision=precision)
    result = adapt(golden_model.to(device), [target], others, config)[0]
    golden_model.cpu()
    for i, maps in enumerate(result.maps):
        assert np.corrcoef(maps.cpu().numpy().ravel(), numbers[f"raw{i}"].ravel())[0, 1] > 0.999


def small_model(name="resnet10", classes=4, **options):
    """With statistics that do something."""
    torch.manual_seed(3)
    model = models.cam_classifier(name, classes, **options)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.7, 1.3)
            nn.init.uniform_(module.weight, 0.7, 1.2)
            nn.init.normal_(module.bias, 0, 0.05)
    return model


def small_target(size=(45, 66), classes=(1,), scales=(1.0, 0.5, 1.5, 2.0)):
    return Target(views_of(torch.randn(3, *size), scales), list(classes), size)


def small_others(step, count=3, side=40, present=(0, 2), n_classes=4):
    generator = torch.Generator().manual_seed(step)
    labels = torch.zeros(count, n_classes, dtype=torch.bool)
    labels[:, list(present)] = True
    return torch.randn(count, 3, side, side, generator=generator), labels


@pytest.mark.parametrize(
    "name, options",
    [
        ("resnet18", {}),
        ("mobilenet_v2", {}),
        ("mobilenet_v2", {"tensorflow_padding": True}),
    ],
)
@pytest.mark.parametrize("preset", ["released", "paper", "coco"])
def test_every_network_and_preset_equals_the_reference(name, options, preset):
    """Odd and even sizes at stride 8, whose places TensorFlow's padding tells apart."""
    model = small_model(name, **options)
    config = getattr(RIBConfig, preset)(steps=4, lr=2e-4, disjoint=False, explode_area=None)
    config = dataclasses.replace(config, momentum=0.3, weight_decay=0.01)  # large enough to show
    targets = [small_target((45, 66), (1, 3)), small_target((64, 48), (2,))]
    for target, result in zip(targets, adapt(model, targets, small_others, config), strict=True):
        maps, steps, stopped = reference.rib(model, target.views, target.classes, small_others, config)
        assert (result.steps, result.stopped) == (steps, stopped)
        for found, expected in zip(result.maps, maps, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.max()))


def test_adaptation_changes_the_maps():
    """What the comparisons above could not tell from standing still."""
    model, target = small_model(), small_target()
    config = RIBConfig.released(steps=3, lr=2e-4, explode_area=None)
    first = adapt(model, [target], small_others, dataclasses.replace(config, steps=1))[0]
    still = adapt(model, [target], small_others, dataclasses.replace(config, lr=0.0))[0]
    moved = adapt(model, [target], small_others, config)[0]
    torch.testing.assert_close(still.maps[0], 3 * first.maps[0], rtol=1e-4, atol=1e-4)
    assert (moved.maps[0] - still.maps[0]).abs().max() > 0.05 * still.maps[0].max()


def test_anchored_others_are_the_mean_gradient_at_theta_0():
    """With the same others at every step and a rate that hardly moves the weights, both ways agree."""
    model, target = small_model(), small_target()
    config = RIBConfig.fast(steps=4, lr=1e-6, anchor_batches=2, precision="float32", explode_area=None)

    def same(step):
        return small_others(0)

    anchored = adapt(model, [target], same, config)[0]
    exact = adapt(model, [target], same, dataclasses.replace(config, anchored=False))[0]
    alone = adapt(model, [target], None, config)[0]
    for found, expected in zip(anchored.maps, exact.maps, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.max()))
    assert (alone.maps[0] - exact.maps[0]).abs().max() > 10 * (anchored.maps[0] - exact.maps[0]).abs().max()


def test_fewer_scales_and_other_orders():
    model = small_model()
    config = RIBConfig.released(steps=3, lr=2e-4, scales=(0.5, 1.0), loss_scales=(1.0,), explode_area=None)
    target = small_target(scales=config.scales)
    result = adapt(model, [target], small_others, config)[0]
    expected = reference.rib(model, target.views, target.classes, small_others, config)[0]
    for found, maps in zip(result.maps, expected, strict=True):
        torch.testing.assert_close(found, maps, rtol=1e-3, atol=1e-4 * float(maps.max()))


def test_an_image_without_classes_and_one_that_is_not_finite_leave_the_others_alone():
    model, good = small_model(), small_target()
    broken = small_target()
    broken.views[2][0, 0, 5, 5] = float("nan")
    config = RIBConfig.released(steps=3)
    results = adapt(model, [small_target(classes=()), broken, good], small_others, config)
    assert results[0].error == "no class is present" and not results[0].maps
    assert "not finite" in results[1].error and results[1].cam is None
    alone = adapt(model, [good], small_others, config)[0]
    assert results[2].error is None
    torch.testing.assert_close(results[2].maps[0], alone.maps[0], rtol=1e-5, atol=1e-5)


def test_bad_input_is_named():
    model, target, config = small_model(), small_target(), RIBConfig.released(steps=3)

    def refused(match, targets=(target,), others=small_others, config=config, model=model, error=ValueError):
        with pytest.raises(error, match=match):
            adapt(model, targets, others, config)

    refused("at least one target", [])
    refused("classes from 0 to 3, the classifier's, got \\[4\\]", [small_target(classes=(4,))])
    refused("each class once", [small_target(classes=(1, 1))])
    refused("one pair of views for each scale", [Target(target.views[:3], [1], target.size)])
    swapped = [target.views[1], target.views[0], *target.views[2:]]
    refused("target 0 to have a view of 45x66 times 1.0, within a pixel, got 22x33", [Target(swapped, [1], (45, 66))])
    refused("views \\(2, 3, h, w\\), at scale 1.0", [Target([target.views[0][:1], *target.views[1:]], [1], (45, 66))])
    refused("normalised views", [Target([v.to(torch.uint8) for v in target.views], [1], (45, 66))])
    refused("no image of class 1, which a target has, got image 0", others=lambda k: small_others(k, present=(1,)))
    refused("present as a bool tensor \\(3, 4\\)", others=lambda k: (small_others(k)[0], small_others(k)[1].float()))
    refused("at least one image", others=lambda k: small_others(k, count=0))
    refused("normalised images \\(B, 3, h, w\\)", others=lambda k: (torch.zeros(2, 40, 40), None))
    refused("of one size as at other steps", others=lambda k: small_others(k, side=40 + 8 * k))
    refused("a classifier of ribfast.models, got Linear", model=nn.Linear(2, 2), error=TypeError)
    ruined = small_model()
    ruined.layer3[0].conv1.weight.data[0, 0, 0, 0] = float("nan")
    refused("finite weights, got NaN or infinity in layer3.0.conv1.weight", model=ruined)


@pytest.mark.parametrize(
    "field, value",
    [("steps", 0), ("lr", -1.0), ("pooling", "max"), ("precision", "int8"), ("scales", (0.5,)), ("loss_scales", (3.0,)),
     ("stop_logit", 0), ("n_others", -1), ("horizon", 3), ("divide_by", "some"), ("tau", float("nan")),
     ("scales", (1.0, float("inf"))), ("others_long_side", (640, 320))],
)  # fmt: skip
def test_config_names_a_bad_field(field, value):
    with pytest.raises(ValueError, match=f"RIBConfig: expected {field} "):
        RIBConfig.released(**{field: value})


def test_presets():
    assert RIBConfig.released() == RIBConfig()
    assert RIBConfig.coco().stop_logit == 1000 and RIBConfig.coco(tau=0.3).tau == 0.3
    paper = RIBConfig.paper()
    assert (paper.margin, paper.stop_logit, paper.explode_area, paper.divide_by) == (600, None, None, "kept")
    assert RIBConfig.fast().anchored
    assert [round(RIBConfig.released().rate(k) / 8e-6, 4) for k in (0, 5)] == [1, round(0.5**0.9, 4)]


@pytest.mark.parametrize("arrange", [arrange, arrange_roomily])
def test_canvas_keeps_every_map_apart(arrange):
    rng = np.random.default_rng(0)
    for _ in range(40):
        own, others = (
            tuple((int(h), int(w)) for h, w in rng.integers(1, 30, (rng.integers(low, 9), 2))) for low in (1, 0)
        )
        places, own_rows, rows, columns = arrange(own, others)
        taken = np.zeros((rows + 1, columns + 1), int)
        for number, ((y, x), (h, w)) in enumerate(zip(places, own + others, strict=True)):
            assert y >= 0 and x >= 0 and x + w <= columns and y + h <= (own_rows if number < len(own) else rows)
            taken[y : y + h + 1, x : x + w + 1] += 1  # with its gutter
        assert taken.max() == 1


def test_images_of_many_sizes_share_few_canvases_with_little_room_to_spare():
    scales, shapes = RIBConfig().scales, set()
    sizes = [(375, 500), (500, 375), (333, 500), (500, 333), (334, 500), (332, 500), (400, 500), (281, 500), (500, 400)]
    for size in sizes:
        own = [tuple(-(-round(side * s) // 8) for side in size) for s in scales for _ in range(2)]
        canvas = Canvas(own, [(64, 64)] * 20, few_shapes=True)
        shapes.add(canvas.shape)
        assert canvas.small_mask.mean() > 0.85
    assert len(shapes) <= 6


def test_canvas_gives_each_map_what_it_has_alone():
    """Values and gradients of a small network of 3x3 convolutions, through `Tail`."""
    from ribfast.rib.tail import Tail, Weights

    model = small_model("mobilenet_v2", tensorflow_padding=True)
    sizes = [(7, 10), (8, 5), (1, 1), (2, 9)]
    features = [torch.randn(32, *size) for size in sizes]
    canvas = Canvas(sizes[:2], sizes[2:], tensorflow_padding=True)
    together = canvas.empty(32, torch.float32)
    for number, feature in enumerate(features):
        canvas.write(together, number, feature)
    tail = Tail(model, torch.float32)
    weights = Weights(tail)
    maps = tail(together, canvas.masks(torch.float32), weights)
    loss = 0
    for number, feature in enumerate(features):
        alone = model.maps(feature[None])[0]
        found = maps[:, canvas.cells(number)]
        torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-5)
        loss = loss + (number + 1) * alone.square().sum()
    loss.backward()
    mine = sum((n + 1) * maps[:, canvas.cells(n)].square().sum() for n in range(len(sizes)))
    gradients = weights.gradients(mine)
    torch.testing.assert_close(gradients[-1], model.classifier.weight.grad, rtol=1e-3, atol=1e-3)
    depthwise = next(i for i, layer in enumerate(tail.layers) if layer.padding is None)
    scale = tail.start[depthwise][1][0] * tail.layers[depthwise].norm[0]
    expected = model.features[7].conv[1][0].weight.grad
    found = gradients[2 * depthwise] * scale[:, None, None, None]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


@pytest.mark.parametrize("divide_by, strict", [("all", True), ("kept", False)])
def test_pooling_of_rows_is_gndrp(divide_by, strict):
    maps = torch.randn(5, 40)
    maps[1] = -maps[1].abs() - 0.1
    maps[2] = 0
    cells = [torch.arange(12).view(3, 4), torch.arange(20, 40).view(4, 5)]
    rows = Rows(cells, 40, "cpu")
    config = RIBConfig.released(divide_by=divide_by, strict=strict)
    present = torch.ones(1, 5, dtype=torch.bool)
    for number, c in enumerate(cells):
        expected = reference.gndrp(maps[None][:, :, c], present, config.tau, divide_by=divide_by, strict=strict)[0]
        torch.testing.assert_close(rows.pool(maps, config)[number], expected)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return data.open_source(pictures.draw(tmp_path_factory.mktemp("data") / "pictures", 10, (48, 64)))


SMALL = {"steps": 3, "n_others": 2, "others_crop": 40, "others_long_side": (32, 48), "share_others": 2, "device": "cpu"}


def test_draws_share_no_class_and_do_not_depend_on_the_share(source):
    config = RIBConfig.released(n_others=2, share_others=2)
    draws = Draws(source, source, config, seed=1)
    labels = source.labels().numpy()
    with_both = [block for block in draws.blocks if len(source[block[0]].classes) == 2]
    assert with_both and not len(draws.pool(with_both[0]))
    assert sorted(i for block in draws.blocks for i in block) == [i for i, item in enumerate(source) if item.classes]
    assert draws.draw(with_both[0])[0].shape == (9, 0) == draws.draw(with_both[0])[1].shape[:2]
    for block in draws.blocks:
        assert len({source[i].classes for i in block}) == 1
        assert not (labels[draws.draw(block)[0]] & labels[block[0]]).any()
    block = draws.blocks[0]
    numbers, seeds = draws.draw(block)
    assert numbers.shape == (9, 2) and seeds.shape == (9, 2, 4)
    pool = draws.pool(block).tolist()
    assert 2 <= len(pool) < 9  # smaller than what is drawn: a turn after another
    turns = [numbers.ravel().tolist()[i : i + len(pool)] for i in range(0, 18 - len(pool), len(pool))]
    assert all(sorted(turn) == pool for turn in turns) and len(set(map(tuple, turns))) > 1
    again = Draws(source, source, config, seed=1)
    for other in reversed(again.blocks):
        for mine, theirs in zip(draws.draw(other), again.draw(other), strict=True):
            assert np.array_equal(mine, theirs)
    crops = np.concatenate([seeds, Draws(source, source, config, 2).draw(block)[1]]).reshape(-1, 4)
    assert len(np.unique(crops, axis=0)) == len(crops)
    free = Draws(source, source, RIBConfig.paper(n_others=2))
    assert set(free.pool(block)) == {i for i, item in enumerate(source) if item.classes} - set(block)
    assert set(free.draw(block)[0].ravel()) <= set(free.pool(block))


def labelled(prefix, sets, classes):
    """A source of images that are never read."""
    items = (data.Item(f"{prefix}{i}", Path(f"{prefix}{i}.jpg"), tuple(found), None) for i, found in enumerate(sets))
    return data.Source(tuple(map(str, range(classes))), tuple(items))


def test_what_is_drawn_costs_the_same_among_any_number_of_images(monkeypatch):
    rng = np.random.default_rng(0)
    sets = [np.sort(rng.choice(80, rng.integers(0, 7), replace=False)).tolist() for _ in range(10_000)]
    source = labelled("i", sets, 80)
    for preset in ("released", "coco", "fast", "paper"):
        draws = Draws(source, source, getattr(RIBConfig, preset)())
        monkeypatch.setattr(draws, "pool", lambda block: pytest.fail("all images that may be drawn were listed"))
        for block in draws.blocks[:: len(draws.blocks) // 30]:
            tracemalloc.start()
            numbers, _ = draws.draw(block)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert peak < 8 * len(sets)  # less than a number an image
            assert numbers.shape == (draws.steps, draws.config.n_others) and len(np.unique(numbers)) == numbers.size
            assert all(sets[number] for number in numbers.flat) and not set(numbers.flat) & set(block)
            if draws.config.disjoint:
                assert not draws.labels[numbers][..., sets[block[0]]].any()


def unevenness(counts):
    """How far counts are from equal, in standard deviations of chi-square: 4 is a chance of less than 0.001."""
    expected, degrees = counts.mean(), counts.size - 1
    return (((counts - expected) ** 2 / expected).sum() - degrees) / (2 * degrees) ** 0.5


@pytest.mark.parametrize("count, listed", [(10, 1.0), (160, 0.46), (2000, 0.99)])
def test_every_order_of_a_pool_is_as_likely(count, listed, monkeypatch):
    """Of 5 images: where all others are few, where 64 tries find two of them at times, and where they hardly do."""
    others = labelled("other", [[1] if number % (count // 5) == 1 else [0, 1] for number in range(count)], 2)
    config = RIBConfig.released(steps=3, n_others=1, share_others=1)
    draws, asked = Draws(labelled("target", [[0]] * 1500, 2), others, config), []
    pool = draws.pool
    monkeypatch.setattr(draws, "pool", lambda block: asked.append(block) or pool(block))
    pairs = np.array([draws.draw(block)[0].ravel() for block in draws.blocks]) // (count // 5)
    assert abs(len(asked) / len(pairs) - listed) < 0.06
    counts = np.bincount(5 * pairs[:, 0] + pairs[:, 1], minlength=25).reshape(5, 5)
    assert not counts.diagonal().any()
    assert unevenness(counts[~np.eye(5, dtype=bool)]) < 4


def test_every_other_image_is_as_likely_without_disjoint():
    count = 70  # the 64 tries of two images are fewer, so the pool is not listed
    source = labelled("i", [[0]] * count, 1)
    draws = Draws(source, source, RIBConfig.released(steps=3, n_others=1, share_others=1, disjoint=False))
    found = []
    for draws.seed in range(60):
        found += [[block[0], *draws.draw(block)[0].ravel()] for block in draws.blocks]
    own, first, second = np.array(found).T
    for places in (first, second):
        assert unevenness(np.bincount(places, minlength=count)) < 4
    for places in (first - own, second - own, second - first):
        counts = np.bincount(places % count, minlength=count)
        assert not counts[0] and unevenness(counts[1:]) < 4


def test_maps_do_not_depend_on_shards_or_on_what_is_there(source, tmp_path):
    model = small_model(classes=2)
    single = source.__class__(source.classes, tuple(i for i in source if len(i.classes) < 2), source.upright)
    whole = Store(tmp_path / "whole", "irn")
    made = adapt_maps(single, model, whole, AdaptConfig.released(**SMALL))
    assert made.made == len(whole.names()) == sum(map(bool, (i.classes for i in single))) and made.without_classes == 1
    parts = Store(tmp_path / "parts", "irn")
    adapt_maps(single, model, parts, AdaptConfig.released(**SMALL, shard="1/2"))
    first = parts.names()
    assert 0 < len(first) < made.made
    parts.path(first[0]).unlink()
    for shard in ("0/2", "1/2"):
        adapt_maps(single, model, parts, AdaptConfig.released(**SMALL, shard=shard))
    assert parts.names() == whole.names()
    for name in whole.names():
        np.testing.assert_allclose(parts.load(name).high_res, whole.load(name).high_res, rtol=1e-4, atol=1e-5)
    known = whole.metrics()
    assert known["p9"] == {"skipped": "no classes"} and known["p0"]["steps"] >= 1 and not whole.failures()
    assert known["p0"]["stopped"] in (True, False) and known["p0"]["seconds"] > 0
    again = adapt_maps(single, model, whole, AdaptConfig.released(**SMALL))
    assert (again.made, again.kept) == (0, made.made)


def test_what_cannot_be_adapted_is_recorded(source, tmp_path):
    store = Store(tmp_path)
    made = adapt_maps(source, small_model(classes=2), store, AdaptConfig.released(**SMALL))
    both = [item.name for item in source if len(item.classes) == 2]
    assert both and set(made.failed) == set(both) and made.made == 9 - len(both)
    assert "every other image shares a class" in store.failures()[both[0]]


def test_large_photographs_are_reduced_and_their_maps_are_not(source, tmp_path):
    """As if they were small, but for the size of the maps."""
    single = source.__class__(source.classes, tuple(i for i in source if len(i.classes) == 1), source.upright)
    model, config, apart = small_model(classes=2), {**SMALL, "steps": 2, "disjoint": False}, []
    stores = {largest: Store(tmp_path / str(largest), "irn") for largest in (None, 64, 32)}
    for largest, store in stores.items():
        made = adapt_maps(single, model, store, AdaptConfig.released(**config, largest=largest, steps_kept=True))
        assert made.made == len(single) and not made.failed
    for item in single:
        whole, same = (stores[largest].load(item.name).high_res for largest in (None, 64))
        np.testing.assert_allclose(same, whole, rtol=1e-4, atol=1e-5)
        maps, (_, steps) = stores[32].load(item.name), stores[32].load_steps(item.name)
        assert maps.high_res.shape == (1, 48, 64) and maps.cam.shape == (1, 12, 16) and steps.shape[1:] == (1, 12, 16)
        apart.append(np.abs(maps.high_res - whole).max())
    assert max(apart) > 0.01
    with pytest.raises(ValueError, match=r"a view of 24x32 times 1\.0"):
        views = views_of(torch.randn(3, 48, 64))
        adapt(model, [Target(views, [0], (48, 64), (24, 32))], None, RIBConfig.released(steps=1))


def test_an_engine_serves_many_calls():
    model, target = small_model(), small_target()
    engine = Engine(model, RIBConfig.released(steps=2, lr=2e-4))
    first, second = (engine.adapt([target], small_others)[0] for _ in range(2))
    assert torch.equal(first.maps[0], second.maps[0])


def test_the_callers_modes_change_nothing():
    model, target, config = small_model(), small_target(), RIBConfig.released(steps=3, lr=2e-4)
    expected = adapt(model, [target], small_others, config)[0]
    for mode in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)):
        with mode:
            found = adapt(model, [target], small_others, config)[0]
        assert torch.equal(found.maps[0], expected.maps[0])


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("preset, expected", [("released", [0, 1, 2]), ("fast", [0, 1, 2, 3])])
def test_others_are_asked_for_once_a_step_in_order(count, preset, expected):
    asked = []

    def others(step):
        asked.append(step)
        return small_others(step)

    config = getattr(RIBConfig, preset)(steps=4, explode_area=None, precision="float32")
    adapt(small_model(), [small_target()] * count, others, config)
    assert asked == expected


@pytest.mark.parametrize("scales", [(1.0, 0.5, 1.5, 2.0), (0.5, 1.0, 1.5)])
def test_the_guard_stops_where_the_reference_does(scales):
    model, target = small_model(), small_target(scales=scales)
    config = RIBConfig.released(
        steps=5, lr=1e-5, explode_level=0.2, explode_area=0.3, scales=scales, loss_scales=(1.0, 1.5)
    )
    result = adapt(model, [target], small_others, config)[0]
    maps, steps, stopped = reference.rib(model, target.views, target.classes, small_others, config)
    assert (result.steps, result.stopped) == (steps, stopped) == (2, True)
    for found, expected in zip(result.maps, maps, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.max()))


def test_a_model_that_changes_later_is_not_seen():
    model, target, config = small_model(), small_target(), RIBConfig.released(steps=2, lr=2e-4)
    engine = Engine(model, config)
    expected = engine.adapt([target], small_others)[0]
    with torch.no_grad():
        model.classifier.weight.mul_(2)
        model.layer4[0].conv1.weight.mul_(2)
    assert torch.equal(engine.adapt([target], small_others)[0].maps[0], expected.maps[0])


def test_watching_the_steps():
    model, target, config = small_model(), small_target(), RIBConfig.released(steps=4, lr=2e-4, explode_area=None)
    seen = []
    engine = Engine(model, config)
    job = Job(target, engine.batches([1], small_others, 1), watch=lambda step, maps: seen.append((step, maps)))
    ((_, result),) = engine.adapt_all([job])
    assert [step for step, _ in seen] == [0, 1, 2, 3]
    assert all(torch.equal(a, b) for a, b in zip(seen[-1][1], result.maps, strict=True))
    shorter = adapt(model, [target], small_others, dataclasses.replace(config, steps=2, horizon=4))[0]
    torch.testing.assert_close(seen[1][1][0], shorter.maps[0], rtol=1e-4, atol=1e-5)


def test_command_and_a_picture_that_cannot_be_read(tmp_path, capsys):
    spec = pictures.draw(tmp_path / "pictures", 7, (48, 64))
    model = small_model(classes=2)
    model.classes = pictures.CLASSES
    models.save_checkpoint(tmp_path / "classifier.safetensors", model.state_dict(), model.metadata())
    (tmp_path / "pictures" / "images" / "p2.png").write_bytes(b"no picture")
    options = ["--data", spec, "--checkpoint", str(tmp_path / "classifier.safetensors"), "--no-disjoint"]
    options += [
        "--steps",
        "2",
        "--n-others",
        "5",
        "--others-crop",
        "40",
        "--others-long-side",
        "32,48",
        "--device",
        "cpu",
    ]
    out = tmp_path / "maps"
    assert cli.main(["rib", *options, "--out", str(out)]) == 3
    store = Store(out)
    assert (
        store.names() == ["p0", "p1", "p3", "p4", "p5"]
        and "p2, drawn as another image, is left out" in capsys.readouterr().err
    )
    assert list(store.failures()) == ["p2"] and store.metrics()["p6"] == {"skipped": "no classes"}
    assert cli.main(["rib", *options, "--out", str(out), "--lr", "1e-3"]) == 1  # would mix two kinds of maps
    assert "lr" in capsys.readouterr().err
    (tmp_path / "pictures" / "some.txt").write_text("p0\np1\np3\n")
    assert cli.main(["rib", *options, "--out", str(out), "--others", "some"]) == 1  # drawn from elsewhere
    assert "another others" in capsys.readouterr().err
    assert cli.main(["rib", *options, "--out", str(out), "--concurrency", "2"]) == 3  # p2 alone is tried again
    assert "0 made, 5 there before" in capsys.readouterr().err
    assert (
        cli.main(["rib", *options, "--out", str(tmp_path / "fast"), "--preset", "fast", "--precision", "float32"]) == 3
    )
    assert Store(tmp_path / "fast").names() == store.names()

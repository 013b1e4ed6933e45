"""RIB against the released procedure written straight (`reference.rib`): one image at a time, float32, every step from
its pixels on, and, with loading, its other images read in line. Seconds an image; both in one run, by the same numbers.

128-pixel images, 20 others of 128 pixels, 4 steps without stops. All images have one label set: 8 of them, which is
what sees the same others by default; 24 where the others' gradient serves a whole label set, which has 27 on VOC.
"""

import functools

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.conftest import seconds
from benchmarks.photographs import picture, write
from ribfast import data, models, reference
from ribfast.cams import merge_cams
from ribfast.pipeline import AdaptConfig, adapt_maps
from ribfast.rib import RIBConfig, Target, adapt
from ribfast.store import Store

SIDE, OTHERS, STEPS = 128, 20, 4
IMAGES = {"released": 8, "fast": 24}
CLASSES, OWN = 20, 3
WITHOUT_STOPS = {"steps": STEPS, "stop_logit": None, "explode_area": None, "n_others": OTHERS, "others_crop": SIDE,
                 "others_long_side": (96, 160), "lr": 1e-6}  # fmt: skip
# preset, precision -> times faster than the released procedure that is asked for: on arithmetic alone, with loading
ASKED = {("released", "float32"): (None, None), ("released", "auto"): (2.5, 4.0), ("fast", "auto"): (6.0, 6.0)}
NETWORKS = ("resnet50", "mobilenet_v2")


@functools.cache
def classifier(name):
    """Random weights whose maps stay in the range of trained ones."""
    torch.manual_seed(0)
    model = models.cam_classifier(name, CLASSES)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.uniform_(0.8, 1.2)
    return model


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """(images to adapt, the others): JPEG files, the others of 375x500 pixels."""

    root = tmp_path_factory.mktemp("rib")
    own = write(root / "own", (picture(i, (SIDE, SIDE)) for i in range(max(IMAGES.values()))), lambda i: OWN, CLASSES)
    others = write(root / "others", (picture(100 + i, (375, 500)) for i in range(60)), lambda i: 4 + i % 8, CLASSES)
    return own, others


def released(model, source, others, config, store, rng):
    """As the released code goes about it, with our decoder and crops, which are faster than its own."""
    crop = data.Augmentation(config.others_long_side, config.others_crop)
    for item in source:
        views = data.make_views(source.image(item), config.scales)
        pool = [i for i, other in enumerate(others) if not set(other.classes) & set(item.classes)]
        order = rng.permutation(np.resize(rng.permutation(pool), STEPS * OTHERS))

        def load(step, order=order):
            chosen = order[step * OTHERS : (step + 1) * OTHERS]
            images = torch.stack([crop(others.image(others[int(i)]), rng) for i in chosen])
            return images, others.labels()[chosen]

        maps, _, _ = reference.rib(model, views, item.classes, load, config)
        store.save(item.name, item.classes, *merge_cams([m[None] for m in maps], item.classes, (SIDE, SIDE)))


def some(source, count):
    return data.Source(source.classes, source.items[:count], source.upright)


def per_image(benchmark, images, ours, baseline, asked, **facts):
    """ours adapts so many images, baseline one."""
    pairs = [(seconds(baseline), seconds(ours) / images) for _ in range(2)]
    before, after = (min(side) for side in zip(*pairs, strict=True))
    benchmark.extra_info.update(
        facts, target=asked, ratio=before / after, ratios=sorted(b / a for b, a in pairs),
        baseline_min=before, ours_min=after, threads=torch.get_num_threads(),
    )  # fmt: skip
    benchmark.pedantic(lambda: None, rounds=1)


@pytest.mark.parametrize("preset, precision", ASKED, ids=lambda value: value)
@pytest.mark.parametrize("name", NETWORKS)
def bench_rib_arithmetic(benchmark, sources, name, preset, precision):
    model, config = classifier(name), getattr(RIBConfig, preset)(precision=precision, **WITHOUT_STOPS)
    own, other = some(sources[0], IMAGES[preset]), sources[1]
    targets = [Target(data.make_views(own.image(item)), [OWN], (SIDE, SIDE)) for item in own]
    crop, rng = data.Augmentation(config.others_long_side, SIDE), np.random.default_rng(0)
    drawn = [rng.permutation(len(other))[:OTHERS] for _ in range(STEPS)]
    batches = [(torch.stack([crop(other.image(other[int(i)]), rng) for i in d]), other.labels()[d]) for d in drawn]
    results = []

    def ours():
        results[:] = adapt(model, targets, batches.__getitem__, config)

    def baseline():
        nonlocal expected
        expected = reference.rib(model, targets[0].views, [OWN], batches.__getitem__, config)[0]

    expected = None
    ours(), baseline()  # which also warms up
    _, straight = merge_cams([m[None] for m in expected], [OWN], (SIDE, SIDE))
    found, straight = results[0].high_res.flatten(), straight.flatten()
    correlation = torch.corrcoef(torch.stack([found, straight]))[0, 1].item()
    agreement = ((found > 0.3) == (straight > 0.3)).float().mean().item()
    facts = {"correlation": correlation, "agreement": agreement}
    per_image(benchmark, len(own), ours, baseline, ASKED[preset, precision][0], **facts)


@pytest.mark.parametrize("preset, precision", [key for key in ASKED if key[1] == "auto"], ids=lambda value: value)
@pytest.mark.parametrize("name", NETWORKS)
def bench_rib_with_loading(benchmark, sources, tmp_path, name, preset, precision):
    model, rng = classifier(name), np.random.default_rng(0)
    own, others = some(sources[0], IMAGES[preset]), sources[1]
    config = getattr(AdaptConfig, preset)(precision=precision, device="cpu", **WITHOUT_STOPS)
    count = iter(range(100))

    def ours():
        made = adapt_maps(own, model, Store(tmp_path / f"ours{next(count)}", "irn"), config, others=others)
        assert made.made == len(own)

    def baseline():
        released(model, some(own, 1), others, config, Store(tmp_path / f"released{next(count)}", "irn"), rng)

    per_image(benchmark, len(own), ours, baseline, ASKED[preset, precision][1])

"""RIB on a GPU: against the released procedure written straight, by images at once, without graphs and in float32.

Random weights, stops off, so that every image takes all K steps; images of one label set share their others, as many
as by default (8; 64 with the fast preset). Without loading, views and others lie on the device; with it, there are JPEG
files on disk, and maps are written. Operations are counted, two a multiply-add, of what has to be computed:
`rate_share` is their rate over that of one large 16-bit matrix product. Called by benchmarks/gpu.py:
`python -m benchmarks.gpu_rib RESULT.json` adds to that file after every row.
"""

import argparse
import dataclasses
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ribfast import data, models, reference
from ribfast.pipeline import AdaptConfig, adapt_maps
from ribfast.rib import Engine, Job, RIBConfig, Target
from ribfast.store import Store

CLASSES, OWN = 20, 3
VOC_IMAGES = 10582
AT_ONCE = (1, 2, 4, 8, 16)
TARGETS = {"arithmetic": 10, "loading": 25, "fast arithmetic": 25, "fast loading": 60, "rate_share": 0.45}
KINDS = {  # of kernels, by parts of their names; the first that fits
    "convolutions and matrix products": (
        "conv",
        "gemm",
        "xmma",
        "cutlass",
        "nvjet",
        "wgrad",
        "dgrad",
        "sm80_",
        "sm90_",
    ),
    "activations": ("activat", "sum_strips"),
    "updates": ("update_folded",),
    "copies": ("memcpy", "copy", "memset", "fill"),
    "layout changes": ("nchw", "nhwc", "transpose"),
    "other": ("",),
}


@dataclasses.dataclass
class Case:
    """What is measured; the defaults are the released constants on a usual VOC image."""

    device: torch.device
    size: tuple[int, int] = (375, 500)
    crop: int = 512
    n_others: int = 20
    steps: int = 10
    network: str = "resnet50"

    def config(self, preset: str = "released", **changes):
        long_side = (round(0.625 * self.crop), round(1.25 * self.crop))
        settings = {"steps": self.steps, "n_others": self.n_others, "others_crop": self.crop, "stop_logit": None}
        settings |= {"explode_area": None, "others_long_side": long_side, "lr": 1e-6, "precision": "auto"}
        return getattr(RIBConfig, preset)(**settings | changes)

    def model(self):
        torch.manual_seed(0)
        model = models.cam_classifier(self.network, CLASSES)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_var.uniform_(0.8, 1.2)
        model.classifier.weight.data[OWN].abs_()  # so that there is a map
        return model.to(self.device, memory_format=torch.channels_last).eval()

    def target(self, config) -> Target:
        views = []
        for scale in config.scales:
            view = torch.randn(1, 3, *(round(side * scale) for side in self.size), device=self.device)
            views.append(torch.cat([view, view.flip(-1)]))
        return Target(views, [OWN], self.size)

    def others(self):
        """step -> (images, present), the images ready on the device."""
        generator = torch.Generator().manual_seed(0)
        shape = self.n_others, 3, self.crop, self.crop
        images = [torch.randn(shape, generator=generator).to(self.device) for _ in range(2)]
        present = torch.zeros(self.n_others, CLASSES, dtype=torch.bool)
        present[range(self.n_others), [4 + i % 8 for i in range(self.n_others)]] = True
        present = present.to(self.device)
        return lambda step: (images[step % 2], present)


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(device, call):
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def matrix_rate(device, n=8192):
    """Operations a second of a 16-bit matrix product."""
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    a, b = torch.randn(n, n, device=device).to(dtype), torch.randn(n, n, device=device).to(dtype)
    torch.mm(a, b)
    return 2 * n**3 / statistics.median(seconds(device, lambda: torch.mm(a, b)) for _ in range(10))


def operations(case: Case, config) -> float:
    """Of one image, when nothing is computed twice; the others' trunk, and they at theta_0, once for all that share."""
    shared = config.share_others
    with torch.device("meta"):
        model = models.cam_classifier(case.network, CLASSES)

    def count(height, width, images):
        """Of the trunk, of the rest."""
        with torch.no_grad(), FlopCounterMode(display=False) as trunk:
            features = model.trunk(torch.empty(images, 3, height, width, device="meta"))
        with torch.no_grad(), FlopCounterMode(display=False) as tail:
            model.maps(features)
        return trunk.get_total_flops(), tail.get_total_flops()

    sides = [[round(side * scale) for side in case.size] for scale in config.scales]
    own = dict(zip(config.scales, (count(*side, 2) for side in sides), strict=True))
    trunk_of_others, others = count(case.crop, case.crop, case.n_others)
    updates = case.steps - 1
    total = sum(trunk + case.steps * tail for trunk, tail in own.values())
    total += 2 * updates * sum(own[scale][1] for scale in config.loss_scales)
    batches = config.anchor_batches / shared if config.anchored else updates - 1 + 1 / shared
    drawn = (config.anchor_batches if config.anchored else updates) / shared
    return total + 3 * others * batches + trunk_of_others * drawn


def ours(case: Case, config, count: int):
    """(seconds an image, what was found); the graphs are there before."""
    engine, target, others = Engine(case.model(), config), case.target(config), case.others()

    def run(images):
        batches, found = None, []
        jobs = []
        for number in range(images):
            if number % config.share_others == 0:
                batches = engine.batches([OWN], others, min(config.share_others, images - number))
            jobs.append(Job(target, batches))
        for _, result in engine.adapt_all(jobs):
            if result.error is not None:
                raise ArithmeticError(result.error)
            found.append(result)
        return found

    at_once = config.concurrency or 8
    run(3 * at_once)  # the third image of a slot is the first to run as graphs alone
    took = [seconds(case.device, lambda: run(count)) / count for _ in range(2)]
    return min(took), run(1)[0]


def straight(case: Case, config):
    """The released procedure: seconds an image, its maps."""
    model, target, others = case.model(), case.target(config), case.others()
    found = []

    def call():
        found[:] = reference.rib(model, target.views, target.classes, others, config)[0]

    call()
    return seconds(case.device, call), found


def agreement(found, expected, target):
    from ribfast.cams import merge_cams

    high = [merge_cams([m[None] for m in maps], target.classes, target.size)[1].flatten() for maps in (found, expected)]
    correlation = torch.corrcoef(torch.stack(high))[0, 1].item()
    return {"correlation": correlation, "masks_equal": ((high[0] > 0.3) == (high[1] > 0.3)).float().mean().item()}


def kernel_classes(case: Case, config):
    """Share of a run's kernel time by class."""
    engine, target, others = Engine(case.model(), config), case.target(config), case.others()

    def run():
        return list(engine.adapt_all([Job(target, engine.batches([OWN], others, 1))]))

    for _ in range(3):
        run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        synchronize(case.device)
    took = dict.fromkeys(KINDS, 0.0)
    for event in profile.key_averages():
        name = event.key.lower()
        took[next(kind for kind, parts in KINDS.items() if any(part in name for part in parts))] += (
            event.device_time_total
        )
    largest = sorted(profile.key_averages(), key=lambda event: -event.device_time_total)[:12]
    return {
        "ms": {kind: round(us / 1000, 3) for kind, us in took.items()},
        "largest": [
            {"ms": round(e.device_time_total / 1000, 3), "count": e.count, "name": e.key[:90]} for e in largest
        ],
    }


def with_loading(case: Case, preset: str, count: int, workers: int):
    """(seconds an image of ours, of the released procedure), from files to files."""
    from benchmarks.photographs import picture, write  # which needs OpenCV

    with tempfile.TemporaryDirectory() as folder:
        folder, model = Path(folder), case.model()
        own = write(folder / "own", (picture(i, case.size) for i in range(count)), lambda i: OWN, CLASSES)
        many = (picture(1000 + i, case.size) for i in range(200))
        others = write(folder / "others", many, lambda i: 4 + i % 8, CLASSES)
        fields = dataclasses.asdict(case.config(preset))
        config = AdaptConfig(**fields, workers=workers, device=str(case.device))
        adapt_maps(own, model, Store(folder / "warm", "irn"), config, others=others)

        def ours():
            made = adapt_maps(own, model, Store(folder / "ours", "irn"), config, others=others)
            assert made.made == count, made

        def released():
            item, rng = own[0], np.random.default_rng(0)
            crop = data.Augmentation(config.others_long_side, config.others_crop)
            order = rng.permutation(np.resize(np.arange(len(others)), case.steps * case.n_others))
            labels = others.labels()

            def load(step):
                chosen = order[step * case.n_others : (step + 1) * case.n_others]
                images = torch.stack([crop(others.image(others[int(i)]), rng) for i in chosen])
                return images.to(case.device), labels[chosen].to(case.device)

            views = [view.to(case.device) for view in data.make_views(own.image(item), config.scales)]
            reference.rib(model, views, item.classes, load, config)

        return seconds(case.device, ours) / count, seconds(case.device, released)


def measure(save, case: Case, small: Case, networks=("resnet50", "mobilenet_v2"), at_once=AT_ONCE, workers=16):
    """Every row, most telling first; save(name, row) after each. A row that fails says how."""
    facts = {}

    def row(name, make):
        try:
            facts[name] = make()
        except Exception as error:  # one row's failure must not cost the others
            facts[name] = {"error": f"{type(error).__name__}: {error}"[:500]}
        if case.device.type == "cuda":
            torch.cuda.empty_cache()
        save(name, facts[name])
        return facts[name]

    on_gpu = case.device.type == "cuda"
    rate = row("matrix", lambda: {"TFLOPs": matrix_rate(case.device, 8192 if on_gpu else 256) / 1e12}).get("TFLOPs")
    expected = []

    def baseline():
        took, maps = straight(case, case.config())
        expected[:] = maps
        return {"seconds": took}

    before, most = row("released", baseline).get("seconds"), max(at_once)

    def arithmetic(of: Case, preset, images, compared=False, **changes):
        chosen = of.config(preset, **changes)
        took, found = ours(of, chosen, images)
        work = operations(of, chosen)
        result = {"seconds": took, "TFLOP": work / 1e12, "rate_share": rate and work / took / rate / 1e12}
        if not compared or before is None:
            return result
        asked = TARGETS["fast arithmetic" if preset == "fast" else "arithmetic"]
        result |= {"ratio": before / took, "asked": asked, "voc_minutes": VOC_IMAGES * took / 60}
        return result | agreement(found.maps, expected, of.target(chosen))

    def loading(preset, images):
        took, released = with_loading(case, preset, images, workers)
        asked = TARGETS["fast loading" if preset == "fast" else "loading"]
        result = {"seconds": took, "released_seconds": released, "ratio": released / took, "asked": asked}
        return result | {"voc_minutes": VOC_IMAGES * took / 60}

    images = {"released": 2 * most, "fast": 4 * most}
    names = {"released": "exact", "fast": "fast"}
    for preset, name in names.items():
        row(name, lambda p=preset: arithmetic(case, p, images[p], True, concurrency=min(8, most)))
    for preset, name in names.items():
        row(f"{name} with loading", lambda p=preset: loading(p, images[p]))
    if on_gpu:
        row("kernels", lambda: kernel_classes(case, case.config(concurrency=1)))
    for graphs, precision in ((False, "auto"), (True, "float32")):
        changes = {"graphs": graphs, "precision": precision, "concurrency": min(4, most)}
        name = f"graphs {'on' if graphs else 'off'}, {precision}"
        row(name, lambda c=changes: arithmetic(case, "released", most, True, **c))
    for of in (case, small):
        for network in networks:
            for n in at_once:
                one = dataclasses.replace(of, network=network)
                count = max(4, min(2 * n, most))
                name = f"{network} {of.size[0]}x{of.size[1]}, {n} at once"
                row(name, lambda one=one, n=n, c=count: arithmetic(one, "released", c, concurrency=n))
    return facts


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("result", type=Path, help="a JSON file, which is added to")
    path, device = parser.parse_args().result, torch.device("cuda")
    facts = json.loads(path.read_text()) if path.exists() else {}
    facts["rib"] = {"targets": TARGETS}

    def save(name, row):
        facts["rib"][name] = row
        path.write_text(json.dumps(facts, indent=1) + "\n")
        print(f"{name:<44} {row}", flush=True)

    measure(save, Case(device), Case(device, (224, 224), 224))


if __name__ == "__main__":
    main()

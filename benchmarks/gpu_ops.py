"""Times of the operators on a GPU: CUDA C++, Triton and plain torch side by side, with the bandwidth they reach.

Times are medians over replays of a CUDA graph (what the engine uses), over several input sets whose bytes together
exceed the second-level cache; `eager` is the median of single calls, launch overhead included. Bytes are the fewest
that the operator must move: each input read once, each output written once. GB/s = those bytes / time. The CRF moves
what its kernels do (docs/performance.md counts it); how long each of them takes is asked of the profiler.
Called by benchmarks/gpu.py: `python -m benchmarks.gpu_ops RESULT.json` adds to that file after every row.
"""

import json
import math
import statistics
import sys
from pathlib import Path

import torch
from torch.nn import functional as F

from ribfast import ops, reference

SCALES, STRIDE = (1, 0.5, 1.5, 2), 16
CACHE_BYTES = 192 << 20  # several times any second-level cache


def graph_seconds(calls, repeats=30):
    """The median seconds of one call, the calls captured in one graph one after another."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call() for call in calls]  # results live through the capture, so that none shares memory
    for _ in range(3):
        graph.replay()
    times = [_event_seconds(graph.replay) for _ in range(repeats)]
    del kept
    return statistics.median(times) / len(calls)


def eager_seconds(calls, repeats=50):
    for call in calls[:2]:
        call()
    return statistics.median(_event_seconds(calls[i % len(calls)]) for i in range(repeats))


def _event_seconds(call):
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000


def copy_bandwidth():
    """Bytes read and written a second by a large device-to-device copy: the ceiling of everything here."""
    source = torch.randn(1 << 30, device="cuda")
    target = torch.empty_like(source)
    seconds = graph_seconds([lambda: target.copy_(source)], repeats=10)
    return 2 * source.numel() * source.element_size() / seconds


def implementations(op):
    """What can serve an operator here: name -> callable with the operator's schema."""
    from ribfast import _ext

    found = {}
    if _ext.build_info()["cuda"]:
        found["cuda"] = getattr(torch.ops.ribfast, op)
    try:
        from ribfast.triton import accumulate_cams, gndrp, normalize_cams
    except ImportError:
        return found
    for module in (gndrp, accumulate_cams, normalize_cams):
        if hasattr(module, op):
            found["triton"] = getattr(module, op)
    return found


def sets_for(size):
    return max(2, -(-CACHE_BYTES // size))


def gndrp_case(shape, dtype):
    """(forward, backward): each (bytes of one call, {implementation: calls})"""
    elements = shape[0] * shape[1] * shape[2] * shape[3]
    size = elements * dtype.itemsize
    sets = []
    for _ in range(sets_for(size)):
        maps = torch.randn(shape, device="cuda").to(dtype)
        present, grad = torch.rand(shape[:2], device="cuda") < 0.2, torch.randn(shape[:2], device="cuda")
        stats = torch.ops.ribfast.gndrp(maps, present, 0.4, False, False)[1]
        sets.append((maps, present, grad, stats))
    forward, backward = {}, {}
    for name, op in implementations("gndrp").items():
        forward[name] = [lambda s=s, op=op: op(s[0], s[1], 0.4, False, False) for s in sets]
    for name, op in implementations("gndrp_backward").items():
        backward[name] = [lambda s=s, op=op: op(s[2], s[0], s[1], s[3], 0.4, False) for s in sets]
    forward["reference"] = [lambda s=s: reference.gndrp(s[0], s[1]) for s in sets]
    return (size, forward), (2 * size, backward)


def accumulate_case(images, classes=20, size=(375, 500)):
    """Forward and backward of a batch of VOC images at four scales with mirrors."""
    shapes = [(2, classes, *(-(-round(side * s) // STRIDE) for side in size)) for s in SCALES]
    padded = [-(-side // STRIDE) * STRIDE for side in size]
    layout = ([len(SCALES)] * images, list(size) * images, padded * images, True)
    written = images * classes * size[0] * size[1] * 4
    read = images * sum(shape[0] * shape[1] * shape[2] * shape[3] for shape in shapes) * 4
    sets = []
    for _ in range(sets_for(read + written)):
        maps = [torch.randn(shape, device="cuda") for _ in range(images) for shape in shapes]
        sets.append((maps, [torch.randn(classes, *size, device="cuda") for _ in range(images)]))

    def plain(maps):
        groups = [maps[i : i + len(SCALES)] for i in range(0, len(maps), len(SCALES))]
        return [reference.accumulate_cams(group, size, padded=padded) for group in groups]

    forward, backward = {}, {}
    for name, op in implementations("accumulate_cams").items():
        forward[name] = [lambda m=m, op=op: op(m, *layout) for m, _ in sets]
    for name, op in implementations("accumulate_cams_backward").items():
        backward[name] = [lambda m=m, g=g, op=op: op(g, m, layout[0], *layout[2:]) for m, g in sets]
    forward["reference"] = [lambda m=m: plain(m) for m, _ in sets]
    return (read + written, forward), (2 * read + written, backward)


def normalize_case(shape):
    size = shape[0] * shape[1] * shape[2] * 4
    sets = [torch.rand(shape, device="cuda") for _ in range(sets_for(size))]
    calls = {
        name: [lambda c=c, op=op: op(c, 1e-5) for c in sets] for name, op in implementations("normalize_cams").items()
    }
    calls["reference"] = [lambda c=c: reference.normalize_cams(c) for c in sets]
    return 2 * size, calls


def channels_last(*shape, dtype=torch.float32):
    return torch.randn(shape, device="cuda").to(dtype).contiguous(memory_format=torch.channels_last)


def activate_case(shape, dtype):
    """With a shortcut and a mask; nothing is read in its gutter, every ninth row."""
    channels = shape[1]
    mask = torch.ones(shape[0], 1, *shape[2:], device="cuda", dtype=dtype)
    mask[:, :, ::9] = 0
    real, cells = int(mask.count_nonzero()), mask.numel()
    size = (channels * (cells + 2 * real) + cells) * dtype.itemsize
    back = 3 * channels * cells * dtype.itemsize + channels * 4
    sets = [
        tuple(channels_last(*shape, dtype=dtype) for _ in range(3))
        for _ in range(sets_for(3 * channels * cells * dtype.itemsize))
    ]
    forward, backward = {}, {}
    for name, op in implementations("activate_").items():
        forward[name] = [lambda s=s, op=op: op(s[0], s[1], mask, torch.inf) for s in sets]
    for name, op in implementations("activate_backward").items():
        backward[name] = [lambda s=s, op=op: op(s[2], s[0], torch.inf) for s in sets]
    forward["reference"] = [lambda s=s: s[0].copy_(reference.activate(s[0], s[1], mask)) for s in sets]
    backward["reference"] = [lambda s=s: reference.activate_backward(s[2], s[0]) for s in sets]
    return (size, forward), (back, backward)


def update_case(shape, dtype):
    """With an anchor and velocities, in place."""
    count = shape[0]
    size = math.prod(shape) * (3 * dtype.itemsize + 4 * 4) + count * (3 * dtype.itemsize + 10 * 4)
    sets, rate = [], torch.tensor(1e-6, device="cuda")
    for _ in range(sets_for(size)):
        states = channels_last(*shape), torch.rand(2, count, device="cuda") + 0.5
        speeds = channels_last(*shape), torch.rand(2, count, device="cuda")
        pairs = [(channels_last(*shape, dtype=dtype), torch.randn(count, device="cuda").to(dtype)) for _ in range(3)]
        sets.append((states, speeds, *pairs, torch.rand(2, count, device="cuda") + 0.5))

    def plain(states, speeds, grads, anchors, folded, norm):
        total = [grad.float() + anchor.float() for grad, anchor in zip(grads, anchors, strict=True)]
        found = reference.update_folded(*total, *states, norm, *speeds, rate=rate, momentum=0.3, decay=1e-4)
        for target, value in zip((*states, *speeds, *folded), found, strict=True):
            target.copy_(value)

    calls = {
        name: [lambda s=s, op=op: op(*s[2], *s[3], *s[0], s[5], *s[0], *s[1], *s[4], False, rate, 0.3, 1e-4, 1.0)
               for s in sets]
        for name, op in implementations("update_folded_").items()
    }  # fmt: skip
    calls["reference"] = [lambda s=s: plain(*s) for s in sets]
    return size, calls


def refine_case(images, classes, method, size=(375, 500), iterations=10):
    """Bytes: weights are written once and read in every iteration, maps read and written in every iteration."""
    pixels = images * size[0] * size[1]
    moved = 4 * pixels * (3 + 48 + iterations * (48 + 2 * classes))
    sets = [(torch.rand(images, 3, *size, device="cuda"), torch.rand(images, classes, *size, device="cuda"))
            for _ in range(sets_for(4 * pixels * 48))]  # fmt: skip
    options = (method == "pamr", [1, 2, 4, 8, 12, 24], iterations, 0.3, 0.01)
    calls = {
        name: [lambda s=s, op=op: op([s[0]], [s[1]], *options) for s in sets]
        for name, op in implementations("refine").items()
    }
    if images == 1:
        calls["reference"] = [lambda s=s: reference.refine(*s, method=method, iterations=iterations) for s in sets]
    return moved, calls


PHOTO = Path(__file__).parents[1] / "ribfast" / "assets" / "coffee.jpg"
TERMS = ([3.0, 3.0], [50.0, 5.0, 10.0])


def photo():
    """(375, 500, 3) uint8 and what it shows; smooth noise where nothing here reads photographs."""
    try:
        import cv2

        pixels = torch.from_numpy(cv2.cvtColor(cv2.imread(str(PHOTO)), cv2.COLOR_BGR2RGB))
        return pixels.cuda(), PHOTO.name
    except ImportError:
        coarse = torch.rand(1, 3, 24, 32, device="cuda") * 220
        smooth = torch.nn.functional.interpolate(coarse, (375, 500), mode="bilinear")[0].permute(1, 2, 0)
        return (smooth + 12 * torch.rand_like(smooth)).to(torch.uint8).contiguous(), "smooth noise"


def crf_bytes(image, labels):
    """Bytes that each kernel of an iteration moves for an image, by the counts of its lattices."""
    height, width = image.shape[:2]
    y, x = torch.meshgrid(*(torch.arange(n, device="cuda").float() for n in (height, width)), indexing="ij")
    places, across = torch.stack([x, y], -1), -(-width // 16)
    features = (places / TERMS[0][0], torch.cat([places / TERMS[1][0], image.float() / TERMS[1][1]], -1))
    tile = (y.long() // 16 * across + x.long() // 16).flatten()[:, None]
    points, channels = -(-height // 16) * across * 256, 1 if labels == 2 else labels // 4 * 4
    update, gather, blur = 4 * labels * height * width, 0, 0
    for each in features:
        lattice = reference.Lattice(each.flatten(0, 1))
        vertices, corners = lattice.count, lattice.d + 1
        runs = len(torch.unique(tile * vertices + lattice.corners))
        update += (8 * corners + 4) * points + (10 + 8 * channels) * runs
        gather += 4 * channels * (runs + vertices) + 4 * vertices
        blur += (8 + 8 * channels) * vertices * corners
    return {"update": update, "gather": gather, "blur": blur}


def kernel_seconds(call, channels):
    """Seconds of each of the CRF's kernels in one call; together: those of building lattices and, where they can be
    told from the others by their channels, of the filters of ones."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    seconds = dict.fromkeys(("update", "gather", "blur", "building and mass"), 0.0)
    for event in profiler.key_averages():
        found = [name for name in ("update", "gather", "blur") if f"{name}_kernel" in event.key]
        of_ones = channels > 1 and ("gather_kernel<1>" in event.key or "blur_kernel<1>" in event.key)
        name = found[0] if found and not of_ones else "building and mass"
        seconds[name] += event.device_time_total / 1e6
    return seconds


def crf_row(images, labels, bandwidth, target):
    """dense_crf of a batch of VOC images, 10 iterations."""
    picture, shown = photo()
    sets = []
    for first in range(1 if images > 1 else 4):
        each = [picture.roll(7 * (first + i), 1) for i in range(images)]
        sets.append((each, [torch.rand(labels, *picture.shape[:2], device="cuda") * 3 for _ in each]))
    calls = [lambda s=s: torch.ops.ribfast.dense_crf(*s, *TERMS, 10, 0, False, 0) for s in sets]
    counted = crf_bytes(picture, labels)
    size = images * 10 * sum(counted.values())
    row = timed(size, {"cuda": calls}, bandwidth) | {"picture": shown, "target_images_per_s": target}
    if "us" in row["cuda"]:
        row["cuda"]["images_per_s"] = round(images * 1e6 / row["cuda"]["us"])
    if images == 1:
        plain = eager_seconds([lambda: reference.dense_crf(sets[0][0][0], sets[0][1][0])], 3)
        row["reference"] = {"eager_us": round(plain * 1e6, 1)}
    try:
        row["kernels"] = {}
        for name, seconds in kernel_seconds(calls[0], 1 if labels == 2 else 4).items():
            row["kernels"][name] = {"us": round(seconds * 1e6, 1)}
            if name in counted and seconds > 0:
                times = 11 if labels == 2 and name != "update" else 10  # with the filters of ones
                rate = images * times * counted[name] / seconds
                row["kernels"][name] |= {"GBps": round(rate / 1e9, 1), "share_of_copy": round(rate / bandwidth, 3)}
    except Exception as error:  # no profiler on this machine
        row["kernels"] = {"error": f"{type(error).__name__}: {error}"[:500]}
    return row


WALK = [(16, 2, 2.0), (1, 2, None)]  # images, classes, milliseconds an image that are asked for


def walk_row(images, classes, target, size=(94, 125)):
    """256 steps of the random walk at a quarter of VOC's size, against one image's dense matrix squared 8 times."""
    cams = [torch.rand(classes, *size, device="cuda") for _ in range(images)]
    edges = torch.rand(images, *size, device="cuda") ** 2
    affinity = torch.ops.ribfast.path_affinity(edges, 5, 10.0)
    calls = {
        "walk": lambda: torch.ops.ribfast.random_walk(cams, list(affinity), 5, 256),
        "affinity": lambda: torch.ops.ribfast.path_affinity(edges, 5, 10.0),
    }
    row = {name: {"us": round(graph_seconds([call], 5) * 1e6, 1), "eager_us": round(eager_seconds([call], 5) * 1e6, 1)}
           for name, call in calls.items()}  # fmt: skip
    each = (row["walk"]["us"] + row["affinity"]["us"]) / images / 1e3
    matrix = torch.rand(size[0] * size[1], size[0] * size[1], device="cuda")
    matrix /= matrix.sum(0)

    def dense():
        squared = matrix
        for _ in range(8):
            squared = squared @ squared
        return squared

    plain = eager_seconds([dense], 1) * 1e3
    row |= {"ms_an_image": round(each, 4), "target_ms": target, "dense_ms": round(plain, 1)}
    # bytes of an application: weights twice, from the second-level cache; T 102 times in place of 256
    row["weight_GBps"] = round(102 * 2 * 34 * size[0] * size[1] * 4 * images / (row["walk"]["us"] * 1e3), 1)
    return row | {"ratio": round(plain / each, 1), "target_ratio": 300.0 if images > 1 else None}


def pair_losses_row(images=16, side=128, radius=10):
    """Forward and backward at the crop of 512 that IRN trains on, by the operators themselves."""
    maps = torch.rand(images, side, side, device="cuda"), torch.randn(images, 2, side, side, device="cuda")
    labels = torch.randint(0, 3, (images, 8, 8), dtype=torch.uint8, device="cuda")
    labels = labels.repeat_interleave(side // 8, 1).repeat_interleave(side // 8, 2)
    grad = torch.ones(8, device="cuda")
    calls = {
        "forward": lambda: torch.ops.ribfast.pair_losses(*maps, labels, radius),
        "backward": lambda: torch.ops.ribfast.pair_losses_backward(grad, *maps, labels, radius),
    }
    return {name: {"us": round(graph_seconds([call], 5) * 1e6, 1)} for name, call in calls.items()}


def segmentation_loss_row(labels, images=10, small=41, large=321):
    """Forward and backward of a batch of crops of 321 at output stride 8, against plain torch on enlarged logits."""
    logits = torch.randn(images, labels, small, small, device="cuda").mul_(3).requires_grad_()
    given = torch.randint(0, labels, (images, large, large), dtype=torch.uint8, device="cuda")
    still, grad = logits.detach(), torch.ones(4, dtype=torch.float64, device="cuda")
    losses = torch.ops.ribfast.pixel_losses(still, given)
    wide = given.long()

    def plain():
        enlarged = F.interpolate(logits, given.shape[1:], mode="bilinear", align_corners=False)
        return torch.autograd.grad(F.cross_entropy(enlarged, wide, ignore_index=255), logits)

    calls = {
        "forward": lambda: torch.ops.ribfast.pixel_losses(still, given),
        "sums": lambda: torch.ops.ribfast.pixel_loss_sums(still, given, losses, None, 0, 0.5),
        "backward": lambda: torch.ops.ribfast.pixel_loss_sums_backward(grad, still, given, losses, None, 0, 0.5),
        "all": lambda: torch.autograd.grad(ops.segmentation_loss(logits, given), logits),
    }
    row = {name: {"us": round(graph_seconds([call], 5) * 1e6, 1)} for name, call in calls.items()}
    row["all"]["eager_us"] = round(eager_seconds([calls["all"]], 5) * 1e6, 1)
    row["plain"] = {"eager_us": round(eager_seconds([plain], 5) * 1e6, 1)}
    return row | {"ratio": round(row["plain"]["eager_us"] / row["all"]["eager_us"], 1)}


def erase_row(layout, images=12, small=28, large=448):
    """Forward and backward of two maps an image, against plain torch."""
    photos = torch.randn(images, 3, large, large, device="cuda").contiguous(memory_format=layout)
    maps = torch.randn(2 * images, small, small, device="cuda").mul_(3).requires_grad_()
    which, still = torch.arange(2 * images, device="cuda") // 2, maps.detach()
    grad, grad_areas = torch.randn_like(photos.repeat_interleave(2, 0)), torch.randn(2 * images, device="cuda")
    options = {"sharpness": 100.0, "level": 0.5}

    def both(run):
        return torch.autograd.grad(run(photos, maps, which, **options), maps, (grad, grad_areas))

    calls = {
        "forward": lambda: torch.ops.ribfast.erase(photos, still, which, 100.0, 0.5),
        "backward": lambda: torch.ops.ribfast.erase_backward(grad, grad_areas, photos, still, which, 100.0, 0.5),
        "all": lambda: both(ops.erase),
    }
    row = {name: {"us": round(graph_seconds([call], 5) * 1e6, 1)} for name, call in calls.items()}
    row["all"]["eager_us"] = round(eager_seconds([calls["all"]], 5) * 1e6, 1)
    row["plain"] = {"eager_us": round(eager_seconds([lambda: both(reference.erase)], 5) * 1e6, 1)}
    return row | {"ratio": round(row["plain"]["eager_us"] / row["all"]["eager_us"], 1)}


def timed(size, calls, bandwidth, target=None):
    """One row of the result: seconds and bandwidth of each implementation, or how it failed."""
    row = {"bytes": size, "target_share_of_copy": target}
    for name, each in calls.items():
        try:
            seconds = graph_seconds(each)
            row[name] = {
                "us": round(seconds * 1e6, 2),
                "eager_us": round(eager_seconds(each) * 1e6, 2),
                "GBps": round(size / seconds / 1e9, 1),
                "share_of_copy": round(size / seconds / bandwidth, 3),
            }
        except Exception as error:  # one implementation's failure must not cost the others' figures
            row[name] = {"error": f"{type(error).__name__}: {error}"[:500]}
            torch.cuda.synchronize()
    return row


def cases():
    """(name, target share of the copy bandwidth, what makes (forward, backward or None)), the most telling first"""
    batch, single = "accumulate_cams 64 x (20, 375, 500)", "accumulate_cams 1 x (20, 375, 500)"
    yield batch, 0.8, lambda: accumulate_case(64)
    for shape in ((64, 20, 64, 64), (8, 20, 32, 32), (2, 80, 63, 84), (1, 20, 512, 512)):
        for dtype in (torch.float32, torch.float16):
            name = f"gndrp {shape} {str(dtype).removeprefix('torch.')}"
            yield name, 0.8 if shape[0] == 64 else None, lambda s=shape, d=dtype: gndrp_case(s, d)
    yield single, None, lambda: accumulate_case(1)
    yield "normalize_cams (20, 375, 500)", None, lambda: (normalize_case((20, 375, 500)), None)
    for shape in ((1, 1024, 500, 65), (1, 96, 40, 50)):
        target = 0.8 if shape[1] == 1024 else None
        yield f"activate_ {shape} float16", target, lambda s=shape: activate_case(s, torch.float16)
    for shape in ((512, 512, 3, 3), (2048, 512, 1, 1), (960, 1, 3, 3)):
        target = 0.8 if shape[0] == 512 else None
        yield f"update_folded_ {shape} float16", target, lambda s=shape: (update_case(s, torch.float16), None)
    for images, classes, method in ((16, 4, "par"), (16, 21, "par"), (1, 21, "par"), (1, 4, "pamr")):
        name = f"refine, {method}, {images} x ({classes}, 375, 500)"
        yield name, None, lambda i=images, c=classes, m=method: (refine_case(i, c, m), None)


CRF = [(64, 21, 700), (64, 2, 1400), (1, 21, 400), (1, 2, 400)]  # images, labels, images a second that are asked for


def main():
    path = Path(sys.argv[1])
    bandwidth = copy_bandwidth()
    facts = json.loads(path.read_text()) | {"copy_GBps": round(bandwidth / 1e9, 1), "ops": {}}
    for name, target, make in cases():
        torch.cuda.empty_cache()
        forward, backward = make()
        rows = {name: timed(*forward, bandwidth, target)}
        if backward is not None:
            asked = target if name.startswith(("gndrp", "activate_")) else None
            rows[f"{name} backward"] = timed(*backward, bandwidth, asked)
        facts["ops"] |= rows
        path.write_text(json.dumps(facts, indent=1) + "\n")
        for label, row in rows.items():
            served = [(k, row[k]) for k in ("cuda", "triton", "reference") if k in row]
            figures = (f"{k} {r['us']:.1f} us {r['share_of_copy']:.2f}" if "us" in r else f"{k} {r}" for k, r in served)
            print(f"{label:<48} {'  '.join(figures)}", flush=True)
    for images, labels, target in CRF if "cuda" in implementations("dense_crf") else []:
        torch.cuda.empty_cache()
        label, row = f"dense_crf {images} x ({labels}, 375, 500)", crf_row(images, labels, bandwidth, target)
        facts["ops"][label] = row
        path.write_text(json.dumps(facts, indent=1) + "\n")
        print(f"{label:<48} {row['cuda']} asked {target}/s {row['kernels']}", flush=True)
    for images, classes, target in WALK if "cuda" in implementations("random_walk") else []:
        torch.cuda.empty_cache()
        label, row = f"random_walk {images} x ({classes}, 94, 125)", walk_row(images, classes, target)
        facts["ops"][label] = row
        path.write_text(json.dumps(facts, indent=1) + "\n")
        print(f"{label:<48} {row['ms_an_image']} ms an image, asked {target}; dense {row['ratio']} times", flush=True)
    if "cuda" in implementations("pair_losses"):
        facts["ops"]["pair_losses 16 x 128 x 128, radius 10"] = row = pair_losses_row()
        path.write_text(json.dumps(facts, indent=1) + "\n")
        print(f"pair_losses {row}", flush=True)
    for labels in (21, 81) if "cuda" in implementations("pixel_losses") else ():
        torch.cuda.empty_cache()
        label = f"segmentation_loss 10 x ({labels}, 41, 41) -> 321 x 321"
        facts["ops"][label] = row = segmentation_loss_row(labels)
        path.write_text(json.dumps(facts, indent=1) + "\n")
        print(f"{label} {row}", flush=True)
    for layout in (torch.channels_last, torch.contiguous_format) if "cuda" in implementations("erase") else ():
        torch.cuda.empty_cache()
        label = f"erase 24 x (3, 448, 448), 28 x 28, {str(layout).removeprefix('torch.')}"
        facts["ops"][label] = row = erase_row(layout)
        path.write_text(json.dumps(facts, indent=1) + "\n")
        print(f"{label} {row}", flush=True)


if __name__ == "__main__":
    main()

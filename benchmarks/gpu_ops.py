"""Times of the operators on a GPU: CUDA C++, Triton and plain torch side by side, with the bandwidth they reach.

Times are medians over replays of a CUDA graph (what the engine uses), over several input sets whose bytes together
exceed the second-level cache; `eager` is the median of single calls, launch overhead included. Bytes are the fewest
that the operator must move: each input read once, each output written once. GB/s = those bytes / time.
Called by benchmarks/gpu.py: `python -m benchmarks.gpu_ops RESULT.json` adds to that file after every row.
"""

import json
import statistics
import sys
from pathlib import Path

import torch

from ribfast import reference

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


def main():
    path = Path(sys.argv[1])
    bandwidth = copy_bandwidth()
    facts = json.loads(path.read_text()) | {"copy_GBps": round(bandwidth / 1e9, 1), "ops": {}}
    for name, target, make in cases():
        torch.cuda.empty_cache()
        forward, backward = make()
        rows = {name: timed(*forward, bandwidth, target)}
        if backward is not None:
            rows[f"{name} backward"] = timed(*backward, bandwidth, target if name.startswith("gndrp") else None)
        facts["ops"] |= rows
        path.write_text(json.dumps(facts, indent=1) + "\n")
        for label, row in rows.items():
            served = [(k, row[k]) for k in ("cuda", "triton", "reference") if k in row]
            figures = (f"{k} {r['us']:.1f} us {r['share_of_copy']:.2f}" if "us" in r else f"{k} {r}" for k, r in served)
            print(f"{label:<48} {'  '.join(figures)}", flush=True)


if __name__ == "__main__":
    main()

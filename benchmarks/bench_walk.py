"""IRN's random walk against the dense matrix, and its training losses against a tensor of all pairs' paths."""

import subprocess
import sys

import pytest
import torch

from benchmarks.conftest import seconds
from ribfast import ops, reference

VOC, COCO = (94, 125), (120, 160)  # a quarter of 375x500 and of 480x640
MEASURED = """
import re, torch
from pathlib import Path
from ribfast import ops
def highest():  # getrusage's would be inherited from the parent
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
torch.set_num_threads(1)
cams, boundary = torch.rand(3, {height}, {width}), torch.rand({height}, {width})
ops.random_walk(cams[:, :9, :9], boundary[:9, :9])
before = highest()
ops.random_walk(cams, boundary)
print((highest() - before) / 1024)
"""


def inputs(classes, size):
    """Boundaries as a network's: low, with sharp lines."""
    boundary = torch.rand(size) * 0.15
    boundary[::17] = boundary[:, ::23] = 0.8
    return torch.rand(classes, *size), boundary


def dense_matrix(boundary):
    """T as the released code has it before it is squared."""
    height, width = boundary.shape
    affinity, count = reference.path_affinity(boundary[None], 5, 10.0)[0], height * width
    pixels, matrix = torch.arange(count).view(height, width), torch.eye(count)
    for (y, x), plane in zip(ops.pair_offsets(5), affinity, strict=True):
        here = pixels[: height - y, max(0, -x) : width - max(0, x)].flatten()
        weights = plane[: height - y, max(0, -x) : width - max(0, x)].flatten()
        matrix[here, here + y * width + x] = matrix[here + y * width + x, here] = weights
    return matrix.div_(matrix.sum(0))


def bench_random_walk(benchmark, threads):
    """2 classes at VOC's size. The dense way squares a matrix of 0.55 GB 8 times: one time is measured, and counted 8
    times; making the matrix and applying it are left out."""
    cams, boundary = inputs(2, VOC)
    matrix, out = dense_matrix(boundary), torch.empty(VOC[0] * VOC[1], VOC[0] * VOC[1])
    torch.mm(matrix[:500], matrix, out=out[:500])
    squaring = seconds(lambda: torch.mm(matrix, matrix, out=out))
    small, edges = inputs(2, (30, 40))
    expected = reference.random_walk(
        (small * (1 - edges)).double(), reference.path_affinity(edges[None].double(), 5, 10.0)[0], 256
    )
    difference = (ops.random_walk(small, edges) - expected).abs().max() / expected.max()
    for _ in range(3):
        ops.random_walk(cams, boundary)
    ours = min(seconds(lambda: ops.random_walk(cams, boundary)) for _ in range(20))
    benchmark.extra_info.update(
        target=500.0, ratio=8 * squaring / ours, ours_min=ours, baseline_min=8 * squaring, threads=threads,
        note="baseline: one of its 8 squarings, times 8", difference_at_30x40=difference.item(),
    )  # fmt: skip
    benchmark.pedantic(lambda: ops.random_walk(cams, boundary), rounds=10)


def bench_random_walk_memory(benchmark):
    """What a walk at COCO's size adds to the process's peak, 3 classes; the dense matrix and its square are 2.9 GB."""
    code = MEASURED.format(height=COCO[0], width=COCO[1])
    mib = float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    dense = 2 * (COCO[0] * COCO[1]) ** 2 * 4 / 2**20
    benchmark.extra_info.update(
        target=dense / (100e6 / 2**20), ratio=dense / max(mib, 0.1), ours_mib=mib, baseline_mib=dense, threads=1
    )
    benchmark.pedantic(lambda: None)


def bench_series_against_steps(compare, threads):
    """The Chebyshev series against 256 plain steps by the same kernel."""
    cams, boundary = inputs(2, VOC)
    affinity = ops.path_affinity(boundary, 5, 10.0)
    walk = torch.ops.ribfast.random_walk

    def plain():
        step = [cams]
        for _ in range(8):  # 32 steps are taken plainly
            step = walk(step, [affinity], 5, 32)

    compare(lambda: walk([cams], [affinity], 5, 256), plain, rounds=15)


@pytest.mark.parametrize("images", [2])
def bench_pair_losses(compare, threads, images):
    """Forward and backward at the crop of 512 that IRN trains on."""
    boundary, displacement = torch.rand(images, 128, 128), torch.randn(images, 2, 128, 128)
    labels = torch.randint(0, 3, (images, 8, 8), dtype=torch.uint8)
    labels = labels.repeat_interleave(16, 1).repeat_interleave(16, 2)

    def step(losses):
        leaves = boundary.clone().requires_grad_(), displacement.clone().requires_grad_()
        losses(*leaves, labels, 10)[:5].sum().backward()

    compare(lambda: step(ops.pair_losses), lambda: step(reference.pair_losses), rounds=3, of_minima=True)

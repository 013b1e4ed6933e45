"""The operators on the CPU against plain torch (ribfast/reference.py)."""

from pathlib import Path

import cv2
import pytest
import torch

from ribfast import ops, reference

STRIDE, SCALES = 16, (1, 0.5, 1.5, 2)


def voc_maps(classes=20, size=(375, 500), dtype=torch.float32):
    """The maps of one VOC image at four scales with mirrors, as ResNet-50 at stride 16 gives them."""
    return [
        torch.randn(2, classes, *(-(-round(side * scale) // STRIDE) for side in size), dtype=dtype) for scale in SCALES
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(8, 20, 32, 32), (2, 80, 63, 84)], ids=str)
def bench_gndrp_forward_backward(compare, threads, shape, dtype):
    maps = torch.randn(shape).to(dtype).requires_grad_()
    present, grad = torch.rand(shape[:2]) < 0.2, torch.randn(shape[:2])

    def step(pool):
        maps.grad = None
        pool(maps, present).backward(grad)

    compare(lambda: step(ops.gndrp), lambda: step(reference.gndrp), target=4.0 if dtype == torch.float32 else None)


@pytest.mark.parametrize("classes", [20, 1])
def bench_accumulate_cams(compare, threads, classes):
    maps = voc_maps(classes)
    compare(
        lambda: ops.accumulate_cams(maps, (375, 500), padded=(384, 512)),
        lambda: reference.accumulate_cams(maps, (375, 500), padded=(384, 512)),
        target=3.0 if classes == 20 else None,
    )


def bench_accumulate_cams_backward(compare, threads):
    maps = [m.requires_grad_() for m in voc_maps()]
    grad = torch.randn(20, 375, 500)

    def step(merge):
        for m in maps:
            m.grad = None
        merge(maps, (375, 500), padded=(384, 512)).backward(grad)

    compare(lambda: step(ops.accumulate_cams), lambda: step(reference.accumulate_cams), rounds=15)


def bench_accumulate_cams_against_filling_the_output(compare, threads):
    """The floor: nothing can merge maps faster than memory takes the result. A ratio of 1 would be that floor."""
    maps, out = voc_maps(), torch.zeros(20, 375, 500)
    merge = torch.ops.ribfast.accumulate_cams_
    compare(
        lambda: merge([out], maps, [4], [384, 512], True),
        lambda: out.add_(1.0),
        note="baseline: out.add_(1), which reads and writes the same memory",
    )


def bench_normalize_cams(compare, threads):
    cams = torch.rand(20, 375, 500)
    compare(lambda: ops.normalize_cams(cams), lambda: reference.normalize_cams(cams))


@pytest.mark.parametrize("method, classes", [("par", 3), ("par", 21), ("pamr", 3)])
def bench_refine(compare, threads, method, classes):
    """10 iterations over a photograph of 375x500."""
    photo = cv2.imread(str(Path(__file__).parents[1] / "ribfast" / "assets" / "coffee.jpg"))
    image = torch.from_numpy(photo).permute(2, 0, 1)[None].float()
    maps = torch.rand(1, classes, *image.shape[2:])
    difference = (ops.refine(image, maps, method=method) - reference.refine(image, maps, method=method)).abs().max()
    compare(
        lambda: ops.refine(image, maps, method=method),
        lambda: reference.refine(image, maps, method=method),
        rounds=4,
        of_minima=True,
        largest_difference=difference.item(),
    )

"""Small calls of every operator on the device, for compute-sanitizer: sizes that break tiles and vectors."""

import torch

from ribfast import ops
from ribfast.ops.adapt import activate_, activate_backward, update_folded_


def crf():
    for size in ((1, 1), (33, 18), (16, 50)):
        image = torch.randint(256, (*size, 3), device="cuda", dtype=torch.uint8)
        for labels in (1, 2, 5, 21, 40):
            unary = torch.rand(labels, *size, device="cuda")
            torch.ops.ribfast.dense_crf([image], [unary], [3.0, 3.0], [50.0, 5.0, 10.0], 2, 0, labels == 5, 0)
        given = torch.randint(3, (2, *size), device="cuda", dtype=torch.uint8)
        torch.ops.ribfast.dense_crf_labels([image], [given], 3, 0.7, 0, [3.0, 3.0], [50.0, 5.0, 10.0], 2, 0, False, 0)
    for dims in range(1, 9):
        lattice = torch.ops.ribfast.lattice(torch.randn(301, dims, device="cuda"), True)
        torch.ops.ribfast.lattice_filter(torch.rand(301, 3, device="cuda"), lattice, True)
        torch.ops.ribfast.mean_field(torch.rand(3, 301, device="cuda"), lattice, [1.0], [dims % 4], 2, False)


def refined():
    for method in ("par", "pamr"):
        for classes in (1, 2, 3, 9):
            sizes = [(1, 1), (33, 18), (9, 65)]
            images = [torch.randint(256, (3, *size), device="cuda", dtype=torch.uint8) for size in sizes]
            maps = [torch.rand(classes, *size, device="cuda") for size in sizes]
            ops.refine(images, maps, method=method, iterations=3)


def adapted():
    for dtype in (torch.float32, torch.float16):
        # single elements and vectors; one strip of cells and several; rows kept in registers and longer ones
        for shape in ((1, 33, 13, 17), (2, 1, 1, 1), (1, 136, 25, 41)):
            y, shortcut, grad = (torch.randn(shape, device="cuda", dtype=dtype) for _ in range(3))
            y, shortcut, grad = (t.contiguous(memory_format=torch.channels_last) for t in (y, shortcut, grad))
            mask = (torch.rand(shape[0], 1, *shape[2:], device="cuda") < 0.8).to(dtype)
            activate_(y, shortcut, mask, 6.0)
            activate_backward(grad, y, 6.0)
        for count, *rest in ((3, 1, 3, 3), (2, 64, 3, 3), (2, 1030, 3, 3), (1, 911, 3, 3)):
            weight, velocity = (torch.randn(count, *rest, device="cuda") for _ in range(2))
            weight, velocity = (t.contiguous(memory_format=torch.channels_last) for t in (weight, velocity))
            affine, norm, affine_velocity = (torch.rand(2, count, device="cuda") + 0.5 for _ in range(3))
            grads = weight.to(dtype), affine[0].to(dtype)
            out = [weight, affine, velocity, affine_velocity, *(t.clone() for t in grads)]
            constants = {"rate": torch.tensor(0.1, device="cuda"), "momentum": 0.3, "decay": 0.1, "scale": 4.0}
            for first, anchors in ((True, None), (False, grads)):
                update_folded_(grads, anchors, (weight, affine), norm, out, first=first, **constants)


def walked():
    for size, radius in (((1, 1), 2), ((9, 40), 5), ((33, 65), 10), ((17, 20), 16)):
        boundary = torch.rand(2, *size, device="cuda").requires_grad_()
        displacement = torch.randn(2, 2, *size, device="cuda").requires_grad_()
        labels = torch.randint(0, 3, (2, *size), dtype=torch.uint8, device="cuda")
        ops.path_affinity(boundary, radius, 10.0).sum().backward()
        ops.pair_losses(boundary, displacement, labels, radius)[:5].sum().backward()
        for classes in (1, 2, 6):
            ops.random_walk(
                torch.rand(2, classes, *size, device="cuda"), boundary.detach(), radius=radius, log2_steps=8
            )


def segmented(dtype):
    for labels, small, large in (
        (1, (1, 1), (1, 1)),
        (21, (4, 5), (30, 37)),
        (70, (9, 5), (4, 40)),
        (255, (2, 3), (9, 9)),
    ):
        logits = torch.randn(2, labels, *small, device="cuda", dtype=dtype).requires_grad_()
        given = torch.randint(0, 256, (2, *large), dtype=torch.uint8, device="cuda")
        for under_fitting in (None, "clamp", "ignore", "pow"):
            ops.segmentation_loss(logits, given, under_fitting=under_fitting, beta=100.0, balanced=True).backward()


def erased(dtype):
    for channels, small, large in (
        (3, (1, 1), (1, 1)),
        (3, (4, 5), (30, 37)),
        (1, (9, 40), (4, 5)),
        (5, (35, 3), (70, 99)),
    ):
        images = torch.randn(2, channels, *large, device="cuda", dtype=dtype)
        maps = torch.randn(3, *small, device="cuda", dtype=dtype).requires_grad_()
        which = torch.tensor([1, 0, 7], device="cuda")  # the last is none
        for layout in (torch.contiguous_format, torch.channels_last):
            results = ops.erase(images.contiguous(memory_format=layout), maps, which)
            sum(result.float().square().sum() for result in results).backward()


def main():
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.float16):
        for shape in ((2, 3, 9, 13), (1, 2, 64, 64), (1, 1, 1, 1), (1, 1, 151, 129)):
            maps = torch.randn(shape, device="cuda").to(dtype).requires_grad_()
            ops.gndrp(maps, torch.rand(shape[:2], device="cuda") < 0.7).sum().backward()
            ops.normalize_cams(maps.detach())
        segmented(dtype)
        erased(dtype)
        sizes = [(37, 50), (1, 9), (130, 21)]
        batch = [
            [torch.randn(2, 3, *(max(1, round(s * f / 16)) for s in size), device="cuda").to(dtype).requires_grad_()
             for f in (1, 0.5, 1.5, 2, 3)]
            for size in sizes
        ]  # fmt: skip
        sum(merged.sum() for merged in ops.accumulate_cams_batch(batch, sizes)).backward()
        with torch.no_grad():
            out = [torch.zeros(3, *size, device="cuda") for size in sizes]
            ops.accumulate_cams_batch(batch, sizes, out=out)
            turned = torch.zeros(3, 50, 37, device="cuda").transpose(1, 2)
            ops.normalize_cams(ops.accumulate_cams(batch[0], sizes[0], out=turned), inplace=True)
    adapted()
    refined()
    walked()
    crf()
    torch.cuda.synchronize()
    print("sanitize.py: done")


if __name__ == "__main__":
    main()

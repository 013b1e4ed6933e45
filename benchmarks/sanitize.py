"""Small calls of every operator on the device, for compute-sanitizer: sizes that break tiles and vectors."""

import torch

from ribfast import ops


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


def main():
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.float16):
        for shape in ((2, 3, 9, 13), (1, 2, 64, 64), (1, 1, 1, 1), (1, 1, 151, 129)):
            maps = torch.randn(shape, device="cuda").to(dtype).requires_grad_()
            ops.gndrp(maps, torch.rand(shape[:2], device="cuda") < 0.7).sum().backward()
            ops.normalize_cams(maps.detach())
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
    crf()
    torch.cuda.synchronize()
    print("sanitize.py: done")


if __name__ == "__main__":
    main()

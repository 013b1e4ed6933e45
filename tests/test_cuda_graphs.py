"""Every operator can be captured in a CUDA graph, and its replays follow new inputs."""

import os

import pytest
import torch
from cases import logits, rounding, scales

from ribfast import ops, reference

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
cpp_alone = pytest.mark.skipif(os.environ.get("RIBFAST_BACKEND") == "triton", reason="has no Triton kernels")


def replayed(run, inputs):
    """What `run()` returns when replayed from a graph after `inputs` were given new values."""
    torch.use_deterministic_algorithms(False)  # capture forbids nothing, but filling with NaN would be captured too
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    for tensor in inputs:
        tensor.copy_(torch.randn_like(tensor) * 2)
    graph.replay()
    torch.cuda.synchronize()
    return results


def test_gndrp():
    maps = logits((8, 20, 32, 32), torch.float32, "cuda")
    present, grad = torch.rand(8, 20, device="cuda") < 0.3, torch.randn(8, 20, device="cuda")

    def run():
        pooled, stats = torch.ops.ribfast.gndrp(maps, present, 0.4, False, False)
        return pooled, torch.ops.ribfast.gndrp_backward(grad, maps, present, stats, 0.4, False)

    pooled, grads = replayed(run, [maps])
    leaf = maps.clone().requires_grad_()
    expected = reference.gndrp(leaf, present)
    expected.backward(grad)
    torch.testing.assert_close(pooled, expected.detach(), rtol=2e-5, atol=1e-5)
    torch.testing.assert_close(grads, leaf.grad)


def test_gndrp_with_its_gradient():
    maps = logits((4, 5, 16, 17), torch.float32, "cuda").requires_grad_()
    present = torch.rand(4, 5, device="cuda") < 0.5

    def run():
        return torch.autograd.grad(ops.gndrp(maps, present).sum(), maps)

    (grads,) = replayed(run, [maps.detach()])
    leaf = maps.detach().clone().requires_grad_()
    (expected,) = torch.autograd.grad(reference.gndrp(leaf, present).sum(), leaf)
    torch.testing.assert_close(grads, expected)


def test_accumulate_cams():
    batch = [scales((90, 130), (1, 0.5, 1.5, 2), 3, torch.float32, "cuda") for _ in range(3)]
    flat = [m for image in batch for m in image]
    grads = [torch.rand(3, 90, 130, device="cuda") for _ in batch]
    layout = ([4] * 3, [90, 130] * 3, [96, 144] * 3, True)

    def run():
        merged = torch.ops.ribfast.accumulate_cams(flat, *layout)
        back = torch.ops.ribfast.accumulate_cams_backward(grads, flat, layout[0], *layout[2:])
        return [*merged, *back]

    results = replayed(run, flat)
    for i, maps in enumerate(batch):
        leaves = [m.clone().requires_grad_() for m in maps]
        expected = reference.accumulate_cams(leaves, (90, 130), padded=(96, 144))
        torch.testing.assert_close(results[i], expected.detach(), rtol=2e-5, atol=1e-5)
        expected.backward(grads[i])
        for got, leaf in zip(results[3 + 4 * i :], leaves, strict=False):
            torch.testing.assert_close(got, leaf.grad, rtol=1e-4, atol=1e-2)


def test_accumulate_cams_into_out():
    """More images than one launch describes, and more scales than it holds."""
    batch = [scales((20, 30), (1, 2, 0.5, 1, 3), 1, torch.float32, "cuda") for _ in range(300)]
    flat = [m for image in batch for m in image]
    out = [torch.zeros(1, 20, 30, device="cuda") for _ in batch]

    def run():
        for target in out:
            target.zero_()
        torch.ops.ribfast.accumulate_cams_(out, flat, [5] * 300, [32, 32] * 300, True)

    replayed(run, flat)
    for target, maps in zip(out[::37], batch[::37], strict=True):
        expected = reference.accumulate_cams(maps, (20, 30), padded=(32, 32))
        torch.testing.assert_close(target, expected, rtol=2e-5, atol=1e-5)


def test_normalize_cams():
    cams = torch.rand(20, 90, 130, device="cuda")
    result = replayed(lambda: ops.normalize_cams(cams), [cams])
    torch.testing.assert_close(result, reference.normalize_cams(cams))


def test_normalize_cams_in_place():
    cams = torch.rand(20, 90, 130, device="cuda")
    graph_input = torch.empty_like(cams)

    def run():
        graph_input.copy_(cams)
        return ops.normalize_cams(graph_input, inplace=True)

    result = replayed(run, [cams])
    torch.testing.assert_close(result, reference.normalize_cams(cams))


def channels_last(*shape, dtype=torch.float32):
    return torch.randn(shape, device="cuda").to(dtype).contiguous(memory_format=torch.channels_last)


@cpp_alone
@pytest.mark.parametrize("channels", [33, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_activations(channels, dtype):
    shape = (1, channels, 40, 33)
    before, shortcut, grad = (channels_last(*shape, dtype=dtype) for _ in range(3))
    mask = (torch.rand(1, 1, 40, 33, device="cuda") < 0.9).to(dtype)
    y = torch.empty_like(before)

    def run():
        y.copy_(before)
        torch.ops.ribfast.activate_(y, shortcut, mask, 6.0)
        return torch.ops.ribfast.activate_backward(grad, y, 6.0)

    result, sums = replayed(run, [before, shortcut, grad])
    torch.testing.assert_close(y, reference.activate(before, shortcut, mask, 6.0), **rounding(dtype))
    expected, expected_sums = reference.activate_backward(grad, y, 6.0)
    assert torch.equal(result, expected)
    torch.testing.assert_close(sums, expected_sums, rtol=1e-4, atol=1e-3)
    assert torch.equal(sums, run()[1])


@cpp_alone
def test_update_folded():
    """Replays follow a rate that is only known on the device."""
    shape, count, rate = (64, 32, 3, 3), 64, torch.zeros((), device="cuda")
    grads = channels_last(*shape, dtype=torch.bfloat16), torch.randn(count, device="cuda").bfloat16()
    anchors = channels_last(*shape, dtype=torch.bfloat16), torch.randn(count, device="cuda").bfloat16()
    weight, velocity = channels_last(*shape), channels_last(*shape)
    affine, norm, affine_velocity = (torch.rand(2, count, device="cuda") + 0.5 for _ in range(3))
    states = [torch.empty_like(t) for t in (weight, affine, velocity, affine_velocity)]
    folded = [torch.empty_like(t) for t in grads]

    def run():
        for state, value in zip(states, (weight, affine, velocity, affine_velocity), strict=True):
            state.copy_(value)
        torch.ops.ribfast.update_folded_(
            *grads, *anchors, *states[:2], norm, *states, *folded, False, rate, 0.3, 0.1, 4.0
        )

    replayed(run, [*grads, rate])
    total = [(g.float() + a.float()) / 4 for g, a in zip(grads, anchors, strict=True)]
    expected = reference.update_folded(
        *total, weight, affine, norm, velocity, affine_velocity, rate=rate, momentum=0.3, decay=0.1
    )
    assert rate != 0
    for found, wanted in zip([*states, *folded], expected, strict=True):
        close = dict(rtol=1e-4, atol=1e-3) if found.dtype == torch.float32 else rounding(found.dtype)
        torch.testing.assert_close(found, wanted.to(found.dtype), **close)


def crf_picture(height, width, labels):
    coarse = torch.rand(1, 3, 4, 5, device="cuda") * 220
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")[0].permute(1, 2, 0)
    image = (smooth + torch.rand(height, width, 3, device="cuda") * 30).to(torch.uint8).contiguous()
    return image, torch.rand(labels, height, width, device="cuda") * 3


@cpp_alone
@pytest.mark.parametrize("labels", [1, 2, 5, 21, 40])
@pytest.mark.parametrize("capacity", [0, 40000])
def test_dense_crf(labels, capacity):
    pictures = [crf_picture(50, 71, labels), crf_picture(50, 71, labels), crf_picture(33, 90, labels)]
    images, unary = map(list, zip(*pictures, strict=True))

    def run():
        return torch.ops.ribfast.dense_crf(images, unary, [3.0, 3.0], [50.0, 5.0, 10.0], 5, 0, False, capacity)

    unary[1] = torch.stack([unary[1], unary[1].flip(0), 2 * unary[1]])  # several problems of one image
    results = replayed(run, unary)
    for result, image, energies in zip(results, images, unary, strict=True):
        torch.testing.assert_close(result, reference.dense_crf(image, energies, iterations=5), rtol=0, atol=1e-4)
    again = run()
    for result, repeated in zip(results, again, strict=True):
        assert torch.equal(result, repeated)


@cpp_alone
def test_dense_crf_follows_new_images():
    image, unary = crf_picture(50, 71, 3)

    def run():
        return ops.dense_crf([image], [unary], iterations=5)

    other = crf_picture(50, 71, 3)[0]
    graph_input = image.clone()
    image.copy_(other)
    (expected,) = run()
    image.copy_(graph_input)
    graph = torch.cuda.CUDAGraph()
    run()
    with torch.cuda.graph(graph):
        (result,) = run()
    image.copy_(other)
    graph.replay()
    assert torch.equal(result, expected)


@cpp_alone
def test_overflow_is_an_error_or_nan():
    image, unary = crf_picture(50, 71, 3)

    def run(capacity):
        return torch.ops.ribfast.dense_crf([image], [unary], [3.0, 3.0], [50.0, 5.0, 10.0], 2, 0, False, capacity)

    with pytest.raises(ValueError, match="dense_crf: expected a capacity of as many vertices as a lattice has"):
        run(100)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        (result,) = run(100)
    graph.replay()
    assert result.isnan().all()


@cpp_alone
def test_lattice_filter():
    features, values = torch.randn(3000, 4, device="cuda") * 2, torch.rand(3000, 6, device="cuda")

    def run():
        lattice = torch.ops.ribfast.lattice(features, False)
        return [torch.ops.ribfast.lattice_filter(values, lattice, transpose) for transpose in (False, True)]

    results = replayed(run, [features, values])
    torch.testing.assert_close(results[0], reference.Lattice(features).filter(values), rtol=1e-4, atol=1e-5)
    for result, repeated in zip(results, run(), strict=True):
        assert torch.equal(result, repeated)


@cpp_alone
def test_mean_field_of_points():
    features, unary = torch.randn(2000, 3, device="cuda"), torch.rand(6, 2000, device="cuda") * 3

    def run():
        lattice = torch.ops.ribfast.lattice(features, False)
        return torch.ops.ribfast.mean_field(unary, lattice, [1.5], [1], 3, False)

    result = replayed(run, [features, unary])
    lattice, q = reference.Lattice(features), (-unary.T).softmax(1)
    mass = lattice.filter(torch.ones(2000, 1, device="cuda")) + 1e-20
    for _ in range(3):
        q = (1.5 / mass * lattice.filter(q) - unary.T).softmax(1)
    torch.testing.assert_close(result, q.T, rtol=0, atol=1e-4)
    assert torch.equal(result, run())


@cpp_alone
def test_random_walk():
    boundary, cams = torch.rand(2, 30, 41, device="cuda"), torch.rand(2, 3, 30, 41, device="cuda")

    def run():
        weights = ops.path_affinity(boundary.abs().clamp(max=1), 5, 10.0)
        return ops.random_walk(cams, affinity=weights, beta=1)

    found = replayed(run, [boundary, cams])
    for own, edge, value in zip(cams, boundary, found, strict=True):
        affinity = reference.path_affinity(edge.abs().clamp(max=1)[None].double(), 5, 10.0)[0]
        expected = reference.random_walk(own.double(), affinity, 256)
        torch.testing.assert_close(value.double(), expected, rtol=0, atol=1e-4)


@cpp_alone
def test_pair_losses_with_their_gradient():
    boundary = torch.rand(2, 30, 41, device="cuda").requires_grad_()
    displacement = torch.randn(2, 2, 30, 41, device="cuda").requires_grad_()
    labels = torch.randint(0, 3, (2, 30, 41), dtype=torch.uint8, device="cuda")

    def run():
        sums = ops.pair_losses(boundary.sigmoid(), displacement, labels, 4)
        return *torch.autograd.grad(sums[:5].sum(), (boundary, displacement)), sums

    to_boundary, to_displacement, sums = replayed(run, [boundary.detach(), displacement.detach()])
    leaves = boundary.detach().double().requires_grad_(), displacement.detach().double().requires_grad_()
    expected = reference.pair_losses(leaves[0].sigmoid(), leaves[1], labels, 4)
    expected[:5].sum().backward()
    torch.testing.assert_close(sums.double(), expected.detach(), rtol=1e-4, atol=1e-4)
    for found, leaf in ((to_boundary, leaves[0]), (to_displacement, leaves[1])):
        torch.testing.assert_close(found.double(), leaf.grad, rtol=1e-3, atol=1e-3 * leaf.grad.abs().max().item())


@cpp_alone
@pytest.mark.parametrize("under_fitting", [None, "pow"])
def test_segmentation_loss_with_its_gradient(under_fitting):
    logits = torch.randn(2, 21, 11, 13, device="cuda").requires_grad_()
    labels = torch.randint(0, 21, (2, 81, 97), dtype=torch.uint8, device="cuda")
    options = dict(under_fitting=under_fitting, beta=100.0, balanced=True)

    def run():
        loss = ops.segmentation_loss(logits, labels, **options)
        return *torch.autograd.grad(loss, logits), loss

    grads, loss = replayed(run, [logits.detach()])
    leaf = logits.detach().double().requires_grad_()
    expected = reference.segmentation_loss(leaf, labels, **options)
    expected.backward()
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(grads.double(), leaf.grad, rtol=1e-4, atol=1e-5 * leaf.grad.abs().max().item())
    for first, repeated in zip((grads, loss), run(), strict=True):
        assert torch.equal(first, repeated)


@cpp_alone
@pytest.mark.parametrize("channels_last", [False, True], ids=["planes", "channels_last"])
def test_erase_with_its_gradient(channels_last):
    images = torch.randn(3, 3, 97, 131, device="cuda")
    if channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    maps, which = torch.randn(5, 7, 9, device="cuda").requires_grad_(), torch.tensor([0, 2, 2, 0, 2], device="cuda")

    def run():
        erased, areas = ops.erase(images, maps, which, sharpness=10.0)
        return *torch.autograd.grad(erased.square().sum() + areas.sum(), maps), erased, areas

    grads, erased, areas = replayed(run, [images, maps.detach()])
    leaf = maps.detach().double().requires_grad_()
    expected = reference.erase(images.double(), leaf, which, sharpness=10.0)
    (expected[0].square().sum() + expected[1].sum()).backward()
    torch.testing.assert_close(erased.double(), expected[0].detach(), rtol=2e-5, atol=1e-4)
    torch.testing.assert_close(areas.double(), expected[1].detach(), rtol=2e-5, atol=1e-2)
    torch.testing.assert_close(grads.double(), leaf.grad, rtol=1e-4, atol=1e-5 * leaf.grad.abs().max().item())
    for first, repeated in zip((grads, erased, areas), run(), strict=True):
        assert torch.equal(first, repeated)


@cpp_alone
@pytest.mark.parametrize("method", ["par", "pamr"])
@pytest.mark.parametrize("classes, iterations", [(1, 1), (3, 2), (21, 5)])
def test_refine(method, classes, iterations):
    pairs = [(torch.rand(2, 3, *size, device="cuda"), torch.rand(2, classes, *size, device="cuda"))
             for size in ((50, 71), (33, 90))]  # fmt: skip
    images, maps = map(list, zip(*pairs, strict=True))

    def run():
        return torch.ops.ribfast.refine(images, maps, method == "pamr", [1, 2, 4, 30], iterations, 0.3, 0.01)

    results = replayed(run, [*images, *maps])
    for result, image, given in zip(results, images, maps, strict=True):
        expected = reference.refine(image, given, method=method, dilations=(1, 2, 4, 30), iterations=iterations)
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
    for result, repeated in zip(results, run(), strict=True):
        assert torch.equal(result, repeated)

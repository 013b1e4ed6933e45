"""Several images at once, and steps as graphs: what `ribfast.rib.slots` does, with graphs recorded on a CPU."""

import dataclasses

import numpy as np
import pytest
import tape
import torch
from test_rib import check_golden, golden_run, small_model, small_others, small_target, within_a_thousandth
from test_rib import golden_model as golden_model

from ribfast import reference
from ribfast.errors import lacks_memory
from ribfast.rib import Engine, Job, RIBConfig, adapt, slots

SIZES = [(33, 45), (48, 32), (33, 45), (30, 46)]


def graphed(model, config):
    """An engine whose steps are recorded and replayed, on canvases of few shapes, as on a GPU."""
    engine = Engine(model, config)
    made = []

    def capture(step, slot):
        made.append(tape.record(step))
        return made[-1]

    engine.capture, engine.made = capture, made
    return engine


def equals_reference(model, target, result, config, others=small_others):
    maps, steps, stopped = reference.rib(model, target.views, target.classes, others, config)
    assert (result.steps, result.stopped, result.error) == (steps, stopped, None)
    for found, expected in zip(result.maps, maps, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.max()))


def test_a_tape_does_again_what_was_recorded():
    x, out = torch.randn(3, requires_grad=True), torch.zeros(3)

    def step():
        out.add_(torch.autograd.grad((x**2).sum(), x)[0])

    replay = tape.record(step)
    assert not out.any()
    with torch.no_grad():
        x.copy_(torch.tensor([1.0, 2.0, 3.0]))
    replay(), replay()
    assert out.tolist() == [4.0, 8.0, 12.0]
    y = x.detach()
    for waiting in (lambda: float(y[0]), lambda: y[y > 0], lambda: torch.tensor([1.0]), lambda: y.unique()):
        with pytest.raises(RuntimeError, match="waits for the device"):
            tape.record(waiting)


@pytest.mark.parametrize("preset, concurrency", [("released", 3), ("fast", 1)])
def test_graphs_equal_the_reference(preset, concurrency):
    """Images of other sizes, some of which share graphs; the first ones of a shape run without."""
    model = small_model()
    config = getattr(RIBConfig, preset)(
        steps=3, lr=2e-4, disjoint=False, explode_area=None, precision="float32", concurrency=concurrency
    )
    config = dataclasses.replace(config, momentum=0.3, weight_decay=0.01)
    engine = graphed(model, config)
    torch.manual_seed(6)  # no cell is so near to tau that rounding would tell whether it is pooled
    targets, before = [small_target(size, (i % 4,)) for i, size in enumerate(SIZES)], 0
    results = engine.adapt(targets, small_others)
    while not engine.made or len(engine.made) > before:
        before = len(engine.made)
        again = engine.adapt(targets, small_others)  # at last by graphs alone
    shapes = {shape for slot in engine._slots for shape in slot.frames}
    assert len(shapes) < len(set(SIZES))
    plain = adapt(model, targets, small_others, dataclasses.replace(config, concurrency=1))
    for target, result, second, expected in zip(targets, results, again, plain, strict=True):
        if preset != "fast":
            equals_reference(model, target, result, config)
        for found, other, wanted in zip(result.maps, second.maps, expected.maps, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3 * float(wanted.max()))
            torch.testing.assert_close(found, other, rtol=1e-4, atol=1e-4 * float(wanted.max()))


@pytest.mark.parametrize("name, options", [("mobilenet_v2", {}), ("mobilenet_v2", {"tensorflow_padding": True})])
def test_graphs_of_other_networks(name, options):
    model = small_model(name, **options)
    config = RIBConfig.released(steps=3, lr=2e-4, explode_area=None, disjoint=False)
    engine = graphed(model, config)
    targets = [small_target(size, (1,)) for size in ((33, 45), (48, 32), (33, 45), (31, 29))]
    for target, result in zip(targets, engine.adapt(targets, small_others), strict=True):
        equals_reference(model, target, result, config)
    assert engine.made


def test_golden_run_as_graphs(golden_model):
    """With a stop: a graph goes through the step in which the image stops, and through those after it."""
    numbers, target, others, config = golden_run("stop")
    engine = graphed(golden_model, config)
    for _ in range(2):
        result = engine.adapt([target], others)[0]
    assert engine.made
    check_golden(result, numbers, within_a_thousandth)


def test_steps_after_a_stop_change_nothing():
    model, target = small_model(), small_target()
    config = RIBConfig.released(steps=5, lr=1e-5, explode_level=0.2, explode_area=0.3)
    engine = graphed(model, config)
    results = [engine.adapt([target], small_others)[0] for _ in range(2)]
    slot = engine.take_slots()[0]
    slot.begin(Job(target, engine.batches([1], small_others, 1)))
    for _ in range(config.steps):
        slot.advance()
    late = slot.result()
    for result in (*results, late):
        equals_reference(model, target, result, config)
    assert late.steps == 2


@pytest.mark.parametrize("order", [(True, True, True, False), (False, False, False, True)])
def test_graphs_with_and_without_others_are_apart(order):
    """Where no others lie on the canvas its shape does not tell."""
    model, target = small_model(), small_target((30, 33))
    config = RIBConfig.fast(steps=3, lr=2e-4, explode_area=None, precision="float32", anchor_batches=1)
    engine = graphed(model, config)
    for with_others in order:
        others = small_others if with_others else None
        found = engine.adapt([target], others)[0]
    assert engine.made
    expected = adapt(model, [target], others, config)[0]
    for one, other in zip(found.maps, expected.maps, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * float(other.max()))


def test_an_engine_goes_on_after_a_caller_has_left():
    model, config = small_model(), RIBConfig.released(steps=3, lr=2e-4, concurrency=2)
    engine, targets = Engine(model, config), [small_target(size) for size in SIZES]
    expected = engine.adapt(targets, small_others)

    def broken(step):
        raise KeyError("others")

    leaving = engine.adapt_all(Job(target, engine.batches([1], small_others, 1)) for target in targets)
    next(leaving)
    leaving.close()
    with pytest.raises(KeyError, match="others"):
        engine.adapt(targets, broken)
    for one, other in zip(expected, engine.adapt(targets, small_others), strict=True):
        assert torch.equal(one.maps[0], other.maps[0])


def test_the_callers_precision_is_left_as_it_is():
    model, target, config = small_model(), small_target(), RIBConfig.released(steps=3, lr=2e-4)
    expected = adapt(model, [target], small_others, config)[0]
    settings = [torch.backends.cudnn.conv, torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]
    before = [setting.fp32_precision for setting in settings]
    try:
        for setting in settings:
            setting.fp32_precision = "tf32"
        found = adapt(model, [target], small_others, config)[0]
        assert [setting.fp32_precision for setting in settings] == ["tf32"] * 3
    finally:
        for setting, value in zip(settings, before, strict=True):
            setting.fp32_precision = value
    assert torch.equal(found.maps[0], expected.maps[0])


def test_images_at_once_do_not_change_results():
    model = small_model()
    config = RIBConfig.released(steps=4, lr=2e-4, explode_level=0.2, explode_area=0.6)
    targets = [small_target(size) for size in SIZES]
    alone = adapt(model, targets, small_others, config)
    for concurrency in (2, 4):
        together = adapt(model, targets, small_others, dataclasses.replace(config, concurrency=concurrency))
        for one, other in zip(alone, together, strict=True):
            assert (one.steps, one.stopped) == (other.steps, other.stopped)
            assert all(torch.equal(a, b) for a, b in zip(one.maps, other.maps, strict=True))


def asking(asked, name):
    def others(step):
        asked.append((name, step))
        return small_others(step)

    return others


def test_others_are_asked_for_once_and_in_order_also_for_images_at_once():
    asked, config = [], RIBConfig.released(steps=4, explode_area=None, concurrency=3)
    engine = Engine(small_model(), config)
    blocks = [engine.batches([1], asking(asked, name), 2) for name in "abc"]
    assert len(list(engine.adapt_all(Job(small_target((30, 33)), block) for block in blocks for _ in range(2)))) == 6
    assert all([step for name, step in asked if name == block] == [0, 1, 2] for block in "abc")
    assert not any(block._steps for block in blocks)  # what all have had is let go


def short_of_memory(monkeypatch, most):
    """Slots run out of memory where more than `most` of them are at work; returns how many began."""
    began, begin = [], slots.Slot.begin

    def limited(slot, job):
        begin(slot, job)
        began.append(slot)
        if len({*began[-most - 1 :]}) > most:
            began.clear()
            raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(slots.Slot, "begin", limited)
    return began


def test_memory_that_runs_out_halves_the_images_at_once(monkeypatch, caplog):
    model, config = small_model(), RIBConfig.released(steps=3, lr=2e-4, concurrency=4)
    targets = [small_target(size) for size in SIZES]
    expected = adapt(model, targets, small_others, dataclasses.replace(config, concurrency=1))
    short_of_memory(monkeypatch, 2)
    caplog.set_level("INFO", logger="ribfast")
    found = adapt(model, targets, small_others, config)
    assert "memory ran out: from 3 images at once to 1" in caplog.text
    for one, other in zip(expected, found, strict=True):
        assert other.error is None and torch.equal(one.maps[0], other.maps[0])


def test_memory_that_runs_out_in_a_step_begins_images_anew(monkeypatch):
    model, config = small_model(), RIBConfig.released(steps=3, lr=2e-4, concurrency=3)
    targets = [small_target(size) for size in SIZES[:3]]
    expected = adapt(model, targets, small_others, dataclasses.replace(config, concurrency=1))
    advance, calls = slots.Slot.advance, []

    def once(slot):
        calls.append(slot)
        if len(calls) == 6:
            raise torch.OutOfMemoryError("no memory")
        advance(slot)

    monkeypatch.setattr(slots.Slot, "advance", once)
    asked = []
    found = adapt(model, targets, asking(asked, "a"), config)
    for one, other in zip(expected, found, strict=True):
        assert other.error is None and torch.equal(one.maps[0], other.maps[0])
    assert len(asked) <= 2 * config.steps  # once more for all that began anew, not for each


def test_images_at_once_become_more_again(monkeypatch):
    """After memory ran out once."""
    begin, at_once, config = slots.Slot.begin, [], RIBConfig.released(steps=1, concurrency=2)
    failing = [True]

    def limited(slot, job):
        at_once.append(slot)
        begin(slot, job)
        if len(at_once) == 2 and failing:
            raise torch.OutOfMemoryError(failing.pop())

    monkeypatch.setattr(slots.Slot, "begin", limited)
    results = adapt(small_model(), [small_target((16, 16)) for _ in range(14)], None, config)
    assert all(result.error is None for result in results)
    after = at_once[2:]
    assert len({*after[:8]}) == 1 and len({*after}) == 2


def test_an_image_that_ran_out_beside_idle_slots_is_tried_alone(monkeypatch):
    begin, failing = slots.Slot.begin, []
    engine = Engine(small_model(), RIBConfig.released(steps=1, concurrency=3))
    engine.adapt([small_target((16, 16)) for _ in range(3)], None)

    def limited(slot, job):
        begin(slot, job)
        if not failing:
            failing.append(slot)
            raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(slots.Slot, "begin", limited)
    assert engine.adapt([small_target((16, 16))], None)[0].error is None and failing


@pytest.mark.parametrize("text", ["CUDA error: out of memory", "cuDNN error: CUDNN_STATUS_ALLOC_FAILED"])
def test_a_lack_of_memory_is_known_by_its_words(text):
    assert lacks_memory(RuntimeError(text)) and not lacks_memory(RuntimeError("CUDA error: misaligned"))
    try:
        try:
            raise torch.OutOfMemoryError("x")
        finally:
            raise RuntimeError("the capture ended")
    except RuntimeError as error:
        assert lacks_memory(error)


def test_an_image_too_large_for_memory_alone_is_recorded(monkeypatch):
    begin = slots.Slot.begin

    def limited(slot, job):
        begin(slot, job)
        if job.target.size == SIZES[1]:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:119] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(slots.Slot, "begin", limited)
    config = RIBConfig.released(steps=2, concurrency=2)
    results = adapt(small_model(), [small_target(size) for size in SIZES[:3]], small_others, config)
    assert [result.error is None for result in results] == [True, False, True]
    assert results[1].error.startswith("out of memory, alone, at 48x32; take smaller scales")


def test_other_errors_are_not_taken_for_a_lack_of_memory(monkeypatch):
    def broken(slot):
        raise RuntimeError("something else")

    monkeypatch.setattr(slots.Slot, "advance", broken)
    with pytest.raises(RuntimeError, match="something else"):
        adapt(small_model(), [small_target()], small_others, RIBConfig.released(steps=2))


def test_images_begin_where_memory_has_room(monkeypatch):
    """By what slots are known to take beforehand."""
    model, config = small_model(), RIBConfig.released(steps=3, lr=2e-4, concurrency=4)
    targets = [small_target() for _ in range(5)]
    engine = Engine(model, config)
    job = Job(targets[0], engine.batches([1], small_others, 1))
    one = slots.bytes_of_slot(engine, None, engine.layout_of(job))
    for room, most in ((0, 1), (2.5 * one, 2), (100 * one, 4)):
        engine.take_slots()
        monkeypatch.setattr(engine, "free_memory", lambda room=room: room)
        assert all(result.error is None for result in engine.adapt(targets, small_others))
        assert len(engine._slots) == most


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "mobilenet_v2"])
def test_bytes_that_a_step_keeps_are_known_beforehand(name):
    """Against what autograd saves."""
    model, config = small_model(name), RIBConfig.released(steps=3)
    engine = Engine(model, config)
    slot = slots.Slot(engine)
    slot.begin(Job(small_target(), engine.batches([1], small_others, 1)))
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    weights = {leaf.untyped_storage().data_ptr() for leaf in (*engine.tail.leaves, *slot.run.weights._leaves)}
    frame = slot.frame
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        slot.run.observe(frame.features, frame.layout, frame.sums, frame.labels)
    kept = sum(size for place, size in saved.items() if place not in weights)
    shape = frame.layout.canvas.shape
    known = engine.tail.activation_bytes(shape.rows, shape.columns)
    assert kept <= known <= 3 * kept


def wide_model():
    """A classifier whose activations leave float16's range, but not bfloat16's."""
    model = small_model()
    with torch.no_grad():
        for block in model.layer4:
            block.bn2.weight.mul_(3000)
        model.classifier.weight.mul_(1e-5)
    return model


def test_an_image_that_float16_does_not_hold_is_adapted_in_bfloat16(caplog):
    model, target = wide_model(), small_target((32, 32))
    config = RIBConfig.released(steps=3, lr=0.0, explode_area=None, precision="float16")
    caplog.set_level("INFO", logger="ribfast")
    found = adapt(model, [target], small_others, config)[0]
    assert found.error is None and "32x32 does not fit float16: adapted in bfloat16" in caplog.text
    expected = adapt(model, [target], small_others, dataclasses.replace(config, precision="float32"))[0]
    assert np.corrcoef(found.maps[0].ravel(), expected.maps[0].ravel())[0, 1] > 0.99


def test_what_bfloat16_has_no_memory_for_waits_until_the_slots_are_done(monkeypatch):
    model = wide_model()
    config = RIBConfig.released(steps=2, lr=0.0, explode_area=None, precision="float16", concurrency=2)
    engine, begin = Engine(model, config), slots.Slot.begin

    def limited(slot, job):
        begin(slot, job)
        if slot.engine is not engine and engine._slots is slots_at_work:
            raise torch.OutOfMemoryError("no memory")

    slots_at_work = engine._slots
    monkeypatch.setattr(slots.Slot, "begin", limited)
    monkeypatch.setattr(engine, "take_slots", lambda: [])
    results = engine.adapt([small_target((16, 16)) for _ in range(2)], small_others)
    assert all(result.error is None for result in results)


def test_a_classifiers_gradient_fits_float16():
    """It sums over many rows; 1024 times as large, as float16's gradients are, it would leave the range."""
    from ribfast.rib.tail import _Classify

    x, weight = torch.full((1, 4, 30, 40), 9.0, dtype=torch.float16), torch.ones(2, 4, 1, 1, requires_grad=True)
    upstream = torch.full((1, 2, 30, 40), 1024 / 100, dtype=torch.float16)
    (gradient,) = torch.autograd.grad(_Classify.apply(x, weight), weight, upstream)
    assert gradient.dtype == torch.float32
    torch.testing.assert_close(gradient, torch.full_like(gradient, 9.0 * 1200 * 10.24), rtol=1e-3, atol=0)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "mobilenet_v2"])
@pytest.mark.parametrize("concurrency", [1, 3])
def test_cuda_graphs_equal_the_reference(name, concurrency):
    model = small_model(name).cuda()
    # pooling all cells: rounding may tell otherwise whether one that is near to tau is pooled
    config = RIBConfig.released(steps=4, lr=2e-5, disjoint=False, concurrency=concurrency, pooling="gap")
    targets = [small_target(size, (i % 4,)) for i, size in enumerate(SIZES)]
    engine = Engine(model, config)

    def others(step):
        images, present = small_others(step)
        return images.cuda(), present.cuda()

    for _ in range(4):
        results = engine.adapt(targets, small_others)
    assert any(frame.replays for slot in engine._slots for frame in slot.frames.values())
    plain = adapt(model, targets, small_others, dataclasses.replace(config, graphs=False))
    for target, result, one in zip(targets, results, plain, strict=True):
        target = dataclasses.replace(target, views=[view.cuda() for view in target.views])
        maps, steps, stopped = reference.rib(model, target.views, target.classes, others, config)
        assert (result.steps, result.stopped) == (one.steps, one.stopped) == (steps, stopped)
        for found, other, expected in zip(result.maps, one.maps, maps, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.max()))
            torch.testing.assert_close(other, expected, rtol=1e-3, atol=1e-3 * float(expected.max()))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_cuda_graphs_in_16_bits(golden_model, precision):
    numbers, target, others, config = golden_run("gndrp_one_class")
    config = dataclasses.replace(config, precision=precision, concurrency=2)
    results = Engine(golden_model.cuda(), config).adapt([target] * 6, others)
    golden_model.cpu()
    for result in results:
        found, expected = result.high_res.cpu().numpy(), numbers["high_res"]
        assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.999
        assert ((found > 0.3) == (expected > 0.3)).mean() > 0.99

"""Images on their way through the steps, several at once: where each one's state lies, and whose turn it is.

A slot adapts one image after another. On a GPU it has a stream of its own, and its steps are CUDA graphs: canvases come
in few shapes, and all that differs between images of one shape is data.
"""

import contextlib
import logging
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from ..cams import merge_cams
from ..errors import lacks_memory
from . import modes
from .batches import Batches
from .job import Job, Result
from .step import Layout, Run

log = logging.getLogger("ribfast")
MOST_AT_ONCE = 8  # large images fill a GPU with fewer; small ones gain little beyond
FRAMES = 12  # shapes of canvas that a slot keeps buffers and graphs of
OUT_OF_MEMORY = "out of memory, alone, at {}x{}; take smaller scales, fewer or smaller others, or 16 bits"


class Frame:
    """What steps on canvases of one shape read and write beside the weights; graphs hold on to it."""

    def __init__(self, layout: Layout, channels: int, engine):
        self.graphed = engine.capture is not None
        self.layout, self.source = layout.clone() if self.graphed else layout, layout
        canvas, device = layout.canvas, engine.device
        self.features = canvas.empty(channels, engine.dtype, device)
        self.sums = torch.zeros(engine.n_classes, canvas.own_rows * canvas.columns, device=device)
        n_others = len(canvas.sizes) - canvas.n_own
        self.labels = torch.zeros(n_others, engine.n_classes, dtype=torch.bool, device=device)
        self.replays: dict[str, Callable[[], None]] = {}
        self.seen = set()  # kinds of steps that ran, and in which thread

    def prepare(self, layout: Layout) -> None:
        """For an image with this layout."""
        if self.sums.is_cuda:  # slots share layouts, which may be let go meanwhile
            for tensor in layout.tensors():
                tensor.record_stream(torch.cuda.current_stream(tensor.device))
        if layout is not self.source:
            if self.graphed:
                self.layout.copy_(layout)
            else:
                self.layout = layout
            self.features.zero_()  # the gutters are elsewhere
            self.source = layout
        self.sums.zero_()


class Slot:
    """Adapts one image at a time."""

    def __init__(self, engine):
        self.engine, self.stream, self.pool = engine, None, None
        if engine.device.type == "cuda":
            self.stream, self.pool = torch.cuda.Stream(engine.device), torch.cuda.graph_pool_handle()
            self.stream.wait_stream(torch.cuda.current_stream(engine.device))  # which made theta_0
        self.frames: OrderedDict[tuple, Frame] = OrderedDict()  # by shape, and whether others' gradients are added
        self.job = None
        self._anchor, self._anchor_of = None, None  # where graphs read it
        with self._here():
            self.run = Run(engine.tail, engine.config, engine.n_classes, engine.device)

    def begin(self, job: Job) -> None:
        """Features of the target's views, and theta_0."""
        self.job, self.step, self._reports = job, 0, deque()
        engine = self.engine
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(engine.device))  # which may have made the views
        present = torch.zeros(engine.n_classes, dtype=torch.bool)
        present[job.target.classes] = True
        with self._here():
            self.run.start(present)  # first, since this copy waits for what is before it
            views = [view for pair in job.target.views for view in engine.trunk(pair, exact=True)]
            wanted = job.batches is not None and engine.config.steps > 1
            self.anchor = self._take_anchor(job.batches) if wanted else None
            layout = engine.layout_of(job)
            self.frame = self._frame(layout, len(views[0]))
            self.frame.prepare(layout)
            for number, view in enumerate(views):
                layout.canvas.write(self.frame.features, number, view)

    def goes_on(self, behind: int = 0) -> bool:
        """Whether the image has steps left, as far as is known without waiting for the last so many."""
        unfinished = self.step < self.engine.config.steps
        while len(self._reports) > (behind if unfinished else 0):
            written, alive = self._reports.popleft()
            if written is not None:
                written.synchronize()
            if not alive:
                return False
        return unfinished

    def advance(self) -> None:
        """Begins the next step; on a GPU nothing waits for its end."""
        engine, job, frame, step = self.engine, self.job, self.frame, self.step
        kind = "last" if step == engine.config.steps - 1 else "first" if step == 0 else "middle"
        with self._here():
            if kind == "middle" and engine.mixes(job):
                others, labels = job.batches.step(step)
                for number, other in enumerate(others, frame.layout.canvas.n_own):
                    frame.layout.canvas.write(frame.features, number, other)
                frame.labels.copy_(labels)
            self._perform(kind)
            if job.watch is not None:
                job.watch(step, frame.layout.maps(frame.sums))
            self._report()
        self.step += 1

    def result(self) -> Result:
        """Of the steps so far; waits for them, and ends with the image."""
        run, frame, job = self.run, self.frame, self.job
        self.job = None
        with self._here():
            finite = run.finite & frame.sums.isfinite().all()
            steps, alive, finite = torch.stack([run.steps, run.alive.long(), finite.long()]).tolist()
            keys = sorted(job.target.classes)
            if not finite:
                return Result([], steps, False, keys, error=f"loss or maps are not finite at step {steps - 1}")
            maps = frame.layout.maps(frame.sums)
            cam, high_res = merge_cams([m[None] for m in maps], keys, job.target.size, job.target.reduced)
        if self.stream is not None:
            reader = torch.cuda.current_stream(self.engine.device)
            reader.wait_stream(self.stream)
            for tensor in (*maps, cam, high_res):
                tensor.record_stream(reader)
        return Result(maps, steps, not alive, keys, cam, high_res)

    def _take_anchor(self, batches: Batches) -> list[Tensor]:
        anchor = batches.anchor(self.run)
        if self.engine.capture is None:
            return anchor
        if self._anchor is None:
            self._anchor = [torch.empty_like(part) for part in anchor]
        if self._anchor_of is not batches.token:
            torch._foreach_copy_(self._anchor, anchor)
            self._anchor_of = batches.token
        return self._anchor

    def _frame(self, layout: Layout, channels: int) -> Frame:
        key = layout.canvas.shape, self.anchor is not None
        if key not in self.frames:
            while len(self.frames) >= (FRAMES if self.engine.capture is not None else 1):
                self.frames.popitem(last=False)
            self.frames[key] = Frame(layout, channels, self.engine)
        self.frames.move_to_end(key)
        return self.frames[key]

    def _perform(self, kind: str) -> None:
        """A step: from its second time on as a graph, since what runs first may still allocate and choose.

        Chosen convolutions are known to the thread that tried them out.
        """
        frame, capture, here = self.frame, self.engine.capture, (kind, threading.get_ident())
        if capture is not None and here in frame.seen and kind not in frame.replays:
            at_start = self.run.weights.at_start
            frame.replays[kind] = capture(lambda: self._compute(kind), self)
            self.run.weights.at_start = at_start
        if kind in frame.replays:
            frame.replays[kind]()
            self.run.weights.at_start = False
        else:
            self._compute(kind)
            frame.seen.add(here)

    def _compute(self, kind: str) -> None:
        """Reads and writes the frame and the run alone."""
        engine, run, frame = self.engine, self.run, self.frame
        mixed = kind == "middle" and engine.mixes(self.job)
        features = frame.features if mixed else frame.layout.canvas.part(frame.features)
        with torch.set_grad_enabled(kind != "last"):
            loss = run.observe(features, frame.layout, frame.sums, frame.labels if mixed else None)
        if kind == "last":
            return  # its update would serve no map
        if engine.capture is None and self.stream is None and not run.alive:
            return
        run.update(loss, self.anchor if kind == "first" or engine.config.anchored else None)

    def _report(self) -> None:
        """Whether another step follows, on its way to the host."""
        if self.stream is None:
            self._reports.append((None, bool(self.run.alive)))
            return
        alive = torch.empty((), dtype=torch.bool, pin_memory=True)
        alive.copy_(self.run.alive, non_blocking=True)
        self._reports.append((self.stream.record_event(), alive))

    @contextlib.contextmanager
    def _here(self):
        """On the slot's stream, in the modes in which images are adapted."""
        on_stream = contextlib.nullcontext() if self.stream is None else torch.cuda.stream(self.stream)
        with modes.plain(self.engine.device, benchmark=self.engine.capture is not None), on_stream:
            yield


def capture_graph(step: Callable[[], None], slot: Slot) -> Callable[[], None]:
    """What does again on the device what step does there; step itself has no effect."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=slot.pool, stream=slot.stream, capture_error_mode="thread_local"):
        step()
    return graph.replay


def bytes_of_slot(engine, slot: Slot | None, layout: Layout | None = None, *, working: bool = True) -> int:
    """About what a slot, or a new one, holds on the device, once it has adapted an image with this layout.

    working: with what its steps allocate, which is free to its own steps alone.
    """
    keys = set() if slot is None else {*slot.frames}
    if layout is not None and layout.canvas.shape not in {shape for shape, _ in keys}:
        keys.add((layout.canvas.shape, True))
    shapes = [shape for shape, _ in keys]
    frames = [4 * shape.rows * shape.columns * engine.channels * engine.dtype.itemsize for shape in shapes]
    activations = [engine.tail.activation_bytes(shape.rows, shape.columns) for shape in shapes]
    # twice the largest canvas: features of others that wait for their step
    steps = 2 * max(frames, default=0) + max(activations, default=0) if working else 0
    return engine.tail.weight_bytes() + sum(frames) + steps


def schedule(engine, jobs: Iterable[Job]) -> Iterator[tuple[Job, Result]]:
    """Each job and its result, as they are done: as many at once as memory holds.

    Where it ran out, half as many, and more again after a while that doubles each time. The images that were on their
    way begin anew; one that was alone and lacked memory has no maps.
    """
    jobs, again = iter(jobs), deque()
    idle, busy = engine.take_slots(), deque()
    limit = most = engine.config.concurrency or (MOST_AT_ONCE if engine.device.type == "cuda" else 1)
    room = engine.free_memory() + sum(bytes_of_slot(engine, slot, working=False) for slot in idle)
    patience, done, alone = 2 * limit, 0, None
    while True:
        job = None
        if len(busy) < most:
            job = again.popleft() if again else next(jobs, None)
        if job is not None and not job.target.classes:
            yield job, Result([], 0, False, error="no class is present")
            continue
        slot = None
        try:
            if job is not None and busy and not _fits(engine, engine.layout_of(job), idle, busy, room):
                again.appendleft(job)
                job = None
            if job is not None:
                slot = idle.pop() if idle else Slot(engine)
                slot.begin(job)
                busy.append(slot)
                continue
            if not busy:
                engine.give_slots(idle)
                return
            slot = busy.popleft()
            job = slot.job
            # alone, a slot begins a step before it is known whether the one before was the last
            if slot.goes_on(behind=1 if most == 1 and slot.stream is not None else 0):
                slot.advance()
                busy.append(slot)
                continue
            result = slot.result()
        except Exception as error:
            if not lacks_memory(error):
                raise
        else:
            idle.append(slot)
            done += 1
            if most < limit and done >= patience:
                most, done = most + 1, 0
            yield job, result
            continue
        beside = [other.job for other in busy]
        slot = None
        idle.clear()
        busy.clear()
        if engine.device.type == "cuda":
            torch.cuda.synchronize(engine.device)
            torch.cuda.empty_cache()
        if alone is job:  # with nothing else there
            yield job, out_of_memory(job)
            continue
        alone = None if beside else job
        again.extendleft(reversed([job, *beside]))
        if beside:
            most, done, patience = (1 + len(beside)) // 2, 0, 2 * patience
            log.info("memory ran out: from %d images at once to %d", 1 + len(beside), most)


def out_of_memory(job: Job) -> Result:
    text = OUT_OF_MEMORY.format(*(job.target.reduced or job.target.size))
    return Result([], 0, False, sorted(job.target.classes), error=text, lacks_memory=True)


def _fits(engine, layout: Layout, idle: list[Slot], busy: Iterable[Slot], room: float) -> bool:
    """Whether another image can be begun; room: bytes that all slots may hold."""
    held = sum(bytes_of_slot(engine, slot) for slot in (*idle[:-1], *busy))
    if held + bytes_of_slot(engine, idle[-1] if idle else None, layout) <= room:
        return True
    idle.clear()
    held = sum(bytes_of_slot(engine, slot) for slot in busy)
    return held + bytes_of_slot(engine, None, layout) <= room

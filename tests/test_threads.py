import subprocess
import sys
import threading

import pytest
import torch
from cases import logits, scales

from ribfast import _ext, ops


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_parallel_loops_are_threaded(two_threads):
    assert _ext.build_info()["openmp"], "built without OpenMP: every loop would run on one thread"
    assert _ext.parallel_threads() == 2


def everything():
    maps, present = logits((4, 5, 63, 84), torch.float32), torch.rand(4, 5) < 0.6
    views = scales((120, 150), (1, 0.5, 1.5, 2), 3, torch.float32)
    leaves = [t.requires_grad_() for t in (maps, *views)]
    pooled, merged = ops.gndrp(maps, present), ops.accumulate_cams(views, (120, 150))
    (pooled.square().sum() + merged.square().sum()).backward()
    return [pooled.detach(), merged.detach(), ops.normalize_cams(merged.detach()), *(leaf.grad for leaf in leaves)]


def test_results_do_not_depend_on_threads(two_threads):
    torch.manual_seed(1)
    parallel = everything()
    torch.set_num_threads(1)
    torch.manual_seed(1)
    for a, b in zip(parallel, everything(), strict=True):
        assert torch.equal(a, b)


def test_one_class_is_shared_out_by_rows(two_threads):
    maps = scales((200, 150), (1, 2), 1, torch.float32)
    parallel = ops.accumulate_cams(maps, (200, 150))
    torch.set_num_threads(1)
    assert torch.equal(ops.accumulate_cams(maps, (200, 150)), parallel)


def test_calls_from_many_python_threads():
    maps, present = logits((2, 3, 63, 84), torch.float32), torch.ones(2, 3, dtype=torch.bool)
    expected, wrong = ops.gndrp(maps, present), []

    def work():
        for _ in range(50):
            if not torch.equal(ops.gndrp(maps, present), expected):
                wrong.append(1)

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_forked_workers_can_call_operators():
    """Data loaders fork after operators have run threaded in the parent."""
    code = (
        "import os, torch\nfrom ribfast import ops\n"
        "x = torch.rand(8, 5, 63, 84); p = torch.ones(8, 5, dtype=torch.bool)\n"
        "expected = ops.gndrp(x, p)\n"
        "torch.set_num_threads(1)\n"
        "pid = os.fork()\n"
        "if pid == 0:\n    os._exit(0 if torch.equal(ops.gndrp(x, p), expected) else 1)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.stdout.strip() == "0", result.stderr

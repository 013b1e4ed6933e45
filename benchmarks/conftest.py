"""Paired timing: the operator and its baseline in turn, in one process, so that both see the same machine."""

import statistics
import time

import pytest
import torch


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def seconds(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@pytest.fixture
def compare(benchmark):
    """compare(ours, baseline, target): times `ours`, and records the median ratio of interleaved pairs, or, for few and
    long ones (`of_minima`), the ratio of the shortest."""

    def run(ours, baseline, target=None, rounds=40, of_minima=False, **facts):
        for _ in range(min(3, rounds // 3)):
            ours(), baseline()
        pairs = [(seconds(baseline), seconds(ours)) for _ in range(rounds)]
        ratios = sorted(b / o for b, o in pairs)
        baseline_min, ours_min = (min(side) for side in zip(*pairs, strict=True))
        benchmark.extra_info.update(
            facts,
            target=target,
            ratio=baseline_min / ours_min if of_minima else statistics.median(ratios),
            ratio_quartiles=[ratios[rounds // 4], ratios[3 * rounds // 4]],
            baseline_min=baseline_min,
            ours_min=ours_min,
            threads=torch.get_num_threads(),
        )
        benchmark.pedantic(ours, rounds=rounds, warmup_rounds=2)

    return run

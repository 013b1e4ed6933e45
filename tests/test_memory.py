"""What an operator allocates beside its result."""

import subprocess
import sys

import pytest

MEASURE = """
import re, torch
from ribfast import ops
torch.set_num_threads(2)
maps = [torch.rand(2, 40, h, w) for h, w in ((47, 63), (24, 32), (94, 125))]
ops.accumulate_cams(maps, (40, 50))
def memory(what):
    with open("/proc/self/status") as status:
        return int(re.search(what + r":\\s+(\\d+) kB", status.read())[1]) * 1024
before = memory("VmRSS")
merged = ops.accumulate_cams(maps, (1500, 2000))  # 480 MB: more than start-up ever held
print((memory("VmHWM") - before) / (merged.numel() * 4))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_merging_maps_needs_its_result_and_little_more():
    result = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True)
    assert 0.9 < float(result.stdout) < 1.05, "peak memory in units of the result"

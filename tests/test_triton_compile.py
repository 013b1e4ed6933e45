"""Every Triton kernel compiles for sm_80 and sm_90, on machines without a GPU too."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="triton is not installed")

# Calls every function once for each way its kernels specialise, and compiles the launches instead of running them.
COMPILE = """
import json, re, sys
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from ribfast.triton import accumulate_cams, gndrp, normalize_cams

POINTERS = {torch.float64: "*fp64", torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16",
            torch.bool: "*i1"}
cubins = {}


def kind(value):
    if isinstance(value, tuple):
        return tuple(map(kind, value))
    return POINTERS[value.dtype] if isinstance(value, torch.Tensor) else "i32"


def compile_launch(kernel, *args, grid, warmup, num_warps=4):
    assert len(args) == len(kernel.params), kernel.__name__
    signature, constants = {}, {}
    for param, arg in zip(kernel.params, args):
        signature[param.name] = "constexpr" if param.is_constexpr else param.annotation_type or kind(arg)
        if param.is_constexpr:
            constants[param.name] = arg
    compiled = triton.compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", int(sys.argv[1]), 32),
                              options={"num_warps": num_warps})
    size = len(compiled.asm["cubin"])
    cubins.setdefault(kernel.__name__, []).append(size)


JITFunction.run = compile_launch
dtype = getattr(torch, sys.argv[2])
acc = torch.float64 if dtype == torch.float64 else torch.float32
present = torch.ones(2, 3, dtype=torch.bool)
for (height, width), divide_by_all, strict in (((31, 42), False, False), ((129, 151), True, True)):
    maps = torch.ones(2, 3, height, width, dtype=dtype)
    _, stats = gndrp.gndrp(maps, present, 0.4, divide_by_all, strict)
    gndrp.gndrp_backward(torch.ones(2, 3, dtype=acc), maps, present, stats, 0.4, strict)
    normalize_cams.normalize_cams(maps, 1e-5)
for relu in (True, False):
    scales, counts, padded = [torch.ones(2, 3, 8, 8, dtype=dtype)] * 4, [2, 2], [128, 128] * 2
    sums = accumulate_cams.accumulate_cams(scales, counts, [125, 126] * 2, padded, relu)
    accumulate_cams.accumulate_cams_backward(sums[:1], scales[:1], [1], padded[:2], relu)
accumulate_cams.accumulate_cams_(sums[:1], scales[:1], [1], padded[:2], True)
kernels = [
    name
    for module in (gndrp, accumulate_cams, normalize_cams)
    for name, function in vars(module).items()
    if isinstance(function, JITFunction) and not re.search(r"return \\S", function.src)  # those are called by kernels
]
print(json.dumps({"kernels": kernels, "cubins": cubins}))
"""


KINDS = [(architecture, dtype) for architecture in (80, 90) for dtype in ("float32", "float16", "bfloat16", "float64")]
QUICK = (80, "float32"), (90, "bfloat16")


@pytest.mark.parametrize(
    "architecture, dtype", [pytest.param(*kind, marks=[pytest.mark.slow] * (kind not in QUICK)) for kind in KINDS]
)
def test_compiles(architecture, dtype, tmp_path):
    env = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "RIBFAST_BACKEND")}
    child = subprocess.run(
        [sys.executable, "-c", COMPILE, str(architecture), dtype],
        env=env | {"TRITON_CACHE_DIR": str(tmp_path)}, capture_output=True, text=True,
    )  # fmt: skip
    assert child.returncode == 0, child.stderr[-4000:]
    report = json.loads(child.stdout.splitlines()[-1])
    assert len(report["kernels"]) >= 7
    assert sorted(report["cubins"]) == sorted(report["kernels"])
    assert all(size > 0 for sizes in report["cubins"].values() for size in sizes)

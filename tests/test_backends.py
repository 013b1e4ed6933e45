"""The operators' tests once more, in child processes, under every CPU tier and backend that this machine can run."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ribfast import _ext

TESTS = Path(__file__).parent
WITHOUT_TRITON = (
    "adapt", "confusion_matrix", "dense_crf", "erase", "lattice", "pair_losses", "path_affinity", "random_walk",
    "refine", "segmentation_loss", "threshold_histogram",
)  # fmt: skip
OPERATORS = [str(TESTS / f"test_{op}.py") for op in _ext.OPS if op not in WITHOUT_TRITON]
WITHOUT_COMPILER = "not compiles and not opcheck"
NO_TRITON = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def child(arguments, cwd=TESTS, **environment):
    """A Python process with `environment` in place of what steers backends here."""
    steering = ("ATEN_CPU_CAPABILITY", "RIBFAST_BACKEND", "TRITON_INTERPRET")
    clean = {name: value for name, value in os.environ.items() if name not in steering}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=clean | environment, capture_output=True, text=True, cwd=cwd)


def operators_pass(*options, **environment):
    result = child(["-m", "pytest", "-q", "-p", "no:cacheprovider", *options, *OPERATORS], **environment)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert " passed" in result.stdout


@pytest.mark.tier
@pytest.mark.parametrize("tier", ["default", "avx2", "avx512"])
def test_tier(tier):
    running = child(["-c", "from ribfast import _ext; print(_ext.cpu_tier())"], ATEN_CPU_CAPABILITY=tier)
    if tier not in _ext.compiled_cpu_tiers:
        pytest.skip(f"tier {tier} is not compiled in: this processor is not x86-64")
    if running.stdout.strip() != tier:
        pytest.skip(f"this processor has no {tier}: torch falls to {running.stdout.strip()}")
    if tier == _ext.cpu_tier():
        pytest.skip(f"tier {tier} is what the suite itself runs on")
    files = [str(TESTS / f"test_{op}.py") for op in WITHOUT_TRITON]
    operators_pass("-k", WITHOUT_COMPILER, *files, ATEN_CPU_CAPABILITY=tier, RIBFAST_TEST_DEVICE="cpu")


# the interpreter takes seconds for what a GPU does in microseconds
SMALL = (
    f"{WITHOUT_COMPILER} and not float64 and not (float16 and not bfloat16) and not gradcheck and not launch_describes"
    " and not plain and not padded and not larger_than and not batch_of and not adds_into and not out_keeps"
    " and not any_number"
)


@NO_TRITON
@pytest.mark.parametrize("cases", [SMALL, pytest.param(WITHOUT_COMPILER, marks=pytest.mark.slow)], ids=["small", "all"])
def test_triton_interpreted(cases):
    operators_pass("-k", cases, TRITON_INTERPRET="1", RIBFAST_BACKEND="triton", RIBFAST_TEST_DEVICE="cpu")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@NO_TRITON
def test_triton_on_the_device():
    cases = f"({SMALL}) or cuda_graphs"
    graphs = str(TESTS / "test_cuda_graphs.py")
    operators_pass("-k", cases, graphs, RIBFAST_BACKEND="triton", RIBFAST_TEST_DEVICE="cuda")


def test_reference_backend():
    result = child(
        ["-c", "import torch; from ribfast import ops, _ext\n"
               "print(_ext.backend('gndrp', torch.device('cpu')).name)\n"
               "x = torch.rand(1, 2, 3, 4, requires_grad=True)\n"
               "print(ops.gndrp(x, torch.ones(1, 2, dtype=torch.bool)).grad_fn.name())\n"
               "print(ops.accumulate_cams([x], (6, 8)).shape, ops.normalize_cams(x.detach()).max() <= 1)"],
        RIBFAST_BACKEND="reference",
    )  # fmt: skip
    assert result.stdout.split("\n")[:1] == ["reference"], result.stderr
    assert "ribfast" not in result.stdout
    assert "torch.Size([2, 6, 8]) tensor(True)" in result.stdout


def test_reference_backend_equals_the_kernels():
    """The plain-torch backend passes the operators' value tests when asked for by name."""
    operators_pass("-k", "by_hand or refuses_bad_input", RIBFAST_BACKEND="reference", RIBFAST_TEST_DEVICE="cpu")


@pytest.mark.parametrize(
    "environment, message",
    [
        (dict(RIBFAST_BACKEND="fast"), "expected one of auto, cpp, triton, reference, got 'fast'"),
        pytest.param(
            dict(RIBFAST_BACKEND="triton"),
            "RIBFAST_BACKEND=triton: the Triton kernels cannot run",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="Triton can run here"),
        ),
    ],
)
def test_backend_that_cannot_serve_raises(environment, message):
    result = child(["-c", "import ribfast"], **environment)
    assert result.returncode != 0
    assert message in result.stderr


@NO_TRITON
def test_named_backend_refuses_other_devices():
    """RIBFAST_BACKEND=triton in the interpreter serves the CPU alone: nothing falls back silently."""
    result = child(
        ["-c", "import torch\nfrom ribfast import ops\n"
               "ops.normalize_cams(torch.zeros(1, 2, 2, device='meta'))"],
        RIBFAST_BACKEND="triton", TRITON_INTERPRET="1",
    )  # fmt: skip
    assert "ValueError: normalize_cams: expected tensors on cpu, which RIBFAST_BACKEND=triton serves" in result.stderr


@NO_TRITON
def test_named_triton_refuses_what_it_has_not():
    result = child(
        ["-c", "import torch\nfrom ribfast.ops.adapt import activate_\n"
               "activate_(torch.zeros(1, 2, 3, 4).contiguous(memory_format=torch.channels_last))"],
        RIBFAST_BACKEND="triton", TRITON_INTERPRET="1",
    )  # fmt: skip
    assert "ValueError: adapt: expected a backend that has it, got RIBFAST_BACKEND=triton on cpu" in result.stderr


def test_plain_torch_serves_an_adapted_network():
    """RIBFAST_BACKEND=reference: the values of the compiled operators, by the same calls."""
    cases = "activation or update_is or gutter"
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", cases, str(TESTS / "test_adapt.py")]
    result = child(command, RIBFAST_BACKEND="reference", RIBFAST_TEST_DEVICE="cpu")
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]


def test_missing_extension_says_how_to_build(tmp_path):
    package = tmp_path / "ribfast"
    package.mkdir()
    for name in ("__init__.py", "_ext.py", "reference.py"):
        (package / name).write_text((Path(_ext.__file__).parent / name).read_text())
    (package / "ops").mkdir()
    for path in (Path(_ext.__file__).parent / "ops").glob("*.py"):
        (package / "ops" / path.name).write_text(path.read_text())
    # an editable install's finder would find the real one
    code = "import sys; sys.meta_path = [f for f in sys.meta_path if 'ditable' not in repr(f)]; import ribfast"
    result = child(["-c", code], cwd=tmp_path)
    assert "ImportError: ribfast: its compiled extension ribfast._C does not load" in result.stderr
    assert "pip install --no-build-isolation ." in result.stderr

"""Every CUDA source compiles for sm_80 and sm_90, wherever there is nvcc; a GPU is not needed."""

import os
import re
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cuda_toolkit import NO_NVCC, NVCC
from torch.utils import cpp_extension

import ribfast

CUDA = Path(ribfast.__file__).parents[1] / "csrc" / "cuda"
SOURCES = sorted(CUDA.glob("*.cu"))
HEADERS = sorted(path for path in CUDA.glob("*.cuh") if "__global__" in path.read_text())
ARCHITECTURES = (80, 90)
pytestmark = pytest.mark.skipif(NVCC is None, reason=NO_NVCC)


def compile_source(source, folder):
    """(return code, what the compiler said)"""
    include = [*cpp_extension.include_paths(), sysconfig.get_path("include")]
    command = [
        NVCC, "-c", str(source), "-o", str(folder / f"{source.stem}.o"), "-std=c++20", "--threads", "2",
        "-Xptxas", "-v", "-DC10_USING_CUSTOM_GENERATED_MACROS", *cpp_extension.COMMON_NVCC_FLAGS,
        *(f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES),
        *(flag for path in include for flag in ("-isystem", path)),
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True)
    return result.returncode, result.stdout + result.stderr


def spills(output):
    """Of kernels that keep registers in memory."""
    lines = [line for line in output.splitlines() if "spill stores" in line]
    assert lines
    return [line for line in lines if " 0 bytes spill stores" not in line]


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """All sources as one: torch's headers are most of what each of them compiles."""
    folder = tmp_path_factory.mktemp("cuda")
    source = folder / "together.cu"
    source.write_text("".join(f'#include "{path}"\n' for path in SOURCES))
    return compile_source(source, folder)


@pytest.mark.slow
def test_compile_together(together):
    code, output = together
    assert code == 0, output[-4000:]
    assert "warning" not in output
    assert not spills(output)


@pytest.mark.slow
@pytest.mark.parametrize("header", HEADERS, ids=lambda path: path.name)
def test_every_kernel_is_compiled_for_every_architecture(together, header):
    text = header.read_text()
    kernels = re.findall(r"__global__ void[^;{]*?(\w+_kernel)\(", text)
    assert len(kernels) == text.count("__global__")
    for kernel in kernels:
        for architecture in ARCHITECTURES:
            entry = rf"Compiling entry function '\w*{len(kernel)}{kernel}\w*' for 'sm_{architecture}'"
            assert re.search(entry, together[1]), (kernel, architecture)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cuda")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = pool.map(lambda source: compile_source(source, folder), SOURCES)
        return dict(zip(SOURCES, results, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_compiles_alone(alone, source):
    """As it is built, with no more than it includes itself."""
    code, output = alone[source]
    assert code == 0, output[-4000:]
    assert "warning" not in output
    for architecture in ARCHITECTURES:
        assert f"for 'sm_{architecture}'" in output
    assert not spills(output)

"""Every CUDA source compiles for sm_80 and sm_90, wherever there is nvcc; a GPU is not needed."""

import os
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cuda_toolkit import NO_NVCC, NVCC
from torch.utils import cpp_extension

import ribfast

SOURCES = sorted((Path(ribfast.__file__).parents[1] / "csrc" / "cuda").glob("*.cu"))
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


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cuda")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = pool.map(lambda source: compile_source(source, folder), SOURCES)
        return dict(zip(SOURCES, results, strict=True))


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_compiles_for_every_architecture(compiled, source):
    code, output = compiled[source]
    assert code == 0, output[-4000:]
    assert "warning" not in output
    for architecture in ARCHITECTURES:
        assert f"for 'sm_{architecture}'" in output
    spills = [line for line in output.splitlines() if "spill stores" in line and " 0 bytes spill stores" not in line]
    assert not spills, "a kernel keeps registers in memory"

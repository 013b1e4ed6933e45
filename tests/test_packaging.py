"""What a user installs: sdist, wheel, the tiers' symbols, and the refusals of the build."""

import os
import shutil
import subprocess
import sys
import tarfile
import venv
from pathlib import Path

import pytest
import torch

import ribfast
from ribfast import _ext

ROOT = Path(ribfast.__file__).parents[1]
pytestmark = pytest.mark.packaging


def run(command, **options):
    result = subprocess.run([str(c) for c in command], capture_output=True, text=True, **options)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """Built without torch in sight (-S hides site-packages' startup, the backend needs setuptools alone)."""
    out = tmp_path_factory.mktemp("sdist")
    source = tmp_path_factory.mktemp("source") / "ribfast"
    ignored = shutil.ignore_patterns(".git", ".venv*", "build", "*.so", "*.egg-info", "__pycache__", "dist")
    shutil.copytree(ROOT, source, ignore=ignored)
    run([sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", out, source])
    (archive,) = out.glob("*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    """Built from the sdist by plain `pip install .`'s way: in a build environment of its own, with the torch that is
    installed here. What build isolation asks for is taken from here too, so that no network is needed."""
    out = tmp_path_factory.mktemp("wheel")
    run(
        [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", out, sdist],
        env=os.environ | {"RIBFAST_CUDA": "0"},
    )
    (path,) = out.glob("*.whl")
    return path


def test_sdist_holds_the_sources(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    expected = {str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*") if p.is_file()}
    expected |= {str(p.relative_to(ROOT)) for p in (ROOT / "ribfast").rglob("*.py")}
    expected |= {"LICENSE", "README.md", "pyproject.toml", "setup.py", "build_backend.py", "ribfast/assets/coffee.jpg"}
    assert expected <= names, expected - names


def test_wheel_from_the_sdist_imports_in_a_clean_environment(wheel, tmp_path):
    """A new environment with the wheel and its dependencies, and nothing of this source tree."""
    environment = tmp_path / "env"
    venv.create(environment, with_pip=False, symlinks=True)
    python = environment / "bin" / "python"
    site = Path(run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]).strip())
    shutil.unpack_archive(wheel, site, "zip")
    here = Path(torch.__file__).parents[1]
    for installed in here.iterdir():  # the dependencies, without what this environment installed of ribfast
        if "ribfast" not in installed.name and installed.suffix != ".pth" and not (site / installed.name).exists():
            (site / installed.name).symlink_to(installed)
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "RIBFAST", "COV"))}
    code = (
        "import ribfast, torch; from ribfast import ops, info\n"
        "maps = torch.rand(1, 2, 5, 6); present = torch.ones(1, 2, dtype=torch.bool)\n"
        "assert torch.allclose(ops.gndrp(maps, present), ribfast.reference.gndrp(maps, present))\n"
        "print(ribfast.__file__); print(info.lines()[0])"
    )
    output = run([python, "-c", code], cwd=tmp_path, env=clean).splitlines()
    assert Path(output[0]).is_relative_to(site)
    assert output[1].startswith("ribfast 0.1.0")
    run([python, "-m", "ribfast.demo", "--out", "picture"], cwd=tmp_path, env=clean)
    assert (tmp_path / "picture" / "merged.png").stat().st_size > 10_000


def test_build_isolation_uses_the_installed_torch():
    """`pip install .` must build against the torch of the environment that it installs into, not fetch another."""
    code = (
        "import build_backend as b\nprint(b.HAS_TORCH, [r for r in b.get_requires_for_build_wheel() if 'torch' in r])"
    )
    installed = Path(torch.__file__).is_relative_to(Path(sys.prefix))
    if not installed:
        pytest.skip("torch is not in this interpreter's own site-packages")
    assert run([sys.executable, "-c", code], cwd=ROOT).strip().endswith("True []")
    nowhere = "import sysconfig; sysconfig.get_path = lambda name: '/nowhere'\n"
    bare = run([sys.executable, "-c", nowhere + code], cwd=ROOT)
    assert bare.strip().endswith("False ['torch>=2.6']")


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_demanding_cuda_without_it_names_what_is_missing():
    environment = os.environ | {"RIBFAST_CUDA": "1"}
    result = subprocess.run(
        [sys.executable, "setup.py", "build_ext"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert result.returncode != 0
    assert "RIBFAST_CUDA=1: cannot build with CUDA, missing: a torch with CUDA" in result.stderr
    assert "RIBFAST_CUDA=0" in result.stderr


def test_unknown_cuda_choice_is_refused():
    environment = os.environ | {"RIBFAST_CUDA": "yes"}
    result = subprocess.run(
        [sys.executable, "setup.py", "build_ext"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert result.returncode != 0
    assert "RIBFAST_CUDA: expected auto, 0 or 1, got 'yes'" in result.stderr


@pytest.mark.parametrize("tier", ["default", "avx2", "avx512"])
def test_tiers_emit_no_weak_symbols(tier, tmp_path):
    """The linker keeps one copy of a weak symbol: an AVX-512 one could then be called on any processor."""
    if tier not in _ext.compiled_cpu_tiers or shutil.which("g++") is None or shutil.which("nm") is None:
        pytest.skip("needs g++ and nm on x86-64")
    source, target = ROOT / "csrc" / "cpu" / f"tier_{tier}.cpp", tmp_path / "tier.o"
    run(["g++", "-std=c++20", "-O3", "-fPIC", "-c", source, "-o", target])
    symbols = [line.split()[-2:] for line in run(["nm", target]).splitlines()]
    assert not [name for kind, name in symbols if kind in "WVu"]
    assert [name for kind, name in symbols if kind in "DRB" and "tier_" in name]

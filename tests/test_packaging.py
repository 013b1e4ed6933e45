"""What a user installs: sdist, wheel, the tiers' symbols, and the refusals of the build."""

import os
import re
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

# what pip says of an index that it does not reach
UNREACHED = "Could not find a version|HTTP error 5|ConnectionResetError|ReadTimeoutError|ProtocolError|IncompleteRead"
ROOT = Path(ribfast.__file__).parents[1]
pytestmark = pytest.mark.packaging
pytest.importorskip("build", reason="the package `build` is not installed")


def run(command, **options):
    result = subprocess.run([str(c) for c in command], capture_output=True, text=True, **options)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    out = tmp_path_factory.mktemp("sdist")
    source = tmp_path_factory.mktemp("source") / "ribfast"
    ignored = shutil.ignore_patterns(".git", ".*_cache", ".venv*", "build", "*.so", "*.egg-info", "__pycache__", "dist")
    shutil.copytree(ROOT, source, ignore=ignored)
    run([sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", out, source])
    (archive,) = out.glob("*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def built(sdist, tmp_path_factory):
    """(wheel from the sdist, whether in a build environment of pip's own, as plain `pip install .` builds)"""
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", str(out), str(sdist)]
    environment = os.environ | {"RIBFAST_CUDA": "0"}
    isolated = subprocess.run(command, capture_output=True, text=True, env=environment)
    if isolated.returncode:
        assert re.search(UNREACHED, isolated.stderr), isolated.stdout[-3000:] + isolated.stderr[-3000:]
        run([*command, "--no-build-isolation"], env=environment)
    (path,) = out.glob("*.whl")
    return path, isolated.returncode == 0


@pytest.fixture
def wheel(built):
    return built[0]


def test_sdist_holds_the_sources(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    expected = {str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*") if p.is_file()}
    expected |= {str(p.relative_to(ROOT)) for p in (ROOT / "ribfast").rglob("*.py")}
    expected |= {"LICENSE", "README.md", "pyproject.toml", "setup.py", "build_backend.py", "ribfast/assets/coffee.jpg"}
    expected |= {f"ribfast/report/page.{suffix}" for suffix in ("html", "css", "js")}
    assert expected <= names, expected - names


def runs_in_a_clean_environment(packages, folder):
    """A new environment with `packages`' contents and the dependencies, and nothing of this source tree."""
    environment = folder / "env"
    venv.create(environment, with_pip=False, symlinks=True)
    python = environment / "bin" / "python"
    site = Path(run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]).strip())
    shutil.copytree(packages, site, dirs_exist_ok=True)
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
    output = run([python, "-c", code], cwd=folder, env=clean).splitlines()
    assert Path(output[0]).is_relative_to(site)
    assert output[1].startswith("ribfast 0.1.0")
    few = ["--pictures", "4", "--rib", "none", "--no-segmenter", "--no-relabel", "--set", "classifier.epochs=1"]
    run([python, "-m", "ribfast", "demo", "--out", "demo", *few], cwd=folder, env=clean)
    assert (folder / "demo" / "report.html").stat().st_size > 10_000


def test_sdist_runs_in_a_clean_environment(sdist, tmp_path):
    """With the extension of this source tree, which takes minutes to build."""
    packages = tmp_path / "packages"
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "sdist", filter="data")
    (package,) = (tmp_path / "sdist").glob("*/ribfast")
    shutil.copytree(package, packages / "ribfast")
    shutil.copy(_ext._C.__file__, packages / "ribfast")
    runs_in_a_clean_environment(packages, tmp_path)


@pytest.mark.slow
def test_wheel_from_the_sdist_runs_in_a_clean_environment(wheel, tmp_path):
    shutil.unpack_archive(wheel, tmp_path / "packages", "zip")
    runs_in_a_clean_environment(tmp_path / "packages", tmp_path)


@pytest.mark.slow
def test_plain_pip_install_builds_against_the_installed_torch(built, tmp_path):
    path, isolated = built
    if not isolated:
        pytest.skip("no package index to fetch setuptools and ninja from")
    shutil.unpack_archive(path, tmp_path, "zip")
    code = "from ribfast import _ext; print(_ext.__file__, _ext.build_info()['torch'])"
    hidden = "import sys; sys.meta_path = [f for f in sys.meta_path if 'ditable' not in repr(f)]; "
    output = run([sys.executable, "-c", hidden + code], cwd=tmp_path).split()
    assert Path(output[0]).is_relative_to(tmp_path)
    assert output[1] == torch.__version__.partition("+")[0]


def test_a_torch_is_fetched_only_where_there_is_none():
    requires = "import build_backend as b; r = b.get_requires_for_build_wheel(); print(b.HAS_TORCH, r)"
    nowhere = "import site, sysconfig; sysconfig.get_path = site.getusersitepackages = lambda *name: '/nowhere'; "

    def asked(code):
        return run([sys.executable, "-c", code], cwd=ROOT).splitlines()[-1].split(maxsplit=1)

    if Path(torch.__file__).is_relative_to(Path(sys.prefix)):
        found, wanted = asked(requires)
        assert found == "True" and "torch" not in wanted
    found, wanted = asked(nowhere + requires)
    assert found == "False" and "torch>=2.6" in wanted


def refused_build(choice):
    """What the build says of RIBFAST_CUDA=choice."""
    environment = os.environ | {"RIBFAST_CUDA": choice}
    result = subprocess.run(
        [sys.executable, "setup.py", "build_ext"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert result.returncode != 0
    return result.stderr


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_demanding_cuda_without_it_names_what_is_missing():
    said = refused_build("1")
    assert "RIBFAST_CUDA=1: cannot build with CUDA, missing: a torch with CUDA" in said
    assert "RIBFAST_CUDA=0" in said


def test_unknown_cuda_choice_is_refused():
    assert "RIBFAST_CUDA: expected auto, 0 or 1, got 'yes'" in refused_build("yes")


@pytest.mark.slow
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

"""Who may import and include whom."""

import ast
import re
import sys
from pathlib import Path

import ribfast
from ribfast import _ext

PACKAGE = Path(ribfast.__file__).parent
CSRC = PACKAGE.parent / "csrc"
TORCH_HEADER = re.compile(r'#include\s*[<"](ATen|c10|torch|pybind11)/')


def imports(path):
    """Modules that a file imports, relative ones resolved: 'ribfast.ops.contract', 'torch', ..."""
    base = ["ribfast", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            stem = [*base[: len(base) - node.level + 1]] if node.level else []
            stem += [node.module] if node.module else []
            yield from (".".join([*stem, alias.name]) for alias in node.names)


def foreign(path, allowed):
    standard = {"copy", "math", "operator", "sys", "itertools", "collections", "typing"}
    standard |= {"enum", "functools", "numbers", "os", "warnings"}

    def within(module, package):
        return module == package or module.startswith(package + ".")

    return [
        module
        for module in imports(path)
        if module.split(".")[0] not in standard and not any(within(module, package) for package in allowed)
    ]


def test_reference_imports_torch_alone():
    assert foreign(PACKAGE / "reference.py", ["torch"]) == []


def test_ops_import_torch_and_the_extension():
    allowed = ["torch", "ribfast._ext", "ribfast.reference", "ribfast.ops"]
    for path in (PACKAGE / "ops").glob("*.py"):
        assert foreign(path, allowed) == [], path.name


def test_triton_imports_torch_and_triton():
    paths = list((PACKAGE / "triton").glob("*.py"))
    assert paths
    for path in paths:
        assert foreign(path, ["torch", "triton", "ribfast.triton"]) == [], path.name


def test_stand_ins_see_the_operators_alone():
    paths = list((PACKAGE / "compat").rglob("*.py"))
    assert paths
    for path in paths:
        assert foreign(path, ["numpy", "torch", "ribfast.ops", "ribfast.compat"]) == [], path


def test_models_import_torch_and_files():
    for path in (PACKAGE / "models").glob("*.py"):
        assert foreign(path, ["torch", "ribfast.files", "ribfast.models", "abc", "json", "os", "pathlib"]) == [], (
            path.name
        )


def test_data_imports_torch_numpy_and_opencv():
    paths = list((PACKAGE / "data").glob("*.py"))
    assert paths
    allowed = ["torch", "numpy", "cv2", "ribfast.data", "ribfast.errors", *sys.stdlib_module_names]
    for path in paths:
        assert foreign(path, allowed) == [], path.name


def test_store_and_metrics():
    standard = ["torch", "numpy", *sys.stdlib_module_names]
    assert foreign(PACKAGE / "metrics.py", ["ribfast.ops", *standard]) == []
    assert foreign(PACKAGE / "store.py", ["ribfast.cams", "ribfast.data", "ribfast.files", *standard]) == []


def test_masks_see_the_operators_and_where_maps_come_from():
    below = ["cams", "data", "models", "ops", "reference"]
    allowed = ["torch", "numpy", *(f"ribfast.{name}" for name in (*below, "masks")), *sys.stdlib_module_names]
    paths = list((PACKAGE / "masks").glob("*.py"))
    assert paths
    for path in paths:
        assert foreign(path, allowed) == [], path.name


def test_nobody_below_sees_masks():
    rooms = ("compat", "data", "models", "ops", "rib", "train", "triton")
    paths = [path for room in rooms for path in (PACKAGE / room).rglob("*.py")]
    paths += [PACKAGE / name for name in ("_ext.py", "cams.py", "config.py", "metrics.py", "reference.py", "store.py")]
    for path in paths:
        assert not [m for m in imports(path) if f"{m}.".startswith("ribfast.masks.")], path


def test_training_and_adapting_see_what_they_are_made_of():
    below = ["cams", "config", "data", "errors", "files", "metrics", "models", "ops", "processes", "segment", "store"]
    for room in ("train", "rib"):
        allowed = ["torch", "numpy", *(f"ribfast.{name}" for name in (*below, room)), *sys.stdlib_module_names]
        paths = list((PACKAGE / room).glob("*.py"))
        assert paths
        for path in paths:
            assert foreign(path, allowed) == [], path.name


def test_stages_see_all_but_commands_and_the_report():
    below = ["cams", "claims", "config", "data", "errors", "files", "masks", "metrics", "models", "ops", "processes"]
    below += ["rib", "segment", "store", "train"]
    allowed = ["torch", "numpy", *(f"ribfast.{name}" for name in below), *sys.stdlib_module_names]
    paths = set((PACKAGE / "pipeline").glob("*.py"))
    for path in paths - {PACKAGE / "pipeline" / "__init__.py"}:  # and of one another what they share, or go on with
        others = ["stage", "predict"] if path.name == "cycle.py" else ["stage"]
        assert foreign(path, [*allowed, *(f"ribfast.pipeline.{name}" for name in others)]) == [], path.name
    users = {PACKAGE / "cli.py", *(PACKAGE / "report").glob("*.py")}
    for path in set(PACKAGE.rglob("*.py")) - paths - users:
        assert not [m for m in imports(path) if f"{m}.".startswith("ribfast.pipeline.")], path


def test_the_report_sees_what_a_run_left():
    below = [f"ribfast.{name}" for name in ("__version__", "cams", "data", "files", "metrics", "pipeline", "store")]
    paths = list((PACKAGE / "report").glob("*.py"))
    assert paths
    for path in paths:
        allowed = ["torch", "numpy", "cv2", "ribfast.report", *below, *sys.stdlib_module_names]
        assert foreign(path, allowed) == [], path.name
    for path in set(PACKAGE.rglob("*.py")) - {PACKAGE / "cli.py", *paths}:
        assert not [m for m in imports(path) if f"{m}.".startswith("ribfast.report.")], path


def test_single_modules():
    standard = [*sys.stdlib_module_names]
    assert foreign(PACKAGE / "files.py", standard) == []
    assert foreign(PACKAGE / "config.py", ["ribfast.files", *standard]) == []
    assert foreign(PACKAGE / "processes.py", ["torch", *standard]) == []
    assert foreign(PACKAGE / "cams.py", ["torch", "numpy", "ribfast.data", "ribfast.ops", *standard]) == []
    allowed = ["torch", "numpy", "ribfast.cams", "ribfast.data", *standard]
    assert foreign(PACKAGE / "segment.py", allowed) == []
    below = [f"ribfast.{name}" for name in ("__version__", "data", "files", "store")]
    assert foreign(PACKAGE / "export.py", ["numpy", "cv2", *below, *standard]) == []
    assert (
        foreign(PACKAGE / "toy.py", ["torch", "numpy", "cv2", "ribfast.files", "ribfast.toy_figure", *standard]) == []
    )
    assert foreign(PACKAGE / "toy_figure.py", ["numpy", "cv2", "ribfast.toy", *standard]) == []
    assert foreign(PACKAGE / "progress.py", standard) == []
    assert foreign(PACKAGE / "run.py", standard) == []
    below = ["claims", "config", "data", "errors", "files", "models", "processes", "run", "store"]
    assert foreign(PACKAGE / "runner.py", [*(f"ribfast.{name}" for name in below), *standard]) == []
    assert foreign(PACKAGE / "errors.py", standard) == []
    below = [f"ribfast.{name}" for name in ("__version__", "claims", "config", "data", "files", "processes", "store")]
    assert foreign(PACKAGE / "begin.py", [*below, *standard]) == []
    assert foreign(PACKAGE / "cli.py", ["ribfast", *standard]) == []  # torch only where a command needs it


def test_nobody_imports_the_commands():
    for path in set(PACKAGE.rglob("*.py")) - {PACKAGE / "__main__.py"}:
        assert not [m for m in imports(path) if m.startswith("ribfast.cli")], path.name
        if path.name != "cli.py":
            assert not [m for m in imports(path) if m.startswith(("ribfast.begin", "ribfast.progress"))], path.name


def test_kernels_are_free_of_torch():
    kernels = [
        *(CSRC / name for name in ("math.h", "refine.h", "walk_series.h")),
        *(CSRC / "cpu" / f"{name}.h" for name in ("erase", "kernels", "lattice", "losses", "pairs", "simd", "taps")),
    ]
    kernels += [*(CSRC / "cpu").glob("*.inl"), *(CSRC / "cpu").glob("tier_*.cpp"), *(CSRC / "cuda").glob("*.cuh")]
    assert len(kernels) >= 11
    for path in kernels:
        assert not TORCH_HEADER.search(path.read_text()), path.name


def test_only_the_module_sees_pybind11():
    users = [p.name for p in CSRC.rglob("*") if p.is_file() and "pybind11/" in p.read_text()]
    assert users == ["module.cpp"]


def test_every_kernel_is_registered_for_its_schemas():
    """A schema without a kernel would only fail when somebody calls it."""
    schemas = set(re.findall(r'm\.def\(\s*"(\w+)\(', (CSRC / "module.cpp").read_text()))
    without = {"cpu": set(), "cuda": set(_ext._ON_CPU)}
    for folder, pattern in (("cpu", "*.cpp"), ("cuda", "*.cu")):
        found = set()
        for path in (CSRC / folder).glob(pattern):
            found |= set(re.findall(r'm\.impl\("(\w+)"', path.read_text()))
        assert found == schemas - without[folder], folder

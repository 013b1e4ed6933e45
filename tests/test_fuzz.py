"""The fuzzer's table, without its sanitizers."""

import importlib.util
import re
from pathlib import Path

import pytest

from ribfast import _ext, ops

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def fuzz():
    spec = importlib.util.spec_from_file_location("fuzz", ROOT / "benchmarks" / "fuzz.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_operator_and_schema_has_a_row(fuzz):
    schemas = re.findall(r'm\.def\(\s*"(\w+)\(', (ROOT / "csrc" / "module.cpp").read_text())
    assert {*ops.__all__, *(f"ribfast::{name}" for name in schemas)} <= set(fuzz.rows())


def test_calls_depend_on_their_number_alone(fuzz):
    def drawn():
        return [fuzz.described(draw(fuzz.Draw([3, number]))) for number, (_, draw) in enumerate(fuzz.rows().values())]

    assert drawn() == drawn()


def test_calls_are_answered_or_refused_by_name(fuzz, tmp_path, monkeypatch, capsys):
    log = tmp_path / "calls.log"
    with pytest.raises(SystemExit, match="expected the instrumented extension"):
        fuzz.child(1, 0, 1, log)
    monkeypatch.setattr(_ext._C, "__file__", str(tmp_path / "_C.so"))
    assert fuzz.child(1, 0, 60, log) == 0, capsys.readouterr().out
    assert len(log.read_text().splitlines()) == 60

"""`ribfast bench`: every operator against the specification."""

import json
from typing import get_args

import pytest
import torch

from ribfast import bench, cli

SMALL = ["--height", "48", "--width", "64", "--classes", "3", "--seconds", "0.001", "--device", "cpu"]


def test_measures_every_operator(capsys):
    threads = torch.get_num_threads()
    assert cli.main(["bench", *SMALL, "--json", "--threads", "1"]) == 0
    assert torch.get_num_threads() == threads
    found = json.loads(capsys.readouterr().out)
    assert found["machine"]["threads"] == 1
    assert [row["operator"] for row in found["operators"]] == [*get_args(bench.Operator)]
    for row in found["operators"]:
        assert row["milliseconds"] > 0 and row["times_faster"] > 0
        assert row["difference"] <= 2e-3 * row["scale"], row  # each operator's own tests say how close it must be


def test_shows_what_was_chosen(capsys):
    assert cli.main(["bench", *SMALL, "--operators", "gndrp,refine"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("device ") and [line.split()[0] for line in lines[2:]] == ["gndrp", "refine"]


def test_a_wrong_result_shows(monkeypatch, capsys):
    monkeypatch.setattr(bench.ops, "normalize_cams", lambda cams: cams)
    assert cli.main(["bench", *SMALL, "--operators", "normalize_cams", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["operators"]
    assert row["difference"] > 1e-4 * row["scale"]


def test_refuses(capsys):
    for words in (["--operators", "gdnrp"], ["--seconds", "0"], ["--height", "8"], ["--threads", "0"]):
        with pytest.raises(SystemExit) as stopped:
            cli.main(["bench", *words])
        assert stopped.value.code == 2 and "expected" in capsys.readouterr().err

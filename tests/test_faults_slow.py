"""Faults that take minutes: kills at any moment of a run, disks that are full indeed, very long images."""

import os
import signal
import subprocess
import sys

import broken
import faults
import pytest
from faults import own as own
from faults import place as place
from test_faults import disk as disk
from test_faults import failures, fill_up

from ribfast import cli
from ribfast.store import Store

pytestmark = pytest.mark.faults
KILLED = """
import os, random, shutil, signal, sys, time
from ribfast import cli, pipeline, report, run, train

def start(out):
    child = os.fork()  # of a process without threads: nothing is imported again
    if not child:
        os._exit(cli.main([*sys.argv[4:], "--out", out]))
    return child

def finish(out):  # in how many seconds
    begin = time.monotonic()
    assert os.waitpid(start(out), 0)[1] == 0
    return time.monotonic() - begin

def kill(out, after):  # in how many seconds it had ended before; None where it had not
    child, begin = start(out), time.monotonic()
    begun = f"{out}/config.json" if by == signal.SIGINT else folder  # whoever is interrupted before says nothing of OUT
    while (passed := time.monotonic() - begin) < after or not os.path.exists(begun):
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        time.sleep(0.001)
    else:
        os.kill(child, by)
        status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL, cli.INTERRUPTED << 8), status
    return passed if status == 0 else None

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets what it starts beside itself ignore this
folder, count, by, draw = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), random.Random(1)
duration = finish(f"{folder}/whole")
for number in range(count):
    out, share = f"{folder}/{number}", (number + draw.random()) / count
    for _ in range(50):
        took = kill(out, share * duration)
        if took is None:
            break
        shutil.rmtree(out)
        duration = 0.95 * took  # the machine is faster than it was
    else:
        raise AssertionError("no run was ended before its end")
    finish(out)
"""


@pytest.fixture(scope="module")
def whole_run(place, tmp_path_factory):
    """What an undisturbed run makes."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert cli.main(place.words("run", out)) == 0
    return faults.results(out)


@pytest.mark.parametrize("by, count", [(signal.SIGKILL, 20), (signal.SIGINT, 6)], ids=["killed", "interrupted"])
def test_run_ended_at_any_moment_goes_on_to_the_same_files(place, by, count, tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", KILLED, str(tmp_path), str(count), str(int(by)), *place.words("run")]
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr[-2000:]
    said = "interrupted; the same command goes on where it was"
    assert done.stderr.count(said) >= count * (by == signal.SIGINT)
    whole = faults.results(tmp_path / "whole")
    assert len(whole) == 2 + 2 * 8 + 8 + 2 * 9 + 4  # networks, maps, steps, masks, evaluations
    for number in range(count):
        assert faults.results(tmp_path / str(number)) == whole, number


def test_a_run_on_a_disk_that_is_full_indeed(place, whole_run, disk, capsys):
    folder = disk("size=8m")  # too small for a checkpoint
    words = place.words("run", folder / "run")
    assert cli.main(words) == cli.FAILED
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"ribfast run: no space left for {folder}/run/classifier/unfinished.safetensors: ")
    assert not [*folder.rglob("*.partial")] and not [*folder.rglob("*.safetensors")]
    subprocess.run(["mount", "-o", "remount,size=400m", str(folder)], check=True)
    assert cli.main(words) == 0 and faults.results(folder / "run") == whole_run


@pytest.mark.parametrize("number", [1, 12, 60])
def test_a_run_goes_on_after_a_full_disk(place, whole_run, number, tmp_path, monkeypatch, capsys):
    words = place.words("run", tmp_path / "run")
    with monkeypatch.context() as patch:
        fill_up(patch, number)
        assert cli.main(words) == cli.FAILED
    assert f"ribfast run: no space left for {tmp_path}/run/" in capsys.readouterr().err.splitlines()[-1]
    assert not [*tmp_path.rglob("*.partial")]
    assert cli.main(words) == 0 and faults.results(tmp_path / "run") == whole_run


def test_run_with_images_of_every_kind(own, tmp_path):
    """Also very long ones."""
    odd = {name: content for name, (content, _) in broken.odd().items()} | broken.long()
    own.add(odd | broken.bad())
    run = tmp_path / "run"
    assert cli.main([*own.words("run", run), "--masks", "irn", "--set", "irn.epochs=1"]) == cli.INCOMPLETE
    assert list(failures(run)) == faults.BAD
    good = sorted([*faults.PLAIN, *faults.ODD, "wide", "high"])
    for stage in ("masks", "predicted"):
        assert Store(run / stage).mask_names() == good
        assert Store(run / stage).load_mask("wide").shape == (50, 10_000)
        assert Store(run / stage).load_mask("turned").shape == (48, 80)

"""Claims of units of work: one process each, taken up again from the dead."""

import contextlib
import errno
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from ribfast import claims
from ribfast.claims import Claims, Work


@pytest.fixture
def dead(tmp_path):
    """The folder, with claims of a process that is gone."""
    code = f"""
import os
from pathlib import Path
from ribfast.claims import Claims
there = Claims(Path({str(tmp_path / "claims")!r}))
assert there.take("a") and there.take("b")
os._exit(9)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 9
    return tmp_path / "claims"


def test_one_of_many_has_it(tmp_path):
    """Threads stand in for processes: to a claim they are as alive."""
    found, start = [], threading.Barrier(8)

    def take(number):
        own = Claims(tmp_path / "claims")
        start.wait()
        found.extend((number, name) for name in map(str, range(40)) if own.take(name))

    threads = [threading.Thread(target=take, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(name for _, name in found) == sorted(map(str, range(40)))


def test_released_claims_are_free_and_leave_nothing(tmp_path):
    first, second = Claims(tmp_path / "claims"), Claims(tmp_path / "claims")
    assert first.take("a/b c") and not second.take("a/b c") and not first.take("a/b c")
    first.release("a/b c")
    assert second.take("a/b c")
    first.close()
    assert (tmp_path / "claims").is_dir()  # the second's is there
    second.close()
    assert not (tmp_path / "claims").exists()


def test_claims_of_the_dead_are_taken_up_by_one(dead):
    first, second = Claims(dead), Claims(dead)
    assert first.take("a") and not second.take("a")
    assert second.take("b") and not first.take("b")
    first.release("a")
    assert second.take("a")
    second.close()
    first.close()
    assert not dead.exists()


def test_another_machine_is_dead_when_it_gives_no_sign(dead):
    """Its processes' numbers say nothing here."""
    for path in dead.iterdir():
        path.write_text(json.dumps(["elsewhere", [os.getpid(), 1]]))
    own = Claims(dead)
    assert not own.take("a")
    path = own._path("a", 0)
    os.utime(path, (time.time() - claims.PATIENCE - 5,) * 2)
    assert own.take("a") and not Claims(dead).take("a")
    own.close()


def test_a_process_gives_signs_of_life(tmp_path, monkeypatch):
    own = Claims(tmp_path)
    own._owner = json.dumps(["elsewhere", [1, 1]]).encode()
    assert own.take("a")
    os.utime(own._path("a", 0), (time.time() - 1000,) * 2)
    own._touch()
    assert not Claims(tmp_path).take("a")
    own.close()
    monkeypatch.setattr(claims, "PATIENCE", 0.06)
    again = Claims(tmp_path)
    assert again.take("c")  # a thread touches it
    path = again._path("c", 0)
    os.utime(path, (time.time() - 1000,) * 2)
    while path.stat().st_mtime < time.time() - 500:
        time.sleep(0.01)
    again.close()


def test_a_claim_that_was_never_written_whole_ends_too(tmp_path):
    own = Claims(tmp_path)
    own._path("a", 0).write_bytes(b"")
    assert not own.take("a")  # its process may be about to
    os.utime(own._path("a", 0), (time.time() - claims.PATIENCE - 5,) * 2)
    assert own.take("a")


def test_a_number_that_another_process_has_now_is_no_sign_of_life(tmp_path):
    own = Claims(tmp_path)
    machine, (number, began), *_ = json.loads(own._owner)
    own._path("a", 0).write_text(json.dumps([machine, [number, began - 1]]))
    own._path("b", 0).write_text(json.dumps([machine, [number, began]]))
    assert own.take("a") and not own.take("b")


def worked(folder, made, share=(0, 1), failed=()):
    def left(unit):
        return [thing for thing in unit if thing not in made and thing not in failed]

    return Work(folder, [(0, 1), (2,), (3, 4), (5,), (6,)], lambda unit: str(unit[0]), left, share)


def test_each_process_begins_elsewhere_and_nothing_is_made_twice(tmp_path):
    made, order = set(), {0: [], 1: []}
    works = [worked(tmp_path / "claims", made, (i, 2)) for i in range(2)]
    taken = [next(work.rounds()) for work in works]
    for turn in (0, 1, 0, 1, 0):
        unit, left = next(taken[turn])
        assert list(unit) == left
        order[turn].append(unit)
        made.update(left)
        works[turn].release(unit)
    assert order == {0: [(0, 1), (3, 4), (6,)], 1: [(2,), (5,)]}
    assert [list(units) for units in taken] == [[], []]
    for work in works:
        assert sum(len(list(units)) for units in work.rounds()) == 0
        work.close()


def test_what_is_there_in_part_and_what_failed(tmp_path):
    work = worked(tmp_path, {0, 2}, failed={5, 6})
    assert list(next(work.rounds())) == [((0, 1), [1]), ((3, 4), [3, 4])]


def test_the_last_one_takes_up_what_the_dead_had(dead, caplog):
    """And waits for what others have in hand, without taking it."""
    made, names, other, ready = set(), {"a": (0, 1), "b": (2,), "c": (3,)}, Claims(dead), threading.Event()
    assert other.take("c")

    def left(unit):
        if "waiting for" in caplog.text:
            ready.set()
        return [thing for thing in unit if thing not in made]

    work = Work(dead, [*names.values()], {unit: name for name, unit in names.items()}.get, left)

    def finish():
        assert ready.wait(60)
        made.add(3)
        other.release("c")

    thread, found = threading.Thread(target=finish), []
    thread.start()
    with caplog.at_level("INFO", "ribfast"):
        for units in work.rounds():
            for unit, left in units:
                found.append(unit)
                made.update(left)
                work.release(unit)
    thread.join()
    assert found == [(0, 1), (2,)] and "waiting for 1 image that process" in caplog.text
    work.close()
    other.close()
    assert not dead.exists()


def test_what_the_dead_left_of_things_that_are_made_is_cleared_and_the_livings_not(dead):
    """A process that took up NAME as NAME.1 has it whoever clears."""
    own, other = Claims(dead), Claims(dead)
    assert own.take("a") and own._path("a", 0).exists() and own.is_alive()
    other.clear()
    assert own._path("a", 0).exists() and own._path("a", 1).exists() and not own._path("b", 0).exists()
    assert not other.take("a")
    own.close()
    assert not dead.exists() and not other.is_alive()


def test_a_claim_that_cannot_be_written_is_none(tmp_path, monkeypatch):
    def full(descriptor, content):
        raise OSError(errno.ENOSPC, "full")

    own = Claims(tmp_path / "claims")
    with monkeypatch.context() as patch:
        patch.setattr(claims.os, "write", full)
        with pytest.raises(OSError, match="no space left"):
            own.take("a")
    assert own.take("a")


@pytest.mark.parametrize("call", ["open", "write", "close", "link", "unlink"])
def test_a_process_that_is_killed_while_it_takes_one_leaves_none_that_holds(tmp_path, call):
    """Before and after each of the calls that make one."""
    code = f"""
import os, signal, sys
from pathlib import Path
from ribfast.claims import Claims
def killed(*given):
    if sys.argv[1] == "after":
        made(*given)
    os.kill(os.getpid(), signal.SIGKILL)
there = Claims(Path({str(tmp_path / "claims")!r}))
there.take("b")  # the folder is there
made = os.{call}
os.{call} = killed
there.take("a")
"""
    for moment in ("before", "after"):
        assert subprocess.run([sys.executable, "-c", code, moment]).returncode == -signal.SIGKILL
        own = Claims(tmp_path / "claims")
        assert own.take("a") and own.take("b")
        own.clear()
        own.close()
        assert not (tmp_path / "claims").exists()


@pytest.mark.parametrize("call", ["open", "write", "close", "link", "unlink"])
@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("what", ["take", "release"])
def test_whoever_is_interrupted_has_none_once_it_closes(tmp_path, monkeypatch, what, moment, call):
    """As in a notebook, whose process lives on."""
    own, made, left = Claims(tmp_path / "claims"), getattr(os, call), 1
    assert own.take("b") and (what == "take" or own.take("a"))

    def interrupted(*given):
        nonlocal left
        left -= 1
        if left < 0:
            return made(*given)
        if moment == "after":
            made(*given)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr(claims.os, call, interrupted)
        getattr(own, what)("a")
    own.close()
    other = Claims(tmp_path / "claims")
    assert other.take("a") and other.take("b")
    other.clear()
    other.close()
    assert not (tmp_path / "claims").exists()


def test_files_that_go_while_they_are_open_on_a_network(dead, monkeypatch):
    def stale(*_):
        raise OSError(errno.ESTALE, "stale")

    own = Claims(dead)
    for call in ("fstat", "listdir"):
        with monkeypatch.context() as patch:
            patch.setattr(claims.os, call, stale)
            assert (call == "listdir" or not own.take("a")) and own.owner("c") is None
            own.clear()
    (dead / ".nfs1").write_bytes(b"")
    unlink = os.unlink

    def busy(path):
        if path.name.startswith(".nfs"):
            raise OSError(errno.EBUSY, "busy")
        unlink(path)

    with monkeypatch.context() as patch:
        patch.setattr(claims.os, "unlink", busy)
        own.clear()
    assert [path.name for path in dead.iterdir()] == [".nfs1"]


def test_what_is_no_claim_is_left_alone(dead):
    (dead / "Thumbs.db").write_bytes(b"")
    own = Claims(dead)
    assert not own.is_alive() and own.take("a") and own.is_alive()
    own.clear()
    own.close()
    assert [path.name for path in dead.iterdir()] == ["Thumbs.db"]


def test_one_that_is_released_as_another_takes_it_from_the_dead(dead, monkeypatch):
    """It is a third one's by then, who found it free."""
    first, second, third = (Claims(dead) for _ in range(3))
    assert first.take("a") and first._path("a", 1).exists()
    make = second._make

    def late(path):
        if path == second._path("a", 1) and first._held:
            first.release("a")
            assert third.take("a")
        return make(path)

    monkeypatch.setattr(second, "_make", late)
    assert not second.take("a")
    second.close()
    assert third._path("a", 0).exists() and not Claims(dead).take("a")
    first._path("a", 1).write_text(json.dumps([json.loads(first._owner)[0], [os.getpid(), 1]]))  # died as it released
    first.clear()
    assert first.is_alive() and third._path("a", 0).exists()


def test_one_of_another_machine_is_waited_for_until_it_is_dead_or_gives_a_sign(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", "ribfast")
    own, other = Claims(tmp_path), Claims(tmp_path)
    assert other.take("here") and not own.take_from_the_dead("here") and not caplog.text
    monkeypatch.setattr(claims, "PATIENCE", 3.0)
    there = Claims(tmp_path)
    there._owner = json.dumps(["elsewhere", [1, 1]]).encode()
    assert there.take("a")  # a thread touches it
    assert not own.take_from_the_dead("a") and "for a sign of life of process 1 of the machine elsewhere" in caplog.text
    there._stop.set()
    there._thread.join()
    monkeypatch.setattr(claims, "PATIENCE", 0.3)
    assert own.take_from_the_dead("a") and own._path("a", 1).exists()
    other.close()
    own.close()


def test_claims_where_files_have_no_further_names(tmp_path, monkeypatch):
    def refused(*_):
        raise OSError(errno.EPERM, "no links")

    monkeypatch.setattr(claims.os, "link", refused)
    first, second = Claims(tmp_path / "claims"), Claims(tmp_path / "claims")
    assert first.take("a") and not second.take("a") and second.take("b")
    first.release("a")
    assert second.take("a")
    first.close()
    second.close()
    assert not (tmp_path / "claims").exists()


def test_a_claim_that_was_made_though_the_answer_was_lost(tmp_path, monkeypatch):
    link = os.link

    def lost(*paths):
        link(*paths)
        raise FileExistsError

    own = Claims(tmp_path / "claims")
    with monkeypatch.context() as patch:
        patch.setattr(claims.os, "link", lost)
        assert own.take("a")
    assert not own.take("a") and not Claims(tmp_path / "claims").take("a")
    own.close()
    assert not (tmp_path / "claims").exists()


def test_all_leave_at_once(tmp_path):
    """The folder goes and comes while others look into it."""
    failures = []

    def come_and_go(number):
        try:
            for turn in range(300):
                own = Claims(tmp_path / "claims")
                own.take(f"{number} {turn}")
                own.clear()
                own.close()
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=come_and_go, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def die_with(folder, *names):
    """Claims of a process that has begun and ended since, beside those that are there."""
    own = Claims(folder)
    machine, (number, began), *_ = json.loads(own._owner)
    folder.mkdir(exist_ok=True)
    for name in names:
        generation = len([path for path in folder.iterdir() if path.stem == own._path(name, 0).stem])
        own._path(name, generation).write_text(json.dumps([machine, [number, began - 1]]))


def test_what_processes_died_with_twice_is_made_last_and_one_by_one(tmp_path, caplog):
    """With (0, 1) two died, then one with 1 alone: that is given up, and 0 is made. With (3, 4) one died."""
    made, given_up, rounds, folder = set(), [], [], tmp_path / "claims"
    die_with(folder, "0", "0")

    def units(work):
        for round_ in work.rounds():
            rounds.append([])
            for unit, left in round_:
                rounds[-1].append((unit, left, work.alone))
                made.update(left)
                work.release(unit)
        work.close()

    def begun(**more):
        def left(unit):
            return [thing for thing in unit if thing not in made]

        return Work(folder, [(0, 1), (2,), (3, 4)], lambda unit: str(unit[0]), left, **more)

    first = next(begun().rounds())
    assert [unit for unit, _ in first] == [(2,), (3, 4)]  # whoever dies of these is not counted with (0, 1)
    for path in folder.iterdir():  # and this process dies
        path.write_text(json.dumps([*json.loads(path.read_text())[:1], [os.getpid(), 1]]))
    die_with(folder, "0", "1 by itself")
    units(begun(give_up=lambda thing, deaths: given_up.append((thing, deaths))))
    assert given_up == [(1, 3)] and not folder.exists()
    assert rounds == [[((2,), [2], False), ((3, 4), [3, 4], False)], [((0, 1), [0], True)]]
    assert "2 processes died with 0, or what was beside it: it is taken by itself" in caplog.text

    rounds.clear()
    given_up.clear()  # the next start, which is told of it
    units(begun(deaths=lambda thing: 3 * (thing == 1)))
    assert rounds == [[], [((0, 1), [1], True)]]
    made.discard(1)
    die_with(folder, "1 by itself")
    units(begun(deaths=lambda thing: 3, give_up=lambda thing, deaths: given_up.append((thing, deaths))))
    assert given_up == [(1, 4)]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not say who is stopped")
def test_it_is_said_again_and_again_whom_this_waits_for(tmp_path, monkeypatch, caplog):
    """A real process, which is stopped: it may go on, so that it is not dead."""
    code = f"""
import sys, time
from pathlib import Path
from ribfast.claims import Claims
there = Claims(Path({str(tmp_path / "claims")!r}))
there.take("0"), there.take("1")
print("ready", flush=True)
time.sleep(60)
"""
    monkeypatch.setattr(claims, "SAID_EVERY", 0.1)
    monkeypatch.setattr(claims, "POLL", 0.01)
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "ready\n"
    made, work = set(), None

    def left(unit):
        warned = sum(record.levelname == "WARNING" for record in caplog.records)
        if warned >= 1 and other.poll() is None and claims._state(other.pid) != "T":
            other.send_signal(signal.SIGSTOP)
        if "(stopped)" in caplog.text and other.poll() is None:
            other.kill()
            other.wait()
        return [thing for thing in unit if thing not in made]

    work = Work(tmp_path / "claims", [(0, 5), (1,)], lambda unit: str(unit[0]), left)
    for round_ in work.rounds():
        for unit, things in round_:
            made.update(things)
            work.release(unit)
    work.close()
    other.stdout.close()
    assert made == {0, 1, 5}
    said = f"waiting for 3 images that process {other.pid} of the machine {os.uname().nodename} "
    levels = {record.levelname for record in caplog.records if f"{said}has in hand" in record.getMessage()}
    assert "WARNING" in levels
    assert f"{said}(stopped) has in hand" in caplog.text


@pytest.mark.parametrize("known", [False, True], ids=["by their claims", "by an earlier run"])
def test_what_another_makes_by_itself_is_waited_for(tmp_path, monkeypatch, caplog, known):
    """Of processes that died with it: one has taken it up, and what waits for that looks now and then."""
    caplog.set_level("INFO", "ribfast")
    folder, other, made, looks, take = tmp_path / "claims", Claims(tmp_path / "claims"), set(), [], Claims.take
    if not known:
        die_with(folder, "0", "0")
    assert other.take("0")

    def left(unit):
        assert len(looks) < 100, "it does nothing else"
        if "waiting for 2 images that process" in caplog.text and other._held:
            made.add(0)
            other.release("0")
        return [thing for thing in unit if thing not in made]

    monkeypatch.setattr(Claims, "take", lambda *given: looks.append(given) or take(*given))
    work = Work(folder, [(0, 1), (2,)], lambda unit: str(unit[0]), left, deaths=lambda thing: 2 * known * (thing == 0))
    for round_ in work.rounds():
        for unit, things in round_:
            made.update(things)
            work.release(unit)
    work.close()
    assert made == {0, 1, 2} and not other._held


def test_whoever_is_stopped_meanwhile_is_one_process(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", "ribfast")
    there, states = Claims(tmp_path / "claims"), iter("STST")
    assert there.take("0") and there.take("1")
    monkeypatch.setattr(claims, "_state", lambda number: next(states))
    work = Work(tmp_path / "claims", [(0, 5), (1,)], lambda unit: str(unit[0]), lambda unit: unit)
    work._say_whose([(0, 5), (1,)], logging.INFO)
    assert [record.getMessage().split(" that ")[0] for record in caplog.records] == ["waiting for 3 images"]
    there.close()


def test_the_file_system_is_asked_for_its_time_once(dead, monkeypatch):
    for path in dead.iterdir():
        path.write_text(json.dumps(["elsewhere", [os.getpid(), 1]]))
    own, probes = Claims(dead), []
    touch = claims.Path.touch
    monkeypatch.setattr(claims.Path, "touch", lambda path: (probes.append(path), touch(path)))
    assert not any(own.take(name) for name in "abab") and len(probes) == 1 and len(list(dead.iterdir())) == 2
    assert own.describe(own.owner("a")) == f"process {os.getpid()} of the machine elsewhere"
    assert own.describe(own.owner("c")) == "another process"

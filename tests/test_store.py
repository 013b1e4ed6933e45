import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from ribfast.store import MapStore


def maps(n=2, height=13, width=18, seed=0):
    draw = np.random.default_rng(seed)
    cam = torch.from_numpy(draw.random((n, -(-height // 4), -(-width // 4)), np.float32))
    return torch.arange(n) * 3, cam, draw.random((n, height, width), np.float32)


def as_saved(path, content):
    with open(path, "wb") as file:  # np.save would add a suffix
        np.save(file, content)


@pytest.mark.parametrize("n", [0, 1, 3])
def test_irn_round_trip(n, tmp_path):
    store = MapStore(tmp_path / "maps")
    keys, cam, high_res = maps(n)
    assert "a/b.v2" not in store
    store.save("a/b.v2", keys, cam, torch.from_numpy(high_res).requires_grad_())
    assert "a/b.v2" in store and "a" not in store and store.names() == ["a/b.v2"]
    loaded = store.load("a/b.v2")
    assert torch.equal(loaded.keys, keys) and loaded.keys.dtype == torch.long
    assert torch.equal(loaded.cam, cam) and np.array_equal(loaded.high_res, high_res)
    assert loaded.high_res.dtype == np.float32
    read = np.load(tmp_path / "maps" / "a" / "b.v2.npy", allow_pickle=True).item()  # as IRN's tools do
    assert list(read) == ["keys", "cam", "high_res"] and read["keys"].dtype == torch.long
    assert torch.equal(read["cam"], cam) and read["high_res"].dtype == np.float32
    assert np.array_equal(np.pad(read["keys"] + 1, (1, 0), mode="constant"), [0, *(keys + 1).tolist()])


def test_pmm_round_trip(tmp_path):
    store = MapStore(tmp_path, format="pmm")
    high_res = maps(2)[2]
    store.save("x", [7, 2], None, high_res)
    loaded = store.load("x")
    assert loaded.keys.tolist() == [7, 2] and loaded.cam is None
    assert np.array_equal(loaded.high_res, high_res.astype(np.float16).astype(np.float32))
    read = np.load(tmp_path / "x.npy", allow_pickle=True).item()
    assert list(read) == [7, 2] and read[7].dtype == np.float16 and read[7].shape == (13, 18)
    store.save("none", [], None, np.zeros((0, 13, 18)))
    assert store.load("none").high_res.shape == (0, 0, 0) and store.names() == ["none", "x"]


def test_files_name_numpy_as_its_old_versions_do(tmp_path):
    MapStore(tmp_path).save("a", *maps())
    assert b"numpy._core" not in (tmp_path / "a.npy").read_bytes()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_reads_what_irn_wrote(protocol, tmp_path):
    """With any protocol of pickle's, numpy's old and new names of its modules, and scalars as keys."""
    keys, cam, high_res = maps()
    array = np.array({"keys": keys, "cam": cam, "high_res": high_res}, dtype=object)
    with open(tmp_path / "a.npy", "wb") as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        pickle.dump(array, file, protocol=protocol)
    loaded = MapStore(tmp_path).load("a")
    assert torch.equal(loaded.keys, keys) and np.array_equal(loaded.high_res, high_res)
    as_saved(tmp_path / "b.npy", {np.int64(4): high_res[0].astype(np.float16)})
    assert MapStore(tmp_path, "pmm").load("b").keys.tolist() == [4]
    as_saved(tmp_path / "c.npy", {"keys": np.array([4]), "cam": cam[:1].numpy(), "high_res": high_res[:1]})
    assert MapStore(tmp_path).load("c").keys.tolist() == [4]


class Hostile:
    def __init__(self, call, *arguments):
        self.state = call, arguments

    def __reduce__(self):
        return self.state


def test_reading_runs_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    inner = pickle.dumps(Hostile(os.mkdir, "harmed"), protocol=2)
    hostile = (
        Hostile(os.mkdir, "harmed"),
        Hostile(eval, "__import__('os').mkdir('harmed')"),
        Hostile(getattr, "text", "upper"),
        Hostile(pickle.loads, inner),
        Hostile(np.load, "a.npy"),
        Hostile(torch.storage._load_from_bytes, inner),  # a pickle within the tensor's bytes
        np.array([Hostile(os.mkdir, "harmed")], dtype=object),
    )
    for form in ("irn", "pmm"):
        store = MapStore(tmp_path / form, format=form)
        store.folder.mkdir()
        for number, thing in enumerate(hostile):
            as_saved(store.path(str(number)), {"keys": thing, "cam": thing, "high_res": thing})
            with pytest.raises(ValueError, match=r"MapStore.load: expected a dict of maps as np.save writes it, got"):
                store.load(str(number))
    assert not (tmp_path / "harmed").exists()


def test_wrong_files_are_named(tmp_path):
    irn, pmm = MapStore(tmp_path), MapStore(tmp_path, "pmm")
    irn.save("irn", *maps())
    pmm.save("pmm", *maps())
    with pytest.raises(ValueError, match=r"expected IRN's keys.* got 0, 3 in .*pmm.npy; .*format='pmm'"):
        irn.load("pmm")
    with pytest.raises(ValueError, match=r"expected PMM's \{class: map\}, got keys, cam.*irn.npy; .*format='irn'"):
        pmm.load("irn")
    with pytest.raises(FileNotFoundError, match="expected maps of gone, got no"):
        irn.load("gone")
    np.save(tmp_path / "plain.npy", np.zeros(3))
    as_saved(tmp_path / "list.npy", np.array([1, None], dtype=object))
    (tmp_path / "cut.npy").write_bytes((tmp_path / "irn.npy").read_bytes()[:300])
    (tmp_path / "text.npy").write_bytes(b"text")
    (tmp_path / "empty.npy").touch()
    assert "empty" not in irn and "empty" not in irn.names()
    for name in ("plain", "list", "cut", "text"):
        with pytest.raises(ValueError, match=rf"expected a dict of maps as np.save writes it, got .*{name}.npy"):
            irn.load(name)
    keys, cam, high_res = maps()
    as_saved(tmp_path / "short.npy", {"keys": keys[:1], "cam": cam, "high_res": high_res})
    with pytest.raises(ValueError, match=r"expected a map for each key, got keys \(1,\)"):
        irn.load("short")
    as_saved(tmp_path / "odd.npy", {"keys": "all", "cam": cam, "high_res": high_res})
    with pytest.raises(ValueError, match=r"expected tensors and arrays, got .*odd.npy"):
        irn.load("odd")
    as_saved(tmp_path / "uneven.npy", {0: high_res[0], 1: high_res[1, 1:]})
    with pytest.raises(ValueError, match=r"expected maps \(H, W\) of one size"):
        pmm.load("uneven")


def test_refuses_wrong_maps_and_places(tmp_path):
    store, (keys, cam, high_res) = MapStore(tmp_path / "maps"), maps()
    for arguments, message in (
        (([1, 1], cam, high_res), "each class once"),
        (([1], cam, high_res), r"finite high_res \(1, H, W\), got \(2, 13, 18\)"),
        ((keys, cam[:, 1:], high_res), r"cam of shape \(2, 4, 5\), got \(2, 3, 5\)"),
        ((keys, None, high_res), r"cam of shape \(2, 4, 5\), got None"),
        ((keys, cam, high_res * np.float32("nan")), "expected finite high_res"),
    ):
        with pytest.raises(ValueError, match=message):
            store.save("a", *arguments)
    with pytest.raises(ValueError, match="maps below 65504"):
        MapStore(tmp_path, "pmm").save("a", keys, None, high_res * 1e6)
    for name in ("../a", "/a", "a//b", "", "a/..", "a\\b", "a\n"):
        with pytest.raises(ValueError, match="expected a relative name"):
            store.save(name, keys, cam, high_res)
    with pytest.raises(ValueError, match="expected a format of irn, pmm, got 'png'"):
        MapStore(tmp_path, "png")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"expected a folder, got .*file, a file"):
        MapStore(tmp_path / "file")
    store.save("a", keys, cam, high_res)
    (tmp_path / "maps" / "b").touch()
    (tmp_path / "maps" / "c.npy").mkdir()
    assert "b/c" not in store and "c" not in store
    with pytest.raises(ValueError, match="got a file in its place"):
        store.save("b/c", keys, cam, high_res)
    with pytest.raises(ValueError, match="expected no folder at"):
        store.save("c", keys, cam, high_res)
    assert store.names() == ["a"]


def test_writes_whole_files_or_none(tmp_path, monkeypatch):
    store = MapStore(tmp_path)
    store.save("a", *maps(seed=1))
    before = (tmp_path / "a.npy").read_bytes()

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        store.save("a", *maps(seed=2))
    assert (tmp_path / "a.npy").read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a.npy"]
    for name, age in (("sub/.b.npy.0.partial", 7200), (".c.npy.1.partial", 0)):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"half")
        os.utime(path, (path.stat().st_mtime - age,) * 2)
    assert MapStore(tmp_path).names() == ["a"]
    assert [p.name for p in tmp_path.rglob("*.partial")] == [".c.npy.1.partial"]  # somebody may be writing it


def test_records(tmp_path, caplog):
    store = MapStore(tmp_path / "new")
    assert store.records() == {}
    store.record("a", steps=3, seconds=np.float32(0.5))
    store.record("b", shape=np.array([2, 3]), where=Path("x"), loss=torch.tensor(1.5))
    store.record("a", steps=4)
    assert store.records() == {"a": {"steps": 4}, "b": {"shape": [2, 3], "where": "x", "loss": 1.5}}
    with pytest.raises(TypeError, match="facts that JSON knows, got a object"):
        store.record("c", thing=object())
    with open(store.folder / "records.jsonl", "ab") as file:
        file.write(b'{"name": "d", "ste')  # killed
    assert store.records().keys() == {"a", "b"}
    store.record("e", steps=1)
    assert store.records().keys() == {"a", "b", "e"} and "line 4" in caplog.text


def test_records_of_several_processes(tmp_path):
    code = (
        "import sys; from ribfast.store import MapStore; store = MapStore(sys.argv[1])\n"
        "for number in range(200): store.record(f'{sys.argv[2]}/{number}', text='x' * 500)"
    )
    runs = [subprocess.Popen([sys.executable, "-c", code, tmp_path, str(i)]) for i in range(2)]
    assert [run.wait() for run in runs] == [0, 0]
    lines = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines() if line]
    assert len(lines) == 400 and len(MapStore(tmp_path).records()) == 400

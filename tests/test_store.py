import errno
import json
import os
import pickle
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from ribfast import files
from ribfast.data.decode import VOC_PALETTE
from ribfast.store import Store, open_maps, open_masks


@pytest.fixture
def quick_path():
    """In memory, where that is mounted: many files forced to a busy disk take long."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as folder:
        yield Path(folder)


def maps(n=2, height=13, width=18, seed=0):
    draw = np.random.default_rng(seed)
    cam = torch.from_numpy(draw.random((n, -(-height // 4), -(-width // 4)), np.float32))
    return torch.arange(n) * 3, cam, draw.random((n, height, width), np.float32)


def as_saved(path, content):
    with open(path, "wb") as file:  # np.save would add a suffix
        np.save(file, content)


def half(values):
    return np.asarray(values).astype(np.float16)


@pytest.mark.parametrize("high_res", [False, True], ids=["strided", "high_res"])
@pytest.mark.parametrize("n", [0, 1, 3])
def test_npz_round_trip(n, high_res, tmp_path):
    store = Store(tmp_path, high_res=high_res)
    keys, cam, large = maps(n)
    store.save("a/b.v2", keys, cam.requires_grad_(), torch.from_numpy(large))
    assert "a/b.v2" in store and "a" not in store and store.names() == ["a/b.v2"]
    with np.load(tmp_path / "maps" / "a" / "b.v2.npz", allow_pickle=False) as read:
        assert read.files == ["keys", "cam", "size"] + ["high_res"] * high_res
        assert read["keys"].dtype == np.int64 and read["keys"].tolist() == keys.tolist()
        assert read["cam"].dtype == np.float16 and np.array_equal(read["cam"], half(cam.detach()))
        assert read["size"].tolist() == [13, 18]
        assert not high_res or np.array_equal(read["high_res"], half(large))
    loaded, stored = store.load("a/b.v2"), store.read("a/b.v2")
    assert torch.equal(loaded.keys, keys) and loaded.keys.dtype == torch.long and loaded.size == (13, 18)
    assert loaded.cam.dtype == torch.float32 and np.array_equal(loaded.cam, half(cam.detach()).astype(np.float32))
    assert loaded.high_res.dtype == np.float32 and loaded.high_res.shape == (n, 13, 18)
    if high_res:
        assert np.array_equal(loaded.high_res, half(large).astype(np.float32)) and stored.high_res.dtype == np.float16
    else:
        assert stored.high_res is None and stored.cam.dtype == torch.float16
        if n:
            whole = F.interpolate(loaded.cam[None], scale_factor=4, mode="bilinear", align_corners=False)
            np.testing.assert_allclose(loaded.high_res, whole[0, :, :13, :18], rtol=0, atol=2e-7)
        store.save("b", keys, cam, size=(13, 18))
        assert store.path("b").read_bytes() == store.path("a/b.v2").read_bytes()  # which do not depend on the time


def test_npz_refuses(tmp_path):
    store, (keys, cam, high_res) = Store(tmp_path, high_res=True), maps()
    for arguments, message in (
        ((keys, cam * 1.5, high_res), r"cam in \[0, 1\], got 0.* to 1.* for a; divide maps by their maximum"),
        ((keys, cam, high_res - 0.5), r"high_res in \[0, 1\], got -0.* to 0"),
        ((keys, cam * float("nan"), high_res), r"cam in \[0, 1\], got nan"),
        ((keys, None, high_res), r"cam of shape \(2, 4, 5\), got None"),
        ((keys, cam, None, (13, 18)), "expected high_res for npz"),
    ):
        with pytest.raises(ValueError, match=message):
            store.save("a", *arguments)
    with pytest.raises(ValueError, match="or a size where only cam is kept, got neither"):
        Store(tmp_path).save("a", keys, cam)
    store.save("a", keys, cam * 0 + 1 + 1e-6, high_res * 0 - 1e-9)  # which float16 holds as 1 and 0
    assert store.load("a").high_res.max() == 0
    arrays = dict(keys=keys.numpy(), cam=half(cam), size=np.array([13, 18]), high_res=half(high_res))
    for change, message in (
        ({"cam": arrays["cam"][:, 1:]}, r"a quarter of the size \(13, 18\), got keys \(2,\), cam \(2, 3, 5\)"),
        ({"keys": arrays["keys"][:1]}, "maps of 1 classes"),
        ({"keys": arrays["keys"] + 0.5}, "maps of 2 classes"),
        ({"size": np.array([13])}, "a quarter of the size"),
        ({"size": np.array([0, 0])}, "a quarter of the size"),
        ({"high_res": arrays["high_res"][:, 1:]}, r"high_res \(2, 12, 18\)"),
        ({"cam": np.array([{}], dtype=object)}, "expected arrays keys, cam and size"),
    ):
        np.savez(store.path("a"), **(arrays | change))
        with pytest.raises(ValueError, match=message):
            store.load("a")
    np.savez(store.path("a"), keys=keys)
    with pytest.raises(ValueError, match=r"expected arrays keys, cam and size in an .npz, got .*a.npz: .*cam"):
        store.load("a")
    np.savez(store.path("a"), **arrays)
    store.load("a")
    whole = store.path("a").read_bytes()
    for broken in (whole[:-30], whole[:50], b"text", whole.replace(b"NUMPY", b"NUMPX")):
        store.path("a").write_bytes(broken)
        with pytest.raises(ValueError, match="expected arrays keys, cam and size"):
            store.load("a")


def test_masks(tmp_path):
    store, draw = Store(tmp_path), np.random.default_rng(0)
    assert not store.has_mask("a/b") and store.mask_names() == []
    for labels in (draw.integers(0, 256, (37, 50)), torch.arange(256).view(1, 256).byte(), np.full((5, 1), 255)):
        store.save_mask("a/b", labels)
        assert np.array_equal(store.load_mask("a/b"), np.asarray(labels)) and store.load_mask("a/b").dtype == np.uint8
        colours = cv2.imread(str(tmp_path / "masks" / "a" / "b.png"))[..., ::-1]
        assert np.array_equal(colours, VOC_PALETTE[np.asarray(labels)])
    assert store.has_mask("a/b") and store.mask_names() == ["a/b"] and "a/b" not in store
    data = store.mask_path("a/b").read_bytes()
    assert data[25] == 3 and data[data.index(b"PLTE") + 4 :][:9] == bytes([0, 0, 0, 128, 0, 0, 0, 128, 0])
    for labels, message in (
        (np.zeros((2, 2)), r"integer labels \(H, W\), got float64"),
        (np.zeros(3, int), r"got int64 \(3,\)"),
        (np.zeros((0, 3), int), "integer labels"),
        (np.full((2, 2), 256), "labels from 0 to 255, got 256 to 256"),
        (np.full((2, 2), -1), "got -1 to -1"),
    ):
        with pytest.raises(ValueError, match=message):
            store.save_mask("c", labels)
    with pytest.raises(FileNotFoundError, match="expected a mask of c, got no"):
        store.load_mask("c")
    flat = open_masks(tmp_path / "masks")
    assert flat.mask_names() == open_masks(tmp_path).mask_names() == ["a/b"]
    assert np.array_equal(flat.load_mask("a/b"), store.load_mask("a/b"))
    with pytest.raises(FileNotFoundError, match="expected a folder of masks"):
        open_masks(tmp_path / "none")


@pytest.mark.parametrize("format", ["npz", "irn", "pmm"])
def test_maps_are_found_in_any_format(format, tmp_path):
    store = Store(tmp_path / "run", format)
    assert open_maps(store._maps.parent if store.folder.exists() else tmp_path).names() == []
    if format == "pmm":
        store.save("0", *maps(0))  # which does not say
    store.save("a/x", *maps())
    for found in (open_maps(tmp_path / "run"), open_maps(tmp_path / "run" / "maps")):
        assert found.format == format and found.names() == store.names()
        assert np.array_equal(found.load("a/x").high_res, store.load("a/x").high_res)
    other = Store(tmp_path / "run", "irn" if format == "npz" else "npz")
    other.save("b", *maps())
    with pytest.raises(ValueError, match=r"maps of one format, got .*\.npz and .*\.npy; say which"):
        open_maps(tmp_path / "run")
    assert open_maps(tmp_path / "run", format).names() == store.names()
    with pytest.raises(FileNotFoundError, match="expected a folder of maps, got"):
        open_maps(tmp_path / "none")


@pytest.mark.parametrize("n", [0, 1, 3])
def test_irn_round_trip(n, tmp_path):
    store = Store(tmp_path, "irn")
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
    store = Store(tmp_path, format="pmm")
    high_res = maps(2)[2]
    store.save("x", [7, 2], None, high_res)
    loaded = store.load("x")
    assert loaded.keys.tolist() == [7, 2] and loaded.cam is None
    assert np.array_equal(loaded.high_res, high_res.astype(np.float16).astype(np.float32))
    read = np.load(tmp_path / "maps" / "x.npy", allow_pickle=True).item()
    assert list(read) == [7, 2] and read[7].dtype == np.float16 and read[7].shape == (13, 18)
    store.save("none", [], None, np.zeros((0, 13, 18)))
    assert store.load("none").high_res.shape == (0, 0, 0) and store.names() == ["none", "x"]


def test_files_name_numpy_as_its_old_versions_do(tmp_path):
    Store(tmp_path, "irn").save("a", *maps())
    assert b"numpy._core" not in (tmp_path / "maps" / "a.npy").read_bytes()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_reads_what_irn_wrote(protocol, tmp_path):
    """With any protocol of pickle's, numpy's old and new names of its modules, and scalars as keys."""
    keys, cam, high_res = maps()
    array = np.array({"keys": keys, "cam": cam, "high_res": high_res}, dtype=object)
    with open(tmp_path / "a.npy", "wb") as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        pickle.dump(array, file, protocol=protocol)
    loaded = Store(tmp_path, "irn", flat=True).load("a")
    assert torch.equal(loaded.keys, keys) and np.array_equal(loaded.high_res, high_res)
    as_saved(tmp_path / "b.npy", {np.int64(4): high_res[0].astype(np.float16)})
    assert Store(tmp_path, "pmm", flat=True).load("b").keys.tolist() == [4]
    as_saved(tmp_path / "c.npy", {"keys": np.array([4]), "cam": cam[:1].numpy(), "high_res": high_res[:1]})
    assert Store(tmp_path, "irn", flat=True).load("c").keys.tolist() == [4]


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
        store = Store(tmp_path / form, format=form, flat=True)
        store.folder.mkdir()
        for number, thing in enumerate(hostile):
            as_saved(store.path(str(number)), {"keys": thing, "cam": thing, "high_res": thing})
            with pytest.raises(ValueError, match=r"Store.load: expected a dict of maps as np.save writes it, got"):
                store.load(str(number))
            with pytest.raises(ValueError, match=r"Store.load: expected a dict of maps as np.save writes it, got"):
                open_maps(store.folder)
    store = Store(tmp_path / "npz", flat=True)
    store.folder.mkdir()
    for number, thing in enumerate(hostile):
        np.savez(store.path(str(number)), keys=np.array([thing], object), cam=thing, size=np.array([1, 1]))
        as_saved(store.path(f"{number}-plain"), thing)
        for name in (str(number), f"{number}-plain"):
            with pytest.raises(ValueError, match=r"Store.load: expected arrays keys, cam and size in an .npz, got"):
                store.load(name)
    assert not (tmp_path / "harmed").exists()


def test_wrong_files_are_named(tmp_path):
    irn, pmm = Store(tmp_path, "irn", flat=True), Store(tmp_path, "pmm", flat=True)
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
    store, (keys, cam, high_res) = Store(tmp_path / "maps", "irn", flat=True), maps()
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
        Store(tmp_path, "pmm").save("a", keys, None, high_res * 1e6)
    mask = np.zeros((2, 2), int)
    names = ("../a", "/a", "a//b", "", "a/..", "a/.", "a/", "a\\b", "a\n", "a\0b", "\ud800", "..", "a/../../b")
    for name in names:
        for call in (store.load, store.has_mask, store.__contains__):
            with pytest.raises(ValueError, match=r"expected a (relative path|name that a line)"):
                call(name)
        with pytest.raises(ValueError, match=r"expected a (relative path|name that a line)"):
            store.save(name, keys, cam, high_res)
        with pytest.raises(ValueError, match=r"expected a (relative path|name that a line)"):
            store.save_mask(name, mask)
    store.save("a" * 251, keys, cam, high_res)
    for name in ("a" * 252, "\u00e9" * 126, f"{'b' * 256}/a"):
        with pytest.raises(ValueError, match=r"names of at most 255 bytes with \.npy, got 25\d in .*rename"):
            store.save(name, keys, cam, high_res)
    store.path("a" * 251).unlink()
    (tmp_path / "outside").mkdir()
    (tmp_path / "maps").joinpath("link").symlink_to(tmp_path / "outside")
    with pytest.raises(ValueError, match=r"a place within .*maps, got .*which a link leads out to"):
        store.save("link/a", keys, cam, high_res)
    with pytest.raises(ValueError, match=r"a place within .*maps, got .*which a link leads out to"):
        store.save_mask("link/a", mask)
    assert not [*(tmp_path / "outside").iterdir()]
    (tmp_path / "elsewhere").symlink_to(tmp_path / "outside")  # the run's own folder may be a link
    Store(tmp_path / "elsewhere").save("sub/a", keys, cam, high_res)
    assert (tmp_path / "outside" / "maps" / "sub" / "a.npz").is_file()
    with pytest.raises(ValueError, match="expected a format of npz, irn, pmm, got 'png'"):
        Store(tmp_path, "png")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"expected a folder, got .*file, a file"):
        Store(tmp_path / "file")
    store.save("a", keys, cam, high_res)
    (tmp_path / "maps" / "b").touch()
    (tmp_path / "maps" / "c.npy").mkdir()
    assert "b/c" not in store and "c" not in store
    with pytest.raises(ValueError, match="got a file in its place"):
        store.save("b/c", keys, cam, high_res)
    with pytest.raises(ValueError, match=r"expected a place for a file, got .*, a folder; choose"):
        store.save("c", keys, cam, high_res)
    assert store.names() == ["a"]


def test_writes_whole_files_or_none(tmp_path, monkeypatch):
    store = Store(tmp_path)
    store.save("a", *maps(seed=1))
    before = store.path("a").read_bytes()

    def fail(*_):
        raise OSError(errno.EIO, "the disk is broken")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, fail)
            with pytest.raises(OSError, match="the disk is broken"):
                store.save("a", *maps(seed=2))
        assert store.path("a").read_bytes() == before and [p.name for p in store._maps.iterdir()] == ["a.npz"]
    for name, age in (("sub/.b.partial", 90_000), (".c.partial", 7200)):
        path = store._maps / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"half")
        os.utime(path, (path.stat().st_mtime - age,) * 2)
    again = Store(tmp_path)
    assert again.names() == ["a"] and len([*tmp_path.rglob("*.partial")]) == 2  # reading removes nothing
    again.save("d", *maps())
    assert [p.name for p in tmp_path.rglob("*.partial")] == [".c.partial"]  # somebody may be writing it


KILLED = """
import os, random, signal, sys, time
import numpy as np, torch
from ribfast.store import Store

def write(store, version, again):
    for number in range(24):
        name = f"{number % 3}/{number}"
        rng = np.random.default_rng([number, version])
        high_res = rng.random((2, 40, 60), np.float32)
        if again or name not in store:
            store.record(name, version=version)
            store.save(name, [number, 100 + version], torch.from_numpy(high_res[:, ::4, ::4].copy()), high_res)
        if again or not store.has_mask(name):
            store.save_mask(name, rng.integers(0, 20, (40, 60)))

def kill(store, seed, kills):
    rng = random.Random(seed)
    for number in range(kills):
        child = os.fork()
        if child == 0:
            write(store, number % 2, number % 4 > 1)
            os._exit(0)
        time.sleep(rng.uniform(0, 0.04))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        for name in store.names():
            assert store.load(name).keys[0] == int(name.split("/")[1]), name
        for name in store.mask_names():
            assert store.load_mask(name).shape == (40, 60), name
        store.metrics()
    write(store, 0, False)

if __name__ == "__main__":
    for format in ("npz", "irn"):
        kill(Store(os.path.join(sys.argv[1], format), format), 7, 24)
"""


def test_killed_at_any_moment(quick_path):
    """By SIGKILL, while new files are written and while they are replaced; then the run goes on to the same files."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # its children are forks of one that has no threads
    subprocess.run([sys.executable, "-c", KILLED, quick_path], check=True, env=environment)
    names = {"__name__": "here"}
    exec(KILLED, names)
    for format in ("npz", "irn"):
        wholes = [Store(quick_path / f"{format} {version}", format) for version in range(2)]
        broken = Store(quick_path / format, format)
        for version, whole in enumerate(wholes):
            names["write"](whole, version, False)
        assert broken.names() == broken.mask_names() == wholes[0].names() and len(broken.names()) == 24
        assert len(broken.metrics()) == 24
        for name in broken.names():  # each is one version's or the other's, by when its process was killed
            found = broken.load(name)
            whole = wholes[found.keys[1] - 100]
            expected = whole.load(name)
            assert torch.equal(found.cam, expected.cam) and np.array_equal(found.high_res, expected.high_res)
            if format == "npz":  # torch numbers its storages
                assert broken.path(name).read_bytes() == whole.path(name).read_bytes()
            assert any(np.array_equal(broken.load_mask(name), whole.load_mask(name)) for whole in wholes)
        left = {path.suffix for path in broken.folder.rglob("*") if path.is_file()}
        assert left <= {".partial", ".jsonl", ".png", ".npz" if format == "npz" else ".npy"}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_said(number, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(number, "full")

    store = Store(tmp_path)
    store.save("a", *maps())
    monkeypatch.setattr(os, "fsync", full)
    for call in (lambda: store.save("sub/b", *maps()), lambda: store.save_mask("b", np.zeros((3, 4), int))):
        with pytest.raises(OSError, match=r"no space left for .*/b\.(npz|png): \d+ bytes free; free some") as error:
            call()
        assert error.value.errno == number
    assert store.names() == ["a"] and store.mask_names() == [] and not [*tmp_path.rglob("*.partial")]


def test_a_disk_that_is_full_indeed(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no small disk can be mounted: {mounted.stderr.strip()}")
    try:
        store, made = Store(disk, "irn"), []
        with pytest.raises(OSError, match=r"no space left for .*\.npy: \d+ bytes free; free some") as error:
            for number in range(100):
                store.save(str(number), *maps(2, 60, 80))
                made.append(str(number))
        assert error.value.errno == errno.ENOSPC and 0 < len(made) < 20
        with pytest.raises(OSError, match=r"no space left for .*metrics\.jsonl: \d+ bytes free"):
            for number in range(100_000):
                store.record("x" * 100, number=number)
        assert store.names() == sorted(made) and not [*disk.rglob("*.partial")]
        assert all(np.array_equal(store.load(name).high_res, maps(2, 60, 80)[2]) for name in made)
        store.metrics()  # whose last line may be cut
        store.path(made[0]).unlink()
        store.record("y", number=1)
        assert store.metrics()["y"] == {"number": 1}
    finally:
        subprocess.run(["umount", disk], check=True)


def test_limits_on_the_size_of_files(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    store = Store(tmp_path, "irn")
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
        with pytest.raises(OSError, match=r"room for .*a\.npy, got a limit on the size of files"):
            store.save("a", *maps(2, 60, 80))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "a" not in store and not [*tmp_path.rglob("*.partial")]


def test_folders_that_cannot_be_written():
    with tempfile.TemporaryDirectory() as folder:
        root = os.geteuid() == 0
        store = Store(folder)
        store.save("a", *maps())
        for path in (Path(folder), store._maps):
            path.chmod(0o555)
        try:
            if root:
                os.seteuid(65534)  # nobody
            for call in (lambda: store.save("b", *maps()), lambda: store.save_mask("b", np.zeros((2, 2), int)),
                         lambda: store.record("b")):  # fmt: skip
                with pytest.raises(PermissionError, match=r"expected to be allowed to write .*, got permission denied"):
                    call()
            assert store.names() == ["a"]
        finally:
            if root:
                os.seteuid(0)
            for path in (Path(folder), store._maps):
                path.chmod(0o755)


def test_facts_and_failures(tmp_path, caplog):
    store = Store(tmp_path / "new")
    assert store.metrics() == store.failures() == {}
    store.record("a", steps=3, seconds=np.float32(0.5))
    store.record("b", shape=np.array([2, 3]), where=Path("x"), loss=torch.tensor(1.5))
    store.record("a", steps=4)
    assert store.metrics() == {"a": {"steps": 4}, "b": {"shape": [2, 3], "where": "x", "loss": 1.5}}
    with pytest.raises(TypeError, match="facts that JSON knows, got a object"):
        store.record("c", thing=object())
    with open(store.folder / "metrics.jsonl", "ab") as file:
        file.write(b'{"name": "d", "ste')  # killed
    assert store.metrics().keys() == {"a", "b"}
    store.record("e", steps=1)
    with open(store.folder / "metrics.jsonl", "ab") as file:
        file.write(b'[1]\n{"steps": 2}\n\0\0\0')
    assert store.metrics().keys() == {"a", "b", "e"} and "line 4" in caplog.text
    store.fail("a", "broken")
    store.fail("b", "gone")
    assert store.failures() == {"a": "broken", "b": "gone"}
    store.fail("a", None)
    assert store.failures() == {"b": "gone"}
    lines = (store.folder / "failures.jsonl").read_text().splitlines()
    assert json.loads(lines[0]) == {"name": "a", "error": "broken"}
    store.save("a", *maps())
    store.save_mask("a", np.zeros((3, 4), int))
    (store.folder / "config.json").write_text("{}")
    (store.folder / "notes.txt").write_text("mine")
    store.clear("maps", "steps")
    assert store.names() == [] and store.mask_names() == ["a"]
    store.clear("masks")
    assert [path.name for path in store.folder.rglob("*") if path.is_file()] == ["notes.txt"]


def test_several_processes_write_one_folder(quick_path):
    """The same names at once: each file is one of theirs, whole, and so is each line."""
    code = (
        "import os, sys; import numpy as np, torch; from ribfast.store import Store; store = Store(sys.argv[1])\n"
        "me = sum(os.fork() == 0 for _ in range(2))\n"  # four processes: 0, 1, 1, 2
        "high_res = np.full((1, 40, 60), me / 4, np.float32)\n"
        "for number in range(15):\n"
        "    store.record(f'{os.getpid()}/{number}', text='x' * 500)\n"
        "    cam = torch.from_numpy(high_res[:, ::4, ::4].copy())\n"
        "    store.save(f'{number % 5}', [me], cam, high_res)\n"
        "    store.save_mask(f'{number % 5}', np.full((40, 60), me))\n"
        "try:\n"
        "    while os.wait(): pass\n"
        "except ChildProcessError: os._exit(0)"  # torch takes its time to leave
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code, quick_path], check=True, env=environment)
    store = Store(quick_path)
    assert len([*files.lines(quick_path / "metrics.jsonl")]) == len(store.metrics()) == 60
    assert store.names() == store.mask_names() == [str(number) for number in range(5)]
    for name in store.names():
        loaded = store.load(name)
        assert (loaded.high_res == loaded.keys[0].item() / 4).all() and len({*store.load_mask(name).ravel()}) == 1
    assert not [*quick_path.rglob("*.partial")]


@pytest.mark.parametrize("format", ["npz", "irn"])
def test_the_parser_s_stumbles_are_no_errors(tmp_path, format, monkeypatch):
    """Python 3.11's, in threads that read NumPy's headers at the same time."""
    store = Store(tmp_path, format)
    cam, high_res = torch.rand(1, 3, 4), np.random.rand(1, 12, 16).astype(np.float32)
    store.save("a", [0], cam, high_res)
    expected, stumbles = store.load("a"), []
    header = np.lib.format.read_array_header_1_0

    def stumbling(file, *args, **options):
        if len(stumbles) < 3:
            stumbles.append(1)
            raise SystemError("AST constructor recursion depth mismatch (before=45, after=42)")
        return header(file, *args, **options)

    def load(path, **options):
        if len(stumbles) < 3:
            stumbles.append(1)
            raise SystemError("AST constructor recursion depth mismatch (before=45, after=42)")
        return np_load(path, **options)

    np_load = np.load
    monkeypatch.setattr(np, "load", load)
    monkeypatch.setattr(np.lib.format, "read_array_header_1_0", stumbling)
    found = store.load("a")
    assert len(stumbles) == 3 and torch.equal(found.cam, expected.cam)

"""Images shared among processes: the same files, byte for byte, as one process makes, whoever dies."""

import json
from pathlib import Path

import groups
import pictures
import pytest
import torch

from ribfast import cli, models
from ribfast.claims import Claims
from ribfast.store import Store

pytestmark = pytest.mark.processes
RANKS = Path(__file__).with_name("ranks.py")
COUNT = 17


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """(data, classifier, segmenter), networks that have learnt nothing."""
    folder = tmp_path_factory.mktemp("given")
    photos = pictures.draw(folder / "photos", COUNT, (48, 60))
    (folder / "photos" / "images" / "p6.png").write_bytes(b"nothing")
    torch.manual_seed(0)
    classifier, segmenter = models.cam_classifier("resnet10", 2), models.segmenter("resnet10", 2)
    for model, tensors in ((classifier, classifier.state_dict()), (segmenter, segmenter.tensors())):
        model.classes = pictures.CLASSES
        models.save_checkpoint(folder / f"{model.kind}.safetensors", tensors, model.metadata())
    return photos, folder / "classifier.safetensors", folder / "segmenter.safetensors"


def commands(given, out):
    """All that share images, each on what the one before made."""
    photos, classifier, segmenter = map(str, given)
    works = ["--data", photos, "--device", "cpu", "--workers", "1"]
    rib = ["--scales", "1,0.5", "--loss-scales", "1", "--steps", "2", "--n-others", "2", "--others-crop", "32"]
    rib += ["--others-long-side", "48,60", "--no-disjoint", "--share-others", "2", "--steps-kept"]
    return [
        ["cam", *works, "--checkpoint", classifier, "--out", str(out / "cam"), "--scales", "1,0.5"],
        ["rib", *works, "--checkpoint", classifier, "--out", str(out / "rib"), *rib],
        ["masks", *works, "--maps", str(out / "rib"), "--out", str(out / "masks"), "--preset", "crf", "--batch", "3"],
        ["predict", *works, "--checkpoint", segmenter, "--out", str(out / "predicted"), "--batch", "3"],
    ]


def results(out):
    return {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.suffix in (".npz", ".png")}


@pytest.fixture(scope="module")
def alone(given, tmp_path_factory):
    """What one process makes."""
    out, threads = tmp_path_factory.mktemp("alone"), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert [cli.main(words) for words in commands(given, out)] == [3] * 4
    finally:
        torch.set_num_threads(threads)
    found = results(out)
    assert len(found) == 3 * (COUNT - 2) + 2 * (COUNT - 1)
    return found


def check(out, alone):
    assert results(out) == alone
    for name in ("cam", "rib", "masks", "predicted"):
        assert list(Store(out / name).failures()) == ["p6"]
        assert (out / name / "config.json").is_file() and not (out / name / "claims").exists()


def torchrun(*words, nodes=1, processes=2):
    """Its exit codes and what was said, of each node."""
    with groups.free_port() as port:
        base = ["-m", "torch.distributed.run", "--nnodes", nodes, "--nproc-per-node", processes]
        base += ["--master-addr", "127.0.0.1", "--master-port", port]
        agents = [([*base, "--node-rank", node, *words], groups.environment()) for node in range(nodes)]
        with groups.started(*agents) as children:
            codes, _, said = zip(*groups.ended(children), strict=True)
    return [*codes], "".join(said)


@pytest.mark.parametrize("nodes, processes", [(1, 2), (2, 2)], ids=["two", "two nodes of two"])
def test_same_bytes_as_one_process(nodes, processes, given, alone, tmp_path):
    path, out = tmp_path / "commands.json", tmp_path / "out"
    path.write_text(json.dumps(commands(given, out)))
    codes, said = torchrun(RANKS, path, nodes=nodes, processes=processes)
    assert codes == [1] * nodes and "exitcode  : 3" in said, said  # the image that cannot be read
    check(out, alone)
    made = [json.loads(line)["name"] for line in (out / "rib" / "metrics.jsonl").read_text().splitlines()]
    assert len(made) == len(set(made)) == COUNT - 1  # once each


def test_those_that_die_lose_what_they_had_in_hand(given, alone, tmp_path):
    """Without torchrun, which would stop the others."""
    path, out = tmp_path / "commands.json", tmp_path / "out"
    path.write_text(json.dumps(commands(given, out)))
    each = [groups.environment(RANK=str(rank), WORLD_SIZE="3", LOCAL_RANK=str(rank)) for rank in range(3)]
    with groups.started(*(((RANKS, path, "1:1", "2:3"), variables) for variables in each)) as children:
        ended = groups.ended(children)
    assert [code for code, *_ in ended] == [3, -9, -9], ended
    check(out, alone)


def test_torchrun_starts_the_dead_again(given, alone, tmp_path):
    path, out = tmp_path / "commands.json", tmp_path / "out"
    path.write_text(json.dumps(commands(given, out)[:1]))
    torchrun("--max-restarts", "1", RANKS, path, "0:0")
    assert path.with_suffix(".again").exists()
    found = {name: content for name, content in alone.items() if name.startswith("cam/")}
    assert results(out) == found and not (out / "cam" / "claims").exists()


def test_run_shares_its_stages(tmp_path):
    """From labels to predictions and a report, by two processes, an image among those that cannot be read."""
    photos, out, path = pictures.draw(tmp_path / "photos", 9), tmp_path / "out", tmp_path / "commands.json"
    (tmp_path / "photos" / "images" / "p2.png").write_bytes(b"nothing")
    words = ["run", "--data", photos, "--out", str(out), "--network", "resnet10", "--device", "cpu"]
    words += ["--set", "classifier.epochs=1", "--set", "classifier.batch=4", "--set", "classifier.crop=64"]
    words += ["--set", "cam.scales=1.0", "--set", "rib.steps=2", "--set", "rib.n_others=2"]
    words += ["--set", "rib.disjoint=false", "--set", "rib.others_crop=64", "--set", "rib.others_long_side=64,72"]
    words += ["--set", "segmenter.steps=2", "--set", "segmenter.batch=4", "--set", "segmenter.crop=57"]
    path.write_text(json.dumps([words]))
    with groups.ranks(RANKS, path) as children:
        (first, table, said), (other, nothing, also) = groups.ended(children)
    assert first == other == 3, said + also
    assert "predicted" in table and nothing == "" and (out / "report.html").is_file()
    assert len(Store(out / "predicted").mask_names()) == 8 and len(Store(out / "rib").names()) == 7
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for command in ("cam", "rib"):  # by one process
        apart = tmp_path / command
        words = [command, "--data", photos, "--split", str(out / "images.txt"), "--out", str(apart)]
        words += ["--checkpoint", str(out / "classifier" / "classifier.safetensors")]
        assert cli.main([*words, "--config", str(out / command / "config.json")]) == 0
        assert [*map(Path.read_bytes, sorted(apart.rglob("*.npz")))] == [
            *map(Path.read_bytes, sorted((out / command).rglob("*.npz")))]  # fmt: skip
    torch.set_num_threads(threads)


def two(code, *words):
    """(exit code, standard error) of each of two processes that know of one another."""
    with groups.ranks("-c", code, *words) as children:
        return [(code, said) for code, _, said in groups.ended(children)]


TWICE = """
import contextlib, sys, time, torch
from pathlib import Path
from torch import nn
from ribfast.processes import processes, together
sys.setswitchinterval(1000)  # threads that need Python wait until it is given away
torch.set_num_threads(1)
def threads():
    found = 0
    for path in Path("/proc/self/task").glob("*/comm"):
        with contextlib.suppress(OSError):  # it has just ended
            found += "gloo" in path.read_text()
    return found
def train(network):
    forward = nn.parallel.DistributedDataParallel(network, bucket_cap_mb=0.01)
    forward(torch.ones(2, 100)).sum().backward()
    if fails:
        raise KeyError
for number, fails in enumerate((True, False, True, False)):
    try:
        with processes("cpu") as here:
            assert together(here, (number, here.rank)) == [(number, 0), (number, 1)] and threads()
            train(nn.Sequential(*(nn.Linear(100, 100) for _ in range(9))))
    except KeyError:
        continue
    end = time.monotonic() + 10  # Linux lists one for a moment after it was joined
    while threads():
        assert time.monotonic() < end
"""


def test_groups_one_after_another(tmp_path):
    """Of the same processes. No thread of one outlives it: if it lets go of a tensor as Python ends, that aborts; and
    if it is ended where it cannot, that waits for ever."""
    assert two(TWICE) == [(0, "")] * 2
    (tmp_path / "twice.py").write_text(TWICE)
    codes, said = torchrun(tmp_path / "twice.py", processes=2)
    assert codes == [0], said


def test_an_error_of_one_is_a_line_of_each(tmp_path):
    """A disk that is full for the one that writes; a folder that another run is at."""
    photos, out = pictures.draw(tmp_path / "photos", 9), tmp_path / "out"
    line = f"train-classifier --data {photos} --out {out} --network resnet10 --batch 4 --crop 64 --device cpu"
    full = """
import os, sys
from ribfast import cli, models
def save(*facts):
    raise OSError("no space left")
if os.environ["RANK"] == "0":
    models.save_checkpoint = save
sys.exit(cli.main(sys.argv[1:]))"""
    (first, said), (other, also) = two(full, *line.split(), "--epochs", "2", "--long-side", "48,72")
    assert first == 1 and said.splitlines()[-1] == "ribfast train-classifier: no space left"
    assert other == 1 and also.splitlines()[-1] == (
        "ribfast train-classifier: another process ended, and said why; the same command goes on"
    )
    run = f"run --data {photos} --out {tmp_path / 'full'} --network resnet10 --device cpu --set classifier.batch=4 "
    run += "--set classifier.crop=64 --set classifier.long_side=48,72 --set rib.disjoint=false"
    (first, said), (other, also) = two(full, *run.split())  # in the midst of a training, in which they wait for another
    assert first == other == 1 and said.splitlines()[-1] == "ribfast run: no space left"
    assert also.splitlines()[-1].startswith("ribfast run: another process ended")
    taken = Claims(tmp_path / "run" / "claims")
    assert taken.take("run")
    line = f"run --data {photos} --out {tmp_path / 'run'} --network resnet10 --device cpu"
    for code, said in two("import sys\nfrom ribfast import cli\nsys.exit(cli.main(sys.argv[1:]))", *line.split()):
        assert code == 1 and "ribfast run: expected one run in" in said.splitlines()[-1] and "Traceback" not in said
    taken.close()


def test_one_that_is_terminated_leaves_its_claims_to_others(given, tmp_path):
    out = tmp_path / "out"
    words = commands(given, out)[0]
    code = "import os, signal, sys\nfrom ribfast import cli\n"
    code += "cli._progress = lambda title='': lambda *facts: facts[2] and os.kill(os.getpid(), signal.SIGTERM)\n"
    code += "sys.exit(cli.main(sys.argv[1:]))"
    with groups.started((["-c", code, *words], groups.environment())) as children:
        ((code, _, said),) = groups.ended(children)
    assert code == 143 and "interrupted; the same command goes on where it was" in said
    assert 0 < len(Store(out / "cam").names()) < COUNT - 2 and not (out / "cam" / "claims").exists()


@pytest.mark.parametrize("number", [0, 3], ids=["cam", "predict"])
def test_an_image_that_kills_its_process_is_got_past(number, given, alone, tmp_path):
    """After two deaths it is taken by itself, and a later start tries it so. In predict's unit are others too."""
    out, name = tmp_path / "out", ("cam", "rib", "masks", "predicted")[number]
    words = commands(given, out)[number]
    dying = [Path(__file__).with_name("dying.py"), "p4", json.dumps([-9, -9, -9, 3, -9, 3]), *words]
    with groups.started((dying, groups.environment())) as children:
        ((code, _, said),) = groups.ended(children)
    assert code == 0, said
    store = Store(out / name)
    assert store.failures().keys() == {"p4", "p6"}
    assert store.failures()["p4"].startswith("4 processes died with it, the last one with nothing else in hand; reduce")
    found = {path: content for path, content in alone.items() if path.startswith(f"{name}/") and "p4." not in path}
    assert results(out) == found and not (out / name / "claims").exists()
    died = [json.loads(line).get("deaths") for line in (out / name / "failures.jsonl").read_text().splitlines()]
    assert [count for count in died if count] == [3, 4]
    assert "with maps p4" in said or "with masks p4" in said
    assert cli.main([*words, "--overwrite"]) == 3 and store.failures().keys() == {"p6"}
    assert cli.main([*words]) == 3

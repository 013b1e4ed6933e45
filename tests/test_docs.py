"""What is written agrees with what was measured and with what is there."""

import csv
import importlib.util
import json
import re
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
REGIONS = ("digit", "motif", "background")


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_are_those_of_the_committed_results():
    tables = script("tables")
    for name, made in tables.MADE.items():
        text = (ROOT / name).read_text()
        assert tables.with_tables(text, made) == text, "run `python benchmarks/tables.py`"


def points(name, key, value, of=lambda row: 100 * row["miou"]):
    """By seed, of a result file's rows of MobileNetV2."""
    rows = json.loads((RESULTS / name).read_text())["rows"]
    return {row["seed"]: of(row) for row in rows if (row["network"], row[key]) == ("mobilenet_v2", value)}


def test_quality_is_told_as_it_was_measured():
    """The sentences of docs/quality.md, with figures from results."""
    text = " ".join((ROOT / "docs" / "quality.md").read_text().split())

    def curve(variant, step):
        return mean(points("quality.json", "variant", variant, lambda row: 100 * row["curve"][step]["miou"]).values())

    cam, released, paper = curve("released", 0), curve("released", 10), curve("paper", 3)
    told = [f"gains {released - cam:.1f} points over the CAM ({cam:.1f} to {released:.1f})"]
    assert abs(curve("fast", 10) - released) < 0.1 and "the fast preset as much" in text
    told += [f"gains {paper - cam:.1f} by K = 3", f"from {paper:.1f} at K = 3 to {curve('paper', 10):.1f} at K = 10"]
    told += [f"the plain mean instead of GNDRP does no worse ({curve('gap', 10):.1f})"]

    plain, erased, grad = (points("quality_eader.json", "variant", v) for v in ("BCE", "EADER, CAM", "EADER, Grad-CAM"))
    gains = [[own[seed] - plain[seed] for seed in sorted(plain)] for own in (erased, grad)]
    told += [f"gain {mean(gains[0]):.1f} points over the plain classifier's ({mean(plain.values()):.1f} to "
             f"{mean(erased.values()):.1f}): {gains[0][0]:.1f}, {gains[0][1]:.1f} and {gains[0][2]:.1f} by seed",
             f"({gains[1][0]:.1f}, {gains[1][1]:.1f} and {gains[1][2]:.1f})"]  # fmt: skip

    of_masks = {name: mean(points("quality_masks.json", "method", f"CAM{name}").values()) for name in
                ("", " + CRF", " + IRN walk", " + IRN walk of 64 steps", " + PAR", " + PAMR")}  # fmt: skip
    gain = {name: value - of_masks[""] for name, value in of_masks.items()}
    long, short = gain[" + IRN walk"], gain[" + IRN walk of 64 steps"]
    told += [f"{long:.1f} points over the CAM at its 256 steps and {short:.1f} at 64",
             f"The label CRF gains {gain[' + CRF']:.1f}, PPMG as much with the power that is chosen, PAMR "
             f"{gain[' + PAMR']:.1f} and PAR {gain[' + PAR']:.1f}"]  # fmt: skip

    def segmenter(variant, of):
        return points("quality_segmentation.json", "variant", variant, of)

    share = "what the same segmenter reaches on ground truth"
    best, own = ({s: v for s, v in segmenter(name, lambda row: 100 * row["miou"]["scales and CRF"]).items()}
                 for name in ("ground truth", "masks"))  # fmt: skip
    on_train = segmenter("masks", lambda row: 100 * row["trained_on"])
    told += [f"Trained on masks of {mean(on_train.values()):.1f} mIoU on train, the segmenter reaches "
             f"{mean(own.values()):.1f} on val, where the masks themselves have "
             f"{of_masks[' + IRN walk of 64 steps']:.1f}",
             f"That is {mean(100 * own[seed] / best[seed] for seed in own):.0f} % of {share} "
             f"({mean(best.values()):.1f})"]  # fmt: skip
    fitted = segmenter("masks, PUF clamp", lambda row: 100 * row["miou"]["scales and CRF"])
    told += [f"Pretended under-fitting costs {mean(own.values()) - mean(fitted.values()):.1f} points here"]
    for sentence in told:
        assert sentence in text, sentence
    quality = script("quality")
    made = quality.report_of_masks(json.loads((RESULTS / "quality_masks.json").read_text())["rows"])
    assert made in (RESULTS / "quality.md").read_text()


def test_the_toy_experiment_is_told_as_it_was_measured():
    rows = list(csv.DictReader((ROOT / "benchmarks" / "results" / "toy.csv").read_text().splitlines()))

    def mean(what, index, loss, region):
        key = {"what": what, "index": str(index), "loss": loss, "region": region}
        values = [float(row["hgr"]) for row in rows if key.items() <= row.items()]
        assert len(values) == 3
        return sum(values) / 3

    last = {(loss, region): mean("step", 10, loss, region) for loss in ("rib", "bce") for region in REGIONS}
    expected = [mean("layer", layer, "", "motif") for layer in (5, 6)] + [last["rib", "motif"], last["bce", "motif"]]
    expected += [mean("layer", 6, "", "background"), last["rib", "background"]]
    section = (ROOT / "docs" / "methods.md").read_text().partition("## The bottleneck itself")[2].partition("\n#")[0]
    assert re.findall(r"(\d+) %", section) == [f"{100 * value:.0f}" for value in expected]
    text, variants = (ROOT / "docs" / "toy.md").read_text(), script("toy_variants")
    assert variants.table() in text, "put in what `table()` of benchmarks/toy_variants.py says"
    shown = {"after L_RIB": [last["rib", region] for region in REGIONS]}
    shown |= {"after BCE": [last["bce", region] for region in REGIONS]}
    for layer in range(1, 7):
        name = "the logit" if layer == 6 else f"layer {layer}"
        shown[name] = [mean("layer", layer, "", region) for region in REGIONS]
    for name, values in shown.items():
        assert f"| {name} | {' | '.join(f'{value:.2f}' for value in values)} |" in text


def anchors(path):
    """Of a file's headings, as links name them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_demo_is_told_as_it_was_measured():
    demo, text = script("demo"), (ROOT / "docs" / "methods.md").read_text()
    section = text.partition("### The demo")[2].partition("\n#")[0]
    assert demo.table() in section, "put in what `table()` of benchmarks/demo.py says"
    rows = json.loads(demo.RESULTS.read_text())["rows"]
    gains = [row["rib"] - row["cam"] for row in rows]
    assert len(rows) >= 3 and f"{sum(gains) / len(gains):.1f} points of mIoU" in section
    assert f"{min(rows, key=lambda row: row['load'][0])['seconds']} seconds" in section


def test_named_files_and_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for path in DOCUMENTS:
        text = path.read_text()
        for link, anchor in re.findall(r"\]\((?!https?:)([\w/.-]*)#?([\w-]*)\)", text):
            place = path.parent / link if link else path
            assert place.exists(), (path.name, link)
            assert not anchor or anchor in anchors(place), (path.name, link, anchor)
        for target in re.findall(r"`make (?:VENV=none )?([a-z-]+)", text):
            assert f"\n{target}:" in makefile, target
        for name in re.findall(r"`((?:benchmarks|csrc|ribfast|tests)/[\w/.-]+\.\w+)`", text):
            assert (ROOT / name).exists() or "OP" in name, (path.name, name)


def test_pages_are_linked_from_the_readme_and_link_back():
    readme = (ROOT / "README.md").read_text()
    for path in (ROOT / "docs").glob("*.md"):
        assert f"(docs/{path.name})" in readme
        assert "(../README.md)" in path.read_text().split("\n\n")[1]


def test_the_picture_is_made_from_a_demo(tmp_path):
    """Of the one image whose map in `rib` covers its object."""
    import cv2
    import numpy as np

    from ribfast import data
    from ribfast.data import synthetic
    from ribfast.store import Store

    overview = script("overview")
    committed = cv2.imread(str(overview.PICTURE))
    assert overview.PICTURE.stat().st_size < 200_000 and 1400 < committed.shape[1] < 1800
    synthetic.draw(tmp_path / "pictures", training=8, validation=0)
    source = data.open_source(f"folder:{tmp_path / 'pictures'}", "train")
    single = [item for item in source if len(item.classes) == 1]
    for item in source:
        truth = source.mask(item)
        for name in ("cam", "rib"):
            good = name == "rib" and item is single[-1]
            maps = np.stack([(truth == number + 1) * np.float32(good) for number in item.classes])
            Store(tmp_path / name, high_res=True).save(item.name, item.classes, maps[:, ::4, ::4], maps)
        for name in ("masks", "relabelled"):
            Store(tmp_path / name).save_mask(item.name, truth)
    for name in ("cam", "rib"):
        (tmp_path / name / "evaluation.json").write_text('{"best": {"threshold": 0.5}}')
    assert len(single) > 1 and overview.chosen(tmp_path, source) == single[-1].name
    sheet = overview.draw(tmp_path, None)
    assert sheet.shape == committed.shape and not np.array_equal(sheet, overview.draw(tmp_path, single[0].name))


def test_code_that_is_quoted_is_there():
    """A block under a line that names its file."""
    quoted = re.findall(
        r"^`([\w/.]+)`:\n\n```\w+\n(.*?)^```", (ROOT / "docs" / "operators.md").read_text(), re.S | re.M
    )
    assert len(quoted) >= 5
    for name, code in quoted:
        assert code in (ROOT / name).read_text(), name


def examples(name):
    """A document's blocks of Python, but for those that quote a file."""
    text = re.sub(r"^`[\w/.]+`:\n\n```.*?^```", "", (ROOT / name).read_text(), flags=re.S | re.M)
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.S | re.M)


def write_folder(folder, count=1):
    """A data set of squares, with masks and a list; returns the first mask."""
    import cv2
    import numpy as np

    mask = np.zeros((48, 64), np.uint8)
    mask[8:24, 8:32] = 1
    names = [f"{'ab'[number % 2]}{number}" for number in range(count)]
    for kind, picture in (("images", np.zeros((48, 64, 3), np.uint8)), ("masks", mask)):
        (folder / kind).mkdir(parents=True)
        for name in names:
            cv2.imwrite(str(folder / kind / f"{name}.png"), picture)
    rows = "".join(f"{name}.png,{'cat' if name[0] == 'a' else 'dog'}\n" for name in names)
    (folder / "labels.csv").write_text(f"image,labels\n{rows}")
    (folder / "train.txt").write_text("".join(f"{name}\n" for name in names))
    return mask


def test_readme_examples_run(tmp_path):
    """On two photographs, with networks that are small."""
    import numpy as np
    import torch

    from ribfast import models

    pipeline, replacement = examples("README.md")
    write_folder(tmp_path / "photos", 2)
    state = models.cam_classifier("mobilenet_v2", 1).state_dict()
    state = {name: value for name, value in state.items() if not name.startswith("classifier.w")}
    models.save_checkpoint(tmp_path / "weights.safetensors", state)
    few = "steps=2, n_others=1, others_crop=32, others_long_side=(32, 48)"
    for shown, small in (("epochs=8, long_side=(224, 384), crop=288", "epochs=1, batch=2, long_side=(32, 48), crop=32"),
                         ("fast(lr=3e-5)", f"fast(lr=3e-5, {few})")):  # fmt: skip
        assert shown in pipeline
        pipeline = pipeline.replace(shown, small)
    names = {"photos": tmp_path / "photos", "out": tmp_path / "out", "weights": tmp_path / "weights.safetensors"}
    exec(pipeline, names)
    assert names["result"]["images"] == 2 and len(names["Store"](tmp_path / "out" / "rib").names()) == 2

    names = {"np": np, "width": 12, "height": 9, "photo": np.zeros((9, 12, 3), np.uint8)}
    names["softmax"] = torch.rand(21, 9, 12).softmax(0).numpy()
    exec(replacement, names)
    assert names["labels"].shape == (9, 12)


def test_operators_examples_run(tmp_path):
    """With arrays of the shapes that they name."""
    import torch

    from ribfast import models

    code, classifiers = examples("docs/operators.md")
    sides = {"maps_1x": (24, 32), "maps_05x": (12, 16), "maps_15x": (36, 47), "maps_2x": (47, 63)}
    names = {name: torch.rand(2, 3, *side) for name, side in sides.items()}
    names |= {"maps": torch.randn(2, 3, 24, 32), "present": torch.ones(2, 3, dtype=torch.bool)}
    names |= {"maps_a": [names["maps_1x"]], "maps_b": [names["maps_2x"]]}
    names |= {"images": torch.zeros(1, 12, 14, 3, dtype=torch.uint8), "p": torch.rand(1, 3, 12, 14).softmax(1)}
    names |= {"labels": torch.randint(3, (1, 12, 14), dtype=torch.uint8)}
    names |= {"cam": torch.rand(2, 12, 14), "boundary": torch.rand(12, 14)}
    names |= {"photos": torch.rand(1, 3, 12, 14), "class_maps": torch.rand(1, 2, 12, 14)}
    names |= {"features": torch.randn(30, 4), "values": torch.randn(30, 6), "unary": torch.rand(3, 30)}
    exec(code, names)
    assert names["probabilities"].shape == (1, 3, 12, 14)
    assert names["pooled"].shape == (2, 3) and names["cams"].shape == (3, 375, 500) and len(names["many"]) == 2

    names = {"checkpoint": tmp_path / "weights.safetensors", "photos": torch.randn(1, 3, 48, 64)}
    models.save_checkpoint(names["checkpoint"], models.cam_classifier("resnet50", 20).state_dict())
    exec(classifiers, names)
    assert names["cams"].shape == (1, 20, 3, 4)


def test_data_examples_run(tmp_path):
    import numpy as np

    from ribfast import data

    sources, own = examples("docs/data.md")
    names = {"photos": tmp_path / "photos", "out": tmp_path / "maps"}
    mask = write_folder(names["photos"])

    def maps_of(scales):
        assert [view.shape[2:] for view in scales] == [data.scaled_size((48, 64), s) for s in (1, 0.5, 1.5, 2)]
        maps = mask[None] * np.float32(0.25)
        return maps[:, ::4, ::4], maps

    names["maps_of"] = maps_of
    exec(sources, names)
    assert names["threshold"] == 0.1 and names["miou"] > 0.98  # enlarged maps have rounder corners

    (tmp_path / "pictures").mkdir()
    for name in ("cat_1", "dog_2"):
        (tmp_path / "pictures" / f"{name}.jpg").touch()
    names = {"pictures": tmp_path / "pictures", "classes": ["cat", "dog"]}
    exec(own, names)
    assert [(item.name, item.classes) for item in names["source"]] == [("cat_1", (0,)), ("dog_2", (1,))]


def test_methods_examples_run():
    import numpy as np
    import torch

    from ribfast import models

    adapting, masking = examples("docs/methods.md")
    names = {"classifier": models.cam_classifier("resnet18", 20)}
    sides = [(round(96 * scale), round(128 * scale)) for scale in (1, 0.5, 1.5, 2)]
    names |= {"views": [torch.randn(2, 3, *side) for side in sides]}
    names["others"] = lambda step: (torch.randn(2, 3, 48, 48), torch.arange(20).expand(2, -1) == 5)
    exec(adapting.replace("steps=10", "steps=3"), names)
    assert names["result"].high_res.shape == (2, 96, 128) and names["result"].keys == [3, 11]

    names = {"photo": np.zeros((48, 64, 3), np.uint8), "maps": torch.rand(2, 48, 64), "strided": torch.rand(2, 12, 16)}
    names |= {"cat_map": names["maps"][0], "dog_map": names["maps"][1]}
    names |= {"irn": models.irn_network("resnet18").eval(), "classifier": models.cam_classifier("resnet18", 20).eval()}
    exec(masking, names)
    assert names["labels"].shape == (48, 64) and names["maps"].shape == (2, 48, 64)


def test_no_example_is_left_out():
    """Every document's blocks of Python are run by a test above."""
    run = {"README.md": 2, "docs/operators.md": 2, "docs/data.md": 2, "docs/methods.md": 2}
    for path in DOCUMENTS:
        name = path.relative_to(ROOT).as_posix()
        assert len(examples(name)) == run.get(name, 0), name

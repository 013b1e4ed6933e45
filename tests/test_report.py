"""The page of a run, in a real browser: what its sliders do, and that its numbers are eval's."""

import dataclasses
import json
import re
import shutil

import browser
import cv2
import numpy as np
import pictures
import pytest
import torch

from ribfast import cli, data, models
from ribfast.metrics import bootstrap_gain
from ribfast.pipeline import (
    AdaptConfig,
    CamConfig,
    EvaluateConfig,
    MasksConfig,
    adapt_maps,
    evaluate_maps,
    evaluate_masks,
    make_cams,
    make_masks,
)
from ribfast.report import ReportConfig, collect, open_stage, page, write_report
from ribfast.store import Store

NASTY = ("<img src=x onerror=alert(1)>", "</script><script>document.title='run'</script>")
SMALL = {"steps": 4, "n_others": 2, "others_crop": 40, "others_long_side": (32, 48), "share_others": 2, "lr": 1e-5,
         "explode_area": None, "stop_logit": None, "disjoint": False, "device": "cpu", "workers": 1}  # fmt: skip
ONE = {"workers": 0}
MINUS, NONE = "\N{MINUS SIGN}", "\N{EN DASH}"


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    """Pictures with some pixels to ignore, of classes whose names would run if they were not escaped."""
    folder = tmp_path_factory.mktemp("report") / "data"
    made = pictures.draw(folder, 9)
    for name in ("classes.txt", "labels.csv"):
        text = (folder / name).read_text()
        for plain, nasty in zip(pictures.CLASSES, NASTY, strict=True):
            text = text.replace(plain, nasty)
        (folder / name).write_text(text)
    mask = cv2.imread(str(folder / "masks" / "p3.png"), cv2.IMREAD_UNCHANGED)
    mask[:6] = 255
    cv2.imwrite(str(folder / "masks" / "p3.png"), mask)
    return made


@pytest.fixture(scope="module")
def source(spec):
    return data.open_source(spec)


@pytest.fixture(scope="module")
def runs(source, tmp_path_factory):
    """A network that has learnt nothing, whose maps differ all the same; its CAMs, RIB's maps by step, masks."""
    torch.manual_seed(0)
    model, folder = models.cam_classifier("mobilenet_v2", 2), tmp_path_factory.mktemp("runs")
    with torch.no_grad():
        model.classifier.weight.normal_(0, 0.3)
    maps, rib, masks = (Store(folder / name) for name in ("maps", "rib", "masks"))
    make_cams(source, model, maps, CamConfig(device="cpu", **ONE))
    made = adapt_maps(source, model, rib, AdaptConfig.released(**SMALL, steps_kept=True))
    assert not made.failed
    make_masks(source, rib, masks, MasksConfig(method="threshold", background=0.5, device="cpu", **ONE))
    (folder / "rib" / "config.json").write_text(
        json.dumps({"command": "rib", "config": {"note": NASTY[0], "tau": 0.4}})
    )
    return folder


@pytest.fixture(scope="module")
def stages(runs):
    return [open_stage("CAM", runs / "maps"), open_stage("<b>RIB", runs / "rib"), open_stage("cut", runs / "masks")]


@pytest.fixture(scope="module")
def written(source, stages, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_report(path, collect(source, stages, ReportConfig(title=NASTY[1], **ONE)))
    return path


@pytest.fixture(scope="module")
def chromium():
    if browser.MISSING:
        pytest.skip(browser.MISSING)
    with browser.Browser() as window:
        yield window


@pytest.fixture
def shown(chromium, written):
    return show(chromium, written)


def show(chromium, path):
    chromium.resize(1280)
    chromium.scheme("light")
    chromium.log()
    chromium.open(path.as_uri())
    chromium.until("document.getElementById('gallery').scrollIntoView(); return Boolean(cards[0].pixels)", said=WHERE)
    return chromium


WHERE = """
    const {near, pixels, element} = cards[0], place = element.getBoundingClientRect();
    return {near, pixels: Boolean(pixels), top: place.top, bottom: place.bottom, height: innerHeight, width: innerWidth,
            scrolled: scrollY, seen: document.visibilityState}"""


def slide(window, name, value):
    """As a hand does it."""
    script = """
        const slider = document.getElementById(arguments[0]);
        slider.value = arguments[1];
        for (const kind of ['input', 'change']) slider.dispatchEvent(new Event(kind))"""
    window.run(script, name, value)
    settled(window)


def settled(window):
    window.until("return !waiting")


def mious(window):
    """What the gallery says, in points, by stage."""
    found = window.run("return [...document.querySelectorAll('#live b')].map(value => value.textContent)")
    return [float(text) for text in found]


def drawn(window, kind, card=0):
    """A canvas's pixels, in words."""
    return window.run("return shown[arguments[0]].figures.get(arguments[1]).canvas.toDataURL()", card, kind)


def test_steps_are_kept_up_to_the_final_map(source, runs):
    store, without, seen = Store(runs / "rib"), Store(runs / "maps"), 0
    for item in source:
        if not item.classes:
            assert store.load_steps(item.name) is None
            continue
        keys, steps = store.load_steps(item.name)
        final = store.read(item.name)
        assert keys.tolist() == final.keys.tolist() == list(item.classes)
        assert steps.shape == (4, *final.cam.shape) and steps.dtype == np.uint8
        np.testing.assert_allclose(steps[-1] / 255, final.cam.float(), atol=0.5 / 255 + 2**-11)
        seen += (steps[0] != steps[-1]).any()
        assert without.load_steps(item.name) is None
    assert seen > 4
    keys, steps = store.load_steps("p0")
    with pytest.raises(ValueError, match=r"Store.save_steps: expected uint8 steps \(k, 1, h, w\), got float64"):
        store.save_steps("p0", keys, steps / 255)


def test_steps_go_on_where_a_run_was_cut_off_and_go_with_its_maps(source, runs, tmp_path):
    torch.manual_seed(0)
    model, store = models.cam_classifier("mobilenet_v2", 2), Store(tmp_path)
    two = data.Source(source.classes, source[:2], source.upright)
    config = AdaptConfig.released(**SMALL | {"steps": 2}, steps_kept=True)
    adapt_maps(two, model, store, config, others=source)
    before = (tmp_path / "steps" / "p0.npz").stat().st_mtime_ns
    store.path("p1").unlink()
    (tmp_path / "steps" / "p1.npz").unlink()
    assert adapt_maps(two, model, store, config, others=source).made == 1
    assert store.load_steps("p1") is not None and (tmp_path / "steps" / "p0.npz").stat().st_mtime_ns == before
    store.clear("maps", "steps")
    assert not list(tmp_path.rglob("*.npz"))
    adapt_maps(two, model, store, AdaptConfig.released(**SMALL | {"steps": 2}), others=source)
    assert store.names() == ["p0", "p1"] and store.load_steps("p0") is None


def test_the_gallerys_numbers_are_evals(shown, source, runs, stages):
    expected = [evaluate_maps(source, stages[n].store, EvaluateConfig(**ONE)) for n in (0, 1)]
    expected.append(evaluate_masks(source, stages[2].store, EvaluateConfig(**ONE)))
    found = mious(shown)
    for number, facts in zip(found, expected, strict=True):
        assert abs(number - 100 * facts["reported"]["miou"]) <= 0.005 + 1e-9
    assert len({*found}) == 3
    table = shown.run("return [...document.querySelectorAll('#stages tbody b')].map(b => b.textContent)")
    assert [float(text) for text in table] == found
    for place in (0, 7, 30, 60):  # RIB's slider, at its last step
        slide(shown, "threshold", place)
        assert abs(mious(shown)[1] - 100 * expected[1]["mious"][place]) <= 0.005 + 1e-9
        assert mious(shown)[0] == found[0]
    shown.choose("#stage", 0)
    slide(shown, "threshold", 12)
    assert abs(mious(shown)[0] - 100 * expected[0]["mious"][12]) <= 0.005 + 1e-9
    bars = shown.run(
        "return [...document.querySelectorAll('#bar-table tr')].slice(1).map(r => [...r.cells].map(c => c.textContent))"
    )
    labels = ("background", *source.classes)
    assert [row[0] for row in bars] == [*labels, "mean"]
    for row, label in zip(bars, labels, strict=False):
        for text, facts in zip(row[1:], expected, strict=True):
            assert abs(float(text) - 100 * facts["ious"][label]) <= 0.005 + 1e-9
    assert not shown.log()


@pytest.mark.parametrize("format", ["irn", "pmm"])
def test_maps_of_other_tools(source, stages, chromium, format, tmp_path):
    store, path = Store(tmp_path / "maps", format, flat=True), tmp_path / "report.html"
    for item in source:
        if item.classes:
            own = stages[0].store.load(item.name)
            store.save(item.name, own.keys, own.cam, own.high_res)
    write_report(path, collect(source, [open_stage("other", tmp_path / "maps")], ReportConfig(**ONE)))
    expected = evaluate_maps(source, store, EvaluateConfig(**ONE))
    show(chromium, path)
    for place in (10, 40):
        slide(chromium, "threshold", place)
        assert abs(mious(chromium)[0] - 100 * expected["mious"][place]) <= 0.005 + 1e-9
    assert not chromium.log()


def test_sliders_redraw(shown, source, stages):
    kinds = ("photo", "truth", "first", "first-mask", "map", "mask", "masks-2")
    first = {kind: drawn(shown, kind) for kind in kinds}
    assert len({*first.values()}) == 7
    slide(shown, "threshold", 55)
    assert [kind for kind in kinds if drawn(shown, kind) != first[kind]] == ["mask"]
    at_last, before = mious(shown), drawn(shown, "mask")
    slide(shown, "step", 1)
    assert drawn(shown, "map") != first["map"] and drawn(shown, "first") == first["first"]
    assert drawn(shown, "mask") != before and mious(shown)[1] != at_last[1]
    said = shown.run(
        "return shown[0].figures.get('map').text.textContent + document.getElementById('live').textContent"
    )
    assert "<b>RIB after step 1" in said and "at 0.55, step 1" in said
    slide(shown, "step", 4)
    assert mious(shown) == at_last and drawn(shown, "mask") == before
    assert not shown.log()


def test_maps_are_beside_what_they_gain_over(chromium, shown, source, runs, stages, tmp_path):
    """Beside RIB's maps the CAM, beside the CAM nothing, and of RIB's alone those after its first step."""
    kinds = "return [...shown[0].figures].filter(([, f]) => !f.element.hidden).map(([kind]) => kind)"
    texts = "return ['first', 'map'].map(kind => shown[0].figures.get(kind).text.textContent)"
    assert shown.run(kinds) == ["photo", "truth", "first", "first-mask", "map", "mask", "masks-2"]
    assert shown.run(texts) == ["CAM", "<b>RIB after step 4"]
    score, both = shown.run("""
        const {score} = shown[0].figures.get('first-mask');
        return [score.textContent, [0, 1].map(stage => percent(scoreOf(0, stage)))]""")
    assert score == both[0] != both[1]
    cam = drawn(shown, "first"), drawn(shown, "first-mask")
    shown.choose("#stage", 0)
    settled(shown)
    assert shown.run(kinds) == ["photo", "truth", "map", "mask", "masks-2"]
    assert (drawn(shown, "map"), drawn(shown, "mask")) == cam

    shutil.copytree(runs / "rib", tmp_path / "rib")
    store, path = Store(tmp_path / "rib"), tmp_path / "report.html"
    keys, steps = store.load_steps("p0")
    store.save_steps("p0", keys, steps[:2])  # as of an image that was stopped
    write_report(path, collect(source, [open_stage("RIB", store.folder)], ReportConfig(**ONE)))
    show(chromium, path)
    assert chromium.run(texts) == ["RIB after step 1", "RIB, stopped after 2"]
    assert chromium.run("return shown[1].figures.get('map').text.textContent") == "RIB after step 4"
    after = drawn(chromium, "map")
    slide(chromium, "step", 1)
    assert chromium.run(texts) == ["RIB after step 1"] * 2
    assert drawn(chromium, "map") == drawn(chromium, "first") != after and not chromium.log()


def test_pictures_are_enlarged(shown):
    state = "return [document.getElementById('large').open, document.getElementById('large-title').textContent]"
    shown.run("shown[0].figures.get('map').element.querySelector('button').focus()")
    shown.press("enter")
    shown.until("return document.getElementById('large').open")
    assert shown.run(state) == [True, "p0 · <b>RIB after step 4"]
    copied = shown.run("return document.getElementById('large-picture').toDataURL()")
    assert copied == drawn(shown, "map")
    wide = shown.run("return document.getElementById('large-picture').getBoundingClientRect().width")
    assert wide > 2 * shown.run("return shown[0].figures.get('map').canvas.getBoundingClientRect().width")
    shown.press("right")
    assert shown.run(state)[1].startswith("p0 · <b>RIB above 0.") and shown.run(state)[1].endswith(
        shown.run("return shown[0].figures.get('mask').score.textContent")
    )
    shown.press("left", "left", "escape")
    shown.until("return !document.getElementById('large').open")
    assert shown.run("return document.activeElement.closest('figure').dataset.kind") == "map"
    shown.run("shown[0].figures.get('photo').canvas.click()")
    assert shown.run(state) == [True, "p0 · photograph"]
    shown.run("document.getElementById('large-close').click()")
    assert not shown.run(state)[0] and not shown.log()


def test_masks_in_the_page_follow_the_maps(shown, source, stages):
    """Against maps of the full size, of which the page has few pixels: they differ along the masks' borders."""
    shown.choose("#stage", 0)
    for place in (20, 45):
        slide(shown, "threshold", place)
        high_res = stages[0].store.load("p0").high_res[0]
        found = shown.run("""
            const {canvas} = cards[0].figures.get('mask'), {data} = canvas.getContext('2d').getImageData(0, 0, 64, 64);
            return Array.from({length: 4096}, (_, place) => data[4 * place] > data[4 * place + 2] + 60)""")
        expected = high_res > place / 100
        assert 0.05 < expected.mean() < 1 and (np.reshape(found, (64, 64)) == expected).mean() > 0.97


def test_order_and_filter(shown, source, runs):
    names = "return [...document.querySelectorAll('article h3')].map(h => h.textContent)"
    assert shown.run(names) == [item.name for item in source]
    shown.choose("#order", "worst 1")
    scores = shown.run("return shown.map(card => scoreOf(card.index, 1))")
    assert scores == sorted(scores) and scores[0] < scores[-1]
    worst = shown.run(names)
    shown.choose("#order", "best 1")
    assert shown.run(names) != worst and sorted(shown.run(names)) == sorted(worst)
    before = shown.run(names)
    slide(shown, "threshold", 0)
    scores = shown.run("return shown.map(card => scoreOf(card.index, 1))")
    assert scores == sorted(scores, reverse=True) and shown.run(names) != before

    shown.choose("#class", 1)
    shown.choose("#order", "data")
    settled(shown)
    discs = [item for item in source if 1 in item.classes]
    assert shown.run(names) == [item.name for item in discs] and len(discs) < len(source)
    few = data.Source(source.classes, tuple(discs), source.upright)
    expected = evaluate_maps(few, Store(runs / "rib"), EvaluateConfig(**ONE))
    assert abs(mious(shown)[1] - 100 * expected["mious"][0]) <= 0.005 + 1e-9
    said = shown.run("return ['live', 'sample'].map(id => document.getElementById(id).textContent)")
    assert all(text.count(NASTY[1]) == 1 for text in said) and f"that image's own IoU of {NASTY[1]}." in said[1]

    shown.choose("#order", "worst 1")
    settled(shown)
    result = evaluate_maps(
        few, Store(runs / "rib"), EvaluateConfig(thresholds="0:0:1", **ONE), keep=(kept := []).append
    )
    right, predicted, true = kept[0][:, :, 2].T.astype(float)
    own = dict(zip((item.name for item in discs), right / (predicted + true - right), strict=True))
    ious = [own[name] for name in shown.run(names)]
    assert ious == sorted(ious) and ious[0] < ious[-1] and result["ious"][NASTY[1]] < 1
    shows = shown.run("return shown.map(card => card.figures.get('mask').score.textContent)")
    assert [float(text) for text in shows] == pytest.approx([100 * iou for iou in ious], abs=0.006)
    shown.choose("#class", -1)
    assert len(shown.run(names)) == len(source) and not shown.log()


def test_keys_alone_are_enough(shown, written):
    shown.open(written.as_uri())
    shown.press("tab", "enter")  # the first is the way to the gallery
    shown.until("return location.hash === '#gallery' && document.activeElement.id === 'gallery'")
    shown.until("return Boolean(cards[0].pixels)")
    seen = []
    for _ in range(5):
        shown.press("tab")
        seen.append(shown.run("return document.activeElement.id"))
        outline = shown.run(
            "const s = getComputedStyle(document.activeElement); return s.outlineStyle + s.outlineWidth"
        )
        assert outline == "solid3px"
    assert seen == ["stage", "class", "order", "threshold", "step"]
    shown.press("left")
    settled(shown)
    assert shown.run("return document.getElementById('step-value').textContent") == "3 of 4"
    shown.run("document.getElementById('threshold').focus()")
    before = shown.run("return threshold(1)"), drawn(shown, "mask")
    shown.press("home")
    settled(shown)
    assert before[0] > 0 == shown.run("return threshold(1)") and drawn(shown, "mask") != before[1]
    shown.press("right", "right")
    settled(shown)
    said = shown.run("return document.getElementById('threshold').getAttribute('aria-valuetext')")
    assert said == "0.02" == shown.run("return document.getElementById('threshold-value').textContent")
    unnamed = shown.run("""
        const all = [...document.querySelectorAll('input, select, canvas, [tabindex="0"]:not(pre)')];
        const named = (element) => element.ariaLabel || element.getAttribute('aria-labelledby');
        return all.filter(element => !element.labels?.length && !named(element)).length""")
    assert unnamed == 0


def test_names_never_run(shown, written):
    assert shown.run("return document.title") == NASTY[1]
    assert shown.run("return [document.images.length, document.scripts.length]") == [0, 2]
    chips = shown.run("return [...document.querySelectorAll('article')].map(a => a.textContent)")
    assert NASTY[0] in chips[0] and NASTY[1] in chips[1]
    assert NASTY[0] in shown.run("return document.querySelector('pre').textContent")
    assert "<b>RIB" in shown.run("return document.getElementById('stages').textContent")
    text = written.read_text()
    assert (
        NASTY[0] not in text
        and NASTY[1] not in text
        and not re.search(r"(?:https?:)?//[a-z]", page_without_facts(text))
    )
    assert not shown.log()
    shown.run("""
        const script = document.createElement('script'), picture = document.createElement('img');
        script.textContent = "document.title = 'run'";
        picture.src = 'https://example.org/x.png';
        document.body.append(script, picture)""")
    said = [entry["message"] for entry in shown.log()]
    assert shown.run("return document.title") == NASTY[1]
    assert len(said) == 2 and all("Content Security Policy" in text for text in said)


def page_without_facts(text):
    text = re.sub(r'<script type="application/json".*?</script>', "", text, flags=re.S)
    return text.replace("http://www.w3.org/2000/svg", "")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_readable_in_light_and_dark(shown, scheme):
    shown.scheme(scheme)
    shown.run("for (const details of document.querySelectorAll('details')) details.open = true")
    pairs = shown.run("""
        const found = {}, clear = 'rgba(0, 0, 0, 0)', styleOf = (element) => getComputedStyle(element ?? document.body);
        for (const element of document.querySelectorAll('body *')) {
            const own = [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim());
            if (!own || !element.getClientRects().length) continue;
            let behind = element;
            while (behind && styleOf(behind).backgroundColor === clear) behind = behind.parentElement;
            const ink = element.namespaceURI.includes('svg') ? styleOf(element).fill : styleOf(element).color;
            found[`${ink} on ${styleOf(behind).backgroundColor}`] = `${element.tagName} ${element.className}`;
        }
        return found""")
    assert len(pairs) > 2
    lightness = []
    for pair, where in pairs.items():
        ink, ground = (luminance([int(part) for part in re.findall(r"\d+", text)[:3]]) for text in pair.split(" on "))
        low, high = sorted((ink, ground))
        assert (high + 0.05) / (low + 0.05) >= 4.5, (pair, where)
        lightness.append(ground)
    assert (min(lightness) > 0.8) if scheme == "light" else (max(lightness) < 0.1)
    lines = shown.run("return [...document.querySelectorAll('#chart path')].map(p => getComputedStyle(p).stroke)")
    assert len({*lines}) == 3
    for text in lines:
        low, high = sorted((luminance([int(part) for part in re.findall(r"\d+", text)]), lightness[0]))
        assert (high + 0.05) / (low + 0.05) >= 3


def luminance(rgb):
    """WCAG's."""
    parts = [part / 255 / 12.92 if part / 255 <= 0.04045 else ((part / 255 + 0.055) / 1.055) ** 2.4 for part in rgb]
    return float(np.dot([0.2126, 0.7152, 0.0722], parts))


def test_fits_a_telephone(shown):
    shown.resize(390, 844)
    shown.run("for (const details of document.querySelectorAll('details')) details.open = true")
    shown.until("return document.querySelector('#chart svg').viewBox.baseVal.width < 390")
    wide = shown.run("""
        const beyond = [...document.querySelectorAll('body *')].filter(element =>
            !element.closest('.scroll, #live, thead, .skip')
            && element.getBoundingClientRect().right > innerWidth + 0.5);
        return [document.documentElement.scrollWidth, innerWidth, beyond.map(element => element.outerHTML)]""")
    assert wide[1] == 390 and wide[0] <= 390 and wide[2] == []
    height = "return document.getElementById('tools').getBoundingClientRect().height"
    plain = shown.run(height)
    shown.choose("#class", 1)  # whose name is as long as the screen is wide
    settled(shown)
    assert shown.run(height) <= plain + 1 < 844 / 5
    assert shown.run("return document.documentElement.scrollWidth") <= 390
    shown.choose("#class", -1)
    small = shown.run(
        "return Math.min(...[...document.querySelectorAll('#cards canvas')].map(c => c.getBoundingClientRect().width))"
    )
    assert small > 100


def test_two_hundred_images_are_small_and_drawn_where_they_are_looked_at(chromium, source, stages, tmp_path):
    report = collect(source, stages, ReportConfig(**ONE))
    report["images"] = [report["images"][n % 9] | {"name": f"p{n}"} for n in range(200)]
    report["total"] = 200
    path = tmp_path / "report.html"
    write_report(path, report)
    show(chromium, path)
    pixels = "return cards.filter(card => card.pixels).length"
    assert 1 <= chromium.run(pixels) < 30
    for there in range(24, 200, 24):
        assert chromium.run("return document.querySelectorAll('article').length") == there
        assert (
            chromium.run("return document.getElementById('more').textContent")
            == f"Show {min(24, 200 - there)} more of 200"
        )
        chromium.run("document.getElementById('more').click()")
    assert chromium.run("return document.getElementById('more').hidden")
    chromium.run("scrollTo(0, document.getElementById('cards').lastChild.offsetTop)")
    chromium.until("return Boolean(cards[199].pixels && !cards[0].pixels)")
    assert chromium.run(pixels) < 30
    chromium.choose("#order", "name")  # from the start again
    assert chromium.run("return document.querySelectorAll('article').length") == 24 and not chromium.log()


def test_pictures_that_fail_to_decode_are_tried_again(shown):
    drawn_at_once = shown.run("""
        const decoder = createImageBitmap;
        let left = 3;
        window.createImageBitmap = (...given) => left-- > 0 ? Promise.reject(new Error('none')) : decoder(...given);
        cards[0].show(false);
        return cards[0].show(true).then(() => Boolean(cards[0].pixels))""")
    assert not drawn_at_once
    shown.until("return Boolean(cards[0].pixels)")
    said = [entry["message"] for entry in shown.log()]
    assert len(said) == 1 and "p0: Error: none; tried again in a second" in said[0]
    assert shown.run("return cards[0].figures.get('photo').canvas.width") == 64


def test_two_hundred_photographs_stay_below_15_megabytes(tmp_path, caplog):
    """Of VOC's size, textured as photographs rarely are, in five stages, with five classes and ten steps."""
    rng = np.random.default_rng(0)
    (tmp_path / "data" / "images").mkdir(parents=True)
    (tmp_path / "data" / "masks").mkdir()

    def blobs(size, grid):
        coarse = rng.random(grid, np.float32)
        return cv2.resize(coarse, size[::-1], interpolation=cv2.INTER_CUBIC).clip(0, 1)

    keys, size = [*range(5)], (375, 500)
    maps, rib, masks = (Store(tmp_path / name) for name in ("maps", "rib", "masks"))
    for n in range(2):
        photo = 0.7 * blobs(size, (24, 32, 3)) + 0.3 * blobs(size, (120, 160, 3))
        cv2.imwrite(str(tmp_path / "data" / "images" / f"{n}.jpg"), np.uint8(255 * photo))
        labels = np.uint8(np.argmax([blobs(size, (7, 9)) for _ in keys], 0))
        cv2.imwrite(str(tmp_path / "data" / "masks" / f"{n}.png"), labels)
        masks.save_mask(str(n), labels)
        steps = np.stack([[blobs((94, 125), (8, 10)) for _ in keys] for _ in range(10)]).cumsum(0)
        steps /= steps.max((2, 3), keepdims=True)
        for store, cam in ((maps, steps[0]), (rib, steps[-1])):
            store.save(str(n), keys, cam, size=size)
        rib.save_steps(str(n), keys, np.uint8(255 * steps))
    rows = "".join(f"{n}.jpg,a;b;c;d;e\n" for n in range(2))
    (tmp_path / "data" / "labels.csv").write_text(f"image,labels\n{rows}")
    source = data.open_source(f"folder:{tmp_path / 'data'}")
    stages = [open_stage("CAM", tmp_path / "maps"), open_stage("RIB", tmp_path / "rib")]
    stages += [open_stage(name, tmp_path / "masks") for name in ("CRF", "PPMG", "segmenter")]

    def made(megabytes):
        return collect(source, stages, ReportConfig(resamples=0, megabytes=megabytes, **ONE))

    whole = made(15)
    shell = len(page(whole | {"images": []}).encode())
    share = (15e6 - shell) / 100  # of these two among two hundred
    fitted = made((share + shell) / 1e6)
    assert 2e6 < len(page(fitted | {"images": fitted["images"] * 100}).encode()) < 15e6
    sides = [[image["stages"][1]["map_size"][0] for image in report["images"]] for report in (whole, fitted)]
    assert 20 <= min(sides[1]) <= max(sides[1]) < min(sides[0])
    assert min(image["size"][0] for image in fitted["images"]) > 150
    counted = [[image["stages"][1]["counts"] for image in report["images"]] for report in (whole, fitted)]
    assert counted[0] == counted[1]
    assert not caplog.text
    made(0.05)
    assert "its 2 images do not fit into 0.05 MB, however small" in caplog.text


def test_of_many_images_the_worst_and_the_best_are_shown(source, stages, chromium, tmp_path):
    report = collect(source, stages, ReportConfig(images=4, **ONE))
    every = collect(source, stages[2:], ReportConfig(**ONE))
    path = tmp_path / "all.html"
    write_report(path, every)
    show(chromium, path)
    scores = chromium.run("return Object.fromEntries(cards.map(card => [card.facts.name, scoreOf(card.index, 0)]))")
    names = [image["name"] for image in report["images"]]
    assert len(names) == 4 and names == sorted(names)
    assert min(scores.values()) == min(scores[name] for name in names)
    assert max(scores.values()) == max(scores[name] for name in names)
    assert report["stages"][0]["evaluation"]["images"] == 9
    assert [image["name"] for image in collect(source, stages, ReportConfig(images=4, **ONE))["images"]] == names
    write_report(path, report)
    show(chromium, path)
    said = chromium.run("return document.getElementById('sample').textContent")
    assert "4 of 9 images: the worst and the best of cut" in said
    assert "mIoU of 4 images" in chromium.run("return document.getElementById('live').textContent")


def test_without_masks_everything_else_works(spec, source, stages, chromium, tmp_path):
    bare = data.Source(
        source.classes, tuple(data.Item(i.name, i.image, i.classes, None) for i in source), source.upright
    )
    report = collect(bare, stages, ReportConfig(**ONE))
    assert report["judged"] == 0 and all(stage["evaluation"] is None for stage in report["stages"])
    path = tmp_path / "report.html"
    write_report(path, report)
    show(chromium, path)
    assert chromium.run("return ['curves', 'bars'].map(id => document.getElementById(id).hidden)") == [True, True]
    assert "no masks" in chromium.run("return document.getElementById('stages-note').textContent")
    assert chromium.run("return document.getElementById('sample').textContent") == "Hatched is what masks leave open."
    before = drawn(chromium, "mask")
    slide(chromium, "threshold", 50)
    assert drawn(chromium, "mask") != before and "mIoU" not in chromium.run(
        "return document.getElementById('live').textContent"
    )
    assert chromium.run("return document.querySelectorAll('#order option').length") == 2 and not chromium.log()


def test_masks_alone(source, stages, chromium, tmp_path):
    path = tmp_path / "report.html"
    write_report(path, collect(source, stages[2:], ReportConfig(**ONE)))
    show(chromium, path)
    assert chromium.run("return document.getElementById('threshold-label').hidden")
    assert len(mious(chromium)) == 1 and not chromium.log()


def test_command(spec, runs, tmp_path, capsys):
    out, elsewhere = tmp_path / "report.html", tmp_path / "evaluation.json"
    elsewhere.write_text('{"best": {"threshold": 0.333}}')
    words = ["report", "--data", spec, "--out", str(out), "--workers", "0", "--resamples", "50"]
    rib = ["--stage", f"RIB=deep={runs / 'rib'}"]
    assert cli.main([*words, "--stage", f"CAM={runs / 'maps'}", "--threshold-from", f"CAM={elsewhere}"]) == 0
    assert f"wrote {out}, 0." in capsys.readouterr().err
    text = out.read_text()
    facts = json.loads(re.search(r'<script type="application/json" id="facts">(.*?)</script>', text)[1])
    (stage,) = facts["stages"]
    assert stage["evaluation"]["reported"]["threshold"] == 0.333 and 0.333 in stage["thresholds"]
    assert stage["evaluation"]["reported"]["chosen"] == "elsewhere" and stage["seconds"] > 0 and stage["rate"] > 0
    (tmp_path / "pages").mkdir()
    assert cli.main([*words, "--out", str(tmp_path / "pages"), "--stage", f"CAM={runs / 'maps'}"]) == 0
    assert (tmp_path / "pages" / "report.html").is_file()
    capsys.readouterr()
    assert cli.main([*words, *rib]) == 1 and "expected a folder of maps" in capsys.readouterr().err
    assert cli.main([*words, "--stage", f"a={runs / 'maps'}", "--stage", f"a={runs / 'rib'}"]) == 1
    assert "each of a name of its own, got a, a" in capsys.readouterr().err
    assert cli.main([*words, "--stage", f"a={runs / 'maps'}", "--threshold-from", f"b={elsewhere}"]) == 1
    assert "expected --threshold-from of stages a, got b" in capsys.readouterr().err
    assert cli.main([*words, "--stage", f"a={runs / 'masks'}", "--threshold-from", f"a={elsewhere}"]) == 1
    assert "expected a threshold of maps, got one of a, which are masks" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert cli.main([*words, "--stage", f"a={tmp_path / 'empty'}"]) == 1
    assert "expected maps or masks in" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main([*words, "--stage", "nameless"])
    assert "expected NAME=PATH, got 'nameless'" in capsys.readouterr().err
    for field in ("images", "quality"):
        with pytest.raises(ValueError, match=f"ReportConfig: expected {field} of 1 to"):
            ReportConfig(**{field: 0})


def test_times_of_processes_beside_and_after_one_another(source, tmp_path):
    """Beside one another they share their time, after one another they add theirs, whatever the first image took."""
    few = data.Source(source.classes, source[:5], source.upright)

    def took(folder, lines, of=""):
        store = Store(folder)
        for item in few:
            if of:
                store.save_mask(item.name, np.zeros((64, 64), np.uint8))
            else:
                store.save(item.name, [], np.zeros((0, 16, 16)), size=(64, 64))
        for name, began, seconds in lines:
            store.record(name, **{f"{of}began": 1.7e9 + began, f"{of}seconds": seconds})
        (facts,) = collect(few, [open_stage("a", folder)], ReportConfig(resamples=0, **ONE))["stages"]
        return facts["seconds"], facts["rate"]

    alternating = [(f"p{n % 5}", n % 2, float(n if n % 2 else 3 * n)) for n in range(101)]
    assert took(tmp_path / "two", alternating) == (300, 5 / 300)
    after = [("p0", 0, 4.0), ("p1", 0, 10.0), ("p2", 50, 6.0), ("p3", 50, 12.0)]
    assert took(tmp_path / "after", after) == (22, 4 / 22)
    overlapping = [("p0", 0, 10.0), ("p1", 5, 4.0), ("p2", 8, 6.0), ("p3", 20, 1.0)]
    assert took(tmp_path / "both", overlapping, "mask_") == (15, 4 / 15)
    assert took(tmp_path / "others", [("p0", 0, 2.0)])[0] == 2
    Store(tmp_path / "others").record("no image here", began=9, seconds=9.0)
    assert took(tmp_path / "others", [])[0] == 2


def test_other_images_trainings_and_the_run(spec, runs, chromium, tmp_path, capsys):
    """Beside the gallery's: a stage of another split, a training, the run's configuration, and where it was made."""
    (tmp_path / "few.txt").write_text("p1\np3\n")
    training, out = tmp_path / "classifier", tmp_path / "report.html"
    training.mkdir()
    (training / "config.json").write_text('{"command": "train-classifier", "config": {"network": "n9", "batch": 4}}')
    steps = [
        {"step": n, "loss": float(20 - n), "began": 10 if n < 10 else 99, "seconds": n % 10 + 1} for n in range(20)
    ]
    (training / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    (tmp_path / "config.json").write_text('{"command": "run", "config": {"size": "tiny"}}')
    words = ["report", "--data", spec, "--out", str(out), "--workers", "0", "--resamples", "50"]
    words += ["--stage", f"CAM={runs / 'maps'}", "--stage", f"val={runs / 'masks'}", "--split-of"]
    more = ["--training", f"net={training}", "--run", str(tmp_path)]
    assert cli.main([*words, f"val={tmp_path / 'few.txt'}", *more]) == 0
    show(chromium, out)
    table = "return [...document.querySelectorAll(arguments[0] + ' tr')].map(r => [...r.cells].map(c => c.textContent))"
    rows = chromium.run(table, "#stages")
    few = data.open_source(spec, str(tmp_path / "few.txt"))
    result = evaluate_masks(few, Store(runs / "masks"), EvaluateConfig(resamples=50, **ONE))
    assert len(few) == 2 and rows[2][0].startswith("val") and rows[2][-3].startswith("2of ")
    assert rows[2][1].startswith(f"{100 * result['reported']['miou']:.2f}")
    assert chromium.run(table, "#trainings")[1] == [
        "netribfast train-classifier", "n9", "20of 4 images", "1.5in the last tenth", "20 s", "4"]  # fmt: skip
    heads = chromium.run("return [...document.querySelectorAll('#bar-table th[scope=col]')].map(h => h.textContent)")
    assert heads == ["Class", "CAM", f"valof {tmp_path / 'few.txt'}"]
    assert len(mious(chromium)) == 1 and chromium.run("return document.querySelectorAll('#chart path').length") == 1
    said = chromium.run("return document.getElementById('configuration').textContent")
    assert '"size": "tiny"' in said and '"network": "n9"' in said
    assert chromium.run("return document.title") == "data" == chromium.run("return at('title').textContent")
    made = chromium.run("return document.getElementById('made').textContent")
    assert re.match(r"Made \d{4}-\d\d-\d\d by ribfast \S+ on .+, \d+ threads?, torch \d", made)
    assert not chromium.log()

    assert cli.main([*words, "other=few.txt"]) == 1
    assert "expected --split-of of stages CAM, val, got other" in capsys.readouterr().err
    assert cli.main([*words, f"val={tmp_path / 'few.txt'}", "--training", f"net={runs / 'maps'}"]) == 1
    assert "expected a training's steps in" in capsys.readouterr().err
    assert cli.main([*words, f"val={tmp_path / 'few.txt'}", "--run", str(tmp_path / "none")]) == 1
    assert "expected the configuration of a run in" in capsys.readouterr().err
    with pytest.raises(ValueError, match="expected a stage of the page's own images, got a of others"):
        collect(few, [open_stage("a", runs / "masks", split="x", source=few)])


def test_what_a_run_left_out(source, runs, chromium, tmp_path):
    """An image that could not be read, and one that failed in a stage."""
    shutil.copytree(runs / "maps", tmp_path / "cam")
    maps = Store(tmp_path / "cam")
    maps.fail("p3", "a disk that is away")
    (tmp_path / "config.json").write_text('{"command": "run", "config": {}}')
    unread = [{"name": "p1", "reason": "nothing", "part": "split"}, {"name": "p0", "reason": "", "part": "validation"}]
    (tmp_path / "failures.jsonl").write_text("".join(json.dumps(line) + "\n" for line in unread))
    left = dataclasses.replace(source, items=tuple(item for item in source if item.name not in ("p1", "p3")))
    stages = [open_stage("CAM", maps.folder)]
    report = collect(left, stages, ReportConfig(**ONE), run=tmp_path)
    assert report["left_out"] == 2 and report["stages"][0]["failed"] == 1
    write_report(tmp_path / "report.html", report)
    show(chromium, tmp_path / "report.html")
    assert "1 failed" in chromium.run("return document.getElementById('stages').textContent")
    assert "Of 2 images that could not be read" in chromium.run("return document.body.textContent")
    alone = collect(left, stages, ReportConfig(**ONE))
    assert alone["left_out"] == 0 and alone["stages"][0]["failed"] == 0


def test_gain_over_the_first_stage(shown, source, stages):
    numbers = []
    config = EvaluateConfig(**ONE)
    found = [evaluate_maps(source, stage.store, config, keep=numbers.append) for stage in stages[:2]]
    low, high = bootstrap_gain(numbers[1], numbers[0])
    gain = found[1]["reported"]["miou"] - found[0]["reported"]["miou"]
    cells = shown.run("return [...document.querySelectorAll('#stages td:nth-child(3)')].map(c => c.innerText)")
    said = [float(text.replace(MINUS, "-")) for text in re.findall(rf"[+{MINUS}][\d.]+", cells[1])]
    assert said == pytest.approx([100 * gain, 100 * low, 100 * high], abs=0.006) and low < high
    assert cells[0] == NONE and "points over CAM" in shown.run("return at('stages-note').textContent")


def test_eighty_classes_sorted_by_their_heads(source, stages, chromium, tmp_path):
    """On a narrow screen names and heads stay in place, and no head breaks within a word."""
    report, path = collect(source, stages, ReportConfig(**ONE)), tmp_path / "report.html"
    names = [f"class{n} of a long name" for n in range(80)]
    report["classes"], values = names, np.random.default_rng(0).random((3, 81))
    for stage, own in zip(report["stages"], values.tolist(), strict=True):
        stage["evaluation"]["ious"] = own
    report["stages"][1]["evaluation"]["ious"][5] = None
    write_report(path, report)
    show(chromium, path)
    column = "return [...document.querySelectorAll('#bar-table tbody tr')].map(r => r.cells[arguments[0]].textContent)"
    sorts = "return [...document.querySelectorAll('#bar-table th[scope=col]')].map(h => h.ariaSort)"
    before = chromium.run(column, 0)
    assert before == ["background", *names] and chromium.run(sorts) == [None] * 4
    chromium.run("document.querySelectorAll('#bar-table thead button')[2].focus()")
    chromium.press("enter")
    found = chromium.run(column, 2)
    assert found[-1] == NONE and [*map(float, found[:-1])] == sorted(map(float, found[:-1]), reverse=True)
    assert chromium.run(sorts) == [None, None, "descending", None]
    chromium.press("enter")
    assert chromium.run(column, 2) == found[::-1] and chromium.run(sorts)[2] == "ascending"
    chromium.press("enter")
    assert chromium.run(column, 0) == before and chromium.run(sorts) == [None] * 4
    chromium.run("document.querySelector('#bar-table thead button').click()")
    assert chromium.run(column, 0) == sorted(before) and chromium.run(sorts)[0] == "ascending"
    assert chromium.run("return document.querySelector('#bar-table tfoot th').textContent") == "mean"

    chromium.resize(390, 844)
    places = """
        const box = document.querySelector('#bars .scroll'), of = (found) => found.getBoundingClientRect();
        box.scrollTo(60, 700);
        const inside = of(box), row = document.querySelectorAll('#bar-table tbody tr')[40];
        const head = document.querySelector('#bar-table thead th:last-child');
        return [of(head).top - inside.top, of(row.cells[0]).left - inside.left, of(row.cells[0]).width / inside.width,
                box.scrollTop, of(head).height]"""
    top, left, wide, scrolled, high = chromium.run(places)
    assert abs(top) < 1 and abs(left) < 1 and wide < 0.35 and scrolled == 700 and high < 40 and not chromium.log()


def test_a_best_threshold_at_the_end_is_said(source, stages, chromium, tmp_path, capsys):
    path = tmp_path / "report.html"
    inside, end = (
        collect(source, stages[:1], ReportConfig(thresholds=grid, **ONE)) for grid in ("0:1:0.01", "0.5:0.7:0.01")
    )
    best = [report["stages"][0]["evaluation"]["best"] for report in (inside, end)]
    assert [found["at_end"] for found in best] == [False, True]
    write_report(path, end)
    show(chromium, path)
    note = chromium.run("return document.getElementById('stages-note').textContent")
    assert f"CAM's best may lie beyond {best[1]['threshold']:g}" in note and "give --thresholds" in note
    assert "chosen on these same images, so optimistic" in note
    for report in (inside, end):
        cli._print_thresholds(report["stages"][0]["evaluation"] | {"thresholds": report["stages"][0]["thresholds"]})
    said = capsys.readouterr().out
    assert said.count("may lie beyond") == 1 and f"may lie beyond {best[1]['threshold']:g}: give --thresholds" in said

import csv
import json
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from ribfast import cli, toy, toy_figure

SMALL = toy.ToyConfig(seeds=(0, 1, 2), images=40, training_images=1000, epochs=8)
TINY = toy.ToyConfig(seeds=(3, 5), images=4, training_images=24, epochs=1, width=3, steps=2)
DIGIT, MOTIF, BACKGROUND = range(len(toy.REGIONS))


@pytest.fixture(scope="module")
def measured():
    return {seed: toy.measure(SMALL, seed) for seed in SMALL.seeds}


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(1)
    network = toy.ToyNetwork(4).requires_grad_(False)
    network.linear.bias += 1  # logits above 0, where margins are
    return network


@pytest.mark.parametrize("seed", SMALL.seeds)
def test_the_last_layer_loses_the_motif_and_l_rib_brings_it_back(measured, seed):
    found = measured[seed]
    assert found.accuracy >= 0.95
    layers, rib, bce = found.layers, found.steps["rib"], found.steps["bce"]
    before, after = layers[3, MOTIF], layers[5, MOTIF]
    assert before >= 0.7 and after <= before / 2
    lost = before - after
    assert rib[-1, MOTIF] - rib[0, MOTIF] >= lost / 4
    assert bce[-1, MOTIF] - bce[0, MOTIF] < lost / 4
    assert rib[-1, BACKGROUND] < 0.3 and rib[-1, BACKGROUND] < rib[-1, MOTIF]
    assert layers[5, BACKGROUND] < 0.3 and bce[-1, BACKGROUND] < 0.3


def test_one_pass_gives_the_maps_of_every_layer_and_image(network):
    drawn = toy.draw(TINY, 4, 1.0, np.random.default_rng(0))
    maps = toy.gradient_maps(network, drawn.pixels, drawn.labels)
    assert maps.shape == (toy.LAYERS, 4, 40, 40) and maps.amax((-1, -2)).gt(0).all()
    for number, label in enumerate(drawn.labels):
        for layer in range(toy.LAYERS):
            image = drawn.pixels[number : number + 1].clone().requires_grad_()
            output = network.layers(image)[layer]
            (expected,) = torch.autograd.grad(output.sum() if layer < 5 else output[0, label], image)
            torch.testing.assert_close(maps[layer, number], expected[0, 0].abs(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss", toy.LOSSES)
def test_images_are_adapted_together_as_each_would_be_alone(network, loss):
    config = replace(TINY, steps=4, adapt_lr=0.02)
    drawn = toy.draw(config, 4, 1.0, np.random.default_rng(0))
    if loss == "rib":  # a margin that some images reach on the way
        logits = network(drawn.pixels).gather(1, drawn.labels[:, None])
        config = replace(config, margin=logits.max().item() + 0.01)
    maps = toy.adapt(network, drawn.pixels, drawn.labels, loss, config)
    assert maps.shape == (5, 4, 40, 40)
    moved = []
    for number, label in enumerate(drawn.labels):
        alone = toy.ToyNetwork(4)
        alone.load_state_dict(network.state_dict())
        optimizer = torch.optim.SGD(alone.parameters(), config.adapt_lr)
        for step in range(config.steps + 1):
            image = drawn.pixels[number : number + 1].clone().requires_grad_()
            logits = alone(image)[0]
            (expected,) = torch.autograd.grad(logits[label], image, retain_graph=True)
            torch.testing.assert_close(maps[step, number], expected[0, 0].abs(), rtol=1e-4, atol=1e-6)
            optimizer.zero_grad()
            if loss == "bce":
                F.binary_cross_entropy_with_logits(logits, F.one_hot(label, 2).float()).backward()
            else:
                (-logits[label].clamp(max=config.margin)).backward()
            moved.append(max(parameter.grad.abs().max().item() for parameter in alone.parameters()) > 0)
            optimizer.step()
    assert any(moved) and all(moved) == (loss == "bce")  # the margin stops some of them
    with pytest.raises(ValueError, match="adapt: expected a loss of rib, bce, got 'ce'"):
        toy.adapt(network, drawn.pixels, drawn.labels, "ce", config)
    with pytest.raises(
        ValueError, match=rf"adapt: expected finite gradients, got others after update \d of {loss}; lower"
    ):
        toy.adapt(network, drawn.pixels, drawn.labels, loss, replace(config, adapt_lr=1e30))


def test_share_of_high_gradients():
    maps = torch.tensor([[[10.0, 3.0], [3.1, 0.0]], [[0.0, 0.0], [0.0, 0.0]]])  # exactly 0.3 is not above it
    regions = torch.tensor([[[[1, 1], [0, 0]]] * 2, [[[0, 0], [1, 1]]] * 2]).bool()
    assert toy.hgr(maps, regions).tolist() == [0.25, 0.25]  # without a gradient nothing is high
    assert toy.hgr(maps[:1] * 1e-30, regions[:, :1]).tolist() == [0.5, 0.5]
    assert toy.hgr(torch.stack([maps, maps.flip(-2)]), regions).tolist() == [[0.25, 0.25]] * 2


@pytest.mark.parametrize("config", [TINY, replace(TINY, size=32), replace(TINY, size=60, motif=6, noise=0.0)])
def test_drawn_images(config):
    drawn = toy.draw(config, 60, 1.0, np.random.default_rng(1))
    assert drawn.pixels.shape == (60, 1, config.size, config.size) and drawn.labels.tolist() == [0, 1] * 30
    digit, motif, background = drawn.regions
    assert drawn.regions.sum(0).max() == 1 and drawn.regions.flatten(2).any(-1).all()
    near = F.max_pool2d((~background & ~motif).float()[:, None], 3, 1, 1)[:, 0] > 0
    assert not (near & motif).any()
    assert drawn.pixels[:, 0][digit].mean() > 0.8 and drawn.pixels[:, 0][background].abs().mean() < 0.05
    diamond, square = (motif[label].nonzero() for label in (0, 1))
    assert len(diamond) == 2 * config.motif * (config.motif + 1) + 1
    assert len(square) == len({*square[:, 0].tolist()}) * len({*square[:, 1].tolist()})
    places = {tuple(places.nonzero()[0].tolist()) for places in motif}
    assert len(places) > 40
    assert len({glyph.numpy().tobytes() for glyph in digit}) == 60


def test_some_training_images_hold_a_motif():
    drawn = toy.draw(TINY, 600, 0.1, np.random.default_rng(1))
    held = drawn.regions[MOTIF].flatten(1).any(1)
    assert 35 <= held.sum() <= 85 and held[::2].sum() >= 10
    assert not toy.draw(TINY, 50, 0.0, np.random.default_rng(1)).regions[MOTIF].any()


def test_a_seed_decides_everything():
    first, again, other = (toy.measure(TINY, seed) for seed in (3, 3, 5))
    assert toy.table({3: first}) == toy.table({3: again})
    assert torch.equal(first.layer_maps, again.layer_maps) and not torch.equal(first.drawn.pixels, other.drawn.pixels)
    torch.manual_seed(8)
    expected = torch.rand(1)
    torch.manual_seed(8)
    toy.measure(TINY, 3)
    assert torch.equal(torch.rand(1), expected)  # the caller's draws stay


def words(config, out):
    fields = ("images", "training_images", "epochs", "width", "steps")
    options = [word for name in fields for word in (f"--{name.replace('_', '-')}", str(getattr(config, name)))]
    return ["toy", "--out", str(out), "--seeds", ",".join(map(str, config.seeds)), *options]


def test_command(tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(words(TINY, out)) == 0
    assert {path.name for path in out.iterdir()} == {"toy.csv", "toy.png", "config.json"}
    rows = list(csv.DictReader((out / "toy.csv").read_text().splitlines()))
    keys = [(row["seed"], row["what"], row["index"], row["loss"], row["region"]) for row in rows]
    assert keys == [
        (seed, *which, region)
        for seed in ("3", "5")
        for which in [*(("layer", str(k), "") for k in range(1, 7)),
                      *(("step", str(step), loss) for loss in toy.LOSSES for step in range(3))]
        for region in toy.REGIONS
    ]  # fmt: skip
    assert all(0 <= float(row["hgr"]) <= 1 for row in rows)
    expected = toy.measure(TINY, 5)
    last = [float(row["hgr"]) for row in rows[-3:]]
    assert last == pytest.approx(expected.steps["bce"][-1].tolist(), abs=6e-5)
    assert json.loads((out / "config.json").read_text())["config"]["training_images"] == 24
    assert cv2.imread(str(out / "toy.png")).shape[2] == 3
    capsys.readouterr()

    written = (out / "toy.csv").read_bytes()
    assert cli.main(words(TINY, out)) == 0 and (out / "toy.csv").read_bytes() == written
    capsys.readouterr()
    assert cli.main(words(replace(TINY, steps=1), out)) == 1
    said = capsys.readouterr().err
    assert "got another steps (here 1, there 2); choose another --out, or --overwrite" in said
    assert (out / "toy.csv").read_bytes() == written
    assert cli.main([*words(replace(TINY, steps=1, seeds=(3,)), out), "--overwrite"]) == 0
    assert len((out / "toy.csv").read_text().splitlines()) == 1 + 3 * (6 + 2 * 2)
    (out / "config.json").unlink()
    assert cli.main(words(TINY, out)) == 1
    assert "with toy.csv and no config.json that says whose" in capsys.readouterr().err


@pytest.mark.parametrize(("options", "message"), [
    ("--images 0", "ToyConfig: expected images of at least 1, got 0"),
    ("--training-images 0", "ToyConfig: expected training_images of at least 1, got 0"),
    ("--seeds 1,1", "ToyConfig: expected seeds of at least 0, each once, got (1, 1)"),
    ("--seeds -1", "ToyConfig: expected seeds of at least 0, each once, got (-1,)"),
    ("--digits 66", "ToyConfig: expected two different digits, got '66'"),
    ("--motif-share 2", "ToyConfig: expected motif_share from 0 to 1, got 2.0"),
    ("--size 31", "ToyConfig: expected size of at least 32 and motif from 2 to a tenth of it, got 31 and 3"),
    ("--motif 5", "ToyConfig: expected size of at least 32 and motif from 2 to a tenth of it, got 40 and 5"),
    ("--strides 1,1,1,1,0", "ToyConfig: expected strides of at least 1 and steps of at least 0"),
    ("--strides 1,2", "argument --strides: expected 5 values"),
    ("--adapt-lr nan", "ToyConfig: expected adapt_lr of at least 0, got nan"),
])  # fmt: skip
def test_wrong_options_are_named(options, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["toy", "--out", str(tmp_path / "out"), *options.split()])
    assert stop.value.code == 2 and message in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("dashed", [False, True])
def test_lines_are_where_their_values_are(dashed):
    canvas = np.full((500, 700, 3), 255, np.uint8)
    axes = toy_figure._Axes(canvas, (100, 50, 400, 300), (1, 5), "layer", [(1, "1"), (5, "5")])
    colour = toy_figure.COLOURS["motif"]
    end = axes.lines(
        np.arange(1, 6), np.array([[0.0, 0.25, 0.5, 0.75, 1.0], [0.0, 0.25, 0.5, 0.75, 0.5]]), colour, dashed
    )
    assert end == pytest.approx(50 + 300 * 0.25)
    found = np.argwhere((canvas == colour).all(-1))
    ys, xs = found[(found[:, 1] > 105) & (found[:, 1] < 395)].T  # up to the fourth value both are one
    assert len(ys) > 200 and np.abs(ys - (350 - (xs - 100) * 0.75)).max() < 5
    gaps = np.setdiff1d(np.arange(110, 390), xs)
    assert (len(gaps) > 50) == dashed


def test_labels_keep_apart_and_near_their_lines():
    assert toy_figure._rising([1.0, 3.0, 2.0, 2.0, 9.0]) == [1.0, *[pytest.approx(7 / 3)] * 3, 9.0]
    assert toy_figure._rising([5.0, 3.0]) == [4.0, 4.0] and toy_figure._rising([]) == []


def test_figure_shows_the_examples_and_their_maps(tmp_path):
    found = toy.run(replace(TINY, seeds=(3,), images=2, steps=0), tmp_path)
    picture = cv2.imread(str(tmp_path / "toy.png"))
    assert np.array_equal(picture, toy_figure.draw(found))
    cell = toy_figure._CELL
    places = [(150, toy_figure._left(column)) for column in range(toy_figure._COLUMNS)]
    image, *maps = (picture[y : y + cell, x : x + cell] for y, x in places)
    small = cv2.resize(image, (40, 40), interpolation=cv2.INTER_AREA)[:, :, 0] / 255
    digit = found[3].drawn.regions[DIGIT, 0].numpy()
    assert small[digit].mean() < 0.2 and small[found[3].drawn.regions[BACKGROUND, 0].numpy()].mean() > 0.9
    for shown, values in zip(maps, found[3].layer_maps[:, 0], strict=False):
        expected = cv2.applyColorMap((values * 255).round().byte().numpy(), cv2.COLORMAP_VIRIDIS)
        assert np.array_equal(shown, cv2.resize(expected, (cell, cell), interpolation=cv2.INTER_NEAREST))

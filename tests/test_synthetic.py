"""The drawn data set: the same in every run, right about itself, with the trouble that it is drawn for."""

import cv2
import numpy as np
import pytest

from ribfast import data
from ribfast.data import synthetic


@pytest.fixture(scope="module")
def pictures():
    return [synthetic.draw_picture(np.random.default_rng([5, n]), 96, n % len(synthetic.CLASSES)) for n in range(40)]


def test_the_same_bytes_every_time_and_others_for_another_seed(tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        synthetic.draw(tmp_path / name, training=5, validation=2, size=64, seed=seed)
    found = [{path.relative_to(tmp_path / name): path.read_bytes() for path in (tmp_path / name).rglob("*.*")}
             for name in "abc"]  # fmt: skip
    assert len(found[0]) == 7 + 7 + 5 and found[0] == found[1]
    images = [path for path in found[0] if path.parts[0] == "images"]
    assert len({found[0][path] for path in images}) == 7
    assert all(found[0][path] != found[2][path] for path in images)


def test_masks_agree_with_labels_and_lists(tmp_path):
    synthetic.draw(tmp_path, training=12, validation=4, seed=1)
    everything = data.open_source(f"folder:{tmp_path}")
    lists = [data.open_source(f"folder:{tmp_path}", name) for name in ("train", "val")]
    assert [len(source) for source in (everything, *lists)] == [16, 12, 4]
    assert [*lists[0], *lists[1]] == list(everything) and everything.classes == synthetic.CLASSES
    assert lists[0].labels().any(0).all() and data.scan(everything, required=True).problems == ()
    for number, item in enumerate(everything):
        mask = everything.mask(item)
        assert everything.image(item).shape == (96, 96, 3) and mask.shape == (96, 96)
        assert tuple(int(label) - 1 for label in np.unique(mask) if label) == item.classes
        picture = synthetic.draw_picture(np.random.default_rng([1, number]), 96, number % len(synthetic.CLASSES))
        assert np.array_equal(everything.image(item), picture.image) and np.array_equal(mask, picture.mask)


def test_one_to_three_objects_of_several_classes(pictures):
    counts = [sum(cv2.connectedComponents((p.mask == label).astype(np.uint8))[0] - 1 for label in range(1, 5))
              for p in pictures]  # fmt: skip
    assert {*counts} == {1, 2, 3}
    together = [len(np.unique(p.mask)) - 1 for p in pictures]
    assert {*together} >= {1, 2} and max(together) <= 3
    for p in pictures:  # a head for each object
        assert cv2.connectedComponents(p.heads.astype(np.uint8))[0] == cv2.connectedComponents(
            (p.mask > 0).astype(np.uint8))[0]  # fmt: skip


def test_what_tells_a_class_is_a_small_part(pictures):
    for p in pictures:
        assert (p.mask[p.heads] > 0).all()
        for label in np.unique(p.mask)[1:]:
            own = p.mask == label
            assert 0.05 < (p.heads & own).sum() / own.sum() < 0.2


def test_colours_do_not_give_the_masks_away(pictures):
    """Heads are told by saturation and hue; bodies are not told from the clutter, by any two cuts of saturation."""
    hsv = np.stack([cv2.cvtColor(p.image, cv2.COLOR_RGB2HSV) for p in pictures]).astype(int)
    mask, heads = np.stack([p.mask for p in pictures]), np.stack([p.heads for p in pictures])
    objects, others = (np.bincount(hsv[..., 1][region], minlength=256).cumsum() for region in (mask > 0, mask == 0))
    best = max(
        (objects[high] - objects[low]) / (objects[-1] + others[high] - others[low])
        for low in range(0, 250, 5)
        for high in range(low + 5, 256, 5)
    )
    assert 0.2 < best < 0.4
    for label, hue in enumerate(synthetic.HUES, 1):
        far = np.abs((hsv[..., 0] - hue + 90) % 180 - 90)
        near = (far <= 10) & (hsv[..., 1] > 150)
        assert (near & heads & (mask == label)).sum() > 0.9 * (heads & (mask == label)).sum()
        assert (near & (mask == 0)).sum() < 0.1 * near.sum()
        faint = (far <= 10) & (hsv[..., 1] > 40) & (hsv[..., 1] < 110)
        assert (faint & (mask == 0)).sum() > 0.3 * faint.sum()


def test_refuses():
    for given in ({"training": 3}, {"validation": -1}, {"size": 40}):
        with pytest.raises(ValueError, match="expected at least 4 training images"):
            synthetic.draw("nowhere", **given)

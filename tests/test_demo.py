import cv2
import numpy as np
import pytest
import torch

from ribfast import demo, reference


def test_writes_the_merged_maps(tmp_path, capsys):
    demo.main(["--out", str(tmp_path / "new" / "folder"), "--device", "cpu"])
    drawn = cv2.imread(str(tmp_path / "new" / "folder" / "merged.png"))
    picture = cv2.imread(str(demo.Path(demo.__file__).parent / "assets" / "coffee.jpg"))
    assert drawn.shape == (375, 1500, 3)
    assert np.array_equal(drawn[:, :500], picture)
    # on the saucer the "red china" panel is drawn bright (yellow: green well above blue), on the table it is not
    saucer, table = drawn[200:230, 500 + 70 : 500 + 100].mean((0, 1)), drawn[330:360, 500 + 20 : 500 + 50].mean((0, 1))
    assert saucer[1] > 1.5 * saucer[0] and table[1] < saucer[1] / 2


def test_maps_equal_the_reference():
    picture = demo.read(demo.Path(demo.__file__).parent / "assets" / "coffee.jpg")
    cams, average, pooled = demo.run(picture, torch.device("cpu"))
    maps = [demo.class_maps(picture, scale) for scale in demo.SCALES]
    expected = reference.normalize_cams(reference.accumulate_cams(maps, picture.shape[:2], padded=(384, 512)))
    torch.testing.assert_close(cams, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(average, maps[0].mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    assert (pooled < average).all()


def test_unreadable_picture_is_named(tmp_path, capsys):
    broken = tmp_path / "broken.jpg"
    broken.write_text("no picture")
    with pytest.raises(SystemExit) as stopped:
        demo.main(["--picture", str(broken), "--out", str(tmp_path)])
    assert stopped.value.code == 2
    assert f"expected a picture that OpenCV reads, got {broken}" in capsys.readouterr().err
    assert not (tmp_path / "merged.png").exists()

import numpy as np
import pytest
import torch

from ribfast import ops, reference

RNG = np.random.default_rng(2)


@pytest.mark.parametrize("n_labels", [1, 21, 255])
@pytest.mark.parametrize("size", [(0, 3), (1, 1), (7, 5), (63, 129)], ids=str)
def test_equals_reference(size, n_labels):
    labels, mask = (torch.from_numpy(RNG.integers(0, n_labels, size).astype(np.uint8)) for _ in range(2))
    mask[torch.from_numpy(RNG.random(size) < 0.2)] = 255
    found = ops.confusion_matrix(labels, mask, n_labels)
    assert found.dtype == torch.int64 and torch.equal(found, reference.confusion_matrix(labels, mask, n_labels))
    assert found.sum() == (mask != 255).sum()
    turned = ops.confusion_matrix(labels.t(), mask.t(), n_labels)
    assert torch.equal(turned, found)


def test_by_hand():
    labels, mask = torch.tensor([[0, 1, 1, 2]], dtype=torch.uint8), torch.tensor([[0, 0, 1, 255]], dtype=torch.uint8)
    assert ops.confusion_matrix(labels, mask, 3).tolist() == [[1, 1, 0], [0, 1, 0], [0, 0, 0]]


def test_opcheck_and_compiles():
    labels, mask = (torch.randint(5, (9, 13), dtype=torch.uint8) for _ in range(2))
    torch.library.opcheck(torch.ops.ribfast.confusion_matrix.default, (labels, mask, 5))
    compiled = torch.compile(lambda a, b: ops.confusion_matrix(a, b, 5), backend="aot_eager")
    assert torch.equal(compiled(labels, mask), ops.confusion_matrix(labels, mask, 5))


def test_refuses_bad_input():
    zeros = torch.zeros(4, 5, dtype=torch.uint8)
    for error, match, arguments in [
        (TypeError, "labels to be a uint8 tensor", (zeros.int(), zeros, 3)),
        (TypeError, "mask to be a uint8 tensor", (zeros, None, 3)),
        (ValueError, r"labels of the mask's shape \(4, 5\), got \(3, 5\)", (zeros[1:], zeros, 3)),
        (ValueError, r"expected mask \(H, W\)", (zeros, zeros[0], 3)),
        (ValueError, "labels below 3", (zeros + 3, zeros, 3)),
        (ValueError, "labels below 3", (zeros + 255, zeros + 255, 3)),
        (ValueError, "labels in the mask below 3|labels below 3", (zeros, zeros + 3, 3)),
        (ValueError, "n_labels from 1 to 255, got 256", (zeros, zeros, 256)),
    ]:
        with pytest.raises(error, match=match):
            ops.confusion_matrix(*arguments)

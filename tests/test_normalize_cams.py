import math

import pytest
import torch
from cases import DTYPES, NAMES, rounding

from ribfast import ops, reference


def cams(shape, dtype, device):
    return torch.rand(shape, dtype=torch.float64).mul_(7).to(device, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("shape", [(20, 37, 50), (2, 3, 129, 151), (63, 2), (1, 1, 1, 1), (4, 1, 7)], ids=str)
def test_equals_reference(device, dtype, shape):
    values = cams(shape, dtype, device)
    expected = reference.normalize_cams(values)
    result = ops.normalize_cams(values)
    assert result.dtype == dtype
    torch.testing.assert_close(result, expected, **rounding(dtype))
    assert ops.normalize_cams(values, inplace=True) is values
    torch.testing.assert_close(values, expected, **rounding(dtype))


def test_by_hand(device):
    values = torch.tensor([[[1.0, 3.0]], [[0.0, 0.0]]], device=device)
    torch.testing.assert_close(
        ops.normalize_cams(values, 1.0), torch.tensor([[[0.25, 0.75]], [[0.0, 0.0]]], device=device)
    )
    assert ops.normalize_cams(values)[1].count_nonzero() == 0


def test_nan_stays_in_its_map(device):
    values = cams((3, 20, 30), torch.float32, device)
    clean = ops.normalize_cams(values)
    values[1, 19, 29] = math.nan
    result = ops.normalize_cams(values)
    assert result[1].isnan().all()
    assert torch.equal(result[[0, 2]], clean[[0, 2]])


def test_inplace_through_strides(device):
    values = cams((3, 20, 30), torch.float32, device)
    expected = reference.normalize_cams(values.transpose(1, 2))
    view = values.transpose(1, 2)
    assert ops.normalize_cams(view, inplace=True) is view
    torch.testing.assert_close(values.transpose(1, 2), expected)


def test_no_maps(device):
    assert ops.normalize_cams(torch.zeros(0, 4, 5, device=device)).shape == (0, 4, 5)


def test_opcheck(device):
    values = cams((3, 20, 30), torch.float32, device)
    torch.library.opcheck(torch.ops.ribfast.normalize_cams.default, (values, 1e-5))
    torch.library.opcheck(torch.ops.ribfast.normalize_cams_.default, (values, 1e-5))


def test_writing_in_place_is_seen_by_autograd(device):
    values = (torch.ones(1, 2, 2, device=device, requires_grad=True) * 1).exp()
    with torch.no_grad():
        ops.normalize_cams(values, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        values.sum().backward()


def test_compiles_without_graph_breaks(device):
    values = cams((3, 20, 30), torch.float32, device)
    compiled = torch.compile(lambda c: ops.normalize_cams(c * 2), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(values), ops.normalize_cams(values * 2))
    written = torch.compile(lambda c: ops.normalize_cams(c, inplace=True), fullgraph=True, backend="aot_eager")
    copy = values.clone()
    written(copy)
    torch.testing.assert_close(copy, ops.normalize_cams(values))


@pytest.mark.parametrize("inplace", [False, True])
def test_refuses_a_gradient(device, inplace):
    values = cams((3, 20, 30), torch.float32, device).requires_grad_()
    with pytest.raises(RuntimeError, match=r"normalize_cams: expected tensors that need no gradient.*detach\(\)"):
        ops.normalize_cams(values, inplace=inplace)
    with torch.no_grad():
        ops.normalize_cams(values, inplace=inplace)


def test_autocast_keeps_the_dtype(device):
    values = cams((3, 20, 30), torch.float32, device)
    with torch.autocast(device, dtype=torch.bfloat16):
        result = ops.normalize_cams(values)
    assert result.dtype == torch.float32
    assert torch.equal(result, ops.normalize_cams(values))


def test_refuses_bad_input():
    values = torch.zeros(2, 3, 4)
    for error, match, args in [
        (TypeError, "normalize_cams: expected cams to be a tensor .*got list", ([1.0],)),
        (TypeError, "float16 or bfloat16, got torch.int32", (values.int(),)),
        (ValueError, r"expected cams \(..., H, W\), got shape \(4,\)", (values[0, 0],)),
        (ValueError, "at least one row and column", (values[:, :0],)),
        (ValueError, "eps to be a finite number of at least 0, got nan", (values, math.nan)),
        (ValueError, "eps to be a finite number of at least 0, got -1", (values, -1)),
    ]:
        with pytest.raises(error, match=match):
            ops.normalize_cams(*args)

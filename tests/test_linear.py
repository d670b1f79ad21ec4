"""Linear layers: a 1x1 convolution over rows."""

from __future__ import annotations

import pytest
import torch
from cases import DTYPES
from reference import assert_close

import tritonconv
import tritonconv.functional as TF
from tritonconv.ops.core.launch import record_launches

pytestmark = pytest.mark.usefixtures("on_triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("shape", [(5, 24), (24,), (2, 3, 4, 24), (0, 24), (1, 7), (300, 33)], ids=str)
def test_linear_matches_fp64(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    x = torch.randn(shape, device=device).to(dtype)
    w, b = (torch.randn(*s, device=device).to(dtype) for s in ((10, shape[-1]), (10,)))
    for bias in (None, b):
        with record_launches() as launches:
            out = TF.linear(x, w, bias)
        assert launches == (["matmul_kernel"] if x.numel() else [])
        ref = torch.nn.functional.linear(x.double(), w.double(), None if bias is None else bias.double())
        assert_close(out, ref, depth=shape[-1])
        assert out.stride() == torch.nn.functional.linear(x, w, bias).stride()


def test_weights_and_inputs_need_not_be_contiguous(device: str) -> None:
    x, w = torch.randn(24, 6, device=device).t(), torch.randn(24, 10, device=device).t()
    assert_close(TF.linear(x, w), torch.nn.functional.linear(x.double(), w.double()), depth=24)
    x = torch.randn(6, 48, device=device)[:, ::2]
    assert_close(TF.linear(x, w), torch.nn.functional.linear(x.double(), w.double()), depth=24)
    x = torch.randn(6, 48, device=device)[:, :24]
    assert_close(TF.linear(x, w), torch.nn.functional.linear(x.double(), w.double()), depth=24)


def test_module_is_torchs_twin(device: str) -> None:
    ours = tritonconv.nn.Linear(8, 4, device=device)
    theirs = torch.nn.Linear(8, 4, device=device)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(3, 8, device=device)
    assert isinstance(ours, torch.nn.Linear)
    assert torch.allclose(ours(x), theirs(x), atol=1e-5)


@pytest.mark.parametrize(
    ("x", "w", "b"),
    [((2, 3), (4, 5), None), ((2, 5), (4, 5), (3,)), ((2, 5), (4, 5), (1, 4))],
    ids=["features", "bias length", "bias rank"],
)
def test_sizes_that_do_not_fit_raise(x: tuple[int, ...], w: tuple[int, ...], b: tuple[int, ...] | None) -> None:
    with pytest.raises(RuntimeError, match="linear"):
        TF.linear(torch.randn(x), torch.randn(w), None if b is None else torch.randn(b))


def test_dtypes_that_do_not_fit_raise(device: str) -> None:
    with pytest.raises(RuntimeError, match=r"float32.*float64"):
        TF.linear(torch.randn(2, 5, device=device), torch.randn(4, 5, device=device).double())


def test_weights_without_a_kernel_run_on_torch_or_say_so(device: str) -> None:
    for x, w in (((3, 0), (4, 0)), ((3, 5), (0, 5)), ((5,), (5,))):
        x, w = torch.randn(x, device=device), torch.randn(w, device=device)
        with tritonconv.set_backend("auto"):
            assert torch.equal(TF.linear(x, w), torch.nn.functional.linear(x, w))
        with pytest.raises(RuntimeError, match="has no kernel"):
            TF.linear(x, w)

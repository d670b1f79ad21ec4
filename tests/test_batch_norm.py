"""Batch norm's numbers: statistics, forward, backward and running statistics against torch in fp64."""

from __future__ import annotations

import pytest
import torch
from calls import patched
from matrix import cover, named, rotate
from norms import CASES, FORWARD, NAMES, Case, Layer, compared
from reference import assert_close
from tritonconv.kernels import batch_norm as kernels

import tritonconv
import tritonconv.functional as TF
from tritonconv.ops.batch_norm import launch as launches_of
from tritonconv.ops.batch_norm.call import BATCH_NORM
from tritonconv.ops.batch_norm.launch import Statistics, combine, statistics
from tritonconv.ops.core.activation import parse_activation
from tritonconv.ops.core.launch import captured, device_of, forced, record_launches
from tritonconv.ops.core.layout import as_format, is_dense, suggests_channels_last
from tritonconv.tuning import device_named

F = torch.nn.functional
OPS = torch.ops.tritonconv
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


@pytest.fixture(autouse=True)
def on_triton() -> object:
    with tritonconv.set_backend("triton"):
        yield


def id_of(dtype: torch.dtype) -> str:
    return str(dtype)[6:]


@rotate(case=CASES, channels_last=[False, True], training=[True, False])
def test_forward_backward_and_running_statistics_match_fp64(
    case: Case, channels_last: bool, training: bool, device: str
) -> None:
    layer = Layer.random(case.shape, torch.float32, channels_last, device)
    y, dx, *_ = compared(layer, training, case)
    for t in (y, dx):
        assert is_dense(t, suggests_channels_last(layer.x)) and t.stride() == layer.x.stride()


@rotate(dtype=DTYPES[1:], channels_last=[False, True], case=[named(CASES, "images"), named(CASES, "odd everything")])
def test_the_other_dtypes(case: Case, dtype: torch.dtype, channels_last: bool, device: str) -> None:
    for training in (True, False):
        compared(Layer.random(case.shape, dtype, channels_last, device), training, case)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=id_of)
def test_parameters_of_16_bits_have_gradients_and_statistics_of_16_bits(dtype: torch.dtype, device: str) -> None:
    layer = Layer.random(named(CASES, "images").shape, dtype, True, device)
    narrow = Layer(layer.x, layer.dy, *(t.to(dtype) for t in list(vars(layer).values())[2:]))
    for training in (True, False):
        assert all(t.dtype == dtype for t in compared(narrow, training, dtype) if t is not None)


@pytest.mark.parametrize(("weight", "bias"), [(False, False), (True, False), (False, True)])
def test_affine_parameters_may_be_missing(weight: bool, bias: bool, device: str) -> None:
    layer = Layer.random((3, 9, 4, 5), device=device)
    layer.weight, layer.bias = layer.weight if weight else None, layer.bias if bias else None
    for training in (True, False):
        compared(layer, training, (weight, bias))


@pytest.mark.parametrize("momentum", [0.0, 0.3, 1.0])
def test_running_statistics_move_by_the_momentum(momentum: float, device: str) -> None:
    layer = Layer.random((4, 5, 3, 3), torch.float64, device=device)
    mean = compared(layer, True, momentum, momentum=momentum)[4]
    # Python's number reaches the kernel whole.
    torch.testing.assert_close(
        mean, (1 - momentum) * layer.running_mean + momentum * layer.x.mean((0, 2, 3)), rtol=1e-14, atol=0
    )
    with record_launches() as launches, torch.no_grad():
        TF.batch_norm(layer.x, None, None, training=True)
    assert launches == FORWARD
    # The operator takes one of the two.
    alone = torch.ones(5, device=device)
    OPS.update_running_stats(alone, 8 * alone, torch.full((1,), 9.0, device=device), None, alone, 0.5)
    assert (alone == 5).all()


# Blocks of both sides inside the sizes and beyond them; several slots, and several blocks in each.
@rotate(config=cover(kernels.configs()), channels_last=[False, True])
def test_every_candidate_config(config: object, channels_last: bool, device: str) -> None:
    shape = (2, 70, 9, 7) if channels_last else (2, 70, 41, 13)
    layer = Layer.random(shape, torch.float32, channels_last, device)
    with forced(config=config):
        compared(layer, True, config)


@pytest.mark.parametrize("channels_last", [False, True], ids=["C", "CL"])
def test_as_many_slots_as_a_gpu_would_have(channels_last: bool, device: str) -> None:
    layer = Layer.random((16, 6, 17, 19), torch.float32, channels_last, device)
    with forced(device=device_named("H200")):
        assert statistics(layer.x).counts.numel() > 2
        compared(layer, True, "H200")


@pytest.mark.parametrize("name", ["H200", "MI300X"])
def test_the_rule_covers_a_side_with_little_waste(name: str) -> None:
    for channels, pixels in ((64, 12544), (256, 3136), (2048, 49), (96, 196), (3, 50176), (24, 784), (65, 1)):
        for channels_last in (False, True):
            view = launches_of.NormView(8, pixels, channels, channels_last, device_named(name))
            for walks in (False, True):
                config = view.config(walks)
                side, block = (channels, "BLOCK_C") if channels_last else (pixels, "BLOCK_P")
                length = config.kwargs[block]
                assert -(-side // length) * length <= max(1.35 * side, 64)
                assert (config.num_stages > 1) == walks
                slots, size = view.slots(config)
                assert (slots - 1) * size < view.blocks(config) <= slots * size


def test_slots_are_joined_by_their_counts(device: str) -> None:
    x = torch.randn(1000, 5, dtype=torch.float64, device=device) * 3 + 100
    sizes = [1, 0, 399, 7, 0, 593]
    counts = torch.tensor(sizes, dtype=torch.float64, device=device)
    moments = torch.full((2, len(sizes), 5), float("nan"), dtype=torch.float64, device=device)
    for slot, part in enumerate(x.split(sizes)):
        # What an empty slot holds is never used.
        if len(part):
            moments[0, slot], moments[1, slot] = part.mean(0), part.var(0, correction=0) * len(part)
    mean, var, count = combine(Statistics(counts, moments))
    torch.testing.assert_close((mean, var, count[0]), (x.mean(0), x.var(0, correction=0), torch.tensor(1000.0).double()))


@pytest.mark.parametrize("slots", [1, 511, 513, 1500])
def test_any_number_of_slots(slots: int, device: str) -> None:
    x = torch.randn(slots, 4, 9, dtype=torch.float64, device=device)
    moments = torch.stack([x.mean(1), x.var(1, correction=0) * 4])
    mean, var, _ = combine(Statistics(torch.full((slots,), 4.0, dtype=torch.float64, device=device), moments))
    torch.testing.assert_close((mean, var), (x.mean((0, 1)), x.var((0, 1), correction=0)))


@pytest.mark.parametrize("channels_last", [False, True], ids=["C", "CL"])
def test_a_mean_far_from_zero_leaves_the_variance_right(channels_last: bool, device: str) -> None:
    x = as_format(torch.randn(8, 6, 30, 30, device=device) + 1e4, channels_last)
    with forced(device=device_named("H200")):
        mean, var, _ = combine(statistics(x))
    assert ((mean - x.double().mean((0, 2, 3))).abs() < 2e-3).all()
    assert ((var / x.double().var((0, 2, 3), correction=0) - 1).abs() < 1e-4).all()
    ours, theirs = TF.batch_norm(x, None, None, training=True), F.batch_norm(x.double(), None, None, training=True)
    assert (ours - theirs).abs().max() < 2e-3


@rotate(value=[float("nan"), float("inf")], channels_last=[False, True])
def test_what_is_not_finite_stays_in_its_channel_as_in_torch(value: float, channels_last: bool, device: str) -> None:
    for training in (True, False):
        layer = Layer.random((3, 7, 5, 6), torch.float32, channels_last, device)
        layer.x[1, 2, 3, 3] = value
        layer.dy[2, 4, 0, 0] = value
        for name, out, ref in zip(NAMES, layer.run(TF, training), layer.double().run(F, training), strict=True):
            assert torch.equal(out.isfinite(), ref.isfinite()), name
            assert not ref.isfinite().all() or name.startswith("running")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=id_of)
def test_two_runs_are_bit_equal(dtype: torch.dtype, device: str) -> None:
    layer = Layer.random((4, 20, 9, 9), dtype, True, device)
    with forced(device=device_named("H200")):
        first, second = layer.run(TF, True), layer.run(TF, True)
    assert all(map(torch.equal, first, second))


def test_64_bit_offsets_change_nothing(device: str) -> None:
    for channels_last in (False, True):
        layer = Layer.random((3, 10, 6, 7), torch.float32, channels_last, device)
        narrow = layer.run(TF, True)
        with patched(launches_of, "needs_int64", lambda _elements: True):
            assert all(map(torch.equal, narrow, layer.run(TF, True)))


def test_inputs_and_gradients_of_any_strides(device: str) -> None:
    layer = Layer.random((4, 6, 8, 5), torch.float64, device=device)
    layer.x, layer.weight = layer.x[::2, :, ::3], layer.weight.repeat_interleave(2)[::2]
    layer.dy = torch.randn(2, 3, 5, 6, device=device, dtype=torch.float64).permute(0, 3, 1, 2)
    layer.bias = layer.bias[:1].expand(6)
    for training in (True, False):
        compared(layer, training, "strided")
    layer.x = torch.randn(1, 6, 1, 1, device=device, dtype=torch.float64).expand(2, 6, 3, 4)
    layer.dy = torch.randn((), device=device).double().expand(2, 6, 3, 4)
    compared(layer, False, "expanded")


def test_channels_of_a_wider_tensor_are_read_where_they_lie(device: str) -> None:
    wide = as_format(torch.randn(2, 40, 5, 7, device=device), True)
    vectors = [torch.rand(24, device=device) + 0.5 for _ in range(4)]
    for z, pitch in ((wide[:, 8:32], 40), (wide[:1, :24], 40), (wide[:, :24, :1, :1], 40 * 35)):
        with captured(device_of(torch.device(device))) as launches:
            TF.batch_norm(z, *vectors)
        (launch,) = launches
        assert launch.arguments["z_ptr"].data_ptr() == z.data_ptr() and launch.arguments["stride_z"] == pitch
        y = TF.batch_norm(z, *vectors)
        assert is_dense(y, True)
        assert_close(y, F.batch_norm(z.double(), *(v.double() for v in vectors)))
        residual = torch.randn_like(y)
        y = BATCH_NORM((z, *vectors, residual), ((False, 0.1, 1e-5), parse_activation("relu"), ""))
        assert_close(y, (F.batch_norm(z.double(), *(v.double() for v in vectors)) + residual).relu())

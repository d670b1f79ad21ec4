"""Forward convolution: every case, dtype, memory format and candidate config against fp64."""

from __future__ import annotations

import pytest
import torch
from calls import convolution, patched
from cases import CASES, DTYPES, ConvCase, make_epilogue, make_tensors
from matrix import cover, every, named, rotate
from reference import assert_close, conv_reference
from tritonconv.kernels import conv_flat, conv_fprop, matmul
from tritonconv.kernels.tiles import fitting

import tritonconv.functional as TF
from tritonconv.geometry import ConvGeometry
from tritonconv.ops.conv.dense import output_format
from tritonconv.ops.conv.operator import CONV
from tritonconv.ops.core.activation import make_spec
from tritonconv.ops.core.launch import captured, device_of, forced, record_launches
from tritonconv.ops.core.layout import dense_strides

pytestmark = pytest.mark.usefixtures("on_triton")

PADDED = named(CASES, "3x3 padded")


def run(case: ConvCase, x: torch.Tensor, w: torch.Tensor, **extra: object) -> torch.Tensor:
    conv = getattr(TF, f"conv{x.dim() - 2}d")
    return conv(x, w, **case.arguments, **extra)


@rotate(case=CASES, dtype=DTYPES, x_cl=[True, False], w_cl=[True, False])
def test_forward_matches_fp64_in_torchs_format(
    case: ConvCase, dtype: torch.dtype, x_cl: bool, w_cl: bool, device: str
) -> None:
    """Channels-last if input or weight is."""
    x, w = make_tensors(case, dtype, device, x_cl=x_cl, w_cl=w_cl)
    with record_launches() as launches:
        out = run(case, x, w)
    assert len(launches) == bool(case.kernel)
    assert out.stride() == dense_strides(tuple(out.shape), output_format(x, w))
    # In 1-d torch has no such format, and in 3-d its CPU convolution decides otherwise than cuDNN, whose rule ours is.
    if len(case.input) == 4 and case.kernel:
        narrow = torch.nn.functional.conv2d(x.float(), w.float(), **case.arguments)
        assert out.stride() == narrow.stride()
    assert_close(out, conv_reference(x, w, **case.arguments), depth=case.depth, what=case)


@every(case=[case for case in CASES if case.kernel])
def test_channels_last_tensors_take_the_cases_kernel(case: ConvCase, device: str) -> None:
    for dtype in DTYPES:
        x, w = (t.to("meta") for t in make_tensors(case, dtype, device))
        with captured(device_of(torch.device(device))) as launches:
            run(case, x, w)
        assert [launch.kernel.__name__ for launch in launches] == [f"{case.kernel}_kernel"], dtype


# Every tile's edges fall inside the output, and every BLOCK_K divides the channels of conv_fprop.
CONFIG_CASES = [
    ConvCase("3x3", (1, 128, 9, 8), (40, 128, 3, 3), "conv_fprop", dict(padding=1)),
    ConvCase("3x3 of 24", (1, 24, 9, 8), (40, 24, 3, 3), "conv_flat", dict(padding=1)),
    ConvCase("stem", (1, 3, 17, 15), (20, 3, 5, 5), "conv_flat", dict(padding=2, stride=2)),
    ConvCase("1x1", (1, 72, 13, 11), (72, 72, 1, 1), "matmul"),
]
KERNELS = {"conv_fprop": conv_fprop, "conv_flat": conv_flat, "matmul": matmul}
CONFIGS = [(case, config) for case in CONFIG_CASES for config in cover(KERNELS[case.kernel].configs())]


@rotate({"case, config": CONFIGS}, dtype=[torch.float32, torch.float16, torch.bfloat16])
def test_every_candidate_config(case: ConvCase, config: object, dtype: torch.dtype, device: str) -> None:
    x, w = make_tensors(case, dtype, device)
    plain = conv_reference(x, w, **case.arguments)
    epilogue = make_epilogue(w.shape[0], plain.to(dtype), dtype, device, activation=make_spec("relu"))
    ref = conv_reference(x, w, epilogue, **case.arguments)
    if device == "cuda" and not fits(config, dtype):
        pytest.skip("the config is pruned for this dtype on this GPU")
    with forced(config=config):
        out = convolution(x, w, epilogue, **case.arguments)
    assert_close(out, ref, depth=case.depth, what=(case, config))


def fits(config: object, dtype: torch.dtype) -> bool:
    size = torch.empty(0, dtype=dtype).element_size()
    shared = device_of(torch.device("cuda")).shared_memory
    return bool(
        fitting([config], m=10**6, n=10**6, k=10**6, itemsize=size, tensor_cores=size == 2, shared=shared)  # type: ignore[list-item]
    )


@pytest.mark.parametrize("case", [PADDED, named(CASES, "stem 7x7"), named(CASES, "depthwise 5x5 strided")], ids=str)
def test_small_integers_are_exact(case: ConvCase, device: str) -> None:
    for dtype in DTYPES:
        x, w = make_tensors(case, dtype, device, integers=True)
        ref = conv_reference(x, w, **case.arguments)
        # bf16 holds integers up to 256.
        exact = ref.abs() <= 256
        assert torch.equal(run(case, x, w).double()[exact], ref[exact]), dtype


SORTS = ("3x3 padded", "3-d", "stem 7x7", "depthwise", "depthwise 5x5 strided")


@pytest.mark.parametrize("case", [named(CASES, name) for name in SORTS], ids=str)
def test_64_bit_offsets_change_nothing(case: ConvCase, device: str) -> None:
    x, w = make_tensors(case, torch.float32, device)
    narrow = run(case, x, w)
    with patched(ConvGeometry, "needs_int64", True):
        assert torch.equal(run(case, x, w), narrow)


@pytest.mark.parametrize("channels", [3, 24, 128], ids=["flat", "flat vectors", "fprop"])
def test_a_view_across_more_than_2_to_the_31_elements(channels: int, device: str) -> None:
    # Memory that is never touched is never mapped.
    storage = torch.empty(2**31 + 4096, dtype=torch.float16, device=device)
    x = storage.as_strided((2, channels, 4, 4), (2**31, 1, 4 * channels, channels))
    x.copy_(torch.randn(2, channels, 4, 4))
    w = torch.randn(8, channels, 3, 3).to(x)
    assert_close(TF.conv2d(x, w, padding=1), conv_reference(x, w, padding=1), depth=9 * channels)


def test_1x1_over_a_view_across_more_than_2_to_the_31_elements(device: str) -> None:
    storage = torch.empty(2**31 + 4096, dtype=torch.float16, device=device)
    x = storage.as_strided((2, 16, 1, 1), (2**31, 1, 1, 1))
    x.copy_(torch.randn(2, 16, 1, 1))
    w = torch.randn(8, 16, 1, 1).to(x)
    assert_close(TF.conv2d(x, w), conv_reference(x, w), depth=16)


def test_unbatched_input_is_a_batch_of_one(device: str) -> None:
    for shape in ((3, 12), (3, 6, 5), (3, 4, 5, 6)):
        x = torch.randn(shape, device=device)
        w = torch.randn(4, 3, *(2,) * (len(shape) - 1), device=device)
        conv = getattr(TF, f"conv{len(shape) - 1}d")
        assert torch.equal(conv(x, w), conv(x.unsqueeze(0), w).squeeze(0))


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, :, ::2, 1::2],
        lambda x: x.transpose(2, 3),
        lambda x: x[:, 8:40],
        lambda x: x.flip(3)[..., 1:],
        lambda x: x[:1].expand(3, -1, -1, -1),
        lambda x: x[:, :, :1].expand(-1, -1, 5, -1),
    ],
    ids=["strided", "transposed", "channel slice", "offset", "expanded batch", "expanded rows"],
)
@pytest.mark.parametrize("channels_last", [False, True], ids=["C", "CL"])
def test_views_need_not_be_dense(view: object, channels_last: bool, device: str) -> None:
    x = torch.randn(2, 48, 9, 9, device=device)
    x = view(x.contiguous(memory_format=torch.channels_last) if channels_last else x)  # type: ignore[operator]
    w = torch.randn(8, x.shape[1], 3, 3, device=device)
    assert_close(TF.conv2d(x, w, padding=1), conv_reference(x, w, padding=1), depth=9 * x.shape[1])


def test_nan_and_inf_reach_the_outputs_that_see_them(device: str) -> None:
    for channels in (3, 128):
        x = torch.randn(1, channels, 7, 7, device=device)
        x[0, 0, 1, 1], x[0, 1, 5, 5] = float("nan"), float("inf")
        w = torch.rand(4, channels, 3, 3, device=device) + 0.1
        assert_close(TF.conv2d(x, w, padding=1), conv_reference(x, w, padding=1), depth=9 * channels)


def test_nan_behind_the_tensors_is_never_read(device: str) -> None:
    # Reductions that no block divides read past their end unless they are masked on both sides.
    for channels in (3, 5, 24, 40):
        room = torch.full((2 * channels * 49 + 999,), float("nan"), device=device)
        x = room[64 : 64 + channels * 49].view(1, 7, 7, channels).permute(0, 3, 1, 2)
        x.copy_(torch.randn(1, channels, 7, 7))
        space = torch.full((20 * channels * 9 + 999,), float("nan"), device=device)
        w = space[: 20 * channels * 9].view(20, 3, 3, channels).permute(0, 3, 1, 2)
        w.copy_(torch.randn(20, channels, 3, 3))
        assert_close(TF.conv2d(x, w), conv_reference(x, w), depth=9 * channels, what=channels)


def test_results_are_poison_until_their_launches_run(device: str) -> None:
    """Also of a call that is replayed; else no test would see what a kernel leaves unwritten."""
    x, w = make_tensors(PADDED, torch.float32, device)
    recording = CONV.resolve(x, w, *(None,) * 6, (1, 1), (1, 1), "", (1, 1), 1, 0.0, "", 0.0, 0.0, "conv")
    for _ in range(2):
        with captured(device_of(torch.device(device))) as launches:
            y = recording.run(x, w, *(None,) * 6)
        assert len(launches) == 1 and y.isnan().all()


def test_two_runs_are_bit_equal(device: str) -> None:
    x, w = make_tensors(PADDED, torch.float16, device)
    assert torch.equal(run(PADDED, x, w), run(PADDED, x, w))


def test_inputs_are_left_as_they_were(device: str) -> None:
    x, w = make_tensors(PADDED, torch.float32, device, x_cl=False, w_cl=False)
    before = x.clone(), w.clone()
    run(PADDED, x, w)
    assert torch.equal(x, before[0]) and torch.equal(w, before[1])

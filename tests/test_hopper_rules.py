"""What Hopper's kernels are not asked to do and why, and that faults planted in them are found."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from calls import recorded
from gluon_interpreter import Fault
from hopper import BF16, FP16, HOPPER, ON_CPU, SEEDS, Layer, channels_last, forward, interpreted, reference_gradients
from reference import assert_close
from torch import Tensor
from tritonconv.kernels.hopper import conv, wgrad

from tritonconv.geometry import ConvGeometry, Pass
from tritonconv.ops.conv.hopper import hopper_convolution, hopper_dgrad, hopper_wgrad, why_no_gradient
from tritonconv.ops.conv.hopper.supports import why_no_boxes, why_unsupported
from tritonconv.ops.conv.route import convolve
from tritonconv.ops.conv.target import WHOLE, Result, Target
from tritonconv.ops.core.backend import asking_hopper
from tritonconv.ops.core.epilogue import Epilogue
from tritonconv.ops.core.launch import captured
from tritonconv.tuning import Device, device_named

pytestmark = ON_CPU

PASSES: tuple[Pass, ...] = ("fprop", "dgrad", "wgrad")


def geometry(x: tuple[int, ...], w: tuple[int, ...], **arguments: Any) -> ConvGeometry:
    return ConvGeometry.parse(x, w, nd=len(x) - 2, **arguments)


PLAIN = geometry((2, 64, 9, 8), (64, 64, 3, 3), padding=1)


@pytest.mark.parametrize("name", ["H100", "H200"])
@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
def test_hopper_gpus_run_16_bit_layers(name: str, pass_: Pass, dtype: torch.dtype) -> None:
    device = next(d for d in every_device() if name in d.name)
    assert why_unsupported(PLAIN, dtype, device, pass_) is None


def every_device() -> list[Device]:
    from tritonconv.tuning import known_devices

    return list(known_devices().values())


@pytest.mark.parametrize("name", ["A100", "B200", "MI300X", "L40S"])
def test_other_gpus_do_not(name: str) -> None:
    device = device_named(name)
    for pass_ in PASSES:
        assert why_unsupported(PLAIN, BF16, device, pass_) == f"{device.name} ({device.arch}) is no Hopper GPU"
    x, w = channels_last(torch.zeros(2, 64, 9, 8, dtype=BF16)), torch.zeros(64, 64, 3, 3, dtype=BF16)
    with captured(device):
        assert hopper_convolution(x, w, Epilogue(), PLAIN) == f"{device.name} ({device.arch}) is no Hopper GPU"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_other_types(dtype: torch.dtype) -> None:
    assert why_unsupported(PLAIN, dtype, HOPPER) == f"{str(dtype)[6:]} is not float16 or bfloat16"


BACKWARD = ("dgrad",)


@dataclass(frozen=True)
class Rule:
    """A layer that some passes refuse, and the reason; the layer beside it that they do not."""

    name: str
    refused: ConvGeometry
    reason: str
    allowed: ConvGeometry
    passes: tuple[str, ...] = PASSES

    def __str__(self) -> str:
        return self.name.replace(" ", "-")


RULES = [
    Rule("channels", geometry((1, 60, 9, 9), (64, 60, 3, 3)), "60 channels and 64 filters are not multiples of 8",
         geometry((1, 56, 9, 9), (64, 56, 3, 3))),
    Rule("filters", geometry((1, 64, 9, 9), (3, 64, 3, 3)), "64 channels and 3 filters are not multiples of 8",
         geometry((1, 64, 9, 9), (8, 64, 3, 3))),
    Rule("channels of a group", geometry((1, 12, 9, 9), (12, 4, 3, 3), groups=3),
         "4 channels and 4 filters of a group are not multiples of 8",
         geometry((1, 192, 9, 9), (192, 64, 3, 3), groups=3)),
    Rule("small groups", geometry((1, 112, 9, 9), (128, 56, 3, 3), groups=2),
         "groups of 56 channels and 64 filters have less than 64", geometry((1, 128, 9, 9), (128, 64, 3, 3), groups=2)),
    Rule("groups with few filters", geometry((1, 128, 9, 9), (80, 64, 3, 3), groups=2),
         "groups of 64 channels and 40 filters have less than 64", geometry((1, 128, 9, 9), (144, 64, 3, 3), groups=2)),
    Rule("groups in 3-d", geometry((1, 192, 4, 4, 4), (256, 96, 1, 1, 1), groups=2),
         "groups of 96 channels and 128 filters in 3-d are not multiples of 128",
         geometry((1, 256, 4, 4, 4), (256, 128, 1, 1, 1), groups=2)),
    Rule("filters of groups in 3-d", geometry((1, 256, 4, 4, 4), (384, 128, 1, 1, 1), groups=2),
         "groups of 128 channels and 192 filters in 3-d are not multiples of 128",
         geometry((1, 192, 4, 4, 4), (192, 192, 1, 1, 1))),
    Rule("pixels", geometry((1, 64, 2**16, 2**15), (64, 64, 1, 1)), "more than 2^31 pixels",
         geometry((1, 64, 2**16, 2**15 - 1), (64, 64, 1, 1))),
    Rule("pixels of a batch", geometry((2**11, 64, 2**10, 2**10), (64, 64, 1, 1)), "more than 2^31 pixels",
         geometry((2**11 - 1, 64, 2**10, 2**10), (64, 64, 1, 1))),
    Rule("phases", geometry((1, 64, 9, 9), (64, 64, 3, 3), stride=3), "a stride of (1, 3, 3) has more than 8 phases",
         geometry((1, 64, 9, 9), (64, 64, 3, 3), stride=(2, 3))),
    Rule("phases that no tap sees, which are written all the same", geometry((1, 64, 9, 9), (64, 64, 1, 1), stride=3),
         "a stride of (1, 3, 3) has more than 8 phases", geometry((1, 64, 9, 9), (64, 64, 3, 3), stride=(2, 4)), BACKWARD),
    Rule("an image within a stride", geometry((1, 64, 1, 9), (64, 64, 1, 1), stride=2),
         "an image of (1, 1, 9) is smaller than the stride (1, 2, 2)", geometry((1, 64, 2, 9), (64, 64, 1, 1), stride=2)),
]  # fmt: skip


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_rules(rule: Rule) -> None:
    for pass_ in rule.passes:
        assert why_unsupported(rule.refused, BF16, HOPPER, pass_) == rule.reason, pass_  # type: ignore[arg-type]
        assert why_unsupported(rule.allowed, BF16, HOPPER, pass_) is None, pass_  # type: ignore[arg-type]
    for pass_ in set(PASSES) - set(rule.passes):
        assert why_unsupported(rule.refused, BF16, HOPPER, pass_) is None, pass_  # type: ignore[arg-type]


def test_what_gradients_refuse_beside() -> None:
    def reason(pass_: Pass, contiguous: bool = False, computed: bool = False) -> str | None:
        return why_no_gradient(PLAIN, BF16, HOPPER, pass_, contiguous, computed)

    assert reason("dgrad") is reason("wgrad") is None
    assert reason("dgrad", contiguous=True) == "the result is contiguous"
    for pass_ in ("dgrad", "wgrad"):
        assert reason(pass_, computed=True) == "a gradient that is computed on its way in comes through registers"  # type: ignore[arg-type]
    a100 = device_named("A100")
    assert why_no_gradient(PLAIN, BF16, a100, "dgrad", False, False) == f"{a100.name} (sm_80) is no Hopper GPU"


def test_what_boxes_can_be_read_from() -> None:
    storage = torch.empty(16, dtype=BF16, device="meta")
    assert why_no_boxes((640, 0, 64, 8), (2, 1, 9, 8), storage) is None
    # Of axes of one pixel the strides do not matter.
    assert why_no_boxes((3, -5, 64, 8), (1, 1, 9, 8), storage[8:]) is None
    assert why_no_boxes((640, 0, 64, 8), (2, 1, 9, 8), storage[1:]) == "a tensor does not start on 16 bytes"
    for strides in ((640, 0, 64, 12), (644, 0, 64, 8), (0, 0, 64, 8), (640, 0, -64, 8)):
        assert why_no_boxes(strides, (2, 1, 9, 8), storage) == (
            f"pixels lie {strides} elements apart, which are not positive multiples of 8"
        )


# Refusals of whole calls.


def zeros(*shape: int) -> Tensor:
    return channels_last(torch.zeros(shape, dtype=BF16))


def unaligned(t: Tensor) -> Tensor:
    """The same tensor two bytes behind a multiple of 16."""
    room = torch.empty(t.numel() + 1, dtype=t.dtype)
    view = room.as_strided(t.shape, t.stride(), 1)
    view.copy_(t)
    assert view.data_ptr() % 16 == 2
    return view


X, W = (2, 64, 9, 8), (64, 64, 3, 3)


@dataclass(frozen=True)
class Refusal:
    name: str
    reason: str
    x: Callable[[], Tensor] = lambda: zeros(*X)
    w: Callable[[], Tensor] = lambda: zeros(*W)
    target: Target = WHOLE
    stride: int = 1
    transposed: bool = False

    def __str__(self) -> str:
        return self.name.replace(" ", "-")


REFUSALS = [
    Refusal("contiguous", "the result is contiguous", lambda: zeros(*X).contiguous(), lambda: zeros(*W).contiguous()),
    Refusal("average", "averages are added by portable kernels", target=Target(average="also")),
    Refusal("average alone", "averages are added by portable kernels", target=Target(average="alone")),
    Refusal(
        "pitch", "results lie 68 elements apart, which is no multiple of 8", target=Target(zeros(2, 68, 7, 6)[:, :64])
    ),
    Refusal("type", "float32 is not float16 or bfloat16", lambda: zeros(*X).float(), lambda: zeros(*W).float()),
    Refusal("unaligned image", "a tensor does not start on 16 bytes", lambda: unaligned(zeros(*X))),
    Refusal("unaligned weight", "a tensor does not start on 16 bytes", w=lambda: unaligned(zeros(*W))),
    Refusal("channels from the fourth on", "a tensor does not start on 16 bytes", lambda: zeros(2, 72, 9, 8)[:, 4:68]),
    Refusal(
        "pixels of 68 channels", "pixels lie (4896, 0, 544, 68) elements apart, which are not positive multiples of 8",
        lambda: zeros(2, 68, 9, 8)[:, :64],
    ),
    Refusal(
        "repeated image", "pixels lie (0, 0, 512, 64) elements apart, which are not positive multiples of 8",
        lambda: zeros(1, 64, 9, 8).expand(2, -1, -1, -1),
    ),
    Refusal(
        "patches of a contiguous image", "few channels are read where they lie", lambda: zeros(2, 64, 8, 8).contiguous(),
        lambda: zeros(64, 64, 2, 2), stride=2,
    ),
    Refusal(
        "unaligned image of a transposed one", "a tensor does not start on 16 bytes", lambda: unaligned(zeros(*X)),
        transposed=True,
    ),
]  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS, ids=str)
def test_refused_calls(case: Refusal) -> None:
    x, w = case.x(), case.w()
    g = geometry(tuple(x.shape), tuple(w.shape), stride=case.stride, transposed=case.transposed)
    with captured(HOPPER) as launches:
        assert hopper_convolution(x, w, Epilogue(), g, case.target) == case.reason
    assert not launches


def test_a_gated_input_goes_to_the_portable_kernel() -> None:
    x, w, gate = zeros(*X), zeros(64, 64, 1, 1), torch.zeros(2, 64, dtype=BF16)
    g = geometry(tuple(x.shape), tuple(w.shape))
    with captured(HOPPER), asking_hopper(True):
        alone = recorded(lambda x, w: convolve(x, w, Epilogue(), g, "conv"), x, w)
        gated = recorded(lambda x, w, gate: convolve(x, w, Epilogue(), g, "conv", gate=gate), x, w, gate)
    assert (alone.kernel, alone.note) == ("hopper.conv", "")
    assert (gated.kernel, gated.note) == ("matmul", "not hopper: a gated input comes through registers")


def test_a_copy_is_aligned() -> None:
    """What is copied anyway may start anywhere."""
    for x, w in ((unaligned(zeros(*X).contiguous()), zeros(*W)), (zeros(*X), unaligned(zeros(*W).contiguous()))):
        with captured(HOPPER):
            assert isinstance(hopper_convolution(x, w, Epilogue(), PLAIN), Result)


def test_an_empty_batch_launches_nothing() -> None:
    g = geometry((0, 64, 9, 8), W, padding=1)
    with captured(HOPPER) as launches:
        assert forward(zeros(0, 64, 9, 8), zeros(*W), g).shape == (0, 64, 9, 8)
        assert hopper_dgrad(zeros(0, 64, 9, 8), zeros(*W), g).shape == (0, 64, 9, 8)
        assert bool((hopper_wgrad(zeros(0, 64, 9, 8), zeros(0, 64, 9, 8), g, True) == 0).all())
    assert not launches


def test_an_unaligned_residual() -> None:
    """It is copied, or the call is refused; it never gets a descriptor."""
    x, w = channels_last(torch.randn(X).to(BF16)), channels_last(torch.randn(W).to(BF16))
    epilogue = Epilogue(residual=unaligned(channels_last(torch.randn(X).to(BF16))))
    with captured(HOPPER):
        call = hopper_convolution(x, w, epilogue, PLAIN)
    if isinstance(call, Result):
        y = interpreted(lambda: forward(x, w, PLAIN, epilogue))
        assert_close(y, torch.nn.functional.conv2d(x.double(), w.double(), padding=1) + epilogue.residual.double())  # type: ignore[union-attr]


def test_gradients_of_unaligned_tensors() -> None:
    """Parameters in a flat buffer start anywhere, and so may gradients."""
    x, w, dy = Layer("", X, W, dict(padding=1)).tensors(BF16)
    dx, dw = reference_gradients(x, w, dy, PLAIN)
    assert_close(interpreted(lambda: hopper_dgrad(unaligned(dy), w, PLAIN)), dx)
    assert_close(interpreted(lambda: hopper_dgrad(dy, unaligned(w), PLAIN)), dx)
    assert_close(interpreted(lambda: hopper_wgrad(unaligned(dy), x, PLAIN, True)), dw)
    assert_close(interpreted(lambda: hopper_wgrad(dy, unaligned(x), PLAIN, True)), dw)


# Planted faults.

MODULES = ("pipeline", "epilogue", "conv", "wgrad")


def planted(module: str, old: str, new: str, folder: Path, monkeypatch: pytest.MonkeyPatch, count: int = 1) -> None:
    """Let the kernels run with a changed text of one of their modules; the others are loaded anew, for they import it."""
    for name in MODULES:
        full = f"tritonconv.kernels.hopper.{name}"
        original = importlib.import_module(full)
        assert original.__file__ is not None
        text = Path(original.__file__).read_text()
        if name == module:
            assert text.count(old) == count, f"{module}: {text.count(old)} times {old!r}"
            text = text.replace(old, new)
        # Device functions read their source from a file.
        path = folder / f"{name}.py"
        path.write_text(text)
        copy = ModuleType(full)
        copy.__package__, copy.__file__ = "tritonconv.kernels.hopper", str(path)
        monkeypatch.setitem(sys.modules, full, copy)
        exec(compile(text, str(path), "exec"), vars(copy))


@dataclass(frozen=True)
class Plant:
    """A fault: which text of a module is replaced by which, and in which launch it shows."""

    name: str
    module: str
    old: str
    new: str
    launch: str = "forward"

    def __str__(self) -> str:
        return self.name.replace(" ", "-")


# Tiles of several slices; of the weight gradient's more than it has buffers for.
CONFIG = next(config for config in conv.configs() if config.kwargs["BLOCK_M"] == config.kwargs["BLOCK_N"] == 128)
CONFIG_WGRAD = next(config for config in wgrad.configs() if config.kwargs["BLOCK_N"] == 256)


def launch_of(which: str, seed: int) -> None:
    """Run launches whose programs have several tiles, of more steps than the ring has slots."""
    layer = {
        "dgrad": Layer("phases of one to four taps", (3, 136, 17, 26), (192, 136, 3, 3), dict(padding=1, stride=2)),
        "gaps": Layer("phases without taps", (4, 136, 12, 11), (72, 136, 1, 1), dict(stride=2)),
        "ranges": Layer("a last range that is shorter", (1, 192, 67, 61), (40, 192, 1, 2)),
    }.get(which, Layer("", (3, 192, 17, 13), (136, 192, 3, 3), dict(padding=1)))
    g = layer.geometry
    x, w, dy = layer.tensors(BF16)
    calls = {
        "forward": lambda: forward(x, w, g), "residual": lambda: forward(x, w, g, Epilogue(residual=dy)),
        "statistics": lambda: forward(x, w, g, slots=[]), "dgrad": lambda: hopper_dgrad(dy, w, g),
        "gaps": lambda: hopper_dgrad(dy, w, g), "wgrad": lambda: hopper_wgrad(dy, x, g, True),
        "ranges": lambda: hopper_wgrad(dy, x, g, True),
    }  # fmt: skip
    interpreted(calls[which], config=CONFIG_WGRAD if which in ("wgrad", "ranges") else CONFIG, seed=seed)


PLANTS = [
    # the ring
    Plant("the loader's parity", "pipeline",
          "mbarrier.wait(empty.index(slot), parity ^ 1)", "mbarrier.wait(empty.index(slot), parity)"),
    Plant("the loader does not wait", "pipeline", "mbarrier.wait(empty.index(slot), parity ^ 1)", "pass"),
    Plant("the multipliers' parity", "pipeline",
          "mbarrier.wait(ready.index(slot), parity)", "mbarrier.wait(ready.index(slot), parity ^ 1)"),
    Plant("the multipliers do not wait", "pipeline", "mbarrier.wait(ready.index(slot), parity)", "pass"),
    Plant("the first slot handed back last", "pipeline",
          "mbarrier.arrive(empty.index(before), count=1)\n        before = slot",
          "mbarrier.arrive(empty.index(slot), count=1)"),
    Plant("slots handed back a product too early", "pipeline", "num_outstanding=1", "num_outstanding=2"),
    Plant("results used while in flight", "pipeline", "num_outstanding=0", "num_outstanding=1"),
    Plant("the last slot never handed back", "pipeline",
          "deps=[acc])\n    mbarrier.arrive(empty.index(before), count=1)", "deps=[acc])"),
    Plant("slots handed back twice", "pipeline", "count=1)\n        before = slot", "count=2)\n        before = slot"),
    Plant("barriers of two arrivals", "pipeline",
          "mbarrier.init(barriers.index(i), count=1)", "mbarrier.init(barriers.index(i), count=2)"),
    Plant("a parity that changes too late", "pipeline", "(step // STAGES & 1)", "(step // (2 * STAGES) & 1)"),
    Plant("fewer bytes announced than loaded", "conv",
          "BYTES: gl.constexpr = x.block_type.nbytes + w", "BYTES: gl.constexpr = w"),
    Plant("more bytes announced than loaded", "conv",
          "BYTES: gl.constexpr = x.block_type.nbytes + w", "BYTES: gl.constexpr = 2 * x.block_type.nbytes + w"),
    Plant("an image never loaded", "conv", "load_box(x, [n, at_d, at_h, at_w, channel + c], bar, a)", "pass"),
    # steps and tiles
    Plant("a step too few", "conv", "steps = TAPS * blocks_c", "steps = TAPS * blocks_c - 1"),
    Plant("a step too many", "conv", "steps = TAPS * blocks_c", "steps = TAPS * blocks_c + 1"),
    Plant("the multipliers begin anew with each tile", "conv", "        step += steps\n", ""),
    Plant("the loader begins anew with each tile", "conv", "step = load_taps(x[i]", "load_taps(x[i]"),
    Plant("taps of another phase", "conv", "counts = pick_axes(phase,", "counts = pick_axes(0,", "dgrad"),
    Plant("no step where no tap is", "conv",
          "steps = gl.maximum(counts[0] * counts[1] * counts[2] * blocks_c, 1)",
          "steps = counts[0] * counts[1] * counts[2] * blocks_c", "gaps"),
    Plant("nothing loaded where no tap is", "conv",
          "load_box(w, [GROUPS, 0, 0, 0], bar, b)\n                step += 1", "pass", "gaps"),
    # the way out
    Plant("staging overwritten while it is stored", "epilogue", "        store_wait(SLICES - 1)\n", ""),
    Plant("staging waited for a store too late", "epilogue", "store_wait(SLICES - 1)", "store_wait(SLICES)"),
    Plant("no fence before a store", "epilogue", "    fence_async_shared()\n", ""),
    Plant("no barrier before a store", "epilogue",
          "    fence_async_shared()\n    barrier()\n", "    fence_async_shared()\n"),
    Plant("a barrier before the fence", "epilogue",
          "    fence_async_shared()\n    barrier()\n", "    barrier()\n    fence_async_shared()\n"),
    Plant("slices stored over each other", "epilogue", "first_y + SLICE * SLICE_N", "first_y"),
    Plant("tiles stored over each other", "conv", "first_y = group * K + first_n", "first_y = group * K"),
    Plant("stores in flight at the end", "conv", "    store_wait(0)\n", ""),
    Plant("statistics of all tiles in one slot", "conv", "phase * tiles_m + pid_m", "phase * tiles_m", "statistics"),
    # the residual
    Plant("a residual that is not waited for", "epilogue", "mbarrier.wait(here.index(SLICE), parity)", "pass", "residual"),
    Plant("a residual's parity", "epilogue",
          "mbarrier.wait(here.index(SLICE), parity)", "mbarrier.wait(here.index(SLICE), parity ^ 1)", "residual"),
    Plant("its parity never changes", "conv",
          "passing[0], ACT, ACT_A, ACT_B)\n        turn ^= 1\n", "passing[0], ACT, ACT_A, ACT_B)\n", "residual"),
    Plant("its buffers handed back while they are stored", "pipeline", "        store_wait(0)\n", "", "residual"),
    Plant("its buffers handed back a store too early", "pipeline",
          "        store_wait(0)\n", "        store_wait(1)\n", "residual"),
    Plant("its buffers never handed back", "pipeline", "mbarrier.arrive(left.index(0), count=1)", "pass", "residual"),
    Plant("its buffers not waited for", "conv", "mbarrier.wait(left.index(0), turn)", "pass", "residual"),
    Plant("its buffers' parity", "conv",
          "mbarrier.wait(left.index(0), turn)", "mbarrier.wait(left.index(0), turn ^ 1)", "residual"),
    Plant("its buffers' parity never changes", "conv",
          "staging.index(j))\n            turn ^= 1\n", "staging.index(j))\n", "residual"),
    Plant("its bytes", "conv",
          "mbarrier.expect(bar, residual[0].block_type.nbytes)",
          "mbarrier.expect(bar, 2 * residual[0].block_type.nbytes)", "residual"),
    Plant("its slices in one buffer", "conv", "bar, staging.index(j))", "bar, staging.index(0))", "residual"),
    # the weight gradient
    Plant("its staging overwritten while it is stored", "wgrad",
          "store_wait(min(STAGED, len(slices)) - 1)", "pass", "wgrad"),
    Plant("its staging waited for a store too late", "wgrad",
          "store_wait(min(STAGED, len(slices)) - 1)", "store_wait(STAGED)", "wgrad"),
    Plant("one buffer for two slices", "wgrad", "staging.index(j % STAGED)", "staging.index(0)", "wgrad"),
    Plant("no fence before its store", "wgrad", "            fence_async_shared()\n", "", "wgrad"),
    Plant("no barrier before its store", "wgrad",
          "            fence_async_shared()\n            barrier()\n", "            fence_async_shared()\n", "wgrad"),
    Plant("its stores in flight at the end", "wgrad", "    store_wait(0)\n", "", "wgrad"),
    Plant("fewer bytes announced than pixels loaded", "wgrad",
          "BYTES: gl.constexpr = x.block_type.nbytes + dy", "BYTES: gl.constexpr = dy", "wgrad"),
    Plant("a box of pixels too many", "wgrad", "range(first, last)", "range(first, last + 1)", "wgrad"),
    Plant("a last range as long as the others", "wgrad",
          "steps = gl.minimum(part * RANGE + RANGE, boxes) - part * RANGE", "steps = RANGE", "ranges"),
    Plant("ranges written over each other", "wgrad", "store_box(dw, [part,", "store_box(dw, [0,", "ranges"),
    Plant("taps written over each other", "wgrad", "first_k, tap, first_c", "first_k, 0, first_c", "wgrad"),
]  # fmt: skip


@pytest.mark.parametrize("plant", PLANTS, ids=str)
def test_a_planted_fault_is_found(plant: Plant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In every order of events, not in one that shows it alone."""
    planted(plant.module, plant.old, plant.new, tmp_path, monkeypatch)
    for seed in SEEDS:
        with pytest.raises(Fault):
            launch_of(plant.launch, seed)


@pytest.mark.parametrize("which", ["forward", "residual", "statistics", "dgrad", "gaps", "wgrad", "ranges"])
def test_nothing_is_found_where_nothing_is_planted(which: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planted("pipeline", "before = slot", "before = slot", tmp_path, monkeypatch)
    for seed in SEEDS:
        launch_of(which, seed)

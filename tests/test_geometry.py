"""ConvGeometry against torch over random arguments, and against the sizes in benchmarks/cases.csv."""

from __future__ import annotations

import copy
import csv
import dataclasses
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from tritonconv.geometry import ConvGeometry

FUNCTIONS = {
    (nd, transposed): getattr(torch.nn.functional, f"conv{'_transpose' if transposed else ''}{nd}d")
    for nd in (1, 2, 3)
    for transposed in (False, True)
}

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")

# The same examples every time: a random failure belongs into a longer run of one's own, not into somebody else's change.
thorough = settings(deadline=None, max_examples=300, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


@dataclasses.dataclass(frozen=True)
class Arguments:
    """One call of torch.nn.functional.conv*d or conv_transpose*d."""

    nd: int
    transposed: bool
    input_shape: tuple[int, ...]
    weight_shape: tuple[int, ...]
    options: dict[str, Any]

    def torch(self, device: str = "meta") -> tuple[int, ...]:
        """Size of torch's result."""
        x, w = torch.empty(self.input_shape, device=device), torch.empty(self.weight_shape, device=device)
        return tuple(FUNCTIONS[self.nd, self.transposed](x, w, **self.options).shape)

    def ours(self) -> ConvGeometry:
        return ConvGeometry.parse(
            self.input_shape, self.weight_shape, nd=self.nd, transposed=self.transposed, **self.options
        )


def outcome(call: Any) -> Any:
    """What a call returns, or the type of what it raises."""
    try:
        return call()
    except Exception as error:
        return type(error)


def vanishes(call: Arguments, expected: Any) -> bool:
    """Whether a transposed convolution's result has no pixels: one of torch's CPU kernels returns it, the other raises."""
    return call.transposed and isinstance(expected, tuple) and 0 in expected[-call.nd :]


@st.composite
def arguments(draw: st.DrawFn) -> Arguments:
    """A call whose channels fit; the image may still be too small for the filter."""
    nd, transposed = draw(st.integers(1, 3)), draw(st.booleans())

    def per_axis(values: st.SearchStrategy[int]) -> Any:
        """One number, a list of one, or a number for each axis, as torch takes them."""
        numbers = draw(st.lists(values, min_size=nd, max_size=nd))
        return draw(st.sampled_from([numbers[0], numbers[:1], tuple(numbers), numbers]))

    groups = draw(st.integers(1, 3))
    rows, columns = groups * draw(st.integers(1, 3)), draw(st.integers(1, 3))
    channels = rows if transposed else groups * columns
    batch = draw(st.sampled_from([(), (1,), (2,), (0,)]))
    spatial = draw(st.lists(st.integers(1, 9), min_size=nd, max_size=nd))
    filter_ = draw(st.lists(st.integers(1, 4), min_size=nd, max_size=nd))
    options = dict(
        stride=per_axis(st.integers(1, 3)), dilation=per_axis(st.integers(1, 3)), padding=per_axis(st.integers(0, 3)),
        groups=groups,
    )  # fmt: skip
    if transposed:
        options["output_padding"] = per_axis(st.integers(0, 2))
    else:
        word = draw(st.sampled_from([None, None, None, "same", "valid"]))
        if word is not None:
            options["padding"] = word
        if word == "same" and draw(st.booleans()):
            options["stride"] = 1
    return Arguments(nd, transposed, (*batch, channels, *spatial), (rows, columns, *filter_), options)


@thorough
@given(arguments())
def test_output_is_torchs(call: Arguments) -> None:
    """Size of the result, or the type of the exception."""
    ours = outcome(call.ours)
    if isinstance(ours, type):
        # Some checks stand in torch's CPU kernels alone, which an empty batch does not reach.
        some = dataclasses.replace(call, input_shape=tuple(max(size, 1) for size in call.input_shape))
        expected = outcome(lambda: some.torch("cpu"))
        assume(not vanishes(call, expected))
        assert ours is expected
        return
    expected = call.torch()
    unbatched = len(call.input_shape) == call.nd + 1
    assert ours.output_shape == ((1, *expected) if unbatched else expected)
    assert ours.input_shape == ((1, *call.input_shape) if unbatched else call.input_shape)
    assert ours.weight_shape == call.weight_shape


@st.composite
def spoiled(draw: st.DrawFn) -> Arguments:
    """A call with one argument replaced by something that rarely fits."""
    # An empty batch reaches few of torch's checks.
    call = draw(arguments().filter(lambda call: 0 not in call.input_shape))
    options = dict(call.options)
    what = draw(st.sampled_from(["input_shape", "weight_shape", *options]))
    if what.endswith("shape"):
        sizes = list(getattr(call, what))
        at = draw(st.integers(0, len(sizes) - 1))
        change = draw(st.sampled_from(["drop", "repeat", "resize"]))
        if change == "drop":
            del sizes[at]
        elif change == "repeat":
            sizes.insert(at, sizes[at])
        else:
            sizes[at] = draw(st.integers(1, 12))
        return dataclasses.replace(call, **{what: tuple(sizes)})
    number = st.sampled_from([-1, 0, 1, 2, 5])
    if what == "groups":
        options[what] = draw(st.sampled_from([-1, 0, 2, 3, 5, 1.5, "1", None, [1]]))
    else:
        other = st.sampled_from([1.0, 1.5, "same", "full", None, [1.5]])
        options[what] = draw(st.one_of(number, st.lists(number, min_size=1, max_size=4), other))
    return dataclasses.replace(call, options=options)


def is_positive(value: Any) -> bool:
    return min(value if isinstance(value, (list, tuple)) else [value]) > 0


@thorough
@given(spoiled())
def test_bad_arguments_raise_what_torch_raises(call: Arguments) -> None:
    expected = outcome(lambda: call.torch("cpu"))
    assume(not vanishes(call, expected))
    ours = outcome(call.ours)
    # Some of torch's CPU kernels for transposed convolutions do not look at the dilation of a filter of one.
    assume(isinstance(expected, type) or not call.transposed or is_positive(call.options.get("dilation", 1)))
    if isinstance(expected, type):
        assert ours is expected, f"torch raises {expected.__name__}"
    else:
        unbatched = len(call.input_shape) == call.nd + 1
        assert not isinstance(ours, type), f"torch returns {expected}, but we raise {ours}"
        assert ours.output_shape == ((1, *expected) if unbatched else expected)


def conv2d(**options: Any) -> Arguments:
    return Arguments(2, False, (1, 4, 5, 5), (6, 4, 3, 3), options)


def conv_transpose2d(**options: Any) -> Arguments:
    return Arguments(2, True, (1, 4, 5, 5), (4, 6, 3, 3), options)


BAD = {
    "unbatched twice": dataclasses.replace(conv2d(), input_shape=(5, 5)),
    "too many axes": dataclasses.replace(conv2d(), input_shape=(1, 1, 4, 5, 5)),
    "weight of another rank": dataclasses.replace(conv2d(), weight_shape=(6, 4, 3)),
    "channels": dataclasses.replace(conv2d(), input_shape=(1, 3, 5, 5)),
    "channels of a group": conv2d(groups=2),
    "filters of a group": dataclasses.replace(conv2d(groups=4), weight_shape=(6, 1, 3, 3)),
    "zero groups": conv2d(groups=0),
    "negative groups": conv2d(groups=-1),
    "float groups": conv2d(groups=1.0),
    "zero stride": conv2d(stride=0),
    "negative stride": conv2d(stride=(1, -1)),
    "zero dilation": conv2d(dilation=0),
    "negative padding": conv2d(padding=-1),
    "three strides": conv2d(stride=(1, 1, 1)),
    "three paddings": conv2d(padding=[1, 1, 1]),
    "no stride": conv2d(stride=()),
    "float stride": conv2d(stride=1.5),
    "float in a tuple": conv2d(padding=(1, 1.5)),
    "None": conv2d(dilation=None),
    "unknown padding": conv2d(padding="full"),
    "same with a stride": conv2d(padding="same", stride=2),
    "filter larger than the image": dataclasses.replace(conv2d(), weight_shape=(6, 4, 7, 3)),
    "dilated filter larger than the image": conv2d(dilation=3),
    "padding in words, transposed": conv_transpose2d(padding="same"),
    "output padding": conv_transpose2d(output_padding=1),
    "negative output padding": conv_transpose2d(output_padding=-1),
    "nothing left, transposed": conv_transpose2d(padding=4),
    "channels, transposed": dataclasses.replace(conv_transpose2d(), input_shape=(1, 6, 5, 5)),
}


@pytest.mark.parametrize("call", BAD.values(), ids=BAD)
def test_errors(call: Arguments) -> None:
    """Both raise, the same type; ours names the operation."""
    with pytest.raises(Exception) as theirs:
        call.torch("cpu")
    with pytest.raises(theirs.type) as ours:
        call.ours()
    assert ours.type is theirs.type
    assert "conv" in str(ours.value)


@thorough
@given(arguments())
def test_macs_are_half_of_torchs_flops(call: Arguments) -> None:
    geometry = outcome(call.ours)
    # torch's counter has no unbatched convolutions.
    if isinstance(geometry, type) or len(call.input_shape) == call.nd + 1:
        return
    with FlopCounterMode(display=False) as counter:
        call.torch()
    assert 2 * geometry.macs == counter.get_total_flops()


@thorough
@given(arguments())
def test_gemm_sizes_multiply_to_macs(call: Arguments) -> None:
    """M * N * K of all groups is the multiply-adds, whatever the direction, but for pixels that padding adds or cuts."""
    g = outcome(call.ours)
    if isinstance(g, type):
        return
    smaller, larger = ("dgrad", "fprop") if g.transposed else ("fprop", "dgrad")
    assert math.prod(g.gemm(smaller)) * g.groups == g.macs
    assert math.prod(g.gemm("wgrad")) * g.groups == g.macs
    m, n, k = g.gemm(larger)
    pixels = math.prod(g.output if g.transposed else g.input)
    assert m == g.batch * pixels
    assert (n * g.groups, k) == (
        (g.out_channels, g.in_channels // g.groups * g.taps)
        if g.transposed
        else (g.in_channels, g.out_channels // g.groups * g.taps)
    )


@thorough
@given(arguments())
def test_value_semantics(call: Arguments) -> None:
    g = outcome(call.ours)
    if isinstance(g, type):
        return
    assert g == call.ours()
    assert hash(g) == hash(call.ours())
    assert copy.deepcopy(g) == pickle.loads(pickle.dumps(g)) == g
    assert {g: 1}[call.ours()] == 1


def test_str_tells_the_call() -> None:
    g = ConvGeometry.parse((2, 4, 9, 9), (6, 2, 3, 3), nd=2, stride=(2, 1), padding=1, groups=2)
    assert str(g) == "conv2d 2x4x9x9 -> 2x6x5x9, weight 6x2x3x3, stride 2x1, padding 1x1, dilation 1x1, groups 2"
    up = ConvGeometry.parse((1, 4, 9), (4, 6, 2), nd=1, stride=2, transposed=True)
    assert str(up) == "conv_transpose1d 1x4x9 -> 1x6x18, weight 4x6x2, stride 2, padding 0, dilation 1, groups 1"


def test_lifting() -> None:
    """1-d and 2-d are 3-d with unit sizes."""
    g = ConvGeometry.parse((2, 4, 9), (6, 4, 3), nd=1, stride=2, padding=1, dilation=2)
    assert (g.input, g.kernel, g.output) == ((1, 1, 9), (1, 1, 3), (1, 1, 4))
    assert (g.stride, g.padding, g.dilation) == ((1, 1, 2), (0, 0, 1), (1, 1, 2))


def test_same_padding_of_an_even_filter_puts_the_odd_zero_behind() -> None:
    g = ConvGeometry.parse((1, 1, 8), (1, 1, 4), nd=1, padding="same")
    assert (g.padding[2], g.padding_after[2], g.output[2]) == (1, 2, 8)
    x, w = torch.randn(1, 1, 8), torch.randn(1, 1, 4)
    padded = torch.nn.functional.pad(x, (g.padding[2], g.padding_after[2]))
    expected = torch.nn.functional.conv1d(x, w, padding="same")
    torch.testing.assert_close(torch.nn.functional.conv1d(padded, w), expected)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((1, 2, 2**15 - 2, 2**15 - 4), False),
        # The image alone would fit, its padded halo does not.
        ((1, 2, 2**15 - 2, 2**15 - 2), True),
        ((64, 128, 513, 513), True),
    ],
)
def test_offsets_beyond_int32(shape: tuple[int, ...], expected: bool) -> None:
    assert ConvGeometry.parse(shape, (1, shape[1], 3, 3), nd=2, padding=1).needs_int64 is expected


def test_offsets_beyond_int32_of_the_output_alone() -> None:
    assert ConvGeometry.parse((1, 1, 2**14, 2**14), (16, 1, 1, 1), nd=2).needs_int64
    assert not ConvGeometry.parse((1, 1, 2**14, 2**14), (4, 1, 1, 1), nd=2).needs_int64


def test_touched_input() -> None:
    """A 1x1 filter of stride 2 reads a quarter of the image; a 3x3 one of stride 2 reads all but unused borders."""
    assert ConvGeometry.parse((1, 1, 8, 8), (1, 1, 1, 1), nd=2, stride=2).touched_input() == 16
    assert ConvGeometry.parse((1, 1, 8, 8), (1, 1, 3, 3), nd=2, stride=2).touched_input() == 49
    assert ConvGeometry.parse((1, 1, 8, 8), (1, 1, 3, 3), nd=2, stride=2, padding=1).touched_input() == 64


def tuning_variants() -> dict[str, ConvGeometry]:
    """Calls that differ from the first in one thing each."""

    def g(x: tuple[int, ...] = (2, 8, 16, 16), w: tuple[int, ...] = (8, 8, 3, 3), **options: Any) -> ConvGeometry:
        return ConvGeometry.parse(x, w, nd=len(x) - 2, **options)

    return {
        "base": g(),
        "batch": g((3, 8, 16, 16)),
        "channels": g((2, 4, 16, 16), (8, 4, 3, 3)),
        "filters": g(w=(16, 8, 3, 3)),
        "height": g((2, 8, 17, 16)),
        "width": g((2, 8, 16, 17)),
        "filter": g(w=(8, 8, 3, 1)),
        "stride": g(stride=2),
        "stride of one axis": g(stride=(1, 2)),
        "padding": g(padding=1),
        "padding behind": g(w=(8, 8, 4, 4), padding="same"),
        "even filter, padded": g(w=(8, 8, 4, 4), padding=1),
        "dilation": g(dilation=2),
        "groups": g(w=(8, 4, 3, 3), groups=2),
        "transposed": g(transposed=True),
        "output padding": g(transposed=True, stride=2, output_padding=1),
        "transposed stride": g(transposed=True, stride=2),
        "1-d": g((2, 8, 256), (8, 8, 9)),
        "3-d": g((2, 8, 1, 16, 16), (8, 8, 1, 3, 3)),
    }


def test_tuning_key_holds_everything_that_matters() -> None:
    keys = {name: g.tuning_key("float16") for name, g in tuning_variants().items()}
    assert len(set(keys.values())) == len(keys), keys
    base = tuning_variants()["base"]
    others = {base.tuning_key("float32"), base.tuning_key("float16", "dgrad"), base.tuning_key("float16", "wgrad")}
    assert len(others | {base.tuning_key("float16")}) == 4


CASES = Path(__file__).parents[1] / "benchmarks" / "cases.csv"


def published() -> list[Any]:
    """The rows that are convolutions."""
    with CASES.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["kind"] in ("conv", "convT")]
    return [pytest.param(row, id=row["id"]) for row in rows]


@pytest.mark.parametrize("row", published())
def test_cases(row: dict[str, str]) -> None:
    """Output sizes, multiply-adds and least bytes of every convolution in the table."""
    nd, transposed = int(row["nd"]), row["kind"] == "convT"

    def number(name: str) -> int:
        return int(row[name])

    def numbers(name: str) -> tuple[int, ...]:
        """One number for every axis, or 1x2x2 for them one by one."""
        values = tuple(int(v) for v in row[name].split("x"))
        return values if len(values) == nd else values * nd

    spatial, filter_ = [[number(name) for name in names[3 - nd :]] for names in ("DHW", "TRS")]
    causal = row["pad"] == "causal"
    if causal:
        # All the zeros stand before the first sample: an image that has them already gives the same sizes.
        spatial[0] += number("dilation") * (filter_[0] - 1)
    c, k, groups = number("C"), number("K"), number("groups")
    options: dict[str, Any] = dict(
        stride=numbers("stride"), padding=0 if causal else numbers("pad"), dilation=numbers("dilation"), groups=groups
    )
    if transposed:
        options["output_padding"] = numbers("output_padding")
    weight = (c, k // groups, *filter_) if transposed else (k, c // groups, *filter_)
    g = ConvGeometry.parse((number("N"), c, *spatial), weight, nd=nd, transposed=transposed, **options)
    assert g.output == (number("OD"), number("OH"), number("OW"))
    assert g.macs == number("macs")
    if not causal:
        assert g.bytes(2, residual=row["residual"] == "1") == number("bytes")

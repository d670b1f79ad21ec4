"""Depthwise convolution with a large filter on tensor cores, both directions: when, which tile, and the launches.

The kernels (kernels/depthwise_bands.py) read rows of a channel, so that images are contiguous here: one that is not is
copied. "Source" and "result" are the image that is read and the one that is written, whichever way that is.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from tritonconv.geometry import INT32_MAX, ConvGeometry, Pass, power, power_of_two_divisor
from tritonconv.ops.conv.dense import output_format
from tritonconv.ops.conv.depthwise import DepthwiseView, add_slots, touched_input
from tritonconv.ops.conv.plan import Strides, lift
from tritonconv.ops.conv.target import WHOLE, Result, Target
from tritonconv.ops.core.epilogue import Epilogue
from tritonconv.ops.core.launch import Launch, axis_constants, device_of, forced_config, launch, precision
from tritonconv.ops.core.layout import as_format, empty_output
from tritonconv.tuning import INTERPRETER, Device, Problem, candidates, choose, device_named
from tritonconv.tuning.cost import predict
from tritonconv.tuning.devices import LAUNCH
from tritonconv.tuning.families.bands import BAND_WAVES, shape_of

__all__ = ["bands_dgrad", "bands_wgrad", "convolve_banded", "prefers_bands", "supports_bands"]

# Least steps of a program of the weight gradient.
LEAST_STEPS = 8
# Smaller filters are left to the direct kernel, which keeps what is not finite in the filter's reach; a model that was not
# measured must promise so much.
LEAST_TAPS, MARGIN = 25, 1.25


@functools.lru_cache(maxsize=4096)
def prefers_bands(view: DepthwiseView, dtype: torch.dtype, pass_: Pass = "fprop", tf32: bool = False) -> bool:
    """Whether the products are predicted to be faster than the direct kernel, with the copies that they need.

    The direct form issues about 1.75 instructions a tap and result (counted: 782 for 448 FFMA in the loop of 7x7, 1694 for
    960 in that of 31x31), 29.6e12 of which an H200 can issue a second; tuning/families/direct.py predicts its time.
    Products take issue slots and tensor cores: tuning/families/bands.py. A channels-last image is copied to rows, and its
    result back, each read and written once. Forward in bf16 on an H200, in microseconds, nothing measured:

                                    direct      products   copies    taken: contiguous, channels-last
        ConvNeXt    7x7, 56x56      128            79         77            yes           no
        ConvNeXt    7x7, 14x14       35            18         23            yes           no
        ConvNeXt    7x7, 7x7         19             8         14            yes           no
        RepLKNet  31x31, 56x56     1344           215         53            yes           yes
        RepLKNet  27x27, 14x14      268            20         17            yes           yes

    The direct kernel's times are those for channels-last images; for contiguous ones they are several times as long.
    A result of ConvNeXt's first layer takes 366 multiply-adds on tensor cores for its 49 taps (10 source rows of 32
    elements for 4 x 16 results, and 64 columns for 56), one of RepLKNet's 2341 for 961.
    """
    pass_ = "dgrad" if view.transposed else pass_
    if view.conv.taps < LEAST_TAPS or not supports_bands(view, dtype, pass_, tf32):
        return False
    device = device_named("H200") if view.device.arch == INTERPRETER.arch else view.device
    g, name = view.conv, str(dtype)[6:]
    last = "_wgrad" if pass_ == "wgrad" else ""
    direct = Problem(f"depthwise{last}", g, name, False, view.channels_last, device, pass_)
    bands = Problem(f"depthwise_bands{last}", g, name, tf32, True, device, pass_)
    seconds = predict(bands, choose(bands)).seconds
    if view.channels_last:
        seconds += copy_seconds(view, device)
    return bool(MARGIN * seconds < predict(direct, choose(direct)).seconds)


def copy_seconds(view: DepthwiseView, device: Device) -> float:
    """Seconds that both images take to be copied from one format to the other."""
    x, _, y = view.conv.elements()
    return 2 * (x + y) * view.itemsize / device.bandwidth + 2 * LAUNCH


def supports_bands(view: DepthwiseView, dtype: torch.dtype, pass_: Pass = "fprop", tf32: bool = False) -> bool:
    """Whether there is a kernel for it: products of this type on tensor cores, and a tile that holds a row's window."""
    device = device_named("H200") if view.device.arch == INTERPRETER.arch else view.device
    pass_ = "dgrad" if view.transposed else pass_
    last = "_wgrad" if pass_ == "wgrad" else ""
    problem = Problem(f"depthwise_bands{last}", view.conv, str(dtype)[6:], tf32, True, device, pass_)
    return problem.tensor_cores and bool(candidates(problem))


def _index_64(view: DepthwiseView, strides: Strides) -> bool:
    """Whether 32-bit offsets could overflow: a large tensor, or a small view that strides over a large one."""
    g = view.conv
    # Elements outside the image have addresses too, before their mask is applied; so have the ends of blocks.
    reach = [(size + 2 * taps * d + 256 * s) * stride for size, taps, d, s, stride in
             zip(view.source, g.kernel, g.dilation, g.stride, strides[2:], strict=True)]  # fmt: skip
    source_channels = g.out_channels if view.transposed else g.in_channels
    return g.needs_int64 or g.batch * strides[0] + source_channels * strides[1] + sum(reach) > INT32_MAX


def _problem(
    view: DepthwiseView, strides: Strides, dtype: torch.dtype, pass_: Pass, statistics: bool = False
) -> tuple[Problem, dict[str, int]]:
    """What a config is chosen for, and powers of two that divide strides and widths."""
    sn, sc, sd, sh, _ = strides
    divisors = dict(
        VEC_X=power_of_two_divisor(sn, sc, sd, sh), VEC_W=power_of_two_divisor(view.source[2]),
        VEC_Q=power_of_two_divisor(view.result[2]),
    )  # fmt: skip
    # Whether rows begin where their width lets them.
    vectors = divisors["VEC_X"] >= math.gcd(16 // view.itemsize, divisors["VEC_W"])
    kernel = "depthwise_bands_wgrad" if pass_ == "wgrad" else "depthwise_bands"
    tf32 = precision(dtype, "conv") == "tf32"
    problem = Problem(kernel, view.conv, str(dtype)[6:], tf32, vectors, view.device, pass_, statistics=statistics)
    return problem, divisors


def _launch(
    view: DepthwiseView, x: Tensor, weight: Tensor, epilogue: Epilogue, shape: tuple[int, ...], target: Target = WHOLE
) -> Result:
    """Launch a depthwise convolution in either direction, with an epilogue.

    Args:
        x: the source, whose rows lie side by side.
        shape: the result's, contiguous.
    """
    from tritonconv.kernels.bands import divide
    from tritonconv.kernels.depthwise_bands import depthwise_bands_kernel

    g = view.conv
    channels = g.out_channels if view.transposed else g.in_channels
    sn, sc, sd, sh, _ = strides = lift(x.stride(), (g.batch, channels, *view.source))
    problem, divisors = _problem(view, strides, x.dtype, "dgrad" if view.transposed else "fprop", target.statistics)
    config = forced_config("BLOCK_M") or choose(problem)
    m, n, k = (config.kwargs[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
    bands = divide(m, n, k, **shape_of(problem))
    if bands is None:
        raise RuntimeError(f"{k} elements are too few for a window of {g}")
    height, width = bands.height, bands.width
    wide = width.blocks > 1
    slots = -(-bands.rows // m)
    result, written = target.result(x, shape, False, slots)
    arguments = written | epilogue.arguments() | axis_constants(g)
    arguments |= dict(zip("DHWOPQ", (*view.source, *view.result), strict=True)) | divisors | dict(
        x_ptr=x, stride_xn=sn, stride_xc=sc, stride_xd=sd, stride_xh=sh, w=weight, M=bands.rows, C=view.channels,
        BLOCKS_P=height.blocks, BLOCKS_Q=width.blocks, STEPS=bands.steps, MULT=g.out_channels // g.groups,
        TRANSPOSED=view.transposed, WIDE=wide, COVERED=not wide and width.first == 0 and bands.block_w <= view.source[2],
        INDEX_64=_index_64(view, strides), PRECISION=precision(x.dtype, "conv"), ROWS=height.results,
        COLUMNS=width.results, FIRST_H=height.first, FIRST_W=width.first, STEP_H=height.step, MOVE_H=height.move,
        MOVE_W=width.move, BLOCK_M=m, BLOCK_N=n, BLOCK_K=k, BLOCK_Q=bands.block_q, BLOCK_W=bands.block_w,
        STAGES=config.num_stages,
    )  # fmt: skip
    launch(Launch(depthwise_bands_kernel, slots * view.channels, arguments, problem, config), x.device)
    return result


def _has_rows(t: Tensor) -> bool:
    """Whether the elements of a row lie side by side."""
    return t.stride()[-1] == 1 or t.shape[-1] == 1


def convolve_banded(
    x: Tensor, weight: Tensor, epilogue: Epilogue, geometry: ConvGeometry, target: Target = WHOLE
) -> Result:
    """A batched depthwise convolution, or a transposed one, of tensors that `check_convolution` accepts.

    A result that is to be channels-last is copied.
    """
    g, channels_last = geometry, output_format(x, weight)
    if 0 in g.output_shape:
        return Result(empty_output(x, g.output_shape, channels_last, x.dtype))
    view = DepthwiseView(g.mirrored if g.transposed else g, g.transposed, False, device_of(x.device), x.element_size())
    # A filter of one channel has one order in memory, whatever it is called.
    tensors = x if _has_rows(x) else as_format(x, False), as_format(weight, False)
    result = _launch(view, *tensors, epilogue.arranged(False), g.output_shape, target)
    assert result.y is not None
    return result._replace(y=as_format(result.y, True)) if channels_last else result


def bands_dgrad(dy: Tensor, weight: Tensor, geometry: ConvGeometry) -> Tensor:
    """Gradient of a batched depthwise convolution's input, contiguous; arguments as `conv_dgrad` takes them."""
    g = geometry
    if 0 in g.input_shape:
        return empty_output(dy, g.input_shape, False, dy.dtype)
    dy, weight = dy if _has_rows(dy) else as_format(dy, False), as_format(weight, False)
    dx = _launch(
        DepthwiseView(g, True, False, device_of(dy.device), dy.element_size()), dy, weight, Epilogue(), g.input_shape
    ).y
    assert dx is not None
    return dx


def bands_wgrad(
    dy: Tensor, x: Tensor, geometry: ConvGeometry, channels_last: bool, bias: bool
) -> tuple[Tensor, Tensor | None]:
    """Gradients of a batched depthwise convolution's weight and bias; arguments as `conv_wgrad` takes them.

    Sums of ranges of the pixels go through a workspace in fp32.
    """
    from tritonconv.kernels.depthwise_bands_wgrad import depthwise_bands_wgrad_kernel, divide

    g, k = geometry, geometry.out_channels
    # A filter of one channel has one order in memory, whatever its strides are called.
    dw = empty_output(dy, g.weight_shape, channels_last, dy.dtype)
    db = torch.empty_strided((k,), (1,), dtype=dy.dtype, device=dy.device) if bias else None
    if dy.numel() == 0:
        return dw.zero_(), db if db is None else db.zero_()
    dy = as_format(dy, False)
    x = x if _has_rows(x) else as_format(x, False)
    sn, sc, sd, sh, _ = strides = lift(x.stride(), (g.batch, g.in_channels, *g.input))
    view = DepthwiseView(g, False, False, device_of(dy.device), dy.element_size())
    problem, divisors = _problem(view, strides, dy.dtype, "wgrad")
    config = forced_config("BLOCK_M") or choose(problem)
    block_m, block_n, block_k = (config.kwargs[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
    found = divide(block_m, block_n, block_k, **shape_of(problem))
    if found is None:
        raise RuntimeError(f"{block_m} elements are too few for a window of {g}")
    block_w, rows, width, groups, steps = found
    programs = g.kernel[0] * groups * k
    size = max(LEAST_STEPS, -(-steps * programs // (BAND_WAVES * view.device.multiprocessors)))
    size = min(size, steps)
    slots = -(-steps // size)
    sums = empty_output(dy, (slots, g.taps + 1, k), False, torch.float32)
    touched = touched_input(g)
    divisors["VEC_W"] = power_of_two_divisor(touched[2])
    arguments: dict[str, Any] = axis_constants(g) | dict(zip("DHW", touched, strict=True)) | divisors | dict(
        x_ptr=x, stride_xn=sn, stride_xc=sc, stride_xd=sd, stride_xh=sh, dy_ptr=dy, sums_ptr=sums, N=g.batch, K=k,
        BLOCKS_Q=width.blocks, STEPS=steps, RANGE=size, MULT=k // g.groups, BIAS=bias, WIDE=width.blocks > 1,
        TALL=g.output[1] > rows, EVEN=g.batch % (block_k // rows) == 0, INDEX_64=_index_64(view, strides),
        PRECISION=precision(dy.dtype, "conv"), FIRST_W=width.first, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k,
        BLOCK_W=block_w, BLOCK_P=rows, BLOCK_S=power(g.kernel[2], 1 << 20), STAGES=config.num_stages,
    )  # fmt: skip
    launch(Launch(depthwise_bands_wgrad_kernel, slots * programs, arguments, problem, config), dy.device)
    add_slots(sums, dw, db)
    return dw, db

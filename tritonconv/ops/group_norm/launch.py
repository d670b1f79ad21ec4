"""Launches of group norm's kernels. Tensors (N, C, *spatial) are dense in either format, and results have that of x.

`groups`: how many an image has, or 0 if each pixel is a group of all channels. Statistics are [3, groups of all images] and
wide: the mean in two parts, and the biased variance. Vectors may have any strides.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from torch import Tensor

from tritonconv.geometry import needs_int64, power_of_two_divisor
from tritonconv.ops.core.activation import ActivationSpec
from tritonconv.ops.core.launch import Launch, activation_constants, device_of, forced_config, gradient_constants, launch
from tritonconv.ops.core.layout import as_format, empty_like, empty_output, is_dense, wide, written_densely
from tritonconv.tuning import Device
from tritonconv.tuning.rules.normalization import (
    Tile,
    batch_norm_config,
    eight_warps,
    group_tile,
    join_tile,
    most_channels,
    norm_join_config,
)

__all__ = ["Affine", "fits", "gradients", "normalize", "reads", "statistics_count", "update_running"]

# As batch norm has them (ops/batch_norm/launch.py).
WAVES, LEAST_BLOCKS = 4, 4


class Affine(NamedTuple):
    """What a normalized value is multiplied by and what is added, each of any floating dtype or None."""

    weight: Tensor | None
    """(C,)"""
    bias: Tensor | None
    """(C,)"""
    scale: Tensor | None
    """(N, C), without the one that is added to it."""
    shift: Tensor | None
    """(N, C)"""

    def arguments(self, *names: str) -> dict[str, Any]:
        """The kernels' arguments, all of them or these: channels side by side, rows anywhere."""
        found: dict[str, Any] = {}
        for name, t in self._asdict().items():
            dense = t if t is None or t.stride(-1) == 1 else t.contiguous()
            found[f"{name}_ptr"] = dense
            if name in ("scale", "shift"):
                found[f"stride_{name}"] = None if dense is None else dense.stride(0)
        return {name: found[name] for name in names or found}


class GroupView(NamedTuple):
    """A tensor as the kernels see it: runs of pixels, in groups."""

    images: int
    """Runs: one for all pixels where nothing differs by image."""
    pixels: int
    channels: int
    size: int
    """Channels of a group."""
    per_pixel: bool
    channels_last: bool
    itemsize: int
    device: Device

    @classmethod
    def of(cls, x: Tensor, groups: int, by_image: bool) -> GroupView:
        """The view of a dense tensor; `by_image`: whether it is scaled or shifted by images."""
        n, c, *spatial = x.shape
        pixels, channels_last = math.prod(spatial), c > 1 and is_dense(x, True)
        if groups == 0 and channels_last and not by_image:
            n, pixels = 1, n * pixels
        size = c if groups == 0 else c // groups
        return cls(n, pixels, c, size, groups == 0, channels_last, x.element_size(), device_of(x.device))

    @property
    def whole(self) -> int:
        """How many groups there are."""
        return self.images * (self.pixels if self.per_pixel else self.channels // self.size)

    @property
    def members(self) -> int:
        """Elements of a group."""
        return self.channels if self.per_pixel else self.size * self.pixels

    def tile(self, backward: bool, residual: bool) -> Tile | None:
        """The tile of kernels of whole groups, with or without a residual to read; None: x is read twice."""
        if forced_config("BLOCK_P") is not None and not self.per_pixel:
            return None
        rule = (self.pixels, self.channels, self.size, self.per_pixel, self.channels_last, self.itemsize)
        held = 1 + backward + residual
        return group_tile(*rule, held, self.per_pixel and backward, self.device, forced_config("ELEMENTS"))

    def config(self, walks: bool, exponentials: bool = False) -> Any:
        """The triton.Config of the others: the forced one, or the chosen one.

        Args:
            exponentials: whether an activation may need so many registers in fp64 that a thread has half of the elements.
        """
        rule = (self.pixels, self.channels, self.channels_last, self.device)
        config = forced_config("BLOCK_P") or batch_norm_config(*rule, walks)
        return eight_warps(config) if exponentials and self.itemsize > 4 else config

    def sizes(self, step: int | None = None) -> dict[str, Any]:
        """The kernels' arguments that say where a tile lies; `step`: channels from a tile to the next."""
        side = (self.channels, step or self.channels) if self.channels_last else (self.pixels,)
        return dict(
            PIXELS=self.pixels, C=self.channels, SIZE=self.size, CHANNELS_LAST=self.channels_last,
            VEC=power_of_two_divisor(*side), INDEX_64=needs_int64(self.images * self.pixels * self.channels),
        )  # fmt: skip

    def blocks(self, pixels: int) -> int:
        """Of an image."""
        return math.ceil(self.pixels / pixels)

    def slots(self, blocks: int, tiles: int, least: int) -> tuple[int, int]:
        """(slots of an image, blocks of each but the last), for so many blocks and tiles of channels."""
        wanted = math.ceil(WAVES * self.device.multiprocessors / (tiles * self.images))
        size = max(least, math.ceil(blocks / wanted))
        return math.ceil(blocks / size), size


def fits(channels: int, x: Tensor, groups: int) -> bool:
    """Whether there are kernels for a norm of a tensor like x: the channels of a pixel must fit in a tile."""
    return groups > 0 or channels <= most_channels(x.element_size())


def reads(channels: int, x: Tensor, groups: int) -> int:
    """How often a norm of (N, C, *spatial) x reads it: once where a group fits in a tile."""
    if groups == 0:
        return 1
    rule = (math.prod(x.shape[2:]), channels, channels // groups, False, True, x.element_size(), 1, False)
    return 1 if group_tile(*rule, device_of(x.device)) is not None else 2


def statistics_count(x: Tensor, groups: int) -> int:
    """How many groups all images have together."""
    return x.shape[0] * (groups or math.prod(x.shape[2:]))


def normalize(
    x: Tensor, affine: Affine, groups: int, eps: float, residual: Tensor | None, activation: ActivationSpec | None
) -> tuple[Tensor, Tensor]:
    """(act(norm(x) * (1 + scale) + shift + residual) of x's dtype, statistics) of a tensor with elements.

    Args:
        residual: of x's size; copied to x's format where it has another.
    """
    from tritonconv.kernels.group_norm import group_norm_kernel, group_norm_normalize_kernel

    view = _view(x, groups, affine)
    y, statistics = empty_like(x), _new(x, 3, view.whole)
    arguments = dict(
        x_ptr=x, residual_ptr=_as(residual, view), y_ptr=y, statistics_ptr=statistics, STATISTICS=view.whole,
        EPS=float(eps), **affine.arguments(), **activation_constants(activation),
    )  # fmt: skip
    tile = view.tile(backward=False, residual=residual is not None)
    if tile is not None:
        arguments.update(
            view.sizes(tile.step), **tile.constants(), SHARE=1 / view.members, PER_PIXEL=view.per_pixel
        )  # fmt: skip
        programs = view.images * view.blocks(tile.pixels) * math.ceil(view.channels / tile.step)
        launch(Launch(group_norm_kernel, programs, arguments, None, tile.config, tile.candidates), x.device)
        return y, statistics
    _statistics(x, view, statistics)
    config = view.config(walks=False, exponentials=True)
    arguments.update(view.sizes(), **config.kwargs)
    launch(Launch(group_norm_normalize_kernel, _tiles(view, config), arguments, None, config), x.device)
    return y, statistics


def _statistics(x: Tensor, view: GroupView, statistics: Tensor) -> None:
    """Fill in the statistics of groups that no tile has as a whole."""
    from tritonconv.kernels.group_norm import group_norm_combine_kernel, group_norm_statistics_kernel

    config = view.config(walks=True)
    blocks, tiles = view.blocks(config.kwargs["BLOCK_P"]), math.ceil(view.channels / config.kwargs["BLOCK_C"])
    slots, size = view.slots(blocks, tiles, LEAST_BLOCKS)
    moments = _new(x, 2, view.images, slots, view.channels)
    arguments = dict(
        x_ptr=x, moments_ptr=moments, RANGE=size, SLOTS=slots, IMAGES=view.images, STAGES=config.num_stages,
        **view.sizes(), **config.kwargs,
    )  # fmt: skip
    launch(Launch(group_norm_statistics_kernel, view.images * slots * tiles, arguments, None, config), x.device)
    step, tile = join_tile(view.channels, view.size, slots, view.device)
    sizes = view.sizes()
    joined = dict(
        moments_ptr=moments, x_ptr=x, statistics_ptr=statistics, LENGTH=size * config.kwargs["BLOCK_P"], SLOTS=slots,
        IMAGES=view.images, STEP=step, SHARE=1 / view.size, VEC=power_of_two_divisor(view.channels, step), **tile,
        **{name: sizes[name] for name in ("PIXELS", "C", "SIZE", "CHANNELS_LAST", "INDEX_64")},
    )  # fmt: skip
    programs = view.images * math.ceil(view.channels / step)
    launch(Launch(group_norm_combine_kernel, programs, joined, None, None), x.device)


class Needs(NamedTuple):
    """Which gradients are needed."""

    x: bool
    weight: bool
    bias: bool
    scale: bool
    shift: bool
    residual: bool

    def parameters(self) -> bool:
        return self.weight or self.bias or self.scale or self.shift


def gradients(
    dy: Tensor, x: Tensor, statistics: Tensor, affine: Affine, groups: int, eps: float, residual: Tensor | None,
    activation: ActivationSpec | None, needs: Needs,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of x, weight, bias, scale, shift and residual, each None where it is not needed.

    Args:
        dy: of x's size with any strides; copied to x's format where it has another.
        residual: None where it has no part in the activation's gradient.
    """
    from tritonconv.kernels.group_norm_backward import group_norm_backward_kernel

    view = _view(x, groups, affine)
    dx = empty_like(x) if needs.x else None
    tile = view.tile(backward=True, residual=residual is not None)
    if tile is None:
        # What the input's gradient cannot compute from dy and x alone is written once.
        write = activation is not None and (needs.residual or residual is not None)
        g, sums = _twice(dy, x, statistics, affine, view, eps, residual, activation, write, dx)
    else:
        g = empty_like(x) if needs.residual and activation is not None else None
        tiles, blocks = math.ceil(view.channels / tile.step), view.blocks(tile.pixels)
        slots, size = view.slots(blocks, tiles, 1)
        sums = _new(x, view.images, slots, 2, view.channels)
        arguments = dict(
            dy_ptr=_as(dy, view), x_ptr=x, residual_ptr=_as(residual, view), dx_ptr=dx, g_ptr=g, statistics_ptr=statistics,
            sums_ptr=sums if needs.parameters() else None, RANGE=size, SLOTS=slots, STATISTICS=view.whole,
            SHARE=1 / view.members, EPS=float(eps), PER_PIXEL=view.per_pixel, **affine.arguments(),
            **gradient_constants(activation), **view.sizes(tile.step), **tile.constants(),
        )  # fmt: skip
        programs = view.images * slots * tiles
        launch(
            Launch(group_norm_backward_kernel, programs, arguments, None, tile.config, tile.candidates), x.device
        )  # fmt: skip
    found = _parameters(sums, affine, needs) if needs.parameters() else (None,) * 4
    return dx, *found, g if needs.residual else None


def _twice(
    dy: Tensor, x: Tensor, statistics: Tensor, affine: Affine, view: GroupView, eps: float, residual: Tensor | None,
    activation: ActivationSpec | None, write: bool, dx: Tensor | None,
) -> tuple[Tensor | None, Tensor]:  # fmt: skip
    """(g where it is written, sums of its slots), of groups that no tile has as a whole; fills in dx."""
    from tritonconv.kernels.group_norm_backward import (
        group_norm_input_gradient_kernel,
        group_norm_means_kernel,
        group_norm_reduce_kernel,
    )

    config = view.config(walks=True, exponentials=True)
    blocks, tiles = view.blocks(config.kwargs["BLOCK_P"]), math.ceil(view.channels / config.kwargs["BLOCK_C"])
    slots, size = view.slots(blocks, tiles, LEAST_BLOCKS)
    g, sums = empty_like(x) if write else None, _new(x, view.images, slots, 2, view.channels)
    shared = dict(
        x_ptr=x, statistics_ptr=statistics, STATISTICS=view.whole, EPS=float(eps), **affine.arguments(), **view.sizes()
    )  # fmt: skip
    arguments = dict(
        shared, dy_ptr=_as(dy, view), residual_ptr=_as(residual, view), g_ptr=g, sums_ptr=sums, RANGE=size, SLOTS=slots,
        STAGES=config.num_stages, **gradient_constants(activation), **config.kwargs,
    )  # fmt: skip
    launch(Launch(group_norm_reduce_kernel, view.images * slots * tiles, arguments, None, config), x.device)
    if dx is None:
        return g, sums
    means, (step, tile) = _new(x, 2, view.whole), join_tile(view.channels, view.size, slots, view.device)
    joined = dict(
        sums_ptr=sums, means_ptr=means, SLOTS=slots, IMAGES=view.images, C=view.channels, SIZE=view.size, STEP=step,
        SHARE=1 / view.members, VEC=power_of_two_divisor(view.channels, step), **tile,
        **affine.arguments("weight_ptr", "scale_ptr", "stride_scale"),
    )  # fmt: skip
    programs = view.images * math.ceil(view.channels / step)
    launch(Launch(group_norm_means_kernel, programs, joined, None, None), x.device)
    config = view.config(walks=False, exponentials=True)
    arguments = dict(
        shared, dy_ptr=_as(dy, view) if g is None else g, dx_ptr=dx, means_ptr=means,
        **gradient_constants(activation if g is None else None), **config.kwargs,
    )  # fmt: skip
    launch(Launch(group_norm_input_gradient_kernel, _tiles(view, config), arguments, None, config), x.device)
    return g, sums


def _parameters(sums: Tensor, affine: Affine, needs: Needs) -> tuple[Tensor | None, ...]:
    """Gradients of weight, bias, scale and shift in their dtypes, each None where it is not needed."""
    from tritonconv.kernels.group_norm_backward import group_norm_parameters_kernel

    images, slots, _, channels = sums.shape
    if affine.scale is None and affine.shift is None:
        images, slots = 1, images * slots
    found = [
        empty_output(sums, tuple(t.shape), False, t.dtype) if need and t is not None else None
        for t, need in zip(affine, needs[1:5], strict=True)
    ]
    config = norm_join_config(slots, channels, device_of(sums.device))
    arguments = dict(
        **affine.arguments("weight_ptr", "bias_ptr", "scale_ptr", "stride_scale"), sums_ptr=sums,
        dweight_ptr=found[0], dbias_ptr=found[1], dscale_ptr=found[2], dshift_ptr=found[3], IMAGES=images, SLOTS=slots,
        C=channels, VEC=power_of_two_divisor(channels), **config.kwargs,
    )  # fmt: skip
    programs = math.ceil(channels / config.kwargs["BLOCK_C"])
    launch(Launch(group_norm_parameters_kernel, programs, arguments, None, config), sums.device)
    return tuple(found)


def update_running(
    statistics: Tensor, pixels: int, running_mean: Tensor | None, running_var: Tensor | None, momentum: float
) -> None:
    """running = (1 - momentum) * running + momentum * mean over images, in place, with the unbiased variance.

    Args:
        statistics: [3, N * C], of images of so many pixels.
    """
    from tritonconv.kernels.group_norm import group_norm_running_kernel

    channels = next(t.shape[0] for t in (running_mean, running_var) if t is not None)
    images = statistics.shape[1] // channels
    config = norm_join_config(images, channels, device_of(statistics.device))
    programs = math.ceil(channels / config.kwargs["BLOCK_C"])
    with written_densely(running_mean, running_var) as (mean, var):
        arguments = dict(
            statistics_ptr=statistics, running_mean_ptr=mean, running_var_ptr=var, IMAGES=images, C=channels,
            unbiased=pixels / (pixels - 1), momentum=float(momentum), BLOCK_N=config.kwargs["BLOCK_S"],
            BLOCK_C=config.kwargs["BLOCK_C"],
        )  # fmt: skip
        launch(Launch(group_norm_running_kernel, programs, arguments, None, config), statistics.device)


def _view(x: Tensor, groups: int, affine: Affine) -> GroupView:
    return GroupView.of(x, groups, affine.scale is not None or affine.shift is not None)


def _tiles(view: GroupView, config: Any) -> int:
    """Programs of a kernel of one tile each."""
    blocks = view.images * view.blocks(config.kwargs["BLOCK_P"])
    return blocks * math.ceil(view.channels / config.kwargs["BLOCK_C"])


def _new(like: Tensor, *shape: int) -> Tensor:
    return empty_output(like, shape, False, wide(like.dtype))


def _as(t: Tensor | None, view: GroupView) -> Tensor | None:
    """The tensor as `view` sees its own."""
    return None if t is None else as_format(t, view.channels_last)

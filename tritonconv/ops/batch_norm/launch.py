"""Launches of batch norm's kernels. Tensors (N, C, *spatial) are dense in either format, and results have that of z.

Vectors (C,) may have any strides.
"Wide" is fp32, and fp64 for fp64: what is computed and handed from kernel to kernel. Nothing here waits for the device.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tritonconv.geometry import needs_int64, power_of_two_divisor
from tritonconv.ops.core.activation import ActivationSpec
from tritonconv.ops.core.launch import Launch, activation_constants, device_of, forced_config, gradient_constants, launch
from tritonconv.ops.core.layout import as_format, empty_like, empty_output, is_dense, pitch_of, wide, written_densely
from tritonconv.tuning import Device
from tritonconv.tuning.rules.normalization import batch_norm_config, norm_join_config

__all__ = [
    "Statistics", "check_sizes", "combine", "gradient_table", "input_gradient", "normalize", "reduce_gradients",
    "statistics", "update_running",
]  # fmt: skip

# So many programs of 4 warps a multiprocessor hide each other's latencies, and a slot is worth its place from so many
# blocks on; neither was measured.
WAVES, LEAST_BLOCKS = 4, 4


class Statistics(NamedTuple):
    """Statistics of parts of the pixels, in slots."""

    counts: Tensor
    """[SLOTS], wide: pixels of each slot; one of none is empty, and its moments are not used."""
    moments: Tensor
    """[2, SLOTS, C], wide: means, then sums of squared deviations."""


class NormView(NamedTuple):
    """A tensor as the kernels see it: runs of pixels."""

    runs: int
    pixels: int
    channels: int
    channels_last: bool
    device: Device
    pitch: int | None = None
    """Elements from a pixel to the next, where the tensor is some channels of a wider channels-last one."""

    @classmethod
    def of(cls, z: Tensor) -> NormView:
        n, c, *spatial = z.shape
        pixels, device = math.prod(spatial), device_of(z.device)
        pitch = pitch_of(z)
        if pitch is not None:
            return cls(1, n * pixels, c, True, device, pitch)
        # One channel is one plane, in either format.
        if is_dense(z, True):
            return cls(1, n * pixels, c, c > 1, device)
        if not is_dense(z, False):
            raise ValueError(
                f"batch norm: expected a dense tensor, got size {list(z.shape)} and strides {list(z.stride())}"
            )
        return cls(n, pixels, c, False, device)

    def config(self, walks: bool) -> Any:
        """The triton.Config to launch with: the forced one, or the chosen one.

        Args:
            walks: whether a program goes over many blocks.
        """
        rule = (self.pixels, self.channels, self.channels_last, self.device)
        return forced_config("BLOCK_P") or batch_norm_config(*rule, walks)

    def sizes(self, config: Any) -> dict[str, Any]:
        """The kernels' arguments that say where a tile lies."""
        side = self.channels if self.channels_last else self.pixels
        reach = self.runs * self.pixels * (self.pitch or self.channels)
        return dict(
            PIXELS=self.pixels, C=self.channels, CHANNELS_LAST=self.channels_last,
            VEC=power_of_two_divisor(side, self.pitch or side), INDEX_64=needs_int64(reach), **config.kwargs,
        )  # fmt: skip

    def blocks(self, config: Any) -> int:
        return self.runs * math.ceil(self.pixels / config.kwargs["BLOCK_P"])

    def tiles(self, config: Any) -> int:
        """Of channels."""
        return math.ceil(self.channels / config.kwargs["BLOCK_C"])

    def slots(self, config: Any) -> tuple[int, int]:
        """(number of slots, blocks of each but the last) of a kernel that walks."""
        blocks = self.blocks(config)
        wanted = math.ceil(WAVES * self.device.multiprocessors / self.tiles(config))
        size = max(LEAST_BLOCKS, math.ceil(blocks / wanted))
        return max(1, math.ceil(blocks / size)), size


def check_sizes(x: Tensor, residual: Tensor | None, **vectors: Tensor | None) -> None:
    """Raise RuntimeError for tensors that kernels would read beyond their ends."""
    channels = x.shape[1]
    for name, t in vectors.items():
        if t is not None and tuple(t.shape) != (channels,):
            raise RuntimeError(
                f"batch_norm: {name} should contain {channels} elements, not {t.numel()} of size {list(t.shape)} "
                f"(input {list(x.shape)})"
            )
        if t is not None and t.device != x.device:
            raise RuntimeError(f"batch_norm: expected {name} on {x.device} as the input, but got {t.device}")
    if residual is not None and residual.shape != x.shape:
        raise RuntimeError(
            f"batch_norm: expected a tensor of the input's size {list(x.shape)}, but got {list(residual.shape)}"
        )


def statistics(z: Tensor) -> Statistics:
    """Statistics of every channel over batch and pixels, in one pass over z."""
    from tritonconv.kernels.batch_norm import batch_norm_statistics_kernel

    view = NormView.of(z)
    config = view.config(walks=True)
    slots, size = view.slots(config)
    counts, moments = _new(z, slots), _new(z, 2, slots, view.channels)
    arguments = dict(
        z_ptr=z, counts_ptr=counts, moments_ptr=moments, SLOTS=slots, RANGE=size, BLOCKS=view.blocks(config),
        STAGES=config.num_stages, **view.sizes(config),
    )  # fmt: skip
    launch(Launch(batch_norm_statistics_kernel, slots * view.tiles(config), arguments, None, config), z.device)
    return Statistics(counts, moments)


def combine(parts: Statistics) -> tuple[Tensor, Tensor, Tensor]:
    """(mean [C], biased variance [C], count [1]) of the union of all slots, joined in a fixed order; wide."""
    from tritonconv.kernels.batch_norm import batch_norm_combine_kernel

    counts, moments = parts
    _, slots, channels = moments.shape
    mean, var, count = _new(moments, channels), _new(moments, channels), _new(moments, 1)
    arguments = dict(
        counts_ptr=counts, moments_ptr=moments, mean_ptr=mean, var_ptr=var, count_ptr=count, SLOTS=slots, C=channels
    )
    _over_slots(batch_norm_combine_kernel, moments, slots, channels, arguments)
    return mean, var, count


def update_running(
    mean: Tensor, var: Tensor, count: Tensor, running_mean: Tensor | None, running_var: Tensor | None, momentum: float
) -> None:
    """running = (1 - momentum) * running + momentum * batch's, in place, with the unbiased variance as torch has it."""
    from tritonconv.kernels.batch_norm import batch_norm_running_kernel

    with written_densely(running_mean, running_var) as (dense_mean, dense_var):
        arguments = dict(
            mean_ptr=mean, var_ptr=var, count_ptr=count, running_mean_ptr=dense_mean, running_var_ptr=dense_var,
            momentum=float(momentum),
        )  # fmt: skip
        _over_channels(batch_norm_running_kernel, mean, arguments)


def normalize(
    z: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, residual: Tensor | None,
    activation: ActivationSpec | None,
) -> Tensor:  # fmt: skip
    """act((z - mean) / sqrt(var + eps) * weight + bias + residual), of z's dtype.

    Args:
        mean, var, weight, bias: (C,), each of any floating dtype.
        z: dense, or some channels of a dense channels-last tensor.
        residual: of z's size; copied to z's format where it has another.
    """
    from tritonconv.kernels.batch_norm import batch_norm_normalize_kernel

    y = empty_like(z)
    if y.numel() == 0:
        return y
    view = NormView.of(z)
    config = view.config(walks=False)
    arguments = dict(
        z_ptr=z, residual_ptr=_as(residual, view), y_ptr=y, stride_z=view.pitch, **_vectors(mean, var, weight, bias),
        **activation_constants(activation), EPS=float(eps),
        **view.sizes(config),
    )  # fmt: skip
    launch(Launch(batch_norm_normalize_kernel, view.blocks(config) * view.tiles(config), arguments, None, config), z.device)
    return y


def reduce_gradients(
    dy: Tensor, z: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float,
    residual: Tensor | None, activation: ActivationSpec | None, write: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Sums [2, C], wide, over batch and pixels of g and of g * (z - mean), and g itself where `write` asks for it.

    g = dy * act'(v) with v = (z - mean) / sqrt(var + eps) * weight + bias + residual; it has z's dtype and format.

    Args:
        dy: of z's size with any strides; copied to z's format where it has another.
    """
    from tritonconv.kernels.batch_norm_backward import batch_norm_add_kernel, batch_norm_reduce_kernel

    view = NormView.of(z)
    config = view.config(walks=True)
    slots, size = view.slots(config)
    parts, sums = _new(z, slots, 2, view.channels), _new(z, 2, view.channels)
    g = empty_like(z) if write else None
    arguments = dict(
        dy_ptr=_as(dy, view), z_ptr=z, residual_ptr=None if activation is None else _as(residual, view), g_ptr=g,
        **_vectors(mean, var, weight, bias), sums_ptr=parts, RANGE=size,
        BLOCKS=view.blocks(config), EPS=float(eps), STAGES=config.num_stages, **gradient_constants(activation),
        **view.sizes(config),
    )  # fmt: skip
    launch(Launch(batch_norm_reduce_kernel, slots * view.tiles(config), arguments, None, config), z.device)
    columns = 2 * view.channels
    _over_slots(batch_norm_add_kernel, z, slots, columns, dict(parts_ptr=parts, sums_ptr=sums, SLOTS=slots, SIZE=columns))
    return sums, g


def gradient_table(
    sums: Tensor | None, count: Tensor | None, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None,
    eps: float, batch_statistics: bool, local_sums: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """The table [5, C] of kernels/statistics.py, wide, and the gradients of weight and bias in their dtypes, if they exist.

    Args:
        sums: of `reduce_gradients`, over all that was normalized together; None in eval mode where no one needs the
            gradients of weight and bias.
        count: [1], over the same; None in eval mode.
        mean, var: those that z was normalized with.
        batch_statistics: whether these are the batch's own; else they are constants, and slope and offset 0.
        local_sums: the sums over this process's pixels, which weight and bias take; None: `sums`.
    """
    from tritonconv.kernels.batch_norm_backward import batch_norm_table_kernel

    local = sums if local_sums is None else local_sums
    channels = mean.shape[0]
    result = _new(mean, 5, channels)
    dweight, dbias = (
        None if t is None or local is None else torch.empty_strided((channels,), (1,), dtype=t.dtype, device=t.device)
        for t in (weight, bias)
    )
    arguments = dict(
        sums_ptr=sums if batch_statistics else None, count_ptr=count if batch_statistics else None, local_ptr=local,
        **_vectors(mean, var, weight, bias), table_ptr=result, dweight_ptr=dweight, dbias_ptr=dbias, EPS=float(eps),
    )  # fmt: skip
    _over_channels(batch_norm_table_kernel, mean, arguments)
    return result, dweight, dbias


def input_gradient(
    dy: Tensor, z: Tensor, table: Tensor, activation: ActivationSpec | None, batch_statistics: bool
) -> Tensor:
    """Gradient of a batch norm's input by its table, in one pass over dy and z.

    Args:
        dy: of z's size with any strides; copied to z's format where it has another.
        table: [5, C] of `gradient_table`.
        batch_statistics: whether the statistics were the batch's own.
    """
    from tritonconv.kernels.batch_norm_backward import batch_norm_input_gradient_kernel

    dz = empty_like(z)
    if dz.numel() == 0:
        return dz
    view = NormView.of(z)
    config = view.config(walks=False)
    arguments = dict(
        dy_ptr=_as(dy, view), z_ptr=z, dz_ptr=dz, table_ptr=table, SLOPED=batch_statistics,
        **gradient_constants(activation), **view.sizes(config),
    )  # fmt: skip
    programs = view.blocks(config) * view.tiles(config)
    launch(Launch(batch_norm_input_gradient_kernel, programs, arguments, None, config), z.device)
    return dz


def _vectors(mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None) -> dict[str, Tensor | None]:
    """A batch norm's vectors as kernels read them, side by side; users may give views of any strides."""
    named = dict(mean_ptr=mean, var_ptr=var, weight_ptr=weight, bias_ptr=bias)
    return {name: None if t is None else t.contiguous() for name, t in named.items()}


def _over_slots(kernel: Any, like: Tensor, slots: int, columns: int, arguments: dict[str, Any]) -> None:
    """Launch a kernel whose programs own some columns and join all slots of them."""
    config = norm_join_config(slots, columns, device_of(like.device))
    programs = math.ceil(columns / config.kwargs["BLOCK_C"])
    arguments = arguments | config.kwargs | dict(STAGES=config.num_stages)
    launch(Launch(kernel, programs, arguments, None, config), like.device)


def _over_channels(kernel: Any, like: Tensor, arguments: dict[str, Any]) -> None:
    """Launch a kernel whose programs own some channels."""
    channels, block = like.shape[0], 512
    launch(Launch(kernel, math.ceil(channels / block), arguments | dict(C=channels, BLOCK=block), None, None), like.device)


def _new(like: Tensor, *shape: int) -> Tensor:
    return empty_output(like, shape, False, wide(like.dtype))


def _as(t: Tensor | None, view: NormView) -> Tensor | None:
    """The tensor as `view` sees its own."""
    return None if t is None else as_format(t, view.channels_last)

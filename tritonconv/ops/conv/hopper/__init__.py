"""Hopper's own backend for dense convolutions, beside the portable kernels: asked for, not chosen, until it is measured."""

from tritonconv.ops.conv.hopper.convolution import hopper_dgrad, prepare_hopper
from tritonconv.ops.conv.hopper.supports import unsupported_gradient
from tritonconv.ops.conv.hopper.weights import hopper_wgrad

__all__ = ["hopper_dgrad", "hopper_wgrad", "prepare_hopper", "unsupported_gradient"]

"""Hopper's own backend for dense convolutions, beside the portable kernels: asked for, not chosen, until it is measured."""

from tritonconv.ops.hopper.convolution import hopper_dgrad, prepare_hopper
from tritonconv.ops.hopper.supports import unsupported_gradient
from tritonconv.ops.hopper.weights import hopper_wgrad

__all__ = ["hopper_dgrad", "hopper_wgrad", "prepare_hopper", "unsupported_gradient"]

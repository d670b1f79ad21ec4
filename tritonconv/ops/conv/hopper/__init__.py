"""Hopper's own backend for dense convolutions, beside the portable kernels: asked for, not chosen, until it is measured."""

from tritonconv.ops.conv.hopper.convolution import hopper_convolution, hopper_dgrad
from tritonconv.ops.conv.hopper.supports import why_no_gradient
from tritonconv.ops.conv.hopper.weights import hopper_wgrad

__all__ = ["hopper_convolution", "hopper_dgrad", "hopper_wgrad", "why_no_gradient"]

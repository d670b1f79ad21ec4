"""Families of kernels: each file has a family's candidates, its model of time and its tile for the interpreter.

A new family is one file here, and a row of `FAMILIES` for each of its kernels.
"""

from tritonconv.tuning.families.bands import BANDS
from tritonconv.tuning.families.deform import DEFORM
from tritonconv.tuning.families.dense import CONV_FLAT, CONV_FPROP, CONV_WGRAD, DENSE, MATMUL
from tritonconv.tuning.families.direct import DIRECT
from tritonconv.tuning.families.family import KernelFamily
from tritonconv.tuning.families.hopper import HOPPER
from tritonconv.tuning.families.separable import SEPARABLE
from tritonconv.tuning.problem import Problem

__all__ = ["FAMILIES", "HOPPER", "KernelFamily", "family_of"]

FAMILIES: dict[str, KernelFamily] = {
    "conv_fprop": CONV_FPROP,
    "conv_flat": CONV_FLAT,
    "matmul": MATMUL,
    "conv_up": DENSE,
    "conv_dgrad": DENSE,
    "conv_wgrad": CONV_WGRAD,
    "separable": SEPARABLE,
    "deform_conv": DEFORM,
    "deform_conv_dgrad": DEFORM,
    "deform_conv_wgrad": DEFORM,
    "depthwise": DIRECT,
    "depthwise_wgrad": DIRECT,
    "depthwise_bands": BANDS,
    "depthwise_bands_wgrad": BANDS,
    "hopper.conv": HOPPER,
    "hopper.wgrad": HOPPER,
}
"""By the files of tritonconv.kernels, such as `Problem.kernel` names them."""


def family_of(problem: Problem) -> KernelFamily:
    """The family of a problem's kernel."""
    return FAMILIES[problem.kernel]

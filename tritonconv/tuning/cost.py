"""The predicted time of a problem with a config, and the same as triton.autotune asks for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tritonconv.geometry import ConvGeometry
from tritonconv.tuning.devices import Device
from tritonconv.tuning.families import family_of
from tritonconv.tuning.model import Prediction
from tritonconv.tuning.problem import Problem

__all__ = ["Prediction", "perf_model", "predict"]


def predict(problem: Problem, config: Any) -> Prediction:
    """The time of a problem with a triton.Config, by the model of its kernel's family."""
    return family_of(problem).predict(problem, config)


def perf_model(kernel: str, device: Device) -> Callable[..., float]:
    """This model as `triton.autotune` wants it: `prune_configs_by={"perf_model": perf_model(kernel, device), "top_k": 4}`.

    Args:
        kernel: conv_fprop, conv_flat or matmul.
        device: the GPU that will run it, such as `device_named("H200")`.

    Returns:
        A function of the kernel's arguments by name, the config's among them, that gives milliseconds.
    """

    def milliseconds(**a: Any) -> float:
        from tritonconv.kernels.tiles import tile

        image = a["x"] if kernel == "matmul" else a["x_ptr"]
        dtype = str(getattr(image, "base", image).dtype)[6:]
        if kernel == "matmul":
            geometry = ConvGeometry.parse((a["M"], a["C"], 1), (a["K"], a["C"], 1), nd=1)
            vectors = a["VEC_C"] > 1
        else:
            groups = a["GROUPS"]
            batch = a["M"] // (a["O"] * a["P"] * a["Q"])
            geometry = ConvGeometry.parse(
                (batch, a["C"] * groups, a["D"], a["H"], a["W"]), (a["K"] * groups, a["C"], a["T"], a["R"], a["S"]), nd=3,
                stride=(a["STRIDE_D"], a["STRIDE_H"], a["STRIDE_W"]), padding=(a["PAD_D"], a["PAD_H"], a["PAD_W"]),
                dilation=(a["DIL_D"], a["DIL_H"], a["DIL_W"]), groups=groups,
            )  # fmt: skip
            vectors = a["VEC_X"] > 1
        problem = Problem(kernel, geometry, dtype, a["PRECISION"] == "tf32", vectors, device, pack=a.get("PACK", 1))
        config = tile(a["BLOCK_M"], a["BLOCK_N"], a["BLOCK_K"], a["num_warps"], a["num_stages"], tma=bool(a["USE_TMA"]))
        return predict(problem, config).seconds * 1e3

    return milliseconds

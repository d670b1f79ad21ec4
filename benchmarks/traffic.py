"""Bytes that a training step of convolution, batch norm and ReLU moves: `python -m benchmarks.traffic`.

Writes the table in docs/training.md (and those of traffic_direct.py, traffic_pools.py and hopper.py beside it): ours, cuDNN
with torch's own batch norm, and the floor, for every convolution and batch norm of ResNet-50 in cases.csv. Counted are
tensors, each time that a kernel reads or writes all of one, as if caches kept nothing from kernel to kernel and all within
one. Statistics and workspaces are left out, but for the ranges of our weight gradient, which are counted as they are chosen
for an H200.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

from benchmarks import hopper, traffic_direct, traffic_pools
from benchmarks.markdown import table
from tritonconv.bench.cases import Case, load_cases
from tritonconv.bench.registry import dtype_of, operation_for
from tritonconv.geometry import ConvGeometry
from tritonconv.ops.conv.conv_norm import on_the_way
from tritonconv.tuning import Problem, choose, device_named
from tritonconv.tuning.configs import as_dict
from tritonconv.tuning.ranges import ranges

__all__ = ["Traffic", "page", "traffic_of"]

PAGE = Path(__file__).parents[1] / "docs" / "training.md"
BEGIN, END = "<!-- bytes -->", "<!-- end of bytes -->"


class Traffic(NamedTuple):
    """Bytes of the forward and of the backward pass."""

    forward: int
    backward: int


def traffic_of(case: Case) -> dict[str, Traffic]:
    """What moves each layer, by "ours", "torch" and "floor"; the gradient of the first layer's image is not needed."""
    size = dtype_of(case).itemsize
    if case.kind == "bn":
        p = size * case.batch * case.channels * math.prod(case.size)
        # A residual is read once more, and its gradient is written where it is not dy.
        r = p if case.residual else 0
        return {
            # Statistics; normalization with all that follows. Sums of gradients; the input's gradient.
            "ours": Traffic(p + 2 * p + r, 2 * p + 3 * p + 2 * r),
            # Statistics, normalization, addition, ReLU. ReLU, sums, the input's gradient.
            "torch": Traffic(p + 2 * p + 3 * r + 2 * p, 3 * p + 2 * p + 3 * p),
            "floor": Traffic(2 * p + r, 3 * p + r),
        }
    operation = operation_for(case)
    assert operation is not None
    g: ConvGeometry = operation.geometry(case)  # type: ignore[attr-defined]
    full, w, p = (n * size for n in g.elements())
    x, first = g.touched_input() * size, g.in_channels == 3
    convolution = x + w + p
    # Without the data gradient the weight's computes dz on its way in.
    dz = 2 * p if first else 4 * p if on_the_way(g, dtype_of(case)) else 5 * p
    data = 0 if first else w + full
    return {
        "ours": Traffic(convolution + 2 * p, 2 * p + dz + data + x + w + _workspace(case, g)),
        # Statistics, normalization, ReLU. ReLU, sums, the input's gradient, and both of the convolution's.
        "torch": Traffic(convolution + p + 2 * p + 2 * p, 3 * p + 2 * p + 3 * p + (1 if first else 2) * p + data + x + w),
        "floor": Traffic(convolution, 2 * p + data + x + w),
    }


def _workspace(case: Case, g: ConvGeometry) -> int:
    """Of the weight gradient's ranges, written once and read once."""
    computed = g.in_channels == 3
    name = str(dtype_of(case))[6:]
    problem = Problem("conv_wgrad", g, name, False, g.in_channels != 3, device_named("H200"), "wgrad", computed)
    blocks = as_dict(choose(problem))
    count, _ = ranges(problem, blocks["BLOCK_M"], blocks["BLOCK_N"], blocks["BLOCK_K"])
    return 2 * 4 * count * g.elements()[1] if count > 1 else 0


def page() -> str:
    """The table."""
    rows = []
    for case in load_cases():
        if not case.id.startswith("r50_") or case.kind not in ("conv", "bn"):
            continue
        found = traffic_of(case)
        total = {name: sum(t) for name, t in found.items()}
        cells = [f"{t.forward / 1e6:.1f} + {t.backward / 1e6:.1f}" for t in found.values()]
        rows.append((case.id, *cells, f"{total['torch'] / total['ours']:.2f}"))
    return table("layer, ours, cuDNN and native batch norm, floor, theirs by ours", rows)


def main() -> None:
    for path, made in ((PAGE, page()), *((other.PAGE, other.page()) for other in (traffic_direct, traffic_pools, hopper))):
        before, _, rest = path.read_text().partition(BEGIN)
        _, _, after = rest.partition(END)
        path.write_text(f"{before}{BEGIN}\n\n{made}\n\n{END}{after}")


if __name__ == "__main__":
    main()

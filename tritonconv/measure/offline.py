"""Compile launches for GPUs that are not there, and read what the compiler made of them.

Launches are built from meta tensors, which Triton's JIT specializes as it would real ones, so that what is inspected is
what would run. TRITON_INTERPRET must be unset.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import triton
from triton.backends.compiler import GPUTarget

from tritonconv.measure.assembly import AMDGCN, SASS, Code, counts, issue_ratio, lane_instructions
from tritonconv.ops.core.launch import Launch
from tritonconv.tuning import Device, device_named

__all__ = ["TARGETS", "IdleDriver", "Target", "compile_launch", "gpu_target", "inspect_launch"]

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


@dataclass(frozen=True)
class Target:
    """What code is compiled for: a GPU of its kind, and its tensor-core instruction."""

    device: Device
    mma: str

    @property
    def gpu(self) -> GPUTarget:
        return gpu_target(self.device)


def gpu_target(device: Device) -> GPUTarget:
    """Triton's name for the code of a device."""
    if device.arch.startswith("gfx"):
        return GPUTarget("hip", device.arch, device.warp_size)
    return GPUTarget("cuda", int(device.arch[3:]), device.warp_size)


TARGETS = {
    arch: Target(device_named(arch), mma)
    for arch, mma in dict(sm_80="HMMA", sm_90="HGMMA", sm_100="UTC", gfx942="v_mfma").items()
}


class IdleDriver:
    """A driver of a GPU that need not be there: Triton compiles for it, and its launches do nothing."""

    def __init__(self, device: Device, number: int) -> None:
        self.device, self.number = device, number
        self.utils = SimpleNamespace(
            get_device_properties=lambda _device: dict(max_shared_mem=device.shared_memory),
            load_binary=lambda *_: (object(), 0, 0, 0, 1024),
        )

    def launcher_cls(self, *_: Any) -> Callable[..., None]:
        return lambda *_arguments: None

    def get_current_device(self) -> int:
        return self.number

    def get_current_stream(self, _device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return gpu_target(self.device)


# Triton keeps what it has compiled by the number of the device.
_idle: dict[Device, IdleDriver] = {}


def compile_launch(launch: Launch, device: Device) -> Any:
    """The compiled kernel, by Triton's own JIT, so that a process with that GPU finds it in Triton's cache.

    This process cannot launch anything afterwards.
    """
    if device not in _idle:
        _idle[device] = IdleDriver(device, len(_idle))
    triton.runtime.driver.set_active(_idle[device])
    arguments = (launch.arguments[name] for name in launch.kernel.arg_names)
    return launch.kernel.warmup(*arguments, grid=(1,), **launch.options)


def run(tool: str, *args: str | Path) -> str:
    done = subprocess.run([TOOLS / tool, *args], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def assembler_notes(ptx: str, gpu: GPUTarget, folder: Path) -> str:
    """What ptxas says of a kernel; the newer assembler is tried where the older one cannot read the PTX."""
    (folder / "k.ptx").write_text(ptx)
    suffix = "a" if gpu.arch >= 90 else ""
    for tool in ("ptxas", "ptxas-blackwell"):
        done = subprocess.run(
            [TOOLS / tool, "-v", f"-arch=sm_{gpu.arch}{suffix}", folder / "k.ptx", "-o", folder / "k.out"],
            capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode == 0:
            return done.stdout + done.stderr
    raise RuntimeError(done.stderr)


def inspect_launch(launch: Launch, target: Target) -> dict[str, Any]:
    """Registers, stack and shared bytes, instruction counts, serialization and the main loop's issue ratio.

    Of direct kernels also the instructions for each result.
    """
    kernel = compile_launch(launch, target.device)
    if target.gpu.backend == "hip":
        return _inspect_amd(kernel)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "k.cubin").write_bytes(kernel.asm["cubin"])
        usage, sass = run("cuobjdump", "-res-usage", folder / "k.cubin"), run("cuobjdump", "-sass", folder / "k.cubin")
        notes = assembler_notes(kernel.asm["ptx"], target.gpu, folder) if target.gpu.arch == 90 else ""
    usage_of = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if usage_of is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {usage}")
    registers, stack = map(int, usage_of.groups())
    code, warps = Code.parse(sass), launch.options["num_warps"]
    found = counts(SASS, sass)
    # Blackwell's code keeps a frame of 16 bytes or less for its barriers; only accesses to it are spills.
    spilled = any(name.startswith(("LDL", "STL")) for name in found)
    return dict(
        registers=registers, stack=stack if spilled or target.gpu.arch < 100 else 0, shared=kernel.metadata.shared,
        serialized="instructions are serialized" in notes if target.gpu.arch == 90 else None,
        issue_ratio=issue_ratio(code, warps) if target.gpu.arch == 90 else None,
        lane_instructions_per_output=lane_instructions(code, launch.kernel.__name__, launch.arguments, warps), counts=found,
    )  # fmt: skip


def _inspect_amd(kernel: Any) -> dict[str, Any]:
    text = kernel.asm["amdgcn"]

    def field(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        if found is None:
            raise RuntimeError(f"the AMD assembly names no {name}")
        return int(found.group(1))

    return dict(
        registers=field("vgpr_count"), stack=field("private_segment_fixed_size"), shared=kernel.metadata.shared,
        serialized=None, issue_ratio=None, lane_instructions_per_output=None,
        counts=counts(AMDGCN, text),
    )  # fmt: skip

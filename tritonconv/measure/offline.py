"""Compile launches for GPUs that are not there, and read what the compiler made of them.

Launches are built from meta tensors, which Triton's JIT specializes as it would real ones, so that what is inspected is
what would run. TRITON_INTERPRET must be unset.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import triton
from triton.backends.compiler import GPUTarget

from tritonconv.ops.core.launch import Launch
from tritonconv.tuning import Device, device_named
from tritonconv.tuning.compiled import HOPPER_FLOP_PER_CLOCK
from tritonconv.tuning.devices import ISSUE_SLOTS

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

# Groups of instructions worth counting; the table keeps these names.
SASS = (
    r"\b(UTC\w*MMA\S*|HGMMA\S*|HMMA\S*|DMMA\S*|UTMALDG\S*|UTMASTG\S*|LDGSTS\S*|LDG\S*|STG\S*|LDSM\S*|STSM\S*|STS\b\S*"
    r"|LDL\S*|STL\S*|FFMA|DFMA)"
)
AMDGCN = r"\b(v_mfma\w+|global_load\w+|buffer_load\w+|global_store\w+|buffer_store\w+|ds_read\w+|ds_write\w+|scratch_\w+)"


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
    counts = dict(sorted(Counter(re.findall(SASS, sass)).items()))
    # Blackwell's code keeps a frame of 16 bytes or less for its barriers; only accesses to it are spills.
    spilled = any(name.startswith(("LDL", "STL")) for name in counts)
    return dict(
        registers=registers, stack=stack if spilled or target.gpu.arch < 100 else 0, shared=kernel.metadata.shared,
        serialized="instructions are serialized" in notes if target.gpu.arch == 90 else None,
        issue_ratio=issue_ratio(sass, launch.options["num_warps"]) if target.gpu.arch == 90 else None,
        lane_instructions_per_output=lane_instructions(sass, launch), counts=counts,
    )  # fmt: skip


def _loops(sass: str) -> tuple[int, list[int]]:
    """(number of instructions, lengths of the loops from the innermost on)."""
    code = [(int(a, 16), text) for a, text in re.findall(r"^\s+/\*([0-9a-f]{4,5})\*/\s+(.*?);", sass, re.M)]
    lengths = []
    for address, text in code:
        back = re.search(r"BRA.*?0x([0-9a-f]+)", text)
        # The code ends in a branch to itself.
        if back and int(back.group(1), 16) < address:
            lengths.append(sum(int(back.group(1), 16) <= a <= address for a, _ in code))
    return sum("NOP" not in text for _, text in code), sorted(lengths)


DIRECT = (
    "depthwise_kernel", "depthwise_wgrad_kernel", "separable_kernel", "causal_forward_kernel", "causal_backward_kernel",
)  # fmt: skip


def lane_instructions(sass: str, launch: Launch) -> float | None:
    """Instructions that a direct kernel's lanes execute for each result; of a separable one, for each element between.

    None for other kernels, and where the code's loops are not those of the source.
    """
    a, kernel = launch.arguments, launch.kernel.__name__
    direct = (
        "depthwise_kernel",
        "depthwise_wgrad_kernel",
        "separable_kernel",
        "causal_forward_kernel",
        "causal_backward_kernel",
    )
    if kernel not in direct:
        return None
    total, loops = _loops(sass)
    lanes = 32 * launch.options["num_warps"]
    if kernel.startswith("causal"):
        results = a["BLOCK_T"] * a["BLOCK_C"] * a["PATCH"]
        return round((loops[0] + (total - loops[0]) / a["RANGE"]) * lanes / results, 1) if len(loops) == 1 else None
    if kernel == "separable_kernel":
        # One pass of the loop over channels, in which the taps' runs once or row by row.
        if len(loops) != 2:
            return None
        once = loops[1] + loops[0] * (a["STEPS"] - 1)
        return round(once * lanes / (a["BLOCK_M"] * a["BLOCK_K"]), 1)
    results = a["BLOCK_T"] * a["BLOCK_C"]
    for extent, patch in (("P", "PATCH_P"), ("Q", "PATCH_Q")):
        # Those that exist, of all patches of the image.
        results *= a[extent] / -(-a[extent] // a[patch])
    if kernel == "depthwise_wgrad_kernel":
        # One step, of as many programs as share the taps.
        programs = a["T"] * -(-a["R"] // a["ROWS"]) * -(-a["S"] // a["COLUMNS"])
        return round(loops[0] * programs * lanes / results, 1) if len(loops) == 1 else None
    trips = [n for n in (a["S"] // a["STEP_S"], a["R"] // a["STEP_R"], a["T"]) if n > 1]
    if len(trips) != len(loops):
        return None
    length = executed = 0
    for inner, trip in zip(loops, trips, strict=True):
        length, executed = inner, (inner - length + executed) * trip
    return round((total - length + executed) * lanes / results, 1)


def issue_ratio(sass: str, num_warps: int) -> float | None:
    """Share of the issue slots that the main loop takes while the tensor cores work; 1 is instruction-bound."""
    code = [(int(a, 16), text) for a, text in re.findall(r"^\s+/\*([0-9a-f]{4,5})\*/\s+(.*?);", sass, re.M)]
    loops = []
    for address, text in code:
        back = re.search(r"BRA.*?0x([0-9a-f]+)", text)
        if back and int(back.group(1), 16) < address:
            body = [t for a, t in code if int(back.group(1), 16) <= a <= address]
            if any("HGMMA" in t for t in body):
                loops.append(body)
    if not loops:
        return None
    body = min(loops, key=len)
    shapes = re.findall(r"HGMMA\.64x(\d+)x(\d+)", "\n".join(body))
    # A step is 32 bytes deep whatever the type, so that bytes count as the 2-byte types' 16 elements do.
    cycles = sum(64 * int(n) * 16 * 2 for n, _ in shapes) * (num_warps // 4) / HOPPER_FLOP_PER_CLOCK
    return round(len(body) * num_warps / (ISSUE_SLOTS * cycles), 2)


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
        counts=dict(sorted(Counter(re.findall(AMDGCN, text)).items())),
    )  # fmt: skip

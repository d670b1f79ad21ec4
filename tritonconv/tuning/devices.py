"""What is known of each GPU: limits that a launch must keep, and rates that its time is predicted from."""

from __future__ import annotations

import functools
import json
import math
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any, Literal

__all__ = [
    "INTERPRETER", "ISSUE_SLOTS", "LAUNCH", "Device", "Products", "device_named", "known_devices", "like", "products_of",
]  # fmt: skip

# Instructions a multiprocessor issues in a clock; seconds that a launch on an idle stream takes, an estimate.
ISSUE_SLOTS = 4
LAUNCH = 2.5e-6

Products = Literal["16", "tf32", "fp32", "fp64"]
"""How products are computed: from 16-bit floats, TF32, or plain fp32 and fp64."""


def products_of(dtype: str, tf32: bool) -> Products:
    """How products of elements of torch's type of this name are computed.

    >>> products_of("bfloat16", False), products_of("float32", True)
    ('16', 'tf32')
    """
    if dtype in ("float16", "bfloat16"):
        return "16"
    if dtype == "float64":
        return "fp64"
    return "tf32" if tf32 else "fp32"


@dataclass(frozen=True, eq=False)
class Device:
    """One GPU. Rates are sustained ones, in SI units; one object per GPU, so that caches key on it cheaply."""

    name: str
    """As torch.cuda.get_device_name gives it."""
    arch: str
    """The code it runs: sm_80, sm_89, sm_90, sm_100, gfx942."""
    multiprocessors: int
    clock: float
    """Hertz."""
    shared_memory: int
    """Bytes that one program may have."""
    shared_per_multiprocessor: int
    registers: int
    """Of 32 bits, on a multiprocessor."""
    warps: int
    """Resident on a multiprocessor at most; so `programs`."""
    programs: int
    bandwidth: float
    """Bytes a second from and to device memory."""
    l2_bandwidth: float
    l2_bytes: int
    tma: bool
    """Whether tiles move by descriptor: Hopper and later, and the interpreter."""
    flops: dict[Products, float]
    """Multiply and add counted as two, by the kind of product."""
    measured: bool
    """Whether the rates were measured, or derived from a datasheet."""
    source: str

    @property
    def warp_size(self) -> int:
        return 64 if self.arch.startswith("gfx") else 32

    def roofline(self, macs: int, size: int, products: Products) -> float:
        """Seconds that so many multiply-adds and bytes take at least."""
        return max(2 * macs / self.flops[products], size / self.bandwidth)


@functools.cache
def known_devices() -> dict[str, Device]:
    """Every described GPU by its name."""
    data: dict[str, Any] = json.loads(resources.files(__package__).joinpath("devices.json").read_text())
    return {entry["name"]: Device(**entry) for entry in data["devices"]}


def device_named(text: str) -> Device:
    """The described GPU that `text` names: its whole name, a word of it such as "H200", or its code such as "sm_90".

    Raises:
        ValueError: none fits, or several do.

    >>> device_named("h200").name, device_named("sm_80").multiprocessors
    ('NVIDIA H200', 108)
    """
    devices = known_devices()
    if text in devices:
        return devices[text]
    found = [d for d in devices.values() if text.lower() in d.name.lower().replace("-", " ").split()]
    if not found:
        # Of GPUs with the same code the measured one stands for all.
        found = sorted((d for d in devices.values() if text == d.arch), key=lambda d: not d.measured)[:1]
    if len(found) != 1:
        raise ValueError(f"{text!r} names no described GPU: expected one of {', '.join(devices)}")
    return found[0]


@functools.cache
def like(name: str, arch: str, multiprocessors: int, shared_memory: int) -> Device:
    """The GPU that the driver reports: described under this name, or else much like one of the same architecture.

    Rates of a GPU that is not described scale with its multiprocessors.
    """
    devices = known_devices()
    if name in devices and devices[name].multiprocessors == multiprocessors:
        return devices[name]

    def distance(device: Device) -> tuple[bool, float, float]:
        digits = [float("".join(c for c in a if c.isdigit()) or 0) for a in (device.arch, arch)]
        other_vendor = device.arch[:2] != arch[:2]
        return other_vendor, abs(digits[0] - digits[1]), abs(math.log(device.multiprocessors / multiprocessors))

    base = min(devices.values(), key=distance)
    share = multiprocessors / base.multiprocessors
    return replace(
        base, name=name, arch=arch, multiprocessors=multiprocessors, shared_memory=shared_memory,
        bandwidth=base.bandwidth * share, l2_bandwidth=base.l2_bandwidth * share,
        flops={kind: rate * share for kind, rate in base.flops.items()},
        tma=base.tma and arch.startswith("sm_") and int(arch[3:]) >= 90,
        measured=False, source=f"as {base.name}, scaled by multiprocessors",
    )  # fmt: skip


# Tests and the demo run kernels there: no limit holds, and no rate means anything.
INTERPRETER = Device(
    name="Triton's interpreter", arch="interpreter", multiprocessors=1, clock=1.0, shared_memory=1 << 30,
    shared_per_multiprocessor=1 << 30, registers=65536, warps=64, programs=32, bandwidth=1.0, l2_bandwidth=1.0, l2_bytes=1,
    tma=True, flops={"16": 1.0, "tf32": 1.0, "fp32": 1.0, "fp64": 1.0}, measured=False, source="not a GPU",
)  # fmt: skip

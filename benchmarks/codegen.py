"""What the compilers make of every candidate config, for GPUs that are not there: `python -m benchmarks.codegen`.

Prints registers, spills, shared memory, instruction counts, wgmma serialization and the main loop's issue ratio, and
updates benchmarks/codegen.json. With --check nothing is written: it fails when code breaks a rule or got worse than the
table says. Rules hold for every triton version, to the letter for the pinned one; comparisons are made with rows of the
same version.

A row remembers what it was made from: the device code, every argument, the compiler's options. --check compiles what
has changed since, and one row of thirty-two of the rest, so that a table that another compiler made shows; --whole compiles
all.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

# Kernels decorated for the interpreter cannot be compiled, and the variable is read when they are imported.
os.environ.pop("TRITON_INTERPRET", None)

import click
import torch
import triton
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import tritonconv.tuning
from tritonconv.bench.registry import Operation, Specimen, configs_of, module_of, operations, specimens
from tritonconv.measure import assembly, offline
from tritonconv.measure.offline import TARGETS, inspect_launch
from tritonconv.ops.core.launch import Launch
from tritonconv.tuning import Problem, candidates
from tritonconv.tuning.compiled import HOPPER_FLOP_PER_CLOCK, variant
from tritonconv.tuning.configs import name_of
from tritonconv.tuning.sources import device_code, kernel_hash

__all__ = ["main"]

# constraints.txt's
PINNED = "3.7.1"
TABLE = Path(__file__).with_name("codegen.json")
RESOURCES = Path(tritonconv.tuning.__file__).with_name("resources.json")
KEY = ("kernel", "case", "config", "target", "triton")
# Of what has not changed one row in so many is compiled again.
SAMPLED = 32
# How code is read is part of what a row says; comments are not.
READING = hashlib.sha256(
    "\0".join(device_code(ast.parse(Path(str(module.__file__)).read_text())) for module in (assembly, offline)).encode()
).hexdigest()


def rows_of(task: tuple[int, str, bool]) -> tuple[list[dict[str, Any]], int]:
    """Rows of one specimen on one target, and how many of them were compiled; the last says whether all are to be."""
    index, name, whole = task
    operation, specimen = specimens()[index]
    case, target = specimen.case, TARGETS[name]
    rows, compiled = [], 0
    for config in candidates_of(operation, specimen, name)[: specimen.configs]:
        launch = launch_of(operation, specimen, name, config)
        row: dict[str, Any] = dict(
            kernel=specimen.kernel, case=case.id, config=name_of(launch.config), target=name, triton=triton.__version__,
            source=source_of(launch),
        )  # fmt: skip
        known = {} if whole else known_rows().get(key(row), {})
        if known.get("source") == row["source"] and int(row["source"], 16) % SAMPLED:
            rows.append(known)
            continue
        rows.append(row | inspect_launch(launch, target))
        compiled += 1
    return rows, compiled


@functools.cache
def known_rows() -> dict[tuple[str, ...], dict[str, Any]]:
    """The table's rows by their keys."""
    return {key(row): row for row in json.loads(TABLE.read_text())} if TABLE.exists() else {}


def source_of(launch: Launch) -> str:
    """A hash of all that the compiler is given: device code, arguments, options."""
    device_code = kernel_hash(module_of(launch)), kernel_hash("activations")
    given: list[Any] = [READING, device_code, launch.kernel.__name__, sorted(launch.options.items())]
    for name, value in sorted(launch.arguments.items()):
        given.append((name, *described(value)))
    return hashlib.sha256(repr(given).encode()).hexdigest()[:12]


def described(value: Any) -> tuple[Any, ...]:
    """What of an argument changes the code."""
    if isinstance(value, torch.Tensor):
        return (str(value.dtype),)
    if hasattr(value, "block_shape"):
        return str(value.base.dtype), value.shape, value.strides, value.block_shape
    # A device function by its name.
    return (getattr(value, "__name__", value),)


def candidates_of(operation: Operation, specimen: Specimen, target: str) -> list[Any]:
    """The configs that a specimen is compiled with; None stands for a kernel's only one."""
    if not specimen.function:
        return candidates(problem_of(operation, specimen, target))
    launch = launch_of(operation, specimen, target, None)
    # Kernels that walk have several stages, the others one.
    walks = launch.options["num_stages"] > 1
    return [config for config in configs_of(launch) if (config.num_stages > 1) == walks] or [None]


def problem_of(operation: Operation, specimen: Specimen, target: str) -> Problem:
    """What the choice of a config would see of a specimen; no choice is made, which could need the table."""
    any_config = importlib.import_module(f"tritonconv.kernels.{specimen.kernel}").configs()[0]
    problem = launch_of(operation, specimen, target, any_config).problem
    assert problem is not None
    return problem


def launch_of(operation: Operation, specimen: Specimen, target: str, config: Any) -> Launch:
    """The launch of the specimen's kernel; others may follow it."""
    launches = operation.launches(specimen.case, TARGETS[target].device, config)
    for launch in launches:
        name = launch.problem.kernel if launch.problem is not None else ""
        if launch.kernel.__name__ == specimen.function or (not specimen.function and name == specimen.kernel):
            return launch
    names = ", ".join(launch.kernel.__name__ for launch in launches)
    raise ValueError(f"{specimen.case.id} runs {names}, expected {specimen.kernel}")


def resources(rows: list[dict[str, Any]]) -> str:
    """What the cost model reads of the table: registers, shared bytes and clocks of a step, the most of any specimen."""
    kernels: dict[str, Any] = {}
    for operation, specimen in specimens():
        if not operation.products:
            continue
        case = specimen.case
        problem = problem_of(operation, specimen, "sm_90")
        known = kernels.setdefault(specimen.kernel, {}).setdefault(variant(problem), {})
        for row in rows:
            if (row["kernel"], row["case"], row["triton"]) != (specimen.kernel, case.id, PINNED):
                continue
            m, n, k = map(int, row["config"].split()[0].split("x"))
            cycles = None
            if row["issue_ratio"] is not None:
                # wgmma's steps are 32 bytes deep whatever the type.
                cycles = round(row["issue_ratio"] * m * n * k * problem.itemsize / HOPPER_FLOP_PER_CLOCK)
            old = known.setdefault(row["config"], {}).get(row["target"], [0, 0, None])
            new = [row["registers"], row["shared"], cycles]
            most = [max((v for v in pair if v is not None), default=None) for pair in zip(old, new, strict=True)]
            known[row["config"]][row["target"]] = most
    about = "Registers of a thread, shared bytes, clocks of a step's instructions. Written by python -m benchmarks.codegen."
    lines = []
    for kernel, variants in sorted(kernels.items()):
        for name, configs in sorted(variants.items()):
            body = ",\n".join(f"   {json.dumps(c)}: {json.dumps(v)}" for c, v in sorted(configs.items()))
            lines.append((kernel, f"  {json.dumps(name)}: {{\n{body}\n  }}"))
    blocks = [
        f" {json.dumps(kernel)}: {{\n" + ",\n".join(text for owner, text in lines if owner == kernel) + "\n }"
        for kernel in sorted(kernels)
    ]
    head = f'{{"about": {json.dumps(about)}, "triton": "{PINNED}", "kernels": {{\n'
    return head + ",\n".join(blocks) + "\n}}\n"


def count(row: dict[str, Any], *prefixes: str) -> int:
    return sum(n for name, n in row["counts"].items() if name.startswith(prefixes))


def broken_rules(row: dict[str, Any]) -> list[str]:
    """What no candidate may do, whatever the table says."""
    target, case = TARGETS[row["target"]], row["case"]
    limit = target.device.shared_memory
    wrong = []
    # Each release hands out registers a little differently. Kernels are shaped with the pinned one; the others may miss by
    # a few words outside the main loop and a few instructions in it.
    pinned = row["triton"] == PINNED
    hopper = row["kernel"].startswith("hopper.")
    if hopper:
        wrong += hopper_rules(row)
    if row["stack"] > (0 if pinned or hopper else 64) or (pinned and count(row, "LDL", "STL", "scratch_")):
        wrong.append(f"spills ({row['stack']} bytes of stack)")
    if row["shared"] > limit:
        wrong.append(f"{row['shared']} bytes of shared memory, limit {limit}")
    lanes = row["lane_instructions_per_output"]
    # An H200 issues 27 for the 4 bytes that a result of 16 bits moves (docs/kernels.md).
    if row["kernel"] == "depthwise" and case == "3x3" and row["target"] == "sm_90" and row["config"].startswith("2x4") and (
        lanes is None or lanes > (24 if pinned else 25)
    ):  # fmt: skip
        wrong.append(f"{lanes} lane instructions for a result, goal 24")
    # The depthwise tile crosses over to the product's layout once a block of channels: 32 elements of a thread in stores of
    # 4, and one for the taps. Once a tap it would be nine times as many.
    crossing = count(row, "STS.64"), count(row, "STS")
    if row["kernel"] == "separable" and row["target"] == "sm_90" and (crossing[0] > 9 or crossing[1] > 32):
        wrong.append(f"{crossing[1]} stores to shared memory: what lies between crosses over more than once")
    if not has_products(row):
        return wrong + narrow_accesses(row)
    plain = case.endswith(("ieee", "fp64"))
    # Along the product's free axis, not along its reduction.
    reads_rows = row["kernel"] in ("conv_dgrad", "conv_up", "conv_wgrad", "depthwise_bands_wgrad")
    m, n, k = map(int, row["config"].split()[0].split("x"))
    # wgmma and tcgen05 need 64 rows.
    mma = "HMMA" if target.gpu.backend == "cuda" and m < 64 else target.mma
    if not plain and not count(row, mma):
        wrong.append(f"no {mma}")
    # Triton 3.6 has the weight gradient wait for its computed operand; memory is that kernel's limit.
    if row["serialized"] and (pinned or hopper or "computed" not in case):
        wrong.append("wgmma is serialized")
    if target.gpu.backend == "cuda":
        wide_store = count(row, "STG.E.128", "UTMASTG")
        wide_load = count(row, "LDGSTS.E.BYPASS.128", "LDG.E.128", "UTMALDG")
        # Rows of 3 or 5 elements cannot be read otherwise. TF32's wgmma wants operands that lie along the reduction, and
        # those that are read by rows do not: they are copied element by element into their places.
        scattered = case.endswith("odd") or (case.endswith("tf32") and reads_rows)
        # Sums along diagonals, or of a tap's offsets, are few, and stored one by one.
        wide_store = wide_store or row["kernel"] in ("depthwise_bands_wgrad", "deform_conv_dgrad")
        # Nothing but sums is stored there.
        wide_store = wide_store or case.startswith("averaged")
        if not scattered and (not wide_store or (not wide_load and "stem" not in case)):
            wrong.append("no 128-bit global accesses")
    else:
        # Triton stores from MFMA's own layout, 4 elements a lane: 64 bits of bf16. Loads have no such limit; but small
        # tiles have too few bytes to go round among the lanes by 16: 64 x 32 among 512, 64 x 16 among 256. Stems read the
        # image by elements.
        lanes = 64 * int(row["config"].split()[1].removeprefix("w"))
        largest = 64 * min(n, k) if reads_rows else (n if "stem" in case else max(m, n)) * k
        if not case.endswith("odd") and 2 * largest >= 16 * lanes and not count(
            row, "global_load_dwordx4", "buffer_load_dwordx4"
        ):  # fmt: skip
            wrong.append("no 128-bit global accesses")
    if row["kernel"] == "conv_fprop" and case == "3x3" and row["target"] == "sm_90":
        goal = 0.30 if m * n == 256 * 128 else 0.45 if m == 128 else None
        goal = goal if goal is None or pinned else goal + 0.01
        if goal is not None and (row["issue_ratio"] is None or row["issue_ratio"] > goal + 1e-9):
            wrong.append(f"issue ratio {row['issue_ratio']}, goal {goal}")
    return wrong


def hopper_rules(row: dict[str, Any]) -> list[str]:
    """What the kernels for H100 and H200 promise under every Triton."""
    wrong = []
    for name, what in (("UTMALDG", "loads"), ("HGMMA", "products"), ("UTMASTG", "stores")):
        if not count(row, name):
            wrong.append(f"no {name}: {what} go another way")
    if row["issue_ratio"] is None or row["issue_ratio"] > 0.2:
        wrong.append(f"issue ratio {row['issue_ratio']}, goal 0.2")
    return wrong


def has_products(row: dict[str, Any]) -> bool:
    return all(operation.products for operation in operations().values() if row["kernel"] in operation.kernels)


def narrow_accesses(row: dict[str, Any]) -> list[str]:
    """What is wrong with a kernel that moves memory and little else: 128 bits at once, wherever sizes allow."""
    # Half of a vector's channels takes half the registers, for the same lines of memory.
    if row["kernel"] == "causal_conv1d" and "x8 " in row["config"]:
        return []
    # 2048 elements among 512 lanes are 8 bytes each.
    if row["target"] == "gfx942" and row["config"].startswith("2048 w8"):
        return []
    loads = count(row, "LDGSTS.E.BYPASS.128", "LDG.E.128", "global_load_dwordx4", "buffer_load_dwordx4")
    stores = count(row, "STG.E.128", "global_store_dwordx4", "buffer_store_dwordx4")
    # The others store a few sums.
    writes = row["case"].startswith(("normalize", "input_gradient", "scale", "whole")) or row["case"] == "reduce residual"
    writes = writes or row["kernel"] in ("depthwise", "causal_conv1d")
    writes = writes and not row["case"].startswith("averaged")
    if not row["case"].endswith("odd") and (not loads or (writes and not stores)):
        return ["no 128-bit global accesses"]
    return []


def got_worse(row: dict[str, Any], before: dict[str, Any]) -> list[str]:
    """What the change made worse: a few registers more are noise, an instruction class lost is not."""
    wrong = []
    if row["registers"] > before["registers"] * 1.1 + 8:
        wrong.append(f"registers {before['registers']} -> {row['registers']}")
    if row["shared"] > before["shared"] * 1.05:
        wrong.append(f"shared memory {before['shared']} -> {row['shared']}")
    if before["issue_ratio"] and (row["issue_ratio"] is None or row["issue_ratio"] > before["issue_ratio"] * 1.05 + 0.01):
        wrong.append(f"issue ratio {before['issue_ratio']} -> {row['issue_ratio']}")
    lanes = before["lane_instructions_per_output"], row["lane_instructions_per_output"]
    if lanes[0] and (lanes[1] is None or lanes[1] > lanes[0] * 1.05 + 1):
        wrong.append(f"lane instructions for a result {lanes[0]} -> {lanes[1]}")
    wide = (name for name in before["counts"] if name.endswith(("128", "dwordx4")))
    wrong += [f"lost {name}" for name in wide if name not in row["counts"]]
    return wrong


def key(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(row[name] for name in KEY)


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(title=f"triton {triton.__version__}", title_justify="left", box=None, pad_edge=False)
    numbers = ("registers", "stack", "shared", "issue", "lanes")
    for name in ("kernel", "case", "config", "target", *numbers[:3], "serialized", "issue", "lanes", "instructions"):
        table.add_column(name, justify="right" if name in numbers else "left")
    for row in rows:
        counts = " ".join(f"{name}:{n}" for name, n in row["counts"].items() if not name.startswith(("FFMA", "LDGDEPBAR")))
        cells = [row["kernel"], row["case"], row["config"], row["target"], row["registers"], row["stack"], row["shared"],
                 row["serialized"], row["issue_ratio"], row["lane_instructions_per_output"]]  # fmt: skip
        table.add_row(*("" if cell is None else str(cell) for cell in cells), counts)
    Console(width=220 if not sys.stdout.isatty() else None).print(table)


@click.command()
@click.option("--check", is_flag=True, help="Write nothing; fail when a rule is broken or code got worse.")
@click.option("--whole", is_flag=True, help="With --check: compile also what has not changed since the table was made.")
@click.option("--kernel", help="Only this kernel.")
@click.option("--target", type=click.Choice(list(TARGETS)), help="Only this target.")
@click.option("--jobs", default=os.cpu_count() or 1, show_default=True, help="Processes.")
def main(check: bool, whole: bool, kernel: str | None, target: str | None, jobs: int) -> None:
    """Compile every candidate config of every kernel for sm_80, sm_90, sm_100 and gfx942, and inspect the code."""
    tasks = [
        (index, name, whole or not check)
        for index, (_, specimen) in enumerate(specimens())
        for name in TARGETS
        if kernel in (None, specimen.kernel) and target in (None, name) and name in (specimen.targets or TARGETS)
    ]
    rows: list[dict[str, Any]] = []
    compiled = 0
    torch.set_num_threads(1)
    with ProcessPoolExecutor(jobs) as pool, Progress(console=Console(stderr=True), transient=True) as progress:
        for found, fresh_rows in progress.track(pool.map(rows_of, tasks), total=len(tasks), description="compiling"):
            rows += found
            compiled += fresh_rows
    show(rows)
    table = known_rows()
    wrong = [(row, text) for row in rows for text in broken_rules(row)]
    if check:
        for row in rows:
            if key(row) in table:
                wrong += [(row, text) for text in got_worse(row, table[key(row)])]
            elif any(row["triton"] == known[-1] for known in table):
                wrong.append((row, "not in benchmarks/codegen.json: run python -m benchmarks.codegen"))
    for row, text in wrong:
        click.echo(f"{row['kernel']} {row['case']}, {row['config']}, {row['target']}: {text}", err=True)
    if not check:
        fresh = {key(row): row for row in rows}
        # A full run replaces its version's rows, so that configs that are gone leave the table.
        every = kernel is None and target is None
        kept = {k: row for k, row in table.items() if not (every and row["triton"] == triton.__version__)}
        lines = [json.dumps(row, sort_keys=False) for _, row in sorted((kept | fresh).items())]
        TABLE.write_text("[\n" + ",\n".join(lines) + "\n]\n")
        RESOURCES.write_text(resources(json.loads(TABLE.read_text())))
    click.echo(f"{len(rows)} kernels, {compiled} compiled, {len(wrong)} complaints")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()

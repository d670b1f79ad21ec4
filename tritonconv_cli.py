"""The command line: tritonconv demo, explain, bench, tune and doctor.

A module of its own, since importing anything of the package imports torch, which takes seconds: the command line is parsed
first.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    import torch

__all__ = ["bench", "load_model", "main", "parse_shape"]

DTYPES = ("float16", "bfloat16", "float32")
SUITES = ("check", "layers", "tune", "blocks", "models")
PEERS = ("cudnn", "compile", "max-autotune")


def print_version(context: click.Context, _parameter: click.Parameter, asked: bool) -> None:
    if asked:
        import tritonconv

        click.echo(f"tritonconv, version {tritonconv.__version__}")
        context.exit()


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=print_version, help="Show the version and exit."
)
def main() -> None:
    """Fused convolution kernels in Triton behind torch's own modules and functions."""


@main.command()
@click.option(
    "--picture", type=click.Path(dir_okay=False, path_type=Path), default="demo.png", help="Where the picture goes."
)
@click.option("--epochs", type=click.IntRange(min=1), default=15, show_default=True, help="Passes over the images.")
def demo(picture: Path, epochs: int) -> None:
    """Train a LeNet-5 on handwritten digits, convert it, and check that it predicts the same on our kernels.

    Runs on the GPU if there is one, else the kernels run in Triton's interpreter. Exits with 1 if a prediction differs.
    """
    check_triton("the demo runs")
    check_folder(picture)
    run_kernels_somewhere(default_device())
    try:
        from tritonconv.demo import run
    except ModuleNotFoundError as error:
        raise click.ClickException(f"the demo needs {error.name}: pip install 'tritonconv[demo]'") from error
    sys.exit(0 if run(picture, epochs) else 1)


@main.command()
@click.argument("model", metavar="FILE.py:NAME")
@click.option(
    "--input", "sizes", multiple=True, required=True, help="Sizes of an input, such as 1,3,64,64; once for each input."
)
@click.option(
    "--dtype", type=click.Choice(DTYPES), default="float32", show_default=True, help="Of the model and its inputs."
)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="Default: cuda if there is a GPU.")
@click.option("--train", is_flag=True, help="In training mode: batch norms use the batch's statistics.")
@click.option("--gradients", is_flag=True, help="Run a backward pass too, and tell who computed which gradients.")
@click.option("--no-fuse", is_flag=True, help="Convert each layer on its own.")
@click.option("--no-convert", is_flag=True, help="Report the model as it is.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Draw the report into this picture too.")
def explain(
    model: str, sizes: tuple[str, ...], dtype: str, device: str | None, train: bool, gradients: bool, no_fuse: bool,
    no_convert: bool, as_json: bool, plot: Path | None,
) -> None:  # fmt: skip
    """Convert a model and tell of each layer where it runs, why, and what it costs at the least.

    NAME is a torch.nn.Module, or something that returns one when called without arguments. A dotted module will do for
    the file: package.module:NAME.

    Where there is no GPU the decisions are those of the interpreter, which takes the same kernels; no kernel is launched,
    unless gradients are asked for.
    """
    shapes = [parse_shape(text) for text in sizes]
    if plot is not None:
        check_folder(plot)
        check_matplotlib()
    import torch

    import tritonconv

    device = device or default_device()
    if device == "cuda" and not torch.cuda.is_available():
        raise click.ClickException("--device cuda: torch sees no GPU (tritonconv doctor tells more)")
    run_kernels_somewhere(device)
    module = load_model(model).to(device, getattr(torch, dtype)).train(train)
    inputs = [torch.randn(shape, device=device, dtype=getattr(torch, dtype)) for shape in shapes]
    try:
        with torch.no_grad():
            module(*inputs)
    except Exception as error:
        given = ", ".join(str(shape) for shape in shapes)
        raise click.ClickException(f"{model} does not take inputs of {given} in {dtype}: {describe(error)}") from error
    module = module if no_convert else tritonconv.convert(module, fuse=not no_fuse)
    try:
        report = tritonconv.explain(module, *inputs, training=gradients)
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    if as_json:
        click.echo(json.dumps(report.to_dict(), indent=2))
    else:
        print(report)
    if plot is not None:
        report.plot(plot)


@main.command()
@click.option(
    "--suite",
    "suites",
    multiple=True,
    type=click.Choice(SUITES),
    help="What to measure; all of them by default, in this order. Of a dry run: layers are predicted, checks interpreted.",
)
@click.option("--only", help="Layers whose name or family has this text.")
@click.option(
    "--peer", "peers", multiple=True, type=click.Choice(PEERS), help="Ways to compare with; all of them by default."
)
@click.option("--budget", type=click.FloatRange(min=1), help="Seconds in all.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Folder for results.jsonl and table.json.")
@click.option("--resume", is_flag=True, help="Continue the results in that folder.")
@click.option("--dry-run", is_flag=True, help="Everything but the clock, for a GPU that need not be there.")
@click.option(
    "--target", default="NVIDIA H200", show_default=True, help="The GPU of a dry run: a name, or code such as sm_80."
)
def bench(
    suites: tuple[str, ...], only: str | None, peers: tuple[str, ...], budget: float | None, out: Path | None, resume: bool,
    dry_run: bool, target: str,
) -> None:  # fmt: skip
    """Check every kernel on this GPU, and time layers and models against cuDNN and torch.compile.

    Results go into a file line by line, so that a run that was stopped continues with --resume. A dry run needs no GPU: it
    counts, compiles and predicts all layers for the target, and runs small ones in Triton's interpreter. Exits with 1 if
    something of ours is wrong or fails.
    """
    if dry_run and (other := [suite for suite in suites if suite not in ("check", "layers")]):
        raise click.BadParameter(f"a dry run has no {other[0]}, only check and layers", param_hint="--suite")
    check_triton("bench measures")
    from tritonconv.bench import dry, run
    from tritonconv.bench.suites import selected

    cases = selected(only)
    small = dry.small_jobs(only, run.columns_of(peers)) if dry_run else []
    if not cases and not small:
        raise click.BadParameter(f"no layer has {only!r} in its name or family", param_hint="--only")
    try:
        if dry_run:
            cases = cases if "layers" in (suites or SUITES) else []
            small = small if "check" in (suites or SUITES) else []
            sys.exit(1 if run.dry_run(cases, small, target, out, resume=resume) else 0)
        wrong = run.measure(
            cases, out or Path("tritonconv-bench"), stages=suites or run.STAGES, columns=run.columns_of(peers),
            budget=budget, resume=resume,
        )  # fmt: skip
    except (FileExistsError, RuntimeError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    sys.exit(1 if wrong else 0)


@main.command()
@click.argument("model", metavar="FILE.py:NAME")
@click.option(
    "--input", "sizes", multiple=True, required=True, help="Sizes of an input, such as 8,3,224,224; once for each input."
)
@click.option("--dtype", type=click.Choice(DTYPES), default="float16", show_default=True, help="Of model and inputs.")
@click.option("--channels-last/--contiguous", default=True, show_default=True, help="Layout of inputs of 4 or 5 sizes.")
@click.option("--no-fuse", is_flag=True, help="Convert each layer on its own.")
@click.option("--export", type=click.Path(dir_okay=False, path_type=Path), help="Write a table of what was found too.")
def tune(model: str, sizes: tuple[str, ...], dtype: str, channels_last: bool, no_fuse: bool, export: Path | None) -> None:
    """Measure the best configs for each layer of a model on this GPU, and remember them for every later run.

    NAME is a torch.nn.Module, or something that returns one when called without arguments.
    """
    shapes = [parse_shape(text) for text in sizes]
    if export is not None:
        check_folder(export)
    module = load_model(model)
    import torch

    import tritonconv

    if not torch.cuda.is_available():
        raise click.ClickException("tune measures on a GPU, and torch sees none (tritonconv doctor tells more)")
    module = module.to("cuda", getattr(torch, dtype)).eval()
    inputs = [torch.randn(shape, device="cuda", dtype=getattr(torch, dtype)) for shape in shapes]
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    if channels_last:
        inputs = [x.to(memory_format=formats.get(x.dim(), torch.preserve_format)) for x in inputs]
    click.echo(tritonconv.tune(tritonconv.convert(module, fuse=not no_fuse), *inputs, export=export))


@main.command()
def doctor() -> None:
    """Tell versions, devices, where kernels run and whether one computes rightly. Exits with 1 if something is wrong."""
    from tritonconv.doctor import report

    sys.exit(0 if report() else 1)


def default_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def check_triton(who: str) -> None:
    from tritonconv.ops.core.backend import HAS_TRITON

    if not HAS_TRITON:
        raise click.ClickException(f"{who} Triton kernels, but triton is not installed (it is for Linux)")


def check_matplotlib() -> None:
    """Fail before the work, not behind it."""
    from tritonconv.convert.report import figure_class

    try:
        figure_class()
    except ImportError as error:
        raise click.ClickException(str(error)) from error


def run_kernels_somewhere(device: str) -> None:
    """Start this command anew in Triton's interpreter if the device is the CPU.

    TRITON_INTERPRET counts when triton is imported, and torch has imported it by now.
    """
    from tritonconv.ops.core.backend import HAS_TRITON

    if device == "cpu" and HAS_TRITON and "TRITON_INTERPRET" not in os.environ:
        os.execve(
            sys.executable, [sys.executable, "-m", "tritonconv", *sys.argv[1:]], {**os.environ, "TRITON_INTERPRET": "1"}
        )


def parse_shape(text: str) -> tuple[int, ...]:
    """Sizes from text.

    >>> parse_shape("1,3,64,64")
    (1, 3, 64, 64)
    """
    try:
        shape = tuple(int(size) for size in text.replace("x", ",").split(","))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 0:
        raise click.BadParameter(f"{text!r} is no size: expected whole numbers such as 1,3,64,64", param_hint="--input")
    return shape


def load_model(target: str) -> torch.nn.Module:
    """The model that FILE.py:NAME or package.module:NAME stands for.

    Raises:
        click.ClickException: there is no such file or name, it fails, or it is no module.
    """
    source, _, name = target.rpartition(":")
    if not source or not name:
        raise click.BadParameter(
            f"{target!r} has no name: expected FILE.py:NAME or package.module:NAME", param_hint="MODEL"
        )
    value: Any = import_source(source)
    import torch

    for part in name.split("."):
        if not hasattr(value, part):
            names = sorted(
                n for n, v in vars(value).items() if callable(v) and getattr(v, "__module__", None) == value.__name__
            )
            known = f"; it has {', '.join(names)}" if names else ""
            raise click.ClickException(f"{source} has no {part!r}{known}")
        value = getattr(value, part)
    if not isinstance(value, torch.nn.Module):
        if not callable(value):
            raise click.ClickException(
                f"{target} is {type(value).__name__}, expected a torch.nn.Module or a function that returns one"
            )
        try:
            value = value()
        except Exception as error:
            raise click.ClickException(f"{target}() failed: {describe(error)}") from error
    if not isinstance(value, torch.nn.Module):
        raise click.ClickException(f"{target}() returned {type(value).__name__}, expected a torch.nn.Module")
    return value


def import_source(source: str) -> Any:
    """The module of a file, or of a dotted name as seen from the current folder."""
    path = Path(source)
    is_file = source.endswith(".py") or path.exists()
    if is_file and not path.is_file():
        raise click.ClickException(f"there is no file {source}")
    # A model may import its neighbors.
    sys.path.insert(0, str(path.resolve().parent if is_file else Path.cwd()))
    try:
        if not is_file:
            return importlib.import_module(source)
        spec = importlib.util.spec_from_file_location(path.stem, path)
        if spec is None or spec.loader is None:
            raise click.ClickException(f"{source} is no Python file")
        module = importlib.util.module_from_spec(spec)
        # Pickles and dataclasses look a class's module up by name.
        sys.modules[path.stem] = module
        spec.loader.exec_module(module)
        return module
    except click.ClickException:
        raise
    except Exception as error:
        raise click.ClickException(f"importing {source} failed: {describe(error)}") from error


def describe(error: BaseException) -> str:
    """An error in a line, with the place that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith("<frozen") and frame.filename != __file__]
    place = f" ({own[-1].filename}, line {own[-1].lineno})" if own else ""
    return f"{type(error).__name__}: {error}{place}"


def check_folder(path: Path) -> None:
    """Fail before the work, not behind it."""
    if not path.absolute().parent.is_dir():
        raise click.ClickException(f"there is no folder {path.parent} for {path.name}")

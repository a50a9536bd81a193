"""The command line `compiled-attn`. Exit codes: 0 done, 1 an error in four parts, 2 wrong usage, 3 a fault of ours.

NAME is a paper of the zoo (`evit`), a variant (`evit_s_k07_fuse`), or both (`deit/digits_tiny`).
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from torch import nn

    from compiled_attn.passes.base import Pass
    from compiled_attn.runtime.build import Settings

NAMED, FAULT = 1, 3
COUNT = click.IntRange(min=1)
DRAWN_MOST = 512  # places along an axis that are drawn


class Group(click.Group):
    """Commands whose errors are printed in their four parts, without a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        from compiled_attn.ir.errors import CompiledAttnError

        try:
            return super().invoke(ctx)
        except CompiledAttnError as error:
            click.echo(str(error), err=True)
            ctx.exit(NAMED)
        except (click.ClickException, click.exceptions.Exit, click.Abort, KeyboardInterrupt):
            raise
        except Exception as error:
            if ctx.params.get("traceback"):
                raise
            wrapped = CompiledAttnError(
                f"{ctx.invoked_subcommand} stopped on a fault that is not the user's",
                where=f"compiled-attn {ctx.invoked_subcommand}",
                facts=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:400],
                do="run it again as compiled-attn --traceback ..., and report what it prints",
            )
            click.echo(str(wrapped), err=True)
            ctx.exit(FAULT)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--traceback", is_flag=True, help="Show the Python traceback of a fault.")
@click.version_option(package_name="compiled-attn")
def main(traceback: bool) -> None:
    """A compiler for attention models on torch.export and Inductor."""
    del traceback


def model_options(command: Any) -> Any:
    """Options of every command that compiles a model."""
    for option in (
        click.option(
            "--passes", "-p", multiple=True, help="A named pass of compiled_attn.passes, e.g. ReorganizeTokens."
        ),
        click.option("--no-fuse", is_flag=True, help="Drop the tokens that go; by default they become one token."),
        click.option("--at", default="3,6,9", show_default=True, help="Blocks, from 0, for --keep-rate."),
        click.option("--keep-rate", type=float, help="Reorganize tokens (EViT), keeping this share at each of --at."),
        click.option("--precision", type=click.Choice(["bf16", "fp16"]), help="Compute in this dtype."),
        click.option("--target", default="auto", show_default=True, help="What to compile for; `doctor` lists them."),
        click.option("--checkpoint", type=click.Path(path_type=Path), help="The authors' weights file."),
    ):
        command = option(command)
    return command


@main.command("list")
def list_papers() -> None:
    """List the zoo: papers, variants, parameters, work, accuracy as published."""
    from compiled_attn import zoo
    from compiled_attn.runtime.report import aligned

    rows = [("paper", "variant", "parameters", "GMACs", "top-1 %", "weights")]
    for name, paper in zoo.PAPERS.items():
        for variant in paper.variants:
            rows.append((name, variant, *_published(paper, variant)))
    click.echo(aligned(rows))


class Numbers(click.ParamType):
    """`7` or `7,5`: one number for each axis."""

    name = "NUMBERS"

    def convert(self, value: Any, param: Any, ctx: Any) -> list[int]:
        try:
            return [int(part) for part in value.split(",")]
        except ValueError:
            self.fail(f"{value!r} is not a number, or numbers between commas", param, ctx)


@main.command()
@click.argument("name")
@click.option("--window", type=Numbers(), help="With local_attention: keys a query sees, e.g. 7 or 7,5.")
@click.option("--stride", type=Numbers(), help="How far the window moves from block to block.")
@click.option("--dilation", type=Numbers(), help="How far the keys of a window lie apart.")
@click.option("--shift", type=Numbers(), help="Where the first whole block begins.")
@click.option("--block", type=Numbers(), help="Queries that share a window; as many as --stride by default.")
@click.option("--border", type=click.Choice(["clamp", "mask", "zero"]), default="clamp", help="Windows at the ends.")
@click.option("--causal", is_flag=True, help="No key behind the query; for a sequence.")
@click.option("--sinks", default=0, help="First keys of a sequence that every query sees.")
@click.option("--size", type=Numbers(), default="15,15", show_default=True, help="Of the map; one number: a sequence.")
@click.option("--query", type=Numbers(), help="Its place; the middle by default.")
def show(name: str, size: list[int], query: list[int] | None, causal: bool, **options: Any) -> None:
    """Show a paper's record: title, link, reference, variants, published figures, checkpoint keys.

    `show local_attention --window 7 --dilation 2` draws which keys a query sees.
    """
    if name == "local_attention":
        _show_pattern(size, query, causal, options)
        return
    _show_paper(name)


def _show_pattern(size: list[int], query: list[int] | None, causal: bool, options: dict[str, Any]) -> None:
    from compiled_attn.runtime.patterns import pattern_picture

    if options["window"] is None:
        raise click.UsageError("local_attention is drawn for a --window, e.g. --window 7")
    for given in (size, *(v for v in options.values() if isinstance(v, list))):
        if max(given) > DRAWN_MOST:
            raise click.UsageError(f"{max(given)} is too many to draw; sizes and windows go up to {DRAWN_MOST}")
    rank = len(size)
    each = {k: v * rank if isinstance(v, list) and len(v) == 1 else v for k, v in options.items()}
    click.echo(pattern_picture(size, query, causal=[causal] * rank, **each))


def _show_paper(name: str) -> None:
    from compiled_attn import zoo
    from compiled_attn.runtime.report import aligned

    paper_name, variant = resolve(name)
    paper = zoo.PAPERS[paper_name]
    facts = [
        ("paper", f"{paper.title} ({paper.year})"),
        ("link", paper.link),
        ("reference", paper.reference),
        ("checkpoints", paper.keys),
    ]
    shown = list(paper.variants) if name == paper_name else [variant]
    facts += [("config", f"{v}: {paper.variants[v]}") for v in shown]
    click.echo(aligned(facts))
    rows = [("variant", "parameters", "GMACs", "top-1 %", "weights")]
    rows += [(v, *_published(paper, v)) for v in shown]
    click.echo("\n" + aligned(rows))


@main.command()
@click.argument("name")
@click.option("--image", required=True, type=click.Path(path_type=Path), help="A picture file.")
@click.option("--top", type=COUNT, default=5, show_default=True, help="How many classes to print.")
@click.option("--random-weights", is_flag=True, help="Run with no trained weights (the answer means nothing).")
@model_options
def run(name: str, image: Path, top: int, random_weights: bool, **options: Any) -> None:
    """Classify a picture with a model of the zoo, compiled: class numbers and their probabilities."""
    import torch

    from compiled_attn.runtime.pictures import read_picture
    from compiled_attn.runtime.progress import Stages

    want_pictures(name)
    model, config = model_of(name, options["checkpoint"], trained=not random_weights)
    picture = read_picture(image, config.img_size, config.in_chans)
    with Stages(1) as stage:
        stage("compiling")
        fast = _compiled(model, (picture,), options)
    with torch.no_grad():
        shares = fast(picture).float().softmax(-1)[0]
    values, classes = shares.topk(min(top, len(shares)))
    for share, number in zip(values.tolist(), classes.tolist(), strict=True):
        click.echo(f"class {number:<6} {100 * share:5.1f} %")


@main.command()
@click.argument("name")
@click.option("--output", "-o", required=True, type=click.Path(path_type=Path), help="The file: .pt2, .onnx, .zip.")
@click.option("--batch", type=COUNT, default=1, show_default=True, help="Pictures; an example with --dynamic-batch.")
@click.option("--dynamic-batch", is_flag=True, help="Leave the batch size open.")
@model_options
def export(name: str, output: Path, batch: int, dynamic_batch: bool, **options: Any) -> None:
    """Export a model of the zoo: an artifact that runs with no Python, or ONNX."""
    from compiled_attn.runtime import cross
    from compiled_attn.runtime.build import prepare
    from compiled_attn.runtime.export import export_build
    from compiled_attn.runtime.files import require_writable
    from compiled_attn.runtime.onnx import export_onnx
    from compiled_attn.runtime.progress import Stages

    require_writable(output)
    model, _ = model_of(name, options["checkpoint"], trained=False)
    args = example(name, batch)
    shapes = tuple({0: "batch"} for _ in args) if dynamic_batch else None
    if output.suffix == ".onnx":
        with Stages(1) as stage:
            stage("ONNX")
            click.echo(export_onnx(model, args, path=output, dynamic_shapes=shapes, passes=passes_of(options)))
        return
    with Stages(2) as stage:
        stage("capture and passes")
        settings = settings_of(options, dynamic_shapes=shapes)
        cross.require_possible(settings.target, output)
        build = prepare(model, args, None, settings)
        stage("native code")
        artifact = export_build(build, output)
    click.echo(artifact)


@main.command()
@click.argument("sources", type=click.Path(path_type=Path))
@click.option("--output", "-o", required=True, type=click.Path(path_type=Path), help="The file: .pt2.")
@click.option("--cuda-dir", type=click.Path(path_type=Path), help="CUDA toolkit; CUDA_HOME or /usr/local/cuda.")
def finish(sources: Path, output: Path, cuda_dir: Path | None) -> None:
    """Compile a package of sources (.zip of a cross build) on the target's own host into an artifact."""
    from compiled_attn.runtime import cross_sources
    from compiled_attn.runtime.progress import Stages

    with Stages(1) as stage:
        stage("host code")
        artifact = cross_sources.finish(sources, output, cuda_dir=cuda_dir)
    click.echo(artifact)


@main.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--target", required=True, help="Which of the file's targets.")
@click.option("--output", "-o", required=True, type=click.Path(path_type=Path), help="The file: .pt2.")
def extract(artifact: Path, target: str, output: Path) -> None:
    """Take the build for one target out of a file that holds several, for the C++ runner."""
    from compiled_attn.runtime.bundle import extract as take

    click.echo(f"{output}  sha256 {take(artifact, target, output)}")


@main.command()
@click.argument("artifact", type=click.Path(path_type=Path))
def inspect(artifact: Path) -> None:
    """Check an artifact and print its contract; none of its code is run."""
    from compiled_attn.runtime import describe
    from compiled_attn.runtime.load import read

    click.echo(describe.text(read(artifact).contract))


@main.command()
@click.argument("name")
@click.option("--native", is_flag=True, help="Compile it too, to see which templates serve.")
@click.option("--batch", type=COUNT, default=1, show_default=True, help="Batch size.")
@model_options
def explain(name: str, native: bool, batch: int, **options: Any) -> None:
    """Say what each pass does to a model, what it does not do and because of what; any target, at hand or not."""
    import tempfile

    from compiled_attn.ir import targets
    from compiled_attn.runtime.build import build_package, prepare
    from compiled_attn.runtime.foresight import explanation
    from compiled_attn.runtime.progress import Stages

    model, _ = model_of(name, options["checkpoint"], trained=False)
    settings = settings_of(options)
    with Stages(2 if native else 1) as stage:
        stage("capture and passes")
        build = prepare(model, example(name, batch), None, settings)
        if native:
            stage("native code")
            targets.require_here(settings.target)
            with tempfile.TemporaryDirectory() as folder:
                build_package(build, Path(folder) / "model.pt2")
    click.echo(explanation(f"{name} for {settings.target.name}, {settings.mode}", build))


@main.command()
@click.argument("name")
@click.option("--batch", type=COUNT, default=1, show_default=True, help="Batch size.")
@click.option("--threads", type=COUNT, help="torch's threads; all by default.")
@click.option("--torch-compile", is_flag=True, help="Also time torch.compile as it comes.")
@model_options
def bench(name: str, batch: int, threads: int | None, torch_compile: bool, **options: Any) -> None:
    """Time a model, compiled, beside eager mode, in turn on the same input; refuses where the numbers differ."""
    import torch

    from compiled_attn.runtime.measure import time_in_turn
    from compiled_attn.runtime.progress import Stages
    from compiled_attn.runtime.report import aligned

    if threads is not None:
        torch.set_num_threads(threads)
    model, _ = model_of(name, options["checkpoint"], trained=False)
    args = example(name, batch)
    calls: dict[str, Any] = {"eager": model}
    with Stages(2 + torch_compile) as stage, torch.no_grad():
        stage("compiling")
        calls["compiled_attn"] = _compiled(model, args, options)
        if torch_compile:
            stage("torch.compile")
            calls["torch.compile"] = torch.compile(model)
            calls["torch.compile"](*args)
        same = not options["keep_rate"] and not options["passes"]
        tolerance = 5e-2 if options["precision"] else 1e-3
        error = _agree(calls["compiled_attn"](*args), model(*args), tolerance) if same else None
        stage("timing")
        seconds = time_in_turn({k: partial(f, *args) for k, f in calls.items()}, round_seconds=0.2)
    first = seconds["eager"]
    rows = [("", "ms", "to eager")]
    rows += [(k, f"{1e3 * s:.2f}", f"{first / s:.2f}x") for k, s in seconds.items()]
    click.echo(aligned(rows))
    shown = "approximate passes are on" if error is None else f"outputs differ by {error:.1e} of the largest"
    click.echo(f"batch {batch}, {torch.get_num_threads()} threads; {shown}")


@main.command()
def doctor() -> None:
    """Say what this machine has, and how to get what is missing. Exit code 1 where it can not compile."""
    from compiled_attn.runtime.doctor import doctor as look

    report = look()
    click.echo(report)
    if not report.ok:
        raise click.exceptions.Exit(NAMED)


def resolve(name: str) -> tuple[str, str]:
    """(paper, variant) of a NAME; of a paper alone, its first variant. Raises CompiledAttnError, naming close ones."""
    import difflib

    from compiled_attn.ir.errors import CompiledAttnError
    from compiled_attn.zoo import PAPERS

    paper, _, variant = name.partition("/")
    if paper in PAPERS:
        chosen = variant or next(iter(PAPERS[paper].variants))
        if chosen in PAPERS[paper].variants:
            return paper, chosen
    owners = [p for p, record in PAPERS.items() if name in record.variants]
    if len(owners) == 1:
        return owners[0], name
    known = [*PAPERS, *(v for record in PAPERS.values() for v in record.variants)]
    known += [f"{p}/{v}" for p, record in PAPERS.items() for v in record.variants]
    close = [f"{p}/{name}" for p in owners] or difflib.get_close_matches(name, known, n=4, cutoff=0.5)
    raise CompiledAttnError(
        f"{name!r} names several models" if owners else f"no model is named {name!r}",
        where=f"NAME {name}",
        facts=f"close: {', '.join(close) or ', '.join(PAPERS)}",
        do="choose one of these; compiled-attn list shows them all",
    )


def model_of(name: str, checkpoint: Path | None, *, trained: bool) -> tuple[nn.Module, Any]:
    """The model in eval mode and its Config; with the checkpoint's weights, or those that the package carries."""
    from compiled_attn import zoo
    from compiled_attn.ir.errors import CheckpointError

    paper, variant = resolve(name)
    record = zoo.PAPERS[paper]
    carried = checkpoint is None and variant in record.weights
    if trained and not carried and checkpoint is None:
        raise CheckpointError(
            f"no weights for {variant}",
            where=f"NAME {name}",
            facts=f"this package carries weights for {', '.join(record.weights) or 'none'} of {paper}",
            do="give the authors' file with --checkpoint, or --random-weights to see it run",
        )
    model = zoo.create(paper, variant, pretrained=carried)
    if checkpoint is not None:
        zoo.load_checkpoint(model, checkpoint)
    return model, record.variants[variant]


def example(name: str, batch: int) -> tuple[Any, ...]:
    """Random inputs that the model of a NAME takes, pictures or others, from a fixed seed."""
    import torch

    from compiled_attn.zoo import PAPERS

    paper, variant = resolve(name)
    record = PAPERS[paper]
    return record.inputs(record.variants[variant], batch, torch.Generator().manual_seed(0))


def want_pictures(name: str) -> None:
    """Raises CompiledAttnError where the model of a NAME takes something else than pictures."""
    from compiled_attn.ir.errors import CompiledAttnError
    from compiled_attn.zoo import PAPERS
    from compiled_attn.zoo.paper import pictures

    paper, variant = resolve(name)
    if PAPERS[paper].inputs is not pictures:
        others = ", ".join(p for p, record in PAPERS.items() if record.inputs is pictures)
        raise CompiledAttnError(
            f"{variant} takes no pictures",
            where=f"NAME {name}",
            facts=f"pictures are what {others} take",
            do="choose one of these, or call the model from Python: compiled_attn.zoo.create",
        )


def passes_of(options: dict[str, Any]) -> tuple[Pass, ...]:
    """The passes that the options name."""
    import dataclasses

    from compiled_attn import passes
    from compiled_attn.ir.errors import PassError

    found: list[Pass] = []
    if options["keep_rate"] is not None:
        at = options["at"]
        if not all(part.strip().isdigit() for part in at.split(",")):
            raise PassError(
                f"--at {at} names no blocks", facts="blocks are whole numbers from 0", do="write for example --at 3,6,9"
            )
        blocks = tuple(int(part) for part in at.split(","))
        found.append(passes.ReorganizeTokens(keep_rate=options["keep_rate"], at=blocks, fuse=not options["no_fuse"]))
    classes: dict[str, Any] = {n: getattr(passes, n) for n in passes.__all__}
    known: dict[str, Any] = {n: c for n, c in classes.items() if dataclasses.is_dataclass(c) and hasattr(c, "run")}
    for name in options["passes"]:
        if name not in known:
            raise PassError(
                f"no pass is named {name!r}",
                where=f"--passes {name}",
                facts=f"there are {', '.join(known)}",
                do="choose one of these",
            )
        found.append(known[name]())
    return tuple(found)


def settings_of(options: dict[str, Any], *, dynamic_shapes: Any = None) -> Settings:
    """How to compile, as the options say."""
    from compiled_attn.runtime.build import Settings

    return Settings.of(
        options["target"], passes=passes_of(options), precision=options["precision"], dynamic_shapes=dynamic_shapes
    )


def _compiled(model: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    from compiled_attn.runtime.compile import compile

    return compile(
        model,
        options["target"],
        example_inputs=args,
        precision=options["precision"],
        passes=passes_of(options),
    )


def _agree(found: Any, expected: Any, tolerance: float) -> float:
    """Largest difference of outputs, relative to the largest expected value. Raises LowerError above the tolerance."""
    from torch.utils import _pytree as pytree

    from compiled_attn.ir.errors import LowerError

    pairs = zip(pytree.tree_leaves(found), pytree.tree_leaves(expected), strict=True)
    error = max(((a.float() - b.float()).abs().max() / b.float().abs().max()).item() for a, b in pairs)
    if not error <= tolerance:
        raise LowerError(
            "the compiled model computes something else than eager mode",
            where="bench",
            facts=f"outputs differ by {error:.1e} of the largest, {tolerance:.0e} is allowed",
            do="no time is given for wrong numbers; report the model",
        )
    return float(error)


def _published(paper: Any, variant: str) -> tuple[str, str, str, str]:
    row = paper.published.get(variant)
    weights = "carried" if variant in paper.weights else "-"
    if row is None:
        return "-", "-", "-", weights
    gmacs, top1 = ("-" if value is None else f"{value:g}" for value in (row.gmacs, row.top1))
    return f"{row.parameters:,}", gmacs, top1, weights

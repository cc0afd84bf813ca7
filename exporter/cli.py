"""The command line: parse, call, print. What a command does is in its own module, imported when the command runs.

Exit codes: 0 done, 1 a fault of ours, 2 bad usage or input, 3 a gate failed, 4 a target not completed or a figure not
measured, 130 interrupted.
"""

import contextlib
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import click

from exporter.errors import InternalError, QExportError
from exporter.versions import VERSION

USAGE = 2
INTERRUPTED = 130
COMPILE = "compile"
COMPLETE = "_QEXPORT_COMPLETE"
"""Set by a shell that asks click what may come next."""

FILE_WIDTH = 160


class CompileByDefault(click.Group):
    """`qexport MODEL ...` compiles: a first word that is no command is a model. ./passes is the file of that name.

    Without a word it compiles what `[tool.qexport]` of the pyproject.toml here names.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put the default command in front, unless one is there."""
        if args and args[0] not in (*self.commands, *self.get_help_option_names(ctx), "--version"):
            args = [COMPILE, *args]
        return super().parse_args(ctx, args)

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Both ways to call it."""
        formatter.write_usage(ctx.command_path, "MODEL [OPTIONS]")
        formatter.write_usage(ctx.command_path, "COMMAND [ARGS]...", prefix=" " * len("Usage: "))

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The commands, then the options of the default one."""
        self.format_commands(ctx, formatter)
        self.commands[COMPILE].format_options(ctx, formatter)


@click.group(cls=CompileByDefault, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(VERSION, message="%(prog)s %(version)s")
def cli() -> None:
    """Compile a trained PyTorch model into a quantized ONNX file or a TensorRT engine, and measure what it costs.

    MODEL is a torch.export archive, a state_dict or safetensors file (with --factory), a pickled module (with
    --trust-model) or a Hugging Face folder; its bytes tell which. Without MODEL the recipe's models are compiled.
    """


as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@cli.command(COMPILE, hidden=True)
@click.argument("model", type=click.Path(path_type=Path), required=False)
@click.option(
    "--passes",
    metavar="LIST",
    help="Passes in order: cle,gptq:bits=3:group_size=64. [default: cle,gptaq; none for a quantized model]",
)
@click.option("--target", multiple=True, metavar="onnx|trt", help="What to make; may be repeated. [default: onnx]")
@click.option("--out", type=click.Path(path_type=Path), metavar="DIR", help="Output folder. [default: out]")
@click.option("--force", is_flag=True, help="Replace an output folder that is there.")
@click.option("--reuse", is_flag=True, help="Keep an output folder that is up to date, replace one that is not.")
@click.option("--calib", metavar="FILE|pkg.mod:function", help="Samples to calibrate and validate with.")
@click.option("--calib-samples", type=int, metavar="N", help="Use so many of them. [default: 512]")
@click.option("--input", "inputs", multiple=True, metavar="[NAME=]SHAPE[:dtype]", help="An input: x=8x3x32x32.")
@click.option("--dynamic", multiple=True, metavar="NAME:AXIS[=label]", help="An axis that stays free: x:0=batch.")
@click.option("--factory", metavar="pkg.mod:function", help="Makes the module that a state_dict is loaded into.")
@click.option("--trust-model", is_flag=True, help="Load a model that runs code of its own.")
@click.option("--eval", metavar="pkg.mod:function", help="Called with predict(inputs); returns {metric: number}.")
@click.option("--gate", "gates", multiple=True, metavar="EXPR", help="What to reach: sqnr_db>=20; may be repeated.")
@click.option("--sensitivity", is_flag=True, help="Rank the layers: each quantized alone, and all but it.")
@click.option("--budget", metavar="TERMS", help="Choose each layer's bits: size<=0.3,metric.accuracy.drop<=0.005.")
@click.option("--skip", multiple=True, metavar="GLOB", help="Layers to leave in float; may be repeated.")
@click.option("--recipe", type=click.Path(path_type=Path), metavar="FILE", help="These options, as TOML.")
@click.option("--provider", metavar="cpu|cuda|tensorrt", help="Where onnxruntime runs. [default: cpu]")
@click.option("--device", metavar="cpu|cuda|cuda:0,cuda:1", help="Where weights are quantized. [default: cpu]")
@click.option("--weights-as", metavar="auto|fast|compact", help="How weights are stored. [default: auto]")
@click.option("--trt-flavor", metavar="auto|tensorrt|rtx", help="Which TensorRT builds. [default: auto]")
@click.option("--trt-arch", metavar="LIST", help="GPU architectures of an rtx engine: sm80,sm89.")
@click.option("--trt-profile", "trt_profiles", multiple=True, metavar="NAME=MIN/OPT/MAX", help="Shapes to build for.")
@click.option("--dtype", metavar="float32|float16|bfloat16", help="Of a TensorRT engine's values. [default: float32]")
@click.option("--seed", type=int, metavar="N", help="Of everything random. [default: 0]")
@click.option(
    "--threads",
    type=int,
    metavar="N",
    help="Of onnxruntime; torch computes on one, which decides the bytes. [default: 0, its own choice]",
)
@click.option("--memory", metavar="SIZE", help="What results and activations may take before they go to disk: 4GB.")
@click.option("--resume/--no-resume", default=None, help="Go on where a stopped run of the same stood. [default: on]")
@click.option("--quiet", is_flag=True, help="Say nothing but warnings and errors.")
@click.option("-v", "--verbose", is_flag=True, help="Show warnings of libraries, and tracebacks.")
@as_json
def compile_command(model: Path | None, recipe: Path | None, verbose: bool, as_json: bool, **flags: Any) -> int:
    """Compile MODEL, or the models of the recipe."""
    with library_warnings(verbose):
        from exporter.compile import CompileResult, compile_path, worst_code
        from exporter.jobs import Job, read_jobs
        from exporter.progress import reporting
        from exporter.render.json_text import compiled_json
        from exporter.render.terminal import render

        def done(job: Job) -> CompileResult:
            with reporting(quiet=job.recipe.quiet or as_json) as progress:
                result = compile_path(job.model, job.recipe, progress=progress)
            if not (job.recipe.quiet or as_json):
                show(render(result.report))
                click.echo(f"\n{'up to date, nothing was done:' if result.reused else 'written to'} {result.out}")
            for message in result.messages:
                click.echo(message, err=True)
            return result

        results = [done(job) for job in read_jobs(model, flags, recipe)]
    if as_json:
        click.echo(compiled_json(results), nl=False)
    return worst_code(result.exit_code for result in results)


@cli.command("passes")
@click.argument("name", required=False)
@as_json
def passes_command(name: str | None, as_json: bool) -> None:
    """Every pass with its options, defaults, paper."""
    from exporter.show_passes import described, render_pass, render_passes

    if as_json:
        echo_json(described(name))
    else:
        show(render_passes() if name is None else render_pass(name))


@cli.command("diff")
@click.argument("old", type=click.Path(path_type=Path))
@click.argument("new", type=click.Path(path_type=Path))
@click.option("--gate", "gates", multiple=True, metavar="EXPR", help="What may be lost: sqnr_db.drop<=0.5.")
@as_json
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE", help="Also write it as markdown.")
@click.option("--model", type=click.Path(path_type=Path), help="The model in float, where OLD is an ONNX file.")
@click.option("--calib", metavar="FILE|pkg.mod:function", help="With --model: as compile was given it.")
@click.option("--factory", metavar="pkg.mod:function", help="With --model: as compile was given it.")
@click.option("--trust-model", is_flag=True, help="With --model: load one that runs code of its own.")
@click.option("--eval", metavar="pkg.mod:function", help="With --model: as compile was given it.")
def diff_command(old: Path, new: Path, gates: tuple[str, ...], as_json: bool, out: Path | None, **source: Any) -> int:
    """What got better or worse from OLD to NEW: output folders or their report.json.

    OLD may also be another tool's ONNX file of the model. Exit code 3 when a gate failed.
    """
    with library_warnings(False):
        from exporter.diff_onnx import Source
        from exporter.diff_paths import diff_paths, write_text
        from exporter.gates import exit_code
        from exporter.render.diff_text import markdown, render

        found = diff_paths(old, new, gates=gates, source=Source(**source))
        if out is not None:
            write_text(out, markdown(found))
    if as_json:
        click.echo(found.to_json(), nl=False)
    else:
        show(render(found))
    return exit_code(found.gates)


@cli.command("inspect")
@click.argument("out", type=click.Path(path_type=Path))
@as_json
def inspect_command(out: Path, as_json: bool) -> None:
    """What an output folder holds: layers, formats, bits per weight, sizes, gates."""
    from exporter.inspect_out import inspect_out, render
    from exporter.render.json_text import inspected_json

    state = inspect_out(out)
    if as_json:
        click.echo(inspected_json(state), nl=False)
    else:
        show(render(state))


@cli.command("doctor")
@as_json
def doctor_command(as_json: bool) -> None:
    """What this machine can do, and what to install for the rest."""
    from exporter.doctor import examine, render

    found = examine()
    if as_json:
        echo_json(found)
    else:
        show(render(found))


@cli.command("build")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--trt-flavor", default="auto", metavar="auto|tensorrt|rtx", help="Which TensorRT builds.")
@click.option("--trt-arch", metavar="LIST", help="GPU architectures of an rtx engine: sm80,sm89.")
@click.option("--trt-profile", "profiles", multiple=True, metavar="NAME=MIN/OPT/MAX", help="Shapes to build for.")
@click.option("--force", is_flag=True, help="Replace an engine that is there.")
@as_json
def build_command(
    bundle: Path, trt_flavor: str, trt_arch: str | None, profiles: tuple[str, ...], force: bool, as_json: bool
) -> None:
    """Finish a TensorRT bundle: make its engine, on the machine that has the GPU."""
    from exporter.build_bundle import build_bundle
    from exporter.recipe import Recipe

    given: dict[str, Any] = {"trt_flavor": trt_flavor, "trt_arch": trt_arch or (), "trt_profiles": profiles}
    recipe = Recipe(**given)
    done = build_bundle(bundle, recipe, force=force)
    if as_json:
        echo_json(done)
    else:
        click.echo(f"{done.engine}: {done.engine_bytes} bytes, TensorRT {done.version} ({done.flavor})")


@cli.command("bench")
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--float",
    "float_model",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="The model in float: ONNX or an engine, its file or output folder. An engine needs it.",
)
@click.option("--batch", "batches", multiple=True, type=click.IntRange(min=1), metavar="N", help="Samples at once.")
@click.option("--length", type=click.IntRange(min=1), default=128, show_default=True, help="Of other free axes.")
@click.option("--threads", type=click.IntRange(min=0), default=1, show_default=True, help="0: onnxruntime decides.")
@click.option(
    "--trt-flavor",
    type=click.Choice(["auto", "tensorrt", "rtx"]),
    default="auto",
    help="Which TensorRT runs an engine; auto: the one that built it.",
)
@click.option("--rounds", type=click.IntRange(min=3), default=30, show_default=True, help="Runs of each, in turns.")
@as_json
def bench_command(
    out: Path,
    float_model: Path | None,
    batches: tuple[int, ...],
    length: int,
    threads: int,
    trt_flavor: Literal["auto", "tensorrt", "rtx"],
    rounds: int,
    as_json: bool,
) -> None:
    """Latency and throughput of the artifact beside the same network in float, in one run, as a ratio."""
    from exporter.bench import bench, render

    sizes = batches or (1, 32)
    measured = bench(
        out,
        batches=sizes,
        length=length,
        threads=threads,
        rounds=rounds,
        float_model=float_model,
        trt_flavor=trt_flavor,
    )
    if as_json:
        echo_json(measured)
    else:
        show(render(measured))


def echo_json(value: object) -> None:
    """Print a value as JSON on stdout."""
    from exporter.render.json_text import as_text

    click.echo(as_text(value), nl=False)


def show(renderable: Any) -> None:
    """Print on stdout, as wide as the terminal, or as any table needs where there is none."""
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else FILE_WIDTH).print(renderable)


@contextlib.contextmanager
def library_warnings(shown: bool) -> Iterator[None]:
    """Warnings of libraries are about their own affairs; ours stand in the report."""
    with warnings.catch_warnings():
        if not shown:
            warnings.simplefilter("ignore")
        yield


def run(args: Sequence[str]) -> int:
    """Run one command line; the exit code. Errors are one line on stderr."""
    try:
        if not args and COMPLETE not in os.environ:
            from exporter.jobs import names_a_model

            if not names_a_model():
                click.echo(cli.get_help(click.Context(cli, info_name="qexport")), err=True)
                return USAGE
            args = [COMPILE]
        with terminated_like_interrupted():
            return int(cli.main(list(args), prog_name="qexport", standalone_mode=False) or 0)
    except QExportError as error:
        return fail(str(error), error.exit_code, args)
    except click.ClickException as error:
        return fail(f"{' '.join(error.format_message().split())} (see qexport --help)", USAGE)
    except (click.Abort, KeyboardInterrupt):
        return fail("interrupted, nothing was written; the same command goes on from here", INTERRUPTED)
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        fault = InternalError(f"{type(error).__name__}: {error}")
        return fail(str(fault), fault.exit_code, args)


def fail(line: str, code: int, args: Sequence[str] = ()) -> int:
    """Say why on stderr, with a traceback where -v asked for it."""
    if {"-v", "--verbose"} & set(args):
        traceback.print_exc()
    click.echo(f"error: {line}", err=True)
    return code


@contextlib.contextmanager
def terminated_like_interrupted() -> Iterator[None]:
    """SIGTERM ends a run as Ctrl-C does: cleanly, with nothing half written."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not in the main thread: signals are somebody else's
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main() -> None:
    """The `qexport` command."""
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()

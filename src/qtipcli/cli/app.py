"""Owns the commands: each is a signature, a sentence and one call. Heavy imports wait until a command runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from qtipcli.cli import dry_run as dry_runs
from qtipcli.cli import max_memory as limits
from qtipcli.cli import options
from qtipcli.cli import push as pushing
from qtipcli.cli.bench import bench_app
from qtipcli.cli.display import Display, print_json, print_table
from qtipcli.cli.evaluate import evaluate
from qtipcli.cli.finetune import finetune
from qtipcli.cli.generate import chat, generate
from qtipcli.cli.serve import PASS_ON, serve
from qtipcli.config import BlockTuning, CalibrationSettings, settings_from
from qtipcli.errors import SettingsError, one_line
from qtipcli.job import launcher
from qtipcli.job.interrupt import stopping_in_words


class _Group(TyperGroup):
    """Lists the commands in the order in which they are used, and puts Ctrl-C into words."""

    def list_commands(self, context: Any) -> list[str]:
        return list(self.commands)

    def invoke(self, context: Any) -> Any:
        """Here, because newer Typers turn Ctrl-C into an exit status and say nothing."""
        with stopping_in_words():
            return super().invoke(context)


app = typer.Typer(
    name="qtip",
    cls=_Group,
    help="Trellis-coded quantization of language models to 1-8 bits a weight. Jobs resume: give the same command again.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(show: bool) -> None:
    if show:
        import qtipcli

        print(f"qtip {qtipcli.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")] = False,
) -> None:
    if context.invoked_subcommand not in launcher.SHARED:
        launcher.refuse_several(str(context.invoked_subcommand))


@app.command()
def calibrate(
    model: options.Model,
    out: Annotated[Path | None, typer.Option(help="Where the Hessians go \\[MODEL.hessians].")] = None,
    data: options.Data = None,
    samples: options.Samples = None,
    context: options.Context = None,
    seed: options.Seed = None,
    two_sided: Annotated[
        bool, typer.Option("--two-sided/--one-sided", help="One of each layer's outputs, too, by one pass back.")
    ] = True,
    head: Annotated[bool, typer.Option("--head", help="That of the head's input too; it can be added later.")] = False,
    limit_blocks: options.LimitBlocks = None,
    max_memory: options.MaxMemory = None,
    slices: Annotated[
        int | None, typer.Option(help="Of the text, which as many processes can share; part of the result [8].", min=1)
    ] = None,
    revision: options.Revision = None,
    trust_remote_code: options.Trust = False,
    force: options.Force = False,
    dry_run: options.DryRun = False,
    as_json: options.Json = False,
) -> None:
    """Measure what the model's layers see: one proxy Hessian for each input, saved once and used for every bitrate."""
    launcher.refuse_lone()

    from qtipcli.job.processes import together
    from qtipcli.model.source import ModelSource
    from qtipcli.stages import calibrate, pipeline

    asked = options.given(data=data, samples=samples, context=context, seed=seed, slices=slices)
    settings = settings_from(CalibrationSettings, asked)
    if dry_run:
        launcher.refuse_several("calibrate --dry-run")
        dry_runs.calibrate(model, revision, trust_remote_code, as_json, settings, out, head, two_sided)
        return
    if max_memory is not None:
        launcher.refuse_several("calibrate --max-memory")
    with together() as processes, Display(quiet=not processes.is_main) as display:
        with processes.main_first():
            source = ModelSource.open(model, revision, trust_remote_code)
        directory = out or pipeline.hessians_directory(source)
        memory_gib = limits.calibrate(max_memory, source, settings, directory, head, two_sided, display)
        calibrate.run(source, settings, directory, force, display, head, two_sided, limit_blocks, memory_gib, processes)
    if processes.is_main:
        print_json({"directory": str(directory)}) if as_json else print(directory)


@app.command()
def quantize(
    model: options.Model,
    bits: Annotated[
        float | None, typer.Option(help="Payload bits per weight, 1 to 8; an average where the code has no such rate [2].")
    ] = None,
    size: Annotated[str | None, typer.Option(help="Of all that is stored, such as 1.2GiB, in the place of --bits.")] = None,
    allocate: Annotated[bool, typer.Option("--allocate", help="Measure which layers need more bits, and which fewer.")] = False,
    out: Annotated[Path | None, typer.Option(help="Where the packed model goes \\[MODEL-qtip-Nbit].")] = None,
    code: Annotated[str | None, typer.Option(help="3inst, 1mad, mul1, mcg, hyb, hyb2 or lut [3inst].")] = None,
    preset: options.PresetName = None,
    hessians: Annotated[Path | None, typer.Option(help="From `qtip calibrate`; made if absent \\[MODEL.hessians].")] = None,
    data: options.Data = None,
    samples: options.Samples = None,
    context: options.Context = None,
    seed: options.Seed = None,
    skip: Annotated[list[str] | None, typer.Option(help="Layers to leave as they are, such as '*.v_proj'; repeat.")] = None,
    layer: Annotated[list[str] | None, typer.Option(help="PATTERN=BITS or PATTERN=BITS:CODE; repeat.")] = None,
    head_bits: Annotated[float | None, typer.Option(help="Pack the head too, at this rate [left as it is].")] = None,
    embedding_bits: Annotated[
        float | None, typer.Option(help="Pack the token embedding, and the head tied to it [left as it is].")
    ] = None,
    state_bits: Annotated[int | None, typer.Option(help="L of the trellis, 8 to 16; fewer is faster and worse [16].")] = None,
    transform: Annotated[str | None, typer.Option(help="Incoherence transform: full or block-128 \\[full].")] = None,
    damping: Annotated[float | None, typer.Option(help="Share of the Hessian's mean diagonal added to it [0.001].")] = None,
    scale: Annotated[
        float | None, typer.Option(help="Weights' rms over the code's \\[by code and rate, then searched].")
    ] = None,
    search: Annotated[bool | None, typer.Option("--search/--no-search", help="Search each matrix's best scale.")] = None,
    refit: Annotated[bool | None, typer.Option("--refit/--no-refit", help="Refit row and column scales.")] = None,
    quantized_prefix: Annotated[
        bool | None,
        typer.Option(
            "--quantized-prefix/--original-prefix", help="Round each layer on, and for, what the rounded ones give it."
        ),
    ] = None,
    two_sided: Annotated[
        bool | None, typer.Option("--two-sided/--one-sided", help="Weigh errors by the loss behind each layer, too.")
    ] = None,
    tune_blocks: Annotated[bool, typer.Option("--tune-blocks", help="Tune each block once it is rounded.")] = False,
    windows: Annotated[int | None, typer.Option(help="Held-out windows that layers are measured on [16].", min=1)] = None,
    heldout_data: Annotated[str | None, typer.Option(help="Their text \\[what the calibration left of its own].")] = None,
    sensitivities: Annotated[
        Path | None, typer.Option(help="What was measured; made if absent \\[HESSIANS.sensitivity-CODE].")
    ] = None,
    fast: Annotated[
        bool | None, typer.Option("--fast/--exact", help="Let the first encoder pass see half the ring only.")
    ] = None,
    pack: Annotated[bool, typer.Option("--pack/--no-pack", help="Pack when all layers are rounded.")] = True,
    limit_blocks: options.LimitBlocks = None,
    max_memory: options.MaxMemory = None,
    push_to: options.PushTo = None,
    revision: options.Revision = None,
    trust_remote_code: options.Trust = False,
    force: options.Force = False,
    dry_run: options.DryRun = False,
    as_json: options.Json = False,
) -> None:
    """Quantize a model: calibrate if need be, round every linear of every block, pack a directory that transformers loads."""
    chosen = options.preset_of(preset)
    measuring = options.given(windows=windows, data=heldout_data)
    own_bits, allocation = options.allocation_settings(chosen, code, bits, size, allocate, measuring)
    settings = options.quantize_settings(
        chosen, layer or [], bits=own_bits, code=code, state_bits=state_bits, transform=transform, damping=damping, refit=refit,
        scale=scale, search=search, fast=fast, quantized_prefix=quantized_prefix, two_sided=two_sided, seed=seed, skip=skip,
        head_bits=head_bits, embedding_bits=embedding_bits,
        tune_blocks=(chosen.quantize.tune_blocks or BlockTuning()).model_dump() if tune_blocks else None,
    )  # fmt: skip
    calibration = chosen.calibrate.model_dump(exclude_defaults=True) | options.given(
        data=data, samples=samples, context=context, seed=seed
    )
    if dry_run:
        launcher.refuse_several("quantize --dry-run")
        dry_runs.quantize(
            model, revision, trust_remote_code, as_json, calibration, settings, allocation, hessians, out, pack
        )  # fmt: skip
        return
    if limit_blocks is not None and allocation is not None:
        raise SettingsError("a measured allocation looks at all blocks", "leave --limit-blocks out, or give a uniform rate")
    pushing.check(push_to, pack and limit_blocks is None)
    launcher.refuse_lone()
    if max_memory is not None:
        launcher.refuse_several("quantize --max-memory")

    from qtipcli.job.processes import together
    from qtipcli.model.source import ModelSource
    from qtipcli.stages import pipeline

    with together() as processes, Display(quiet=not processes.is_main) as display:
        with processes.main_first():
            source = ModelSource.open(model, revision, trust_remote_code)
        target = out or pipeline.output_directory(source, options.rate_of(settings, allocation, size))
        where = hessians or pipeline.hessians_directory(source)
        memory_gib = limits.quantize(max_memory, source, calibration, settings, where, target, display)
        if allocation is None:
            result = pipeline.quantize_model(
                source, calibration, settings, where, target, display, force, pack, limit_blocks, memory_gib, processes
            )  # fmt: skip
        else:
            measured = sensitivities or pipeline.sensitivities_directory(where, settings.code)
            result = pipeline.allocate_model(
                source, calibration, settings, allocation, where, measured, target, display, force, pack, memory_gib, processes
            )  # fmt: skip
    if processes.is_main:
        _summarize(result, as_json, push_to) if result == target else print(result)


@app.command("pack")
def pack_command(
    model: options.Model,
    job: Annotated[Path, typer.Argument(help="The finished run directory of `qtip quantize`: OUT.job.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Where the packed model goes.", show_default=False)],
    max_shard_size: Annotated[str, typer.Option(help="Of each safetensors file.")] = "5GB",
    max_memory: options.MaxMemory = None,
    push_to: options.PushTo = None,
    remote_code: Annotated[
        bool, typer.Option("--remote-code", help="Add a file that imports qtipcli where trust_remote_code=True is given.")
    ] = False,
    revision: options.Revision = None,
    trust_remote_code: options.Trust = False,
    force: options.Force = False,
    dry_run: options.DryRun = False,
    as_json: options.Json = False,
) -> None:
    """Pack a finished quantize job: shards, config, tokenizer, card and checksums, the index last."""
    if dry_run:
        dry_runs.pack(model, revision, trust_remote_code, as_json, job, max_shard_size)
        return
    pushing.check(push_to)
    from qtipcli.model.source import ModelSource
    from qtipcli.stages import pack

    source = ModelSource.open(model, revision, trust_remote_code)
    limits.pack(max_memory, source, job, max_shard_size)
    with Display() as display:
        pack.run(source, job, out, force, max_shard_size, display, with_code=remote_code)
    _summarize(out, as_json, push_to)


app.command("finetune")(finetune)
app.command("eval")(evaluate)
app.command("generate")(generate)
app.command("chat")(chat)
app.command("serve", context_settings=PASS_ON)(serve)


@app.command()
def inspect(
    directory: Annotated[Path, typer.Argument(help="A packed directory.", show_default=False)],
    as_json: options.Json = False,
) -> None:
    """Check a packed directory (every shape, dtype and checksum) and show what is in it, layer by layer."""
    from qtipcli.stages import inspect

    _report(inspect.run(directory), as_json)


app.command("push")(pushing.push)


@app.command()
def doctor(as_json: options.Json = False) -> None:
    """Say what this machine can run, with versions."""
    from qtipcli.stages import doctor

    report = doctor.run()
    if as_json:
        print_json(report)
        return
    print_table("", report["rows"])


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where everything goes; given again, it goes on.")] = Path("demo-run"),
    state_bits: Annotated[int, typer.Option(help="L of the trellis; 12 is quick and worse.")] = 16,
    as_json: options.Json = False,
) -> None:
    """Take the embedded model through it all, offline: calibrate, quantize to 2, 3 and 4 bits, evaluate, generate."""
    from qtipcli.stages import demo

    with Display() as display:
        report = demo.run(out, state_bits, display)
    if as_json:
        print_json(report)
        return
    for sample in report["samples"]:
        print(f"--- {sample['model']} continues {report['prompt']!r}\n{sample['text'].rstrip()}\n")
    print_table("What was gained and lost", report["rows"])


app.add_typer(bench_app, name="bench")


def _summarize(directory: Path, as_json: bool, push_to: str | None) -> None:
    from qtipcli.stages import inspect

    report = inspect.run(directory)
    report |= pushing.after(directory, push_to, report)
    if as_json:
        print_json(report)
        return
    print(f"{directory}: {report['bits_per_weight']:.3f} bits per weight as stored, {report['bytes'] / 1e6:.2f} MB in all")
    if "pushed" in report:
        print(report["pushed"])


def _report(report: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(report)
        return
    print_table("", report["rows"])
    for name, why in report["not_converted"].items():
        print(one_line(f"not converted: {name} ({why})"))
    parameters = "an unknown number of" if report["parameters"] is None else f"{report['parameters']:,}"
    print(
        f"{report['directory']}: {report['bits_per_weight']:.3f} bits per weight as stored, {report['bytes'] / 1e6:.2f} MB, "
        f"{parameters} parameters, {report['checksums']} checksums right"
    )

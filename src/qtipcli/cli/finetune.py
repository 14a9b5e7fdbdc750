"""Owns `qtip finetune`: its options, and how they become settings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from qtipcli.cli import dry_run as dry_runs
from qtipcli.cli import options
from qtipcli.cli.display import Display, print_json
from qtipcli.config import FinetuneSettings, Preset, settings_from
from qtipcli.job import launcher


def finetune(
    directory: Annotated[Path, typer.Argument(help="A packed directory, or the job OUT.job it came from.", show_default=False)],
    blocks: Annotated[bool, typer.Option("--blocks", help="Teach each block the original block's output.")] = False,
    end_to_end: Annotated[bool, typer.Option("--end-to-end", help="Teach the model the original's predictions.")] = False,
    out: Annotated[Path | None, typer.Option(help="Where the tuned model goes \\[DIRECTORY-tuned].")] = None,
    base: Annotated[str | None, typer.Option(help="The original model \\[the one that DIRECTORY names].")] = None,
    preset: options.PresetName = None,
    data: options.Data = None,
    samples: Annotated[int | None, typer.Option(help="Training windows [1536].", min=1)] = None,
    heldout: Annotated[int | None, typer.Option(help="Windows that decide which state is kept [64].", min=1)] = None,
    context: options.Context = None,
    seed: Annotated[int | None, typer.Option(help="Of the windows chosen and of their order [0].", min=0)] = None,
    batch: Annotated[int | None, typer.Option(help="Windows in a step [4].", min=1)] = None,
    block_rate: Annotated[
        float | None, typer.Option(help="Learning rate of scales by block, a share of their size [0.02].")
    ] = None,
    block_epochs: Annotated[int | None, typer.Option(help="Passes over the text for each block [2].", min=1)] = None,
    end_rate: Annotated[
        float | None, typer.Option(help="Learning rate of scales end to end, a share of their size [0.01].")
    ] = None,
    end_epochs: Annotated[int | None, typer.Option(help="Passes over the text end to end [1].", min=1)] = None,
    norm_rate: Annotated[float | None, typer.Option(help="The same of norms and biases; 0 leaves them [0.002].")] = None,
    lut_rate: Annotated[float | None, typer.Option(help="The same of HYB's table; 0 leaves it [0.002].")] = None,
    head_rate: Annotated[
        float | None, typer.Option(help="The same of the head (and a tied embedding), end to end [0].")
    ] = None,
    autocast: Annotated[bool, typer.Option("--autocast", help="bfloat16 products, end to end.")] = False,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="End to end: less memory, a third more time.")
    ] = False,
    checkpoint_every: Annotated[int | None, typer.Option(help="Steps between saved states, end to end [50].", min=1)] = None,
    memory: Annotated[float, typer.Option(help="GiB of activations and decoded weights held in memory.", min=0)] = 4.0,
    revision: options.Revision = None,
    trust_remote_code: options.Trust = False,
    force: options.Force = False,
    dry_run: options.DryRun = False,
    as_json: options.Json = False,
) -> None:
    """Tune a packed model's scales against its original: by block, end to end, or both. Never writes a worse model."""
    shared = options.given(batch=batch, norm_rate=norm_rate, lut_rate=lut_rate, seed=seed)
    block_wise = shared | options.given(learning_rate=block_rate, epochs=block_epochs)
    whole = shared | options.given(
        learning_rate=end_rate, epochs=end_epochs, head_rate=head_rate, checkpoint_every=checkpoint_every
    )
    whole |= {"autocast": autocast, "gradient_checkpointing": gradient_checkpointing}
    text = options.given(data=data, samples=samples, heldout=heldout, context=context, seed=seed)
    settings = _settings(options.preset_of(preset), text, block_wise if blocks else None, whole if end_to_end else None)
    launcher.refuse_lone()
    if dry_run:
        dry_runs.finetune(directory, base, revision, trust_remote_code, as_json, settings, out, memory)
        return

    from qtipcli.job.processes import together
    from qtipcli.model.source import ModelSource
    from qtipcli.stages import finetune

    with together() as processes, Display(quiet=not processes.is_main) as display:
        packed = finetune.packed_directory(directory)
        with processes.main_first():
            source = ModelSource.open(base or finetune.original_of(packed), revision, trust_remote_code)
        target = out or packed.with_name(f"{packed.name}-tuned")
        report = finetune.run(source, packed, settings, target, force, display, memory, processes)
    if not processes.is_main:
        return
    if as_json:
        print_json(report)
        return
    print(f"{report['directory']}: held-out KL {report['heldout_before']:.5g} -> {report['heldout_after']:.5g} nats")


def _settings(
    preset: Preset, text: dict[str, Any], block_wise: dict[str, Any] | None, whole: dict[str, Any] | None
) -> FinetuneSettings:
    """The preset's settings with what was typed in their place; a kind that was not asked for is left out."""
    values = preset.finetune.model_dump() | text
    for kind, asked in (("blocks", block_wise), ("end_to_end", whole)):
        values[kind] = None if asked is None else {**(values[kind] or {}), **asked}
    return settings_from(FinetuneSettings, values)

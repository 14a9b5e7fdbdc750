"""Owns the valid directories that are broken: a source model, a job, what it packs, and an adapter on that."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from stages.tiny import FAST_OPTIONS, save_model, save_text

KINDS = ("packed", "source", "job", "adapter")
TUNED = ["q_proj", "down_proj"]


def make(folder: Path) -> None:
    """Make one directory of each kind below `folder`, and a text. Half a minute where nothing is compiled yet."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from qtipcli.cli.main import _run
    from qtipcli.hub.lora import packed_lora

    folder.mkdir(parents=True)
    source = save_model("llama", folder / "source", max_shard_size="200KB")
    text = save_text(folder / "text.txt")
    job, packed = folder / "packed.job", folder / "packed"
    # A code with a table, a packed embedding with a tied head, and rates that differ.
    settings = ["--code", "hyb", "--layer", "*.v_proj=4", "--embedding-bits", "4", "--one-sided"]
    _ran(
        _run, ["quantize", source, *FAST_OPTIONS, *settings, "--data", text, "--out", packed, "--hessians", folder / "hessians"]
    )
    _ran(_run, ["pack", source, job, "--out", packed, "--max-shard-size", "40KB", "--force"])
    job.rename(folder / "job")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(packed)
    adapted = get_peft_model(model, packed_lora(LoraConfig(r=4, target_modules=TUNED, task_type="CAUSAL_LM")))
    adapted.save_pretrained(folder / "adapter")


def _ran(run: object, command: list[object]) -> None:
    status = run([str(part) for part in command])  # type: ignore[operator]
    if status:
        raise RuntimeError(f"qtip {command[0]} ended with {status}")


def content(directory: Path) -> Mapping[str, bytes]:
    """Name -> bytes of every file of a valid directory."""
    return {
        file.relative_to(directory).as_posix(): file.read_bytes() for file in sorted(directory.rglob("*")) if file.is_file()
    }

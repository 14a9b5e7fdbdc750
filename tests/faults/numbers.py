"""Owns the faults that numbers make: weights and activations that are not finite, Hessians of every bad kind, an idle expert.

Where the model itself is damaged a refusal is right, and its remedy a sound model. Where numbers are only odd the job may be
done; then a second one, killed on its way, must end in the same bytes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from stages.tiny import SETTINGS
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from faults.judge import FAILED, REFUSED, SAME, Fault, Verdict, judged, told
from faults.runs import start
from faults.subjects import PACKED, different, snapshot
from qtipcli.job.directory import RunDirectory

HUGE = 3e38
"""Of float32's 3.4e38: any sum of two overflows."""


def bad_weights(fault: Fault) -> Verdict:
    """NaN or an infinity in some weight, or in several of one tensor."""

    def damage(values: Tensor) -> None:
        for _ in range(fault.dice.choice((1, 1, 10))):
            values[fault.dice.randrange(len(values))] = fault.dice.choice((math.nan, math.inf, -math.inf))

    return _with_damaged_model(fault, damage, may_be_done=False)


def bad_activations(fault: Fault) -> Verdict:
    """Weights that are finite, and too large for what is computed with them to be; a norm can hide that."""

    def damage(values: Tensor) -> None:
        values.sign_().mul_(HUGE)

    return _with_damaged_model(fault, damage, may_be_done=True)


def bad_hessians(fault: Fault) -> Verdict:
    """Singular, tiny, of a huge range, or zero: as stored, or because of what the norms let through."""
    if fault.subject.name == "quantize":
        return _with_stored_hessians(fault)
    return _repeatable(fault, _odd_model(fault, _odd_norms))


def idle_expert(fault: Fault) -> Verdict:
    """A mixture of experts that never asks one of them."""
    return _repeatable(fault, _odd_model(fault, None))


# ---- a model that is damaged -----------------------------------------------------------------------------------------------


def _with_damaged_model(fault: Fault, damage: Callable[[Tensor], None], may_be_done: bool) -> Verdict:
    """The command with it must be refused, and with a sound model end in the same bytes.

    may_be_done: where all that is stored is finite, the job counts as an odd one.
    """
    sound, model = _model_of(fault), fault.folder / "model"
    shutil.copytree(sound, model)
    file = fault.dice.choice(sorted(model.glob("*.safetensors")))
    tensors = load_file(file)
    name = fault.dice.choice(sorted(name for name, tensor in tensors.items() if tensor.is_floating_point() and tensor.numel()))
    damage(tensors[name].view(-1))
    save_file(tensors, file, {"format": "pt"})
    moved = _with_model(fault, model)
    moved.subject.prepare(moved.where)
    ended = moved.run()
    if ended.status == 0 and may_be_done:
        shutil.rmtree(moved.where)
        return _repeatable(fault, moved)
    if ended.status == 0:
        return Verdict(FAILED, f"done, with {name} damaged: {told(ended)}")
    if not ended.is_clear_refusal:
        return Verdict(FAILED, f"{name} damaged: {told(ended)}")
    shutil.rmtree(model)
    shutil.copytree(sound, model)
    for arguments in moved.subject.repair:
        again = start(arguments, moved.where, fault.folder / "log").wait()
        if again.status:
            return Verdict(FAILED, f"with a sound model after {ended.message!r}: {told(again)}")
    verdict = judged(moved)
    return (
        Verdict(REFUSED, ended.message)
        if verdict.outcome == SAME
        else Verdict(FAILED, f"{verdict.said} after {ended.message!r}")
    )


def _model_of(fault: Fault) -> Path:
    return Path(next(part for part in fault.subject.arguments if part.endswith(("/model", "/pack-0/out"))))


# ---- a model that is odd ---------------------------------------------------------------------------------------------------


def _repeatable(fault: Fault, odd: Fault) -> Verdict:
    """An undisturbed run of an odd job, and one that is killed on its way and given again, must end alike."""
    first = dataclasses.replace(odd, folder=fault.folder / "first")
    first.folder.mkdir()
    odd.subject.prepare(first.where)
    undisturbed = first.run()
    if undisturbed.status and not undisturbed.is_clear_refusal:
        return Verdict(FAILED, told(undisturbed))
    odd.subject.prepare(odd.where)
    running = odd.start()
    time.sleep(odd.moment())
    running.signal(signal.SIGKILL)
    running.wait()
    ended = odd.run()
    if undisturbed.status:
        is_same = ended.message == undisturbed.message
        return Verdict(REFUSED, ended.message) if is_same else Verdict(FAILED, f"{undisturbed.message}, then {told(ended)}")
    if ended.status:
        return Verdict(FAILED, f"done, and after a kill {told(ended)}")
    if words := different(snapshot(odd.where), snapshot(first.where)) or _not_finite(odd.where):
        return Verdict(FAILED, words)
    return Verdict(SAME)


def _not_finite(where: Path) -> str:
    for path in sorted(where.rglob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118, no mapping
                tensor = file.get_tensor(name)
                if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                    return f"{name} in {path.name} is not finite"
    return ""


def _odd_model(fault: Fault, change: Callable[[Fault, torch.nn.Module], None] | None) -> Fault:
    """The fault's command on a model of its own: a Llama made odd by `change`, or without it a Mixtral with an idle expert."""
    model = fault.folder / "model"
    torch.manual_seed(fault.dice.randrange(1 << 30))
    experts = {"num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size": 64} if change is None else {}
    config = AutoConfig.for_model("mixtral" if experts else "llama", **SETTINGS | {"tie_word_embeddings": True} | experts)
    made = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(0.0, 0.1) if parameter.ndim > 1 else parameter.uniform_(0.5, 1.5)
        if change is not None:
            change(fault, made)
        else:
            for name, parameter in made.named_parameters():
                if name.endswith("gate.weight"):  # no mean of two is above both: the last expert is nobody's first choice
                    parameter[-1] = (parameter[0] + parameter[1]) / 2
    made.save_pretrained(model)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(_model_of(fault) / name, model / name)
    return _with_model(fault, model)


def _odd_norms(fault: Fault, model: torch.nn.Module) -> None:
    norms = [parameter for name, parameter in model.named_parameters() if parameter.ndim == 1 and "layers" in name]
    norm = fault.dice.choice(norms)
    way = fault.dice.choice(("zero", "one", "half", "tiny", "range"))
    if way == "zero":
        norm.zero_()
    elif way == "one":
        norm[1:] = 0
    elif way == "half":
        norm[::2] = 0
    elif way == "tiny":
        norm.mul_(10.0 ** fault.dice.uniform(-25, -10))
    else:
        norm.mul_(torch.tensor([10.0 ** fault.dice.uniform(-20, 15) for _ in norm]))


def _with_model(fault: Fault, model: Path) -> Fault:
    """The same fault of another model; what is expected says where that lies."""
    old = str(_model_of(fault))

    def with_it(arguments: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(str(model) if part == old else part for part in arguments)

    local = hashlib.sha256((json.dumps({"base_model": str(model)}) + "\n").encode()).hexdigest()
    expected = dict(fault.subject.expected)
    if f"{PACKED}/.qtip-local.json" in expected and fault.subject.name != "finetune":  # that one keeps what the packed one says
        expected[f"{PACKED}/.qtip-local.json"] = local
    subject = dataclasses.replace(
        fault.subject,
        arguments=with_it(fault.subject.arguments),
        repair=tuple(map(with_it, fault.subject.repair)),
        expected=expected,
    )
    return dataclasses.replace(fault, subject=subject)


# ---- Hessians as stored ----------------------------------------------------------------------------------------------------


def _with_stored_hessians(fault: Fault) -> Verdict:
    """One of them is replaced before quantize reads it; the job is committed as the product does it."""
    given = fault.folder / "given"
    shutil.copytree(fault.subject.given, given)
    found = RunDirectory.load(given / "hessians")
    with RunDirectory.open(found.path, found.stage, found.settings, found.fingerprint) as job:
        key = fault.dice.choice([key for key in job.keys() if key.startswith("block")])  # noqa: SIM118, no mapping
        tensors, report = job.read(key), job.report(key)
        name = fault.dice.choice(sorted(tensors))
        tensors[name] = _odd_hessian(fault, tensors[name])
        job.forget(key)
        job.commit(key, tensors, report)
    arguments = (*fault.subject.arguments, "--original-prefix", "--one-sided")
    subject = dataclasses.replace(fault.subject, given=given, arguments=arguments)
    return _repeatable(fault, dataclasses.replace(fault, subject=subject))


def _odd_hessian(fault: Fault, hessian_II: Tensor) -> Tensor:
    way = fault.dice.choice(("zero", "rank one", "tiny", "denormal", "huge", "range"))
    size = len(hessian_II)
    if way == "zero":
        return torch.zeros_like(hessian_II)
    if way == "rank one":
        return torch.outer(hessian_II[0], hessian_II[0])
    if way == "range":
        root_I = torch.tensor([10.0 ** fault.dice.uniform(-19, 17) for _ in range(size)])
        return root_I[:, None] * hessian_II * root_I[None, :]
    return hessian_II * {"tiny": 1e-30, "denormal": 1e-42, "huge": 1e34}[way]

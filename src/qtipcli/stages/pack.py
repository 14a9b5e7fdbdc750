"""Owns the pack stage: from a finished quantize job to a directory that transformers loads.

The directory is written beside its final place and renamed when it is whole, the index last; so it is complete or absent.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from huggingface_hub import StateDictSplit, split_torch_state_dict_into_shards

from qtipcli.errors import CorruptError, QtipError, SettingsError
from qtipcli.hub import remote_code
from qtipcli.hub.config import QtipConfig
from qtipcli.hub.published import model_name, published
from qtipcli.job.directory import RunDirectory
from qtipcli.job.files import sha256_file, write_text_atomic
from qtipcli.job.fingerprint import fingerprint_model
from qtipcli.job.interrupt import checkpoint
from qtipcli.job.shards import write_shard
from qtipcli.model.linears import left_exact
from qtipcli.model.skeleton import Skeleton
from qtipcli.model.source import ModelSource
from qtipcli.stages import card, outer, quantize
from qtipcli.stages.calibrate import block_key
from qtipcli.stages.progress import Silent, Watcher
from qtipcli.stages.stored_layers import layout_of
from qtipcli.stages.whole import (
    INDEX_FILE,
    RECORD_FILE,
    REMEDY,
    check_complete,
    index_found,
    only_writer,
    record_text,
    refuse_occupied,
    written_whole,
)
from qtipcli.untrusted import led_out, read_table

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".h5", ".msgpack")

LOCAL_FILE = ".qtip-local.json"
"""What only this machine needs to know, and what is never published: where the original lies."""

NOT_COPIED = ("config.json", RECORD_FILE, *card.CHANGING)

OTHER_COPIES = ("onnx", "openvino", "original", "coreml", "__pycache__")
"""Folders of a repository that hold the model for another program, or nothing of it."""


EMPTY_WEIGHT_DTYPE = torch.bfloat16

_OF_MODEL = ("weight", "bias")
"""Parts of a packed layer that are no part of a job's shard."""

_RECORD_TABLES = {"sha256": str, "layers": dict, "job": dict, "quantize": dict, "calibration": object}
"""Parts of qtip.json that stages read -> what the values in them are."""


def run(
    source: ModelSource,
    job_directory: Path,
    out: Path,
    force: bool = False,
    max_shard_size: str = "5GB",
    watcher: Watcher | None = None,
    provenance: Mapping[str, Any] | None = None,
    with_code: bool = False,
) -> Path:
    """Write `out` from the finished job in `job_directory`; returns it.

    provenance: what config.json and qtip.json are to say besides about how the model was made, in JSON types.
    with_code: add the file that imports qtipcli for who loads with trust_remote_code=True (hub.remote_code).
    Where `out` was already packed from this very job it is only checked, unless `force` is given. Raises SettingsError where it
    holds something else and `force` is not given, CorruptError where it or a shard of the job is damaged, QtipError where the
    job is unfinished or of another model, BusyError where another process packs to `out`.
    """
    watcher = watcher or Silent()
    refuse_surroundings(out)
    refuse_links(other_files(source.directory), source.directory)
    job = RunDirectory.load(job_directory, quantize.STAGE)
    if job.fingerprint.get("model") != fingerprint_model(source.directory):
        raise QtipError(f"{job_directory} is a job of another model than {source.name}", "give the model it was started with")
    with only_writer(out):
        if not force and packed_from(out, job):
            _Packer(source, job, out, watcher, _own_provenance(out), with_code).check()
            if remote_code.is_in(out) or not with_code:
                watcher.note(f"{out} is complete already: nothing was done")
                return out
        refuse_occupied(out, force)
        with written_whole(out) as partial:
            _Packer(source, job, partial, watcher, provenance or {}, with_code).run(max_shard_size)
    return out


def refuse_surroundings(out: Path) -> None:
    """Raise SettingsError where `out` is a directory that cannot be replaced: this one, one around it, or a home."""
    here = Path.cwd()
    if out.resolve() in (here, *here.parents, Path.home()):
        raise SettingsError(f"{out} cannot be replaced as a whole", "choose a new directory, such as --out my-model-2bit")


def read_record(directory: Path) -> dict[str, Any] | None:
    """What qtip.json of a packed directory says; None where there is none. Raises CorruptError where it is damaged."""
    file = directory / RECORD_FILE
    if not file.exists():
        return None
    record = read_table(file, REMEDY)
    for part, of in _RECORD_TABLES.items():
        table = record.get(part, {})
        if not isinstance(table, dict) or not all(isinstance(value, of) for value in table.values()):
            raise CorruptError(f"{file} is damaged: {part} is not the table that qtip writes", REMEDY)
    if not _has_losses(record.get("layers", {})):
        raise CorruptError(f"{file} is damaged: a loss is no number", REMEDY)
    return record


def _has_losses(layers: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether every layer's loss is a number, or not known."""
    return all(type(layer.get("relative_proxy_loss")) in (int, float, NoneType) for layer in layers.values())


def local_original(directory: Path) -> str | None:
    """Where on this machine the original of a packed directory was, if it is still there."""
    try:
        where = read_table(directory / LOCAL_FILE, "")["base_model"]
    except (QtipError, KeyError):
        return None
    return where if isinstance(where, str) and Path(where).is_dir() else None


def packed_from(out: Path, job: RunDirectory) -> bool:
    """Whether `out` is whole and was made by this job, as it is now."""
    if not (out / INDEX_FILE).is_file():
        return False
    record = read_record(out)
    return record is not None and record.get("job") == _job_record(job)


def _own_provenance(out: Path) -> dict[str, Any]:
    """What a packed directory says besides about how it was made. Raises CorruptError where its config does not say it."""
    try:
        config = json.loads((out / "config.json").read_text(encoding="utf-8"))
        said = dict(config["quantization_config"]["provenance"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise CorruptError(f"{out / 'config.json'} is damaged, or was changed", REMEDY) from error
    return {name: value for name, value in said.items() if name not in ("base_model", "settings")}


def _job_record(job: RunDirectory) -> dict[str, Any]:
    return {"settings": published(job.settings), "fingerprint": job.fingerprint}


class _Packer:
    """One run of the stage, into an empty directory; or the check of one that is written."""

    def __init__(
        self,
        source: ModelSource,
        job: RunDirectory,
        directory: Path,
        watcher: Watcher,
        provenance: Mapping[str, Any],
        with_code: bool,
    ) -> None:
        self.source, self.job, self.directory, self.watcher = source, job, directory, watcher
        self.provenance: dict[str, Any] = published(dict(provenance))
        if job.done(quantize.CALIBRATION):
            self.provenance["calibration"] = published(job.report(quantize.CALIBRATION))
        self.with_code = with_code
        self.skeleton = Skeleton(source)
        self.layers: dict[str, dict[str, Any]] = {}
        self.left: dict[str, str] = {}
        self.shard_of: dict[str, str] = {}
        self.tuned: dict[str, str] = {}
        shards = {block_key(index): f"block {prefix}" for index, (prefix, _) in enumerate(self.skeleton.blocks)}
        for key, what in (shards | {key: f"the {key}" for key in outer.shard_keys(job.settings)}).items():
            if not job.done(key):
                raise QtipError(f"{job.path} is not finished: {what} is missing", "give the quantize command again")
            report = _checked_report(job, key)
            self.layers |= report["layers"]
            self.left |= report["left"]
            self.shard_of |= dict.fromkeys(report["layers"], key)
            self.tuned |= dict.fromkeys(report.get("tuned", ()), key)
        self.layouts = {name: layout_of(report) for name, report in self.layers.items()}

    def run(self, max_shard_size: str) -> None:
        for key in {*self.shard_of.values(), *self.tuned.values()}:
            self._verify(key)
        plan = self._plan()
        split = split_torch_state_dict_into_shards(plan, max_shard_size=max_shard_size)
        self.watcher.begin("pack", len(split.filename_to_tensors))
        for file, names in split.filename_to_tensors.items():
            checkpoint()
            write_shard(self.directory / file, {name: self._tensor(name) for name in names})
            self.watcher.advance(file)
        copy_other_files(self.source.directory, self.directory, NOT_COPIED)
        config = self._write_config()
        record = self._record()
        write_record(self.directory, record)
        index = index_of(split, parameter_count(self.skeleton))
        card.write(self.directory, config, record, index, card.inherited_from(self.source.directory, self.watcher))
        self._write_local()
        write_text_atomic(self.directory / INDEX_FILE, index_text(index))

    def check(self) -> None:
        """Raise CorruptError unless the directory is what this job writes; say anew where the original lies if that changed."""
        check_complete(self.directory, self._record(), self._index_found)
        self._write_local()

    def _index_found(self) -> str:
        return index_text(index_found(self.directory, parameter_count(self.skeleton)))

    def _record(self) -> dict[str, Any]:
        return {"format": "qtip", "job": _job_record(self.job), **self.provenance, "layers": self.layers}

    def _verify(self, key: str) -> None:
        try:
            self.job.verify(key)
        except CorruptError as error:
            raise CorruptError(error.message, "give the quantize command again with --force, then pack") from error

    def _write_local(self) -> None:
        file = self.directory / LOCAL_FILE
        text = json.dumps({"base_model": str(self.source.directory.absolute())}) + "\n"
        if self._is_local() and not (file.is_file() and file.read_bytes() == text.encode()):
            write_text_atomic(file, text)

    def _is_local(self) -> bool:
        return Path(self.source.name).expanduser().is_dir()

    def _plan(self) -> dict[str, torch.Tensor]:
        """Every tensor to be stored, on meta."""
        return stored_tensors(self.skeleton, self.layers, self._packed)

    def _packed(self, layer: str) -> dict[str, torch.Tensor]:
        with self.job.open_shard(self.shard_of[layer]) as shard:
            names = [name for name in shard.keys() if name.rpartition(".")[0] == layer]  # noqa: SIM118, no mapping
            parts = {name.rpartition(".")[2]: shard.get_tensor(name) for name in names}
            found = {name.rpartition(".")[2]: shard.get_slice(name) for name in names}
            # Beside them lie the vectors that block tuning trained, under the model's own names.
            kinds = {
                part: ((each.get_dtype(),), tuple(each.get_shape())) for part, each in found.items() if part not in _OF_MODEL
            }
        stated = self.layouts[layer].tensors()
        if kinds != {part: (each.dtypes, each.shape) for part, each in stated.items() if part not in _OF_MODEL}:
            raise CorruptError(
                f"the shard of {layer} in {self.job.path} does not hold the tensors that its ledger says it does",
                "give the quantize command again with --force",
            )
        return parts | {"weight": torch.empty(0, dtype=EMPTY_WEIGHT_DTYPE)}

    def _tensor(self, name: str) -> torch.Tensor:
        layer, _, leaf = name.rpartition(".")
        if name in self.tuned:
            with self.job.open_shard(self.tuned[name]) as shard:
                return shard.get_tensor(name)
        if layer in self.layers and leaf != "bias":
            return self._packed(layer)[leaf]
        return self.skeleton.read(name)

    def _write_config(self) -> QtipConfig:
        linears = [name for name, module in self.skeleton.model.named_modules() if type(module) is torch.nn.Linear]
        exact = {f"{prefix}.{name}": why for prefix, block in self.skeleton.blocks for name, why in left_exact(block).items()}
        left = exact | self.left
        not_converted = {name: left.get(name, "outside the decoder blocks") for name in linears if name not in self.layers}
        base = model_name(self.source.directory) if self._is_local() else self.source.name
        provenance = {"base_model": base, "settings": published(self.job.settings), **self.provenance}
        config = read_table(self.source.directory / "config.json", "download or export the model again")
        if any(f"{name}.weight" in self.skeleton.untied for name in self.layers):
            _untie(config)
        if "_name_or_path" in config:
            config["_name_or_path"] = published(config["_name_or_path"])
        own = QtipConfig.from_layouts(self.layouts, not_converted, provenance)
        config["quantization_config"] = own.to_dict()
        if self.with_code:
            config = remote_code.add(self.directory, config)
        write_text_atomic(self.directory / "config.json", json.dumps(config, indent=2) + "\n")
        return own


def _checked_report(job: RunDirectory, key: str) -> dict[str, Any]:
    """What a finished quantize job says of a shard. Raises CorruptError where it is not what the stage writes."""
    report = job.report(key)
    layers, left, tuned = (report.get(part, {}) for part in ("layers", "left", "tuned"))
    is_written_so = isinstance(layers, dict) and all(isinstance(layer, dict) for layer in layers.values())
    is_written_so = is_written_so and _has_losses(layers)
    is_written_so &= isinstance(left, dict) and all(isinstance(why, str) for why in left.values())
    is_written_so &= isinstance(tuned, list | dict) and all(isinstance(name, str) for name in tuned)
    if not (is_written_so and {"layers", "left"} <= report.keys()):
        raise CorruptError(f"the ledger of {job.path} is damaged: {key} has no table of layers", "quantize again with --force")
    return report


def stored_tensors(
    skeleton: Skeleton, layers: Collection[str], parts: Callable[[str], Mapping[str, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """Every tensor of a packed directory, on meta: the model's own, and for each packed layer its parts in the weight's place.

    layers: names of those that are packed. parts: such a name -> the tensors stored for it, the empty weight among them.
    """
    plan: dict[str, torch.Tensor] = {}
    kept = {name: tensor for name, tensor in skeleton.model.state_dict().items() if name not in skeleton.tied}
    for name in kept:
        layer, _, leaf = name.rpartition(".")
        if leaf == "weight" and layer in layers:
            plan |= {f"{layer}.{part}": tensor.to("meta") for part, tensor in parts(layer).items()}
        elif skeleton.holds(name):
            plan[name] = skeleton.read(name).to("meta")
    return plan


def index_of(split: StateDictSplit, parameters: int) -> dict[str, Any]:
    """The index of a directory's shards. parameters: of the model."""
    return {
        "metadata": {"total_size": split.metadata["total_size"], "total_parameters": parameters},
        "weight_map": split.tensor_to_filename,
    }


def index_text(index: Mapping[str, Any]) -> str:
    """As it is written."""
    return json.dumps(index, indent=2, sort_keys=True) + "\n"


def parameter_count(skeleton: Skeleton) -> int:
    """Parameters of the model as it is without packing, tied ones once."""
    return sum(parameter.numel() for parameter in skeleton.model.parameters())


def other_files(model: Path, without: tuple[str, ...] = NOT_COPIED) -> list[Path]:
    """The files that `copy_other_files` copies.

    All but weights, indexes and hidden files, and at the top the names in `without`. A folder with weights or a config of its
    own is another model, or this one for another program, and stays behind.
    """
    found: list[Path] = []
    for file in sorted(model.iterdir()):
        if file.name.startswith(".") or is_weight(file):
            continue
        if file.is_dir():
            found += other_files(file, ()) if _belongs(file) else []
        elif file.name not in without:
            found.append(file)
    return found


def refuse_links(files: Iterable[Path], directory: Path) -> None:
    """Raise QtipError where one of a model's files is a link out of its directory.

    What is packed is meant to be published: a file of the user's own must not come along because a model's author put a link
    to it beside the weights. Weights are read through links: nothing but tensors comes of them.
    """
    for file in files:
        if (real := led_out(file, directory)) is not None:
            raise QtipError(
                f"{file} is a link out of the model's directory, to {real}",
                "put a copy of the file in its place if it belongs to the model, or delete the link",
            )


def copy_other_files(model: Path, out: Path, without: tuple[str, ...]) -> None:
    """Copy what belongs to a model besides its weights: tokenizer, chat templates, processor, generation config, licence."""
    files = other_files(model, without)
    refuse_links(files, model)
    for file in files:
        target = out / file.relative_to(model)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)


def is_weight(file: Path) -> bool:
    """Whether a file holds weights, or says where they are."""
    return file.suffix in WEIGHT_SUFFIXES or file.name.endswith(".index.json")


def _belongs(folder: Path) -> bool:
    if folder.name in OTHER_COPIES:
        return False
    return not any(is_weight(file) or file.name == "config.json" for file in folder.rglob("*"))


def published_files(directory: Path) -> dict[str, Path]:
    """Path within a packed directory -> file, of all that belongs to the model: hidden files are this machine's own."""
    files = {file.relative_to(directory): file for file in sorted(directory.rglob("*")) if file.is_file()}
    own = {path.as_posix(): file for path, file in files.items() if not any(part.startswith(".") for part in path.parts)}
    refuse_links(own.values(), directory)
    return own


def write_record(directory: Path, record: Mapping[str, Any]) -> None:
    """Write qtip.json with the checksums of all that is there, but for what may change later. Raises StorageError."""
    files = {name: file for name, file in published_files(directory).items() if name not in (RECORD_FILE, *card.CHANGING)}
    checksums = {name: sha256_file(file) for name, file in files.items()}
    write_text_atomic(directory / RECORD_FILE, record_text(record, checksums))


def _untie(config: dict[str, Any]) -> None:
    """The config of a model whose head and embedding the config calls tied, but the checkpoint does not: they stay two."""
    config["tie_word_embeddings"] = False
    for part in config.values():
        if isinstance(part, dict) and "tie_word_embeddings" in part:
            part["tie_word_embeddings"] = False

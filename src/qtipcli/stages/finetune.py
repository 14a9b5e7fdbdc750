"""Owns `qtip finetune`: tuning of blocks, tuning end to end, and the gate that writes a result only if held-out text says so.

Each kind has a run directory beside the result, OUT.blocks.job and OUT.end.job, and goes on where it stopped.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from qtipcli.config import BlockTuning, CalibrationSettings, EndTuning, FinetuneSettings
from qtipcli.data.text import CALIBRATION_DATA
from qtipcli.data.windows import Windows
from qtipcli.errors import QtipError, SettingsError
from qtipcli.hub.published import published
from qtipcli.job.directory import RunDirectory
from qtipcli.job.fingerprint import fingerprint_model, fingerprint_text, fingerprint_versions
from qtipcli.job.interrupt import interruptible
from qtipcli.job.processes import ALONE, Processes
from qtipcli.job.record import normalized
from qtipcli.job.shared import SharedDirectory
from qtipcli.model.skeleton import Skeleton
from qtipcli.model.source import ModelSource
from qtipcli.stages import calibrate, distill, pack, quantize, whole
from qtipcli.stages.calibrate import block_key
from qtipcli.stages.load import default_device
from qtipcli.stages.packed import PackedDirectory
from qtipcli.stages.progress import Silent, Watcher
from qtipcli.stages.streams import DEFAULT_MEMORY_GIB
from qtipcli.stages.teacher import Teacher
from qtipcli.stages.tune_blocks import BlockTuner
from qtipcli.tune.share import Share, share_of

BLOCKS_STAGE, END_STAGE = "finetune-blocks", "finetune-end"
VERDICT = "verdict"
"""The shard that says what the tuned blocks are worth on held-out text."""


def run(
    source: ModelSource,
    packed: Path,
    settings: FinetuneSettings,
    out: Path,
    force: bool = False,
    watcher: Watcher | None = None,
    memory_gib: float = DEFAULT_MEMORY_GIB,
    processes: Processes = ALONE,
) -> dict[str, Any]:
    """Tune the packed directory `packed`, whose original is `source`, and write the result to `out`.

    memory_gib: activations, and decoded weights in end-to-end tuning, are held in memory up to this, by each process.
    processes: those that share each step's windows and the held-out ones. They change no more than the order of sums.
    Returns {"directory": `out`, or `packed` where tuning made it no better and nothing was written, "written",
    "heldout_before", "heldout_after": KL to the original in nats, "blocks", "end_to_end": what each kind reports}.
    Raises SettingsError where there is nothing to do or `out` is taken, QtipError where `packed` is of another model.
    """
    watcher = watcher or Silent()
    refuse(settings, packed, out)
    run_ = _Run(source, packed, settings, out, force, watcher, memory_gib, processes)
    if force or not run_.is_written():
        whole.refuse_occupied(out, force)
        pack.refuse_links(pack.other_files(packed), packed)
    with interruptible(notice=processes.is_main):
        return run_.run()


def refuse(settings: FinetuneSettings, packed: Path, out: Path) -> None:
    """Raise SettingsError where there is nothing to do or `out` cannot be."""
    if settings.blocks is None and settings.end_to_end is None:
        raise SettingsError("neither kind of tuning was asked for", "say --blocks, --end-to-end or both")
    pack.refuse_surroundings(out)
    if out.resolve() == packed.resolve():
        raise SettingsError(f"{out} is what is to be tuned", "choose another --out: the untuned model stays as it is")


class _Run:
    """One run of the stage."""

    def __init__(
        self,
        source: ModelSource,
        packed: Path,
        settings: FinetuneSettings,
        out: Path,
        force: bool,
        watcher: Watcher,
        memory_gib: float,
        processes: Processes,
    ) -> None:
        self.source, self.settings, self.out, self.force, self.watcher = source, settings, out, force, watcher
        self.memory_gib, self.processes = memory_gib, processes
        self.packed = PackedDirectory(packed)
        with processes.main_first():
            self.windows = load_windows(source, settings, watcher)
        self.fingerprint = {
            "model": fingerprint_model(source.directory),
            "packed": fingerprint_model(packed),
            "data": self.windows.content_hash,
            "versions": fingerprint_versions(),
        }
        _refuse_other_model(self.packed, self.fingerprint["model"], source)
        self.frozen = settings.model_dump() | {
            "data": settings.data or CALIBRATION_DATA, "context": self.windows.context, "heldout": self._heldout()
        }  # fmt: skip
        self._refuse_idle()

    def _heldout(self) -> int:
        """Held-out windows: those asked for, or a fifth of a text that is too short."""
        return heldout_of(self.windows.rows, self.settings)

    def _refuse_idle(self) -> None:
        """Raise SettingsError where a process would have nothing to do, and say where one will wait for others."""
        batches = [kind.batch for kind in (self.settings.blocks, self.settings.end_to_end) if kind is not None]
        heldout, count = self._heldout(), self.processes.world
        work = {"windows in a step": min(batches), "held-out windows": heldout, "training windows": self.windows.rows - heldout}
        for what, number in work.items():
            if number < count:
                raise SettingsError(
                    f"{number} {what} leave some of {count} processes idle", f"start at most {number} processes"
                )
        if any(batch % count for batch in batches):
            self.watcher.note(f"a step's {min(batches)} windows do not divide evenly among {count} processes: some will wait")

    def record(self) -> dict[str, Any]:
        return {"finetune": {"settings": published(self.frozen), "fingerprint": self.fingerprint}}

    def is_written(self) -> bool:
        """Whether `out` is the whole result of this very run."""
        found = pack.read_record(self.out) if (self.out / pack.RECORD_FILE).is_file() else None
        return found is not None and found.get("finetune") == normalized(self.record()["finetune"])

    def run(self) -> dict[str, Any]:
        report: dict[str, Any] = {}
        changed: dict[str, Tensor] = {}
        if self.settings.blocks is not None:
            report["blocks"], changed = self._blocks(self.settings.blocks)
        if self.settings.end_to_end is not None:
            report["end_to_end"], ended = self._end(self.settings.end_to_end, changed)
            changed |= ended
        verdict = report.get("blocks", report.get("end_to_end"))
        before = verdict["before"]
        after = report["end_to_end"]["after"] if "end_to_end" in report else min(before, report["blocks"]["after"])
        figures = {"heldout_before": before, "heldout_after": after}
        if after < before:
            if self.processes.is_main:
                with whole.only_writer(self.out):
                    self._write(changed, figures, self.record() | {"finetune_report": report})
            return {"directory": str(self.out), "written": True, **figures, **report}
        self.watcher.note(
            f"nothing was written: on held-out text the tuned model is no better than {self.packed.path} ({before:.5g} nats)"
        )
        return {"directory": str(self.packed.path), "written": False, **figures, **report}

    def _write(self, changed: dict[str, Tensor], figures: dict[str, float], record: dict[str, Any]) -> None:
        """Write the result unless it is there; then it is checked. Raises CorruptError, SettingsError."""
        if not self.force and self.is_written():
            self.packed.check_changed(self.out, record)
            self.watcher.note(f"{self.out} is complete already: nothing was done")
            return
        whole.refuse_occupied(self.out, self.force)  # again: another process may have written meanwhile
        self.packed.write_changed(self.out, changed, {"finetune": self.frozen | figures}, record)

    # ---- block after block -------------------------------------------------------------------------------------------------

    def _blocks(self, settings: BlockTuning) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """(report, stored name -> tensor; nothing where the tuned blocks are no better together than the untuned ones)."""
        frozen = self._frozen("blocks")
        with self._open("blocks", BLOCKS_STAGE, frozen, self.fingerprint) as job:
            skeleton = Skeleton(self.source, device=default_device())
            count = len(skeleton.blocks)
            self._tune_missing(settings, skeleton, job)
            changed = {name: tensor for index in range(count) for name, tensor in job.read(block_key(index)).items()}
            if not job.done(VERDICT):
                job.commit(VERDICT, {}, self._verdict(changed, job))
            report = job.report(VERDICT) | {"rows": [job.report(block_key(index)) for index in range(count)]}
        if report["after"] < report["before"]:
            return report, changed
        self.watcher.note("the tuned blocks are no better together on held-out text: they are left out")
        return report, {}

    def _tune_missing(self, settings: BlockTuning, skeleton: Skeleton, job: RunDirectory) -> None:
        blocks = range(len(skeleton.blocks))
        missing = [index for index in blocks if not job.done(block_key(index))]
        self.watcher.begin("tune blocks", len(blocks), len(blocks) - len(missing))
        if not missing:
            return
        tuner = BlockTuner(
            skeleton, self.windows.tokens, self._heldout(), settings, job.path, self.watcher, self.memory_gib, self.processes
        )
        try:
            for index in range(missing[-1] + 1):
                self.processes.checkpoint()
                prefix = skeleton.blocks[index][0]
                dtypes, layers = self.packed.vectors(prefix), self.packed.layers(prefix)
                others = {name: self.packed.read(name) for name in dtypes}
                if index in missing:
                    tensors, report = tuner.tune(index, layers, others, dtypes)
                    job.commit(block_key(index), tensors, {"block": prefix, **report})
                    self.watcher.advance(prefix)
                else:
                    tuned = job.read(block_key(index))
                    _set(layers, tuned)
                    tuner.skip(index, layers, others | {name: tuned[name] for name in tuned if name in others})
        finally:
            tuner.close()

    def _verdict(self, changed: dict[str, Tensor], job: RunDirectory) -> dict[str, float]:
        """KL on the held-out windows, of the packed model as it is and with its tuned blocks."""
        rows = self.windows.tokens[-self._heldout() :]
        student = distill.Student(self.packed, {}, None, self.source.trust_remote_code)
        share = self._share(rows, len(rows), student)
        teacher = self._teacher(share, job)
        try:
            before = distill.heldout_divergence(student, teacher, share, self.processes)
            student.change(changed)
            after = distill.heldout_divergence(student, teacher, share, self.processes)
        finally:
            teacher.close()
        return {"before": before, "after": after}

    # ---- end to end --------------------------------------------------------------------------------------------------------

    def _end(self, settings: EndTuning, changed: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        frozen = self._frozen("end_to_end") | ({"blocks": self.frozen["blocks"]} if self.settings.blocks else {})
        fingerprint = self.fingerprint | {"start": _hash(changed)}
        with self._open("end", END_STAGE, frozen, fingerprint) as job:
            if not job.done(distill.RESULT):
                self._distill(settings, changed, job)
            if saved := distill.saved_states(job):  # also those of a run that was killed behind its result
                job.forget(*saved)
            return job.report(distill.RESULT), job.read(distill.RESULT)

    def _distill(self, settings: EndTuning, changed: dict[str, Tensor], job: RunDirectory) -> None:
        student = distill.Student(self.packed, changed, settings, self.source.trust_remote_code)
        share = self._share(self.windows.tokens, settings.batch, student)
        teacher = self._teacher(share, job)
        try:
            trained = student.prepare(self.packed, self.memory_gib)
            distill.Distiller(student, trained, teacher, share, job, self.watcher, self.processes).run()
        finally:
            teacher.close()

    # ---- small things ------------------------------------------------------------------------------------------------------

    def _share(self, tokens: Tensor, batch: int, student: distill.Student) -> Share:
        most = distill.most_rows(tokens.shape[1], student.vocabulary)
        return share_of(tokens, self._heldout(), batch, most, self.processes.rank, self.processes.world)

    def _teacher(self, share: Share, job: RunDirectory) -> Teacher:
        skeleton = Skeleton(self.source, device=default_device())
        return Teacher(skeleton, share.pieces, job.path, self.watcher, self.memory_gib, self.processes)

    def _open(self, kind: str, stage: str, frozen: dict[str, Any], fingerprint: dict[str, Any]) -> SharedDirectory:
        return SharedDirectory.join(self.processes, self._job(kind), stage, frozen, fingerprint, self.force)

    def _frozen(self, kind: str) -> dict[str, Any]:
        return {name: value for name, value in self.frozen.items() if name not in ("blocks", "end_to_end") or name == kind}

    def _job(self, kind: str) -> Path:
        return self.out.with_name(f"{self.out.name}.{kind}.job")


def heldout_of(rows: int, settings: FinetuneSettings) -> int:
    """Held-out windows of `rows`."""
    return settings.heldout if rows > 2 * settings.heldout else max(1, rows // 5)


def original_of(packed: Path) -> str:
    """Where the original model lies, or its name, as a packed directory knows it. Raises QtipError where it says nothing."""
    if (local := pack.local_original(packed)) is not None:
        return local
    name = PackedDirectory(packed).config.provenance.get("base_model")
    if not isinstance(name, str):
        raise QtipError(f"{packed} does not say which model it was made from", "give the original with --base MODEL")
    return name


def load_windows(source: ModelSource, settings: FinetuneSettings, watcher: Watcher) -> Windows:
    """Training and held-out windows. Raises QtipError where there is one window, and what calibrate.load_windows raises."""
    asked = settings.samples + settings.heldout
    wanted = CalibrationSettings(data=settings.data, samples=asked, context=settings.context, seed=settings.seed)
    windows = calibrate.load_windows(source, wanted)
    if windows.rows < 2:
        raise QtipError(
            f"{windows.source} holds one window of {windows.context} tokens", "give longer text, or a smaller --context"
        )
    if windows.rows < asked:
        watcher.note(f"{windows.source} holds {windows.rows} windows of {windows.context} tokens, not {asked}: all are used")
    return windows


def _refuse_other_model(packed: PackedDirectory, model: dict[str, Any], source: ModelSource) -> None:
    record = pack.read_record(packed.path) or {}
    made_from = (record.get("job") or record.get("quantize") or {}).get("fingerprint", {}).get("model")
    if made_from is not None and made_from != model:
        raise QtipError(f"{packed.path} was made from another model than {source.name}", "give its original with --base MODEL")


def _set(layers: dict[str, Any], tuned: dict[str, Tensor]) -> None:
    """Put tuned scales and tables in the place of the layers' own."""
    for name, layer in layers.items():
        for part in ("scale_in", "scale_out", "lut"):
            if f"{name}.{part}" in tuned:
                getattr(layer, part).data = tuned[f"{name}.{part}"]


def _hash(tensors: dict[str, Tensor]) -> str:
    return fingerprint_text(*(f"{name} {tensors[name].float().tolist()}" for name in sorted(tensors)))


def packed_directory(path: Path) -> Path:
    """`path` itself, or the packed directory that belongs to it where it is the run directory of a quantize job.

    Raises QtipError where that job has not been packed.
    """
    if not (path / "job.json").is_file():
        return path
    RunDirectory.load(path, quantize.STAGE)
    packed = path.with_name(path.name.removesuffix(".job"))
    if packed == path or not (packed / "config.json").is_file():
        raise QtipError(f"{path} is a job that is not packed", f"qtip pack MODEL {path} --out DIR, then tune DIR")
    return packed

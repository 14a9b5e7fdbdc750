"""Owns end-to-end tuning: the packed model as a whole is taught the original's predictions, KL(original || quantized).

A run can stop after any step: masters, Adam's moments and the best state so far are a shard of the run directory, and the
continued run takes the same steps to the same bits. Source: QuIP# (arXiv 2402.04396), section 5.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint as recompute

from qtipcli.config import EndTuning
from qtipcli.errors import QtipError, StoppedError
from qtipcli.job.directory import RunDirectory
from qtipcli.job.processes import ALONE, Processes
from qtipcli.model.skeleton import find_blocks
from qtipcli.nn import fused, swap
from qtipcli.stages import curve
from qtipcli.stages.load import load_model
from qtipcli.stages.packed import PackedDirectory
from qtipcli.stages.progress import Watcher
from qtipcli.stages.teacher import Teacher
from qtipcli.tune.descent import Descent, order
from qtipcli.tune.linear import TunedLinear
from qtipcli.tune.parameters import Rates, Trained
from qtipcli.tune.share import Share

RESULT = "result"
"""The shard with the best held-out state; when it is there, the run is done."""

LOGIT_BYTES = 256 << 20
"""Largest float32 logits of one pass; more rows to a step are taken one after the other, their gradients summed."""


def most_rows(context: int, vocabulary: int) -> int:
    """Rows that may go through the model at once; 0 where even one is more, and then it is one."""
    return LOGIT_BYTES // (4 * context * vocabulary)


class Student:
    """The packed model, whole, with its scales as float32 masters.

    packed: the model. changed: stored name -> tensor in the place of its own. settings: of its training, if it is trained.
    """

    def __init__(
        self,
        packed: PackedDirectory,
        changed: Mapping[str, Tensor],
        settings: EndTuning | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        self.model = load_model(packed.path, torch.float32, trust_remote_code).requires_grad_(False)
        self.settings = settings or EndTuning()
        fused.unfuse(self.model)
        self.vocabulary: int = self.model.config.get_text_config().vocab_size
        self.change(changed)

    def change(self, changed: Mapping[str, Tensor]) -> None:
        """Put these tensors, by their stored names, in the place of the model's own; before `prepare`."""
        for name, tensor in changed.items():
            parameter = self.model.get_parameter(name)
            parameter.data = tensor.to(parameter.device, parameter.dtype)

    def prepare(self, packed: PackedDirectory, decoded_gib: float) -> Trained:
        """Make the model trainable, and return what is trained.

        decoded_gib: decoded weights are held up to this; a larger model decodes them in every product, which is slower.
        """
        if self.settings.gradient_checkpointing:
            for _, block in find_blocks(self.model):
                block.forward = _recomputed(block.forward)
        layers = swap.packed_layers(self.model)
        asked = self.settings
        rates = Rates(asked.learning_rate, asked.norm_rate, asked.lut_rate, asked.head_rate)
        decoded = sum(4 * layer.layout.weights for layer in layers.values())
        for name, layer in layers.items():
            if decoded <= decoded_gib * 2**30:
                self.model.set_submodule(name, TunedLinear(layer, rates.luts > 0))
            else:
                layer.unfreeze()
        # The embedding needs no gradient, and the first block's input then has none: nothing is lost with use_reentrant=False.
        head = self._head(packed) if asked.head_rate > 0 else {}
        return Trained(self.model, "", packed.vectors() | head, rates)

    def _head(self, packed: PackedDirectory) -> dict[str, torch.dtype]:
        """Stored name -> dtype of the head's matrix, which may be the embedding's. Raises QtipError where it is packed."""
        weight = self.model.get_output_embeddings().weight
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            if parameter is weight and (dtype := packed.dtype(name)) is not None and weight.numel():
                return {name: dtype}
        raise no_plain_head(packed)

    def divergence(self, rows: Tensor, teacher_logits: Tensor, autocast: bool = False) -> Tensor:
        """KL(original || quantized) in nats, summed over the predictions that count: all but the last of each row."""
        rows = rows.to(self.model.device)
        kind = self.model.device.type
        with torch.autocast(kind, torch.bfloat16, enabled=autocast):
            logits = self.model(input_ids=rows, use_cache=False).logits
        return divergence(logits, teacher_logits)


def no_plain_head(packed: PackedDirectory) -> QtipError:
    """What is wrong where the head is to be trained and is packed."""
    return QtipError(f"the head of {packed.path} is no plain matrix", "leave --head-rate out")


def divergence(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(original || quantized) in nats, summed over all predictions but the last of each row; both [rows, context, V]."""
    log_q = torch.log_softmax(logits[:, :-1].float(), -1)
    log_p = torch.log_softmax(teacher_logits[:, :-1].to(log_q.device).float(), -1)
    return functional.kl_div(log_q, log_p, reduction="sum", log_target=True)


def heldout_divergence(student: Student, teacher: Teacher, share: Share, processes: Processes = ALONE) -> float:
    """Mean KL over the predictions of the held-out windows of all processes, in nats."""
    total = count = 0.0
    with torch.no_grad():
        for index in share.held:
            total += float(student.divergence(share.pieces[index], teacher.logits(index)))
            count += _predictions(*share.pieces[index].shape)
    total, count = processes.sum_numbers(total, count)
    return total / count


def saved_states(job: RunDirectory) -> list[str]:
    """The shards that hold a run on its way; of no use any more when the result is there."""
    return [key for key in job.keys() if key.startswith("step-")]  # noqa: SIM118, no mapping


def _predictions(rows: int, context: int) -> int:
    return rows * (context - 1)


class Distiller:
    """One run, whose result is committed to `job` as RESULT. share: the part of this one of `processes`, as the teacher has it.

    Every process takes the same steps with the same sums, and holds the same masters; the first one writes.
    """

    def __init__(
        self,
        student: Student,
        trained: Trained,
        teacher: Teacher,
        share: Share,
        job: RunDirectory,
        watcher: Watcher,
        processes: Processes = ALONE,
    ) -> None:
        self.student, self.trained, self.teacher, self.job, self.watcher = student, trained, teacher, job, watcher
        self.share, self.processes, self.settings = share, processes, student.settings
        self.steps_an_epoch = len(share.steps)
        self.descent = Descent(trained, self.settings.epochs * self.steps_an_epoch, processes.sum_gradients)
        self.losses: list[float] = []
        self.judged: list[tuple[int, float]] = []

    def run(self) -> dict[str, Any]:
        """Take the steps that are left; returns {"before", "after": held-out KL, "step": of the state kept}."""
        self._resume()
        self.watcher.begin("tune end to end", self.descent.steps, self.descent.step)
        if not self.judged:
            self._judge()
        while self.descent.step < self.descent.steps:
            loss = self.descent.take_step(lambda: self._backward(self._chosen(self.descent.step)))
            self.losses.append(loss)
            step = self.descent.step
            if step % (self.settings.judge_every or self.steps_an_epoch) == 0 or step == self.descent.steps:
                self._judge()
            best = f"held out {self.judged[0][1]:.4f} -> {self.descent.best_loss:.4f}"
            self.watcher.advance(f"loss {loss:.4f}, {best}")
            self._save_if_due()
        step, after = min(self.judged, key=lambda each: each[1])
        report = {"before": self.judged[0][1], "after": after, "step": step}
        self._draw()  # before the result: who is killed in between draws again
        self.job.commit(RESULT, self.descent.best, report)
        return report

    def _chosen(self, step: int) -> int:
        """The windows of a step, by their place in an epoch; they depend on nothing but its number."""
        epoch, place = divmod(step, self.steps_an_epoch)
        return order(self.steps_an_epoch, self.settings.seed, epoch)[place]

    def _backward(self, chosen: int) -> float:
        predictions = _predictions(self.share.rows[chosen], self.share.pieces[0].shape[1])
        total = 0.0
        for index in self.share.steps[chosen]:
            rows, autocast = self.share.pieces[index], self.settings.autocast
            loss = self.student.divergence(rows, self.teacher.logits(index), autocast) / predictions
            loss.backward()
            total += float(loss.detach())
        return self.processes.sum_numbers(total)[0]

    def _judge(self) -> None:
        loss = self.descent.judge(lambda: heldout_divergence(self.student, self.teacher, self.share, self.processes))
        self.judged.append((self.descent.step, loss))

    def _save_if_due(self) -> None:
        """A safe point is where the state is on disk; when the user has asked to stop, that is made so first."""
        due = self.descent.step % self.settings.checkpoint_every == 0
        try:
            self.processes.checkpoint()
        except StoppedError:
            self._save()
            raise
        if due and self.descent.step < self.descent.steps:
            self._save()

    def _save(self) -> None:
        key = f"step-{self.descent.step:07d}"
        if self.job.done(key):
            return
        history = {
            "losses": torch.tensor(self.losses, dtype=torch.float64),
            "judged": torch.tensor(self.judged, dtype=torch.float64).reshape(-1, 2),
        }
        before = saved_states(self.job)
        self.job.commit(key, self.descent.state() | history)
        if before:
            self.job.forget(*before)
        self._draw()

    def _resume(self) -> None:
        if saved := saved_states(self.job):
            tensors = self.job.read(saved[-1])
            self.descent.restore(tensors)
            self.losses = tensors["losses"].tolist()
            self.judged = [(int(step), loss) for step, loss in tensors["judged"].tolist()]

    def _draw(self) -> None:
        if self.processes.is_main:
            curve.write(self.job.path, self.losses, self.judged, self.watcher)


def _recomputed(forward: Any) -> Any:
    def run(*args: Any, **kwargs: Any) -> Any:
        return recompute(forward, *args, use_reentrant=False, **kwargs) if torch.is_grad_enabled() else forward(*args, **kwargs)

    return run

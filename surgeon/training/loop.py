"""The training loop. Every pass that trains something defines its loss and runs it here.

The loop uses accelerate for devices, gradient accumulation, checkpoints, and several processes, each of which computes
a part of every batch (`surgeon.processes`). A fit writes checkpoints and can resume from the last one.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import logging
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from surgeon.collective import send
from surgeon.data.batch import Batch
from surgeon.data.data import Data
from surgeon.data.losses import Loss, guessed_task, over_processes, task_loss
from surgeon.errors import DataError, DivergedError, UsageError
from surgeon.graph.agreement import call_reproducibly
from surgeon.graph.traced import TracedGraph
from surgeon.processes import agreed, count, is_main, rank
from surgeon.progress import Progress, Tell
from surgeon.tracing.trace import TraceInfo
from surgeon.training.checkpoint import Checkpoint, Stateful, saving
from surgeon.training.penalty import Sparsity
from surgeon.training.trackers import DIRECTORY, Tracker

log = logging.getLogger("surgeon")

Schedule = Literal["constant", "linear", "cosine"]
Precision = Literal["float32", "bfloat16"]
CHECKPOINT_SECONDS = 60.0
# The ways to train in which every process holds the whole model, by accelerate's names.
_WHOLE = ("NO", "MULTI_CPU", "MULTI_GPU", "MULTI_XPU", "MULTI_NPU", "MULTI_HPU", "MULTI_MLU")
# Maps a batch and the completed share of the fit to (loss, named values to show).
BatchLoss = Callable[[Batch, float], tuple[Tensor, dict[str, float]]]


@dataclass(frozen=True)
class RunSettings:
    """The settings of a run of passes.

    seed: the seed of every random choice.
    verify: "off", "fast" (check on the example inputs) or "full" (check on other inputs and sizes too).
    progress: a function that is called during long work, or None.
    workdir: the folder for the checkpoints of fits, or None to write none. resume: whether to continue from them.
    dry_run: rewrite the graph, but do not fit anything.
    original: the graph before the first pass, in evaluation mode, to distill from. teacher: another model whose outputs
        are distilled from in its place, or None.
    consume: free the weights of a layer as soon as it is rewritten. Only where nothing is trained.
    report_to: the name of a tracker that gets the losses of every step (see `surgeon.training.trackers`), or None.
    """

    seed: int = 0
    verify: Literal["off", "fast", "full"] = "fast"
    progress: Tell | None = None
    workdir: Path | None = None
    resume: bool = False
    dry_run: bool = False
    original: TracedGraph | None = None
    consume: bool = False
    report_to: str | None = None
    teacher: nn.Module | None = None


@dataclass(frozen=True)
class TrainingPlan:
    """How to optimise: AdamW for `epochs` over the data, or for `steps` of the optimiser if given.

    lr: the learning rate. warmup: the share of the steps in which it rises linearly from 0.
    schedule: the schedule of the learning rate after the warmup.
    clip: the largest gradient norm. accumulate: the number of batches per step. Their gradients are averaged.
    precision: "bfloat16" computes the loss in mixed precision, while the parameters keep their dtype.
    beta2: AdamW's second beta. The first is 0.9.
    """

    epochs: float
    steps: int | None
    lr: float
    weight_decay: float = 0.0
    schedule: Schedule = "linear"
    clip: float | None = 1.0
    warmup: float = 0.0
    accumulate: int = 1
    precision: Precision = "float32"
    beta2: float = 0.999

    def total_steps(self, data: Data) -> int:
        """Return the number of optimiser steps of the whole fit.

        Raises:
            DataError: neither `steps` nor the length of the data is known.
        """
        if self.steps is not None:
            return self.steps
        length = _length(data)
        if length is None:
            raise DataError("The data has no length. Set the length of the training with the pass's option `steps`.")
        return max(1, round(self.epochs * length / self.accumulate))

    def rate(self, done: float) -> float:
        """Return the learning rate after the share `done` of the fit, relative to `lr`."""
        if done < self.warmup:
            return done / self.warmup
        done = (done - self.warmup) / (1.0 - self.warmup)
        if self.schedule == "linear":
            return max(0.0, 1.0 - done)
        if self.schedule == "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))
        return 1.0


def fit(
    parameters: Sequence[nn.Parameter],
    loss: BatchLoss,
    data: Data,
    plan: TrainingPlan,
    settings: RunSettings,
    key: str,
    *,
    label: str | None = None,
    own_rates: Mapping[nn.Parameter, float] | None = None,
    stateful: Sequence[Stateful] = (),
    in_parts: bool = False,
) -> FitReport:
    """Optimise the parameters and change nothing else.

    Args:
        loss: the loss of a batch, called `plan.accumulate` times for every step. With several processes it is called
            with a part of the batch, and has to return the loss of the whole batch (see `surgeon.processes`).
        key: the name of the fit. Its checkpoints are in the folder of this name in `settings.workdir`, so a resumed run
            must use the same key.
        label: the name shown to people, by default the key.
        own_rates: learning rates for parameters that do not use the plan's rate.
        stateful: other objects that change during the fit and are saved in its checkpoints.
        in_parts: whether the data gives every process its own part of each batch already.

    Raises:
        DivergedError: the loss is not finite.
        UsageError: the processes were launched to share out one model.
        SaveError: a checkpoint cannot be written, for example on a full disk. The earlier one is kept.
        KeyboardInterrupt: the fit was interrupted. A checkpoint was written if there is a workdir.
    """
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs

    label = key if label is None else label
    total = plan.total_steps(data)
    device = parameters[0].device
    accelerator = Accelerator(
        cpu=device.type == "cpu",
        device_placement=False,  # the model and its batches are where they belong
        step_scheduler_with_optimizer=False,
        gradient_accumulation_steps=plan.accumulate,  # `backward` divides the loss by this
        log_with=settings.report_to,
        project_dir=None if settings.report_to is None else DIRECTORY,
        # Not every parameter has a part in every loss.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    if accelerator.distributed_type not in _WHOLE:
        raise UsageError(
            f"Training shares no model out among processes, as {accelerator.distributed_type.value} does: every "
            "process holds the whole model. Launch it without --use_fsdp and --use_deepspeed."
        )
    frozen = [(parameter, parameter.requires_grad) for parameter in parameters]
    for parameter in parameters:
        parameter.requires_grad_(True)
    by_rate: dict[float, list[nn.Parameter]] = defaultdict(list)
    for parameter in parameters:
        by_rate[(own_rates or {}).get(parameter, plan.lr)].append(parameter)
    groups = [{"params": members, "lr": rate} for rate, members in by_rate.items()]
    optimizer = torch.optim.AdamW(
        groups, lr=plan.lr, betas=(0.9, plan.beta2), weight_decay=plan.weight_decay, fused=True
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: plan.rate(step / total))
    model, optimizer, scheduler = accelerator.prepare(_Trained(parameters, loss, plan.precision), optimizer, scheduler)
    tracker = Tracker(accelerator, key, asdict(plan))
    directory = None if settings.workdir is None else settings.workdir / key
    checkpoint = Checkpoint(accelerator, stateful, directory)
    step, history = checkpoint.restore() if settings.resume else (0, [])
    resumed_at, started, saved = step, time.monotonic(), time.monotonic()
    undo_part = _remember(stateful, device)
    batches = _batches(data, step * plan.accumulate, total * plan.accumulate)
    try:
        for group in _groups(batches, plan.accumulate):
            parts = []
            for part, batch in enumerate(group):
                own = (batch if in_parts else batch.part()).to(device)
                waiting = accelerator.no_sync(model) if part + 1 < len(group) else nullcontext()
                with waiting, _drawing(settings.seed, step * plan.accumulate + part, device):
                    value, values = model(own, (step + part / plan.accumulate) / total)
                    if not bool(torch.isfinite(value)):
                        raise DivergedError(
                            f"{label}: the loss is {value.item()} at step {step + 1} of {total}. "
                            f"Try a smaller learning rate (now {plan.lr:g})."
                        )
                    accelerator.backward(value)
                parts.append(values)
            shown = {name: sum(values[name] for values in parts) / len(parts) for name in parts[0]}
            if plan.clip is not None:
                accelerator.clip_grad_norm_(parameters, plan.clip)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            step += 1
            undo_part = _remember(stateful, device)
            if step == 1 or step == total or step % max(1, total // 20) == 0:
                history.append((step, shown))
                log.info("%s: step %d of %d, %s", label, step, total, _format(shown))
            tracker.report(step, shown)
            if settings.progress is not None:
                settings.progress(Progress(label, step, total, shown))
            if directory is not None and agreed(time.monotonic() - saved > CHECKPOINT_SECONDS):
                checkpoint.save(step, history)
                saved = time.monotonic()
        checkpoint.save(step, history)
    except KeyboardInterrupt:
        undo_part()
        if count() == 1:  # other processes may be at another step: their last checkpoint stays
            checkpoint.save(step, history)
        raise
    finally:
        tracker.close()
        optimizer.zero_grad()
        for parameter, requires_grad in frozen:
            parameter.requires_grad_(requires_grad)
    length = _length(data)
    epochs = round(step * plan.accumulate / length, 3) if length else None
    return FitReport(step, epochs, round(time.monotonic() - started, 2), tuple(history), resumed_at)


class _Trained(nn.Module):
    """The parameters of a fit as a module that computes the loss: what accelerate prepares."""

    def __init__(self, parameters: Sequence[nn.Parameter], loss: BatchLoss, precision: Precision) -> None:
        super().__init__()
        self.trained = nn.ParameterList(parameters)
        self._loss, self._precision = loss, precision

    def forward(self, batch: Batch, done: float) -> tuple[Tensor, dict[str, float]]:
        with computing_in(self._precision, self.trained[0].device):
            return self._loss(batch, done)


@contextlib.contextmanager
def _drawing(seed: int, position: int, device: torch.device) -> Iterator[None]:
    """Let every process draw other random numbers (dropout), and go on in all of them with the same."""
    if count() == 1:
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed((seed * 1_000_003 + position) * count() + rank())
        yield


def start_alike(graph: GraphModule, made: Sequence[str], settings: RunSettings) -> None:
    """Let a resumed fit start from the same values of the modules `made` (paths) as the interrupted fit.

    The modules that rewriting makes may depend on the data, for example on which neurons form an expert. The data may
    come in another order the next time, and then a checkpoint would not match the new modules. All processes start from
    the values of the main process.
    """
    if not made or (settings.workdir is None and count() == 1):
        return
    state = {
        name: tensor
        for name, tensor in graph.state_dict().items()
        if name.startswith(tuple(f"{path}." for path in made))
    }
    if settings.workdir is not None and is_main():
        path = settings.workdir / "rewritten.pt"
        if settings.resume and path.is_file():
            kept = torch.load(path, weights_only=True)
            with torch.no_grad():
                for name, tensor in state.items():
                    tensor.copy_(kept[name])
        else:
            with saving(f"{path} cannot be written"):
                settings.workdir.mkdir(parents=True, exist_ok=True)
                fresh = path.with_suffix(".new")
                torch.save(state, fresh)
                fresh.rename(path)
    send(list(state.values()))


def loss_of(graph: GraphModule, data: Data) -> Loss:
    """Return the loss for this data.

    It is the data's own loss or the loss of the model's task. If the task is unknown but the labels look like classes,
    it is the loss of classification.

    Raises:
        UsageError: none of these is known.
    """
    if data.loss is not None:
        return over_processes(data.loss)
    info: TraceInfo | None = graph.meta.get("trace")
    task = info.task if info is not None else None
    if task is None:
        batch = next(iter(data.train))
        task = guessed_task(call_reproducibly(graph, batch.args, batch.kwargs), batch.labels)
    if task is None:
        raise UsageError(
            "The task is unknown: the model's class does not tell it, and the labels do not look like classes.",
            python="Give surgeon.Data.of(batches, task=…), or Data(batches, loss=…). The task imitate needs no labels.",
            command="Give --task. --task imitate needs no labels.",
        )
    loss = task_loss(task)
    assert loss is not None, "a task without labels is imitated"
    return loss


def _batches(data: Data, skip: int, total: int) -> Iterator[Batch]:
    """Yield the batches of all epochs. The first `skip` are read and dropped, so that a resumed fit sees the rest."""
    position = 0
    while position < total:
        before = position
        for batch in data.train:
            if position >= total:
                return
            if position >= skip:
                yield batch
            position += 1
        if position == before:
            raise DataError("The training data is empty.")


def _groups(batches: Iterator[Batch], size: int) -> Iterator[list[Batch]]:
    while group := list(itertools.islice(batches, size)):
        yield group


def _length(data: Data) -> int | None:
    try:
        return len(data.train)  # type: ignore[arg-type]
    except TypeError:
        return None


def computing_in(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """Return a context of mixed precision, or an empty one. accelerate sets its own once for the whole process."""
    return nullcontext() if precision == "float32" else torch.autocast(device.type, torch.bfloat16)


def _remember(stateful: Sequence[Stateful], device: torch.device) -> Callable[[], None]:
    """Save the states that change while a step is computed. The returned function restores them."""
    states = [copy.deepcopy(kept.state_dict()) for kept in stateful]
    cpu, cuda = torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def put_back() -> None:
        for kept, state in zip(stateful, states, strict=True):
            kept.load_state_dict(state)
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda, device)

    return put_back


def _format(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in values.items())


@dataclass(frozen=True)
class FitReport:
    """How a pass was fitted.

    steps: the number of optimiser steps. epochs: the number of passes over the data, None if its length is unknown.
    losses: (step, values) at the start, at the end and in between.
    resumed_at: the step at which an interrupted fit was resumed, or 0.
    sparsity: for each layer that was made sparse, by path, the sparsity of its activations before and after.
    penalty: what was penalised before and after, on the same tokens as `sparsity`, as a mean over the penalised layers;
        None if nothing was.
    """

    steps: int
    epochs: float | None
    seconds: float
    losses: tuple[tuple[int, dict[str, float]], ...]
    resumed_at: int = 0
    sparsity: Mapping[str, tuple[Sparsity, Sparsity]] = field(default_factory=dict)
    penalty: tuple[float, float] | None = None

    @classmethod
    def merged(cls, fits: Sequence[FitReport]) -> FitReport:
        """Merge the reports of fits that ran one after the other with the same plan: sums, and means of the losses."""
        epochs = [fit.epochs for fit in fits if fit.epochs is not None]
        losses = []
        for moment in zip(*(fit.losses for fit in fits), strict=True):
            names = moment[0][1]
            means = {name: sum(values[name] for _, values in moment) / len(fits) for name in names}
            losses.append((sum(step for step, _ in moment), means))
        return cls(
            steps=sum(fit.steps for fit in fits),
            epochs=round(sum(epochs), 3) if len(epochs) == len(fits) else None,
            seconds=round(sum(fit.seconds for fit in fits), 2),
            losses=tuple(losses),
            resumed_at=sum(fit.resumed_at for fit in fits),
            sparsity={path: values for fit in fits for path, values in fit.sparsity.items()},
        )

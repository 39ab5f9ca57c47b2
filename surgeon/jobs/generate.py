"""Generate text with a converted language model, and time it beside the dense model."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from surgeon.dynamic.knobs import get_tau, set_tau
from surgeon.dynamic.site import find_dynamic
from surgeon.errors import UsageError
from surgeon.measure.meter import ExpertMeter
from surgeon.models.source import load_model
from surgeon.progress import Stage
from surgeon.surgery.artifact import load_with_inputs
from surgeon.surgery.export import base_of, origin_of, rebuilt
from surgeon.surgery.record import RECORD, earlier_passes, read_record


@dataclass(frozen=True)
class GenerateOptions:
    """How to generate. chat: whether the prompt is a message for the tokenizer's chat template. rounds: of timing."""

    max_new_tokens: int = 64
    sample: bool = False
    temperature: float = 1.0
    seed: int = 0
    chat: bool = False
    rounds: int = 3


@dataclass(frozen=True)
class Setting:
    """One row of the comparison.

    tau: None for the dense model; the mean of the layers' values for the stored setting.
    tokens_per_second: the median over the rounds. ratio: to the dense model, None without one.
    executed: the share that ran of the multiply-adds that layers can skip; None for the dense model. same: how
    many tokens from the start are the dense model's, None without one. text: what was generated.
    """

    tau: float | None
    tokens: int
    tokens_per_second: float
    ratio: float | None
    executed: float | None
    same: int | None
    text: str


@dataclass(frozen=True)
class Generated:
    """What was generated with each setting. The dense model comes last, if it was found."""

    model: str
    prompt: str
    prompt_tokens: int
    settings: tuple[Setting, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Generator:
    """A converted model and the dense one, if it was found, with the tokenizer."""

    spec: str
    model: Any
    tokenizer: Any
    dense: Any | None
    notes: tuple[str, ...] = ()


def open_generator(directory: Path, dense: Path | None, *, stage: Stage) -> Generator:
    """Open a saved surgery, or an exported model, to generate text with it.

    Args:
        dense: the directory of the dense model. By default it is the one that a saved surgery was made from, if it is
            still there and unchanged. An exported model does not know it.

    Raises:
        UsageError: it is no language model, or has no tokenizer. LoadError: it cannot be read.
    """
    notes: list[str] = []
    base: Any = None
    with stage(f"loading {directory}"):
        if (directory / RECORD).is_file():
            record, origin = read_record(directory), origin_of(directory)
            base = base_of(record, origin)
            graph, inputs = load_with_inputs(directory)
            reports = [pass_.report for pass_ in earlier_passes(graph)]
            model: Any = rebuilt(base, graph, reports, inputs, origin, share=True)
            tokenizer = origin.tokenizer
        else:
            found = load_model(directory)
            model, tokenizer = found.model, found.tokenizer
        if dense is not None:
            base = load_model(dense).model
            if base is None:
                raise UsageError(f"{dense} is a surgery. Give the directory of the dense model.")
    if not (hasattr(model, "can_generate") and model.can_generate()):
        raise UsageError(f"{type(model).__name__} does not generate text. Give a language model.")
    if tokenizer is None:
        raise UsageError(f"{directory} has no tokenizer. Copy the tokenizer files of the original model there.")
    if not find_dynamic(model):
        raise UsageError(f"{directory} has no layers that skip. Convert it with surgeon apply --recipe recommended.")
    if base is None:
        notes.append("The dense model was not found, so there is nothing to compare with. Give it with --dense.")
    return Generator(str(directory), model.eval(), tokenizer, None if base is None else base.eval(), tuple(notes))


def generate(
    opened: Generator, prompt: str, taus: Sequence[float], options: GenerateOptions, *, stage: Stage
) -> Generated:
    """Generate with the stored settings, at several tau, and with the dense model. All are timed in turns.

    Args:
        taus: the settings to compare; without any, only the stored one.

    Raises:
        UsageError: the prompt is empty, the model does not take so many tokens, or the tokenizer has no chat template.
    """
    model, stored = opened.model, get_tau(opened.model)
    encoded = _encoded(opened, prompt, options)
    chosen: list[tuple[float | None, Any, Callable[[], object]]] = []
    for tau in dict.fromkeys(taus):
        chosen.append((tau, model, partial(set_tau, model, tau)))
    if not chosen:
        mean = statistics.mean(stored.values())
        chosen.append((mean, model, partial(set_tau, model, stored)))
    if opened.dense is not None:
        chosen.append((None, opened.dense, lambda: None))
    seconds: list[list[float]] = [[] for _ in chosen]
    results: list[Any] = [None for _ in chosen]
    shares: list[float | None] = [None for _ in chosen]
    try:
        for round_ in range(options.rounds + 1):
            with stage(f"generating, round {round_} of {options.rounds}" if round_ else "warming up"):
                for index, (value, which, choose) in enumerate(chosen):
                    choose()
                    # The first round warms up, and counts the experts that run.
                    meter = ExpertMeter(which) if not round_ and value is not None else None
                    results[index], took = _timed(which, encoded, options, meter)
                    if round_:
                        seconds[index].append(took)
                    elif meter is not None:
                        whole = sum(layer.multiply_adds for layer in meter.layers.values())
                        shares[index] = sum(layer.executed_multiply_adds for layer in meter.layers.values()) / whole
    finally:
        set_tau(model, stored)
    given = encoded["input_ids"].shape[1]
    start = 1 if model.config.is_encoder_decoder else given
    new = [result[0, start:] for result in results]
    speeds = [len(tokens) / statistics.median(times) for tokens, times in zip(new, seconds, strict=True)]
    dense = new[-1] if opened.dense is not None else None
    settings = tuple(
        Setting(
            tau,
            len(tokens),
            speed,
            speed / speeds[-1] if dense is not None and tau is not None else None,
            share,
            _same(tokens, dense) if dense is not None and tau is not None else None,
            opened.tokenizer.decode(tokens, skip_special_tokens=True),
        )
        for (tau, _, _), tokens, speed, share in zip(chosen, new, speeds, shares, strict=True)
    )
    return Generated(opened.spec, prompt, given, settings, opened.notes)


def _encoded(opened: Generator, prompt: str, options: GenerateOptions) -> dict[str, torch.Tensor]:
    tokenizer = opened.tokenizer
    if options.chat:
        if not getattr(tokenizer, "chat_template", None):
            raise UsageError("The tokenizer has no chat template. Leave out --chat: the prompt is continued as text.")
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
    # A template writes the special tokens itself.
    encoded = tokenizer(prompt, return_tensors="pt", add_special_tokens=not options.chat)
    length = encoded["input_ids"].shape[1]
    if length == 0:
        raise UsageError("The prompt is empty. Give some text to continue.")
    config = opened.model.config
    limit = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    total = options.max_new_tokens + (0 if config.is_encoder_decoder else length)
    if isinstance(limit, int) and total > limit:
        raise UsageError(
            f"The model takes {limit} tokens, but the prompt has {length} and {options.max_new_tokens} more were asked "
            "for. Give a lower --max-new-tokens, or a shorter prompt."
        )
    return {name: encoded[name] for name in ("input_ids", "attention_mask") if name in encoded}


def _timed(
    model: Any, encoded: dict[str, torch.Tensor], options: GenerateOptions, meter: ExpertMeter | None
) -> tuple[Any, float]:
    config = model.generation_config
    padding = config.pad_token_id if config.pad_token_id is not None else config.eos_token_id
    given = {name: tensor.to(model.device) for name, tensor in encoded.items()}
    chosen: dict[str, Any] = {"do_sample": options.sample}
    if options.sample:
        chosen["temperature"] = options.temperature
    with ExitStack() as stack:
        if meter is not None:
            stack.enter_context(meter.counting())
        stack.enter_context(torch.random.fork_rng(devices=[]))
        torch.manual_seed(options.seed)
        started = time.perf_counter()
        result = model.generate(
            **given, max_new_tokens=options.max_new_tokens, pad_token_id=_first(padding), use_cache=True, **chosen
        )
        return result, time.perf_counter() - started


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, list) else value


def _same(tokens: torch.Tensor, dense: torch.Tensor) -> int:
    """The number of tokens from the start that are equal."""
    count = min(len(tokens), len(dense))
    differ = (tokens[:count] != dense[:count]).nonzero()
    return int(differ[0]) if len(differ) else count

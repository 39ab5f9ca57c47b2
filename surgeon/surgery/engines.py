"""Write a surgery as a directory that another engine reads, in processes without this package.

    openvino_model.xml, openvino_model.bin        for OpenVINO, with
    surgeon_openvino.so                           the extension that has the experts' operator, if it has experts
    model.onnx                                    for ONNX
    config.json, generation_config.json, tokenizer, processor   as far as the surgery has them
    README.md                                     how to load it, and how it was checked
    surgeon.json                                  the record of the surgery

Inputs and outputs have the graph's names. The directory appears whole or not at all.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from surgeon.data.batch import Batch
from surgeon.directories import OVERWRITE, restore
from surgeon.engines import onnx, openvino
from surgeon.engines.generation import INPUTS, convert_generator
from surgeon.engines.installed import installed
from surgeon.engines.program import Program
from surgeon.errors import SaveError, UsageError, first_line
from surgeon.exits.halting import find_halts
from surgeon.exits.site import find_exits
from surgeon.graph.calls import as_args_kwargs
from surgeon.graph.traced import TracedGraph
from surgeon.inputs.skipping import find_skipping
from surgeon.models.hugging_face import quiet_transformers
from surgeon.surgery.artifact import written_whole
from surgeon.surgery.origin import Origin
from surgeon.surgery.record import Record, write_record
from surgeon.version import __version__

FILES = {"openvino": "openvino_model.xml", "onnx": "model.onnx"}
"""The file of the model, by the name of the engine."""
LIBRARY, CARD, RECORD = "surgeon_openvino.so", "README.md", "surgeon.json"

TOLERANCE = {False: 1e-3, True: 0.1}
"""Largest accepted ‖difference‖ / ‖output‖ from the graph, without and with experts in 8 bits. Sums in another order
round now and then to the next of 255 steps, and select another expert where two are equally good."""
QUANTISED_TOLERANCE = 0.5
"""The same where the other linears are quantised: more than that is a mistake, not rounding."""

_CALIBRATION = 300  # samples


@dataclass(frozen=True)
class EngineModel:
    """A model that was written.

    engine: a key of `FILES`. inputs, outputs: names in order. linears: as `surgeon.engines.openvino.LINEARS`.
    error: the largest difference from the graph at all sizes that were tried, ‖difference‖ / ‖output‖.
    float_error: the same before the linears were quantised. samples: those that ranges were measured on.
    library: whether it needs the extension. bytes: of all files. masked_inputs: whether linear layers read the inputs
    that they skip.
    """

    engine: str
    inputs: list[str]
    outputs: list[str]
    linears: str
    error: float
    float_error: float
    samples: int
    library: bool
    bytes: int
    versions: dict[str, str]
    masked_inputs: bool = False


def export_openvino(
    graph: TracedGraph,
    inputs: Any,
    directory: Path,
    *,
    record: Record,
    origin: Origin,
    linears: str = "float",
    calibration: Iterable[Any] | None = None,
    overwrite: bool = False,
) -> EngineModel:
    """Convert a graph in evaluation mode for OpenVINO, compare it with the graph, and write it.

    Args:
        inputs: example inputs. record, origin: of the surgery.
        linears: what becomes of the linears around the experts, one of `surgeon.engines.openvino.LINEARS`.
        calibration: batches, or inputs as the example inputs are; by default the example inputs. For "int8" alone.

    Raises:
        UsageError: a package is missing, or the experts have float weights. SaveError: it cannot be converted, differs
            from the graph, or the directory has other content or cannot be written.
    """
    check_engine_directory("openvino", directory, overwrite=overwrite)
    _refuse_exits(graph)
    package, program = installed("openvino"), Program(graph.eval(), inputs)
    model = openvino.convert(graph, program)
    int8 = openvino.has_int8_experts(graph)
    library = openvino.extension() if int8 else None
    float_error = error = _compared(openvino.Compiled(model), program, TOLERANCE[int8])
    rows = _rows(program, calibration if calibration is not None else [inputs]) if linears == "int8" else []
    if linears != "float":
        model = openvino.quantised(model, linears, rows)
        error = _compared(openvino.Compiled(model), program, QUANTISED_TOLERANCE)
    made = EngineModel(
        "openvino",
        [port.get_any_name() for port in model.inputs],
        [port.get_any_name() for port in model.outputs],
        linears, error, float_error, len(rows), library is not None, 0,
        {"surgeon": __version__, "openvino": package.__version__}, bool(find_skipping(graph)),
    )  # fmt: skip

    def write(fresh: Path) -> None:
        # Half precision has too few digits for the scales and for tau.
        package.save_model(model, str(fresh / FILES["openvino"]), compress_to_fp16=False)
        if library is not None:
            shutil.copyfile(library, fresh / LIBRARY)

    return _written(made, directory, record, origin, write)


def export_generator(
    model: Any, directory: Path, *, record: Record, origin: Origin, linears: str = "float", overwrite: bool = False
) -> EngineModel:
    """Convert a language model of transformers for OpenVINO, with its cache as state, compare it, and write it.

    Args:
        model: with the surgery's layers in it, in evaluation mode. It has no experts with float weights.
        record, origin, linears: as `export_openvino` takes them; inputs are not quantised.

    Raises:
        UsageError, SaveError: as `export_openvino`; the model has no cache of keys and values.
    """
    check_engine_directory("openvino", directory, overwrite=overwrite)
    package = installed("openvino")
    if linears == "int8":
        raise UsageError(
            "In a model with a cache the inputs of linears are not quantised.",
            python="Use linears='int8-weights'.",
            command="Use --linears int8-weights.",
        )
    made = convert_generator(model)
    float_error = error = _generating(made, model, TOLERANCE[True])
    if linears != "float":
        made = openvino.quantised(made, linears, ())
        error = _generating(made, model, QUANTISED_TOLERANCE)
    library = openvino.extension()
    about = EngineModel(
        "openvino", [*INPUTS], ["logits"], linears, error, float_error, 0, True, 0,
        {"surgeon": __version__, "openvino": package.__version__}, bool(find_skipping(model)),
    )  # fmt: skip

    def write(fresh: Path) -> None:
        package.save_model(made, str(fresh / FILES["openvino"]), compress_to_fp16=False)
        shutil.copyfile(library, fresh / LIBRARY)

    return _written(about, directory, record, origin, write)


def _generating(made: Any, model: Any, tolerance: float) -> float:
    """The largest difference of the logits of new tokens from those that the model gives for all tokens at once.

    Raises:
        SaveError: it is too large, or the converted model fails.
    """
    compiled, errors = openvino.Compiled(made), []
    tokens = torch.randint(0, model.config.vocab_size, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False).logits
    for start, end in ((0, 6), (6, 7), (7, 9)):
        given = tokens[:, start:end], torch.ones_like(tokens[:, :end]), torch.arange(start, end).repeat(2, 1)
        try:
            (found,) = compiled(dict(zip(INPUTS, (*given, torch.arange(2, dtype=torch.int32)), strict=True)))
        except Exception as error:  # OpenVINO raises many types
            raise SaveError(f"The converted model fails: {first_line(error)}.") from error
        errors.append(difference(found, expected[:, start:end]))
    if not max(errors) <= tolerance:
        raise SaveError(f"The converted model differs from the surgery by {max(errors):.1e}, relative.")
    return max(errors)


def _refuse_exits(graph: TracedGraph) -> None:
    if find_exits(graph) or find_halts(graph):
        what = "early exits" if find_exits(graph) else "token halting"
        raise UsageError(
            f"The surgery has {what}, which only torch runs. `surgeon compile` writes a package that runs without "
            "surgeon."
        )


def export_onnx(
    graph: TracedGraph, inputs: Any, directory: Path, *, record: Record, origin: Origin, overwrite: bool = False
) -> EngineModel:
    """Convert a graph in evaluation mode to ONNX, compare it with the graph in ONNX Runtime, and write it.

    Arguments and exceptions are those of `export_openvino`; experts with 8-bit weights are refused.
    """
    check_engine_directory("onnx", directory, overwrite=overwrite)
    if openvino.has_int8_experts(graph):
        raise UsageError(
            "ONNX has no operator for experts with 8-bit weights. Export the surgery before they were quantised, or "
            "for OpenVINO."
        )
    _refuse_exits(graph)
    package, program, errors = installed("onnxruntime"), Program(graph.eval(), inputs), []

    def write(fresh: Path) -> None:
        onnx.save(program, fresh / FILES["onnx"])
        errors.append(_compared(onnx.Session(fresh / FILES["onnx"]), program, TOLERANCE[False]))

    names = [given.name for given in program.sizes.inputs], program.output_names()
    versions = {"surgeon": __version__, "torch": torch.__version__, "onnxruntime": package.__version__}
    made = EngineModel("onnx", *names, "float", 0.0, 0.0, 0, False, 0, versions, bool(find_skipping(graph)))
    return _written(made, directory, record, origin, write, errors)


def check_engine_directory(engine: str, directory: Path, *, overwrite: bool) -> None:
    """Refuse a directory that has other content than a model for this engine, or one that is not to be overwritten.

    Raises:
        SaveError: it has.
    """
    restore(directory)
    if directory.exists() and not directory.is_dir():
        raise SaveError(f"{directory} is a file. Give a directory for the model.")
    if directory.is_dir() and any(directory.iterdir()):
        if not (directory / FILES[engine]).exists():
            raise SaveError(f"{directory} is not empty and not a model for {engine}. Give another directory.")
        if not overwrite:
            raise SaveError(f"{directory} exists.", **OVERWRITE)


def loading(made: EngineModel, directory: str) -> str:
    """Return the lines of Python that load the model."""
    file = f"{directory}/{FILES[made.engine]}"
    if made.engine == "onnx":
        return f'import onnxruntime\nmodel = onnxruntime.InferenceSession("{file}")'
    lines = ["import openvino", "core = openvino.Core()"]
    if made.library:
        lines.append(f'core.add_extension("{directory}/{LIBRARY}")')
    return "\n".join([*lines, f'model = core.compile_model("{file}", "CPU")'])


def difference(found: Tensor, expected: Tensor) -> float:
    """Return ‖found - expected‖ / ‖expected‖; infinite if shapes differ or only one has NaN somewhere."""
    if found.shape != expected.shape or not torch.equal(found.isnan(), expected.isnan()):
        return float("inf")
    a, b = found.double().nan_to_num(), expected.double().nan_to_num()
    return float((a - b).norm() / b.norm().clamp(min=1e-12))


def _compared(model: Callable[[Mapping[str, Tensor]], list[Tensor]], program: Program, tolerance: float) -> float:
    """The largest error of the model, on the example inputs and at other sizes.

    Raises:
        SaveError: it is too large, or the model fails.
    """
    errors = [0.0]
    for sizes, inputs, expected in program.examples():
        try:
            found = model(inputs)
        except Exception as error:  # engines raise many types
            raise SaveError(f"The converted model fails at {sizes}: {first_line(error)}.") from error
        errors += [difference(a, b) for a, b in zip(found, expected, strict=True)]
        if not max(errors) <= tolerance:
            raise SaveError(f"The converted model differs from the graph by {max(errors):.1e}, relative, at {sizes}.")
    return max(errors)


def _rows(program: Program, batches: Iterable[Any]) -> list[dict[str, Tensor]]:
    """The first samples of the batches, each on its own."""
    rows: list[dict[str, Tensor]] = []
    for item in batches:
        args, kwargs = (item.args, item.kwargs) if isinstance(item, Batch) else as_args_kwargs(item)
        named = program.named(args, kwargs)
        count = min(len(value) for value in named.values())
        rows += [{name: value[at : at + 1] for name, value in named.items()} for at in range(count)]
        if len(rows) >= _CALIBRATION:
            break
    return rows[:_CALIBRATION]


def _written(
    made: EngineModel,
    directory: Path,
    record: Record,
    origin: Origin,
    write: Callable[[Path], None],
    errors: Sequence[float] = (),
) -> EngineModel:
    """Write the directory. errors: of the model, known once it is written."""
    with written_whole(directory) as fresh, quiet_transformers():
        write(fresh)
        for part in (origin.config, origin.generation, origin.tokenizer, origin.processor):
            if part is not None:
                part.save_pretrained(fresh)
        # Where the model lay on this machine is nobody else's business.
        path = None if record.input.path is None else Path(record.input.path).name
        write_record(replace(record, input=replace(record.input, path=path)), fresh, RECORD)
        size = sum(file.stat().st_size for file in fresh.iterdir())
        error = max(errors, default=made.error)
        made = replace(made, bytes=size, error=error, float_error=error if errors else made.float_error)
        (fresh / CARD).write_text(_card(made), encoding="utf-8")
    return made


def _card(made: EngineModel) -> str:
    parts = [
        f"# A model for {made.engine}, with layers that skip work by tau",
        f"```python\n{loading(made, 'PATH')}\n```",
        f"Inputs: {', '.join(made.inputs)}. Outputs: {', '.join(made.outputs)}.",
    ]
    if made.library:
        parts.append(
            f"`{LIBRARY}` has the operator of the experts. It was built for OpenVINO {made.versions['openvino']} on "
            "Linux, and runs with this version alone."
        )
    if made.engine == "onnx":
        parts.append("Everything is computed; a mask leaves out what a token did not select.")
    elif made.masked_inputs:
        parts.append("Linear layers that skip inputs read all of them; a mask leaves out those that are skipped.")
    parts.append(
        {
            "float": "Linears outside of experts are in float32.",
            "int8": "Linears outside of experts are in 8 bits; the ranges of their inputs were measured on "
            f"{made.samples} samples.",
            "int8-weights": "The weights of linears outside of experts have 8 bits.",
            "int4-weights": "The weights of linears outside of experts have 4 bits.",
        }[made.linears]
    )
    parts.append(f"Outputs differ from those of the graph by {made.error:.1e} (‖difference‖ / ‖output‖, in float32).")
    return "\n\n".join(parts) + "\n"

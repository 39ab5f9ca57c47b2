"""The format as transformers sees it: a "quantizer" that changes a model's modules before its weights are loaded.

That is transformers' extension point for checkpoints whose modules are not those of the model's class. The plan of the
modules stands in `config.json`, under `quantization_config`. The weights are ordinary tensors in safetensors files.
Importing this module registers the format.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from pydantic import TypeAdapter, ValidationError
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from surgeon.errors import LoadError, UsageError, some
from surgeon.grafting.parts import GRAFT, Graft, Layer, MLPShape, Plan, empty_layer, plan_of, put
from surgeon.inputs.module import SparseLinearShape
from surgeon.inputs.neurons import SparseNeuronsShape
from surgeon.kernels.panels import PLACES
from surgeon.moe.module import MoEShape
from surgeon.pretrained.register import METHOD

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger("surgeon")

SCHEMA = 1
_READER = TypeAdapter(Plan)


@register_quantization_config(METHOD)
class SurgeonConfig(QuantizationConfigMixin):
    """The plan of a model's converted layers, as it stands in `config.json`."""

    def __init__(self, plan: Mapping[str, Any] | Plan | None = None, schema: int = SCHEMA, **_: Any) -> None:
        """Read a plan, or the JSON values of one.

        Raises:
            LoadError: the values are damaged, or of another version.
        """
        if schema != SCHEMA:
            raise LoadError(
                f"config.json has a surgeon plan of schema {schema!r}, but this version reads schema {SCHEMA}. "
                "Update surgeon, or export the surgery again."
            )
        try:
            self.plan = plan if isinstance(plan, Plan) else _READER.validate_python(plan)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in ("plan", *first["loc"]))
            raise LoadError(f"config.json is damaged: quantization_config.{where}: {first['msg'].lower()}.") from error
        _check(self.plan)
        self.quant_method = METHOD  # type: ignore[assignment]

    def to_dict(self) -> dict[str, Any]:
        """The JSON values."""
        return {"quant_method": METHOD, "schema": SCHEMA, "plan": _READER.dump_python(self.plan, mode="json")}


def _check(plan: Plan) -> None:
    """Refuse values that no exported model has.

    Raises:
        LoadError: a value is out of its range.
    """
    for path, layer in plan.layers.items():
        faults = ["dropout"] * (not 0 <= layer.dropout < 1) + ["parts"] * (not layer.parts)
        for part in layer.parts:
            sizes = {"d_in": part.d_in, "d_out": part.d_out}
            if isinstance(part, SparseLinearShape):
                sizes["rank + 1"] = part.rank + 1
            else:
                faults += [f"biases {part.biases}"] * (not {"b1", "b_gate", "b2"}.issuperset(part.biases))
            if isinstance(part, MoEShape):
                sizes |= {"experts": part.experts, "size": part.size, "experts - shared": part.experts - part.shared}
                sizes |= {} if part.router_width is None else {"router_width": part.router_width}
                sizes |= {} if part.group is None else {"group": 0 if part.group % PLACES else part.group}
                faults += ["float8"] * (part.float8 and (part.form != "int8" or part.group is not None))
                sizes |= {"shared + 1": part.shared + 1, "filling + 1": part.filling + 1}
                sizes |= {"experts * size - filling": part.experts * part.size - part.filling}
            elif isinstance(part, MLPShape | SparseNeuronsShape):
                sizes["neurons"] = part.neurons
            faults += [f"{name} {value}" for name, value in sizes.items() if value < 1]
        if faults:
            raise LoadError(f"config.json is damaged: quantization_config.plan.layers.{path} has a wrong {faults[0]}.")


@register_quantizer(METHOD)
class SurgeonQuantizer(HfQuantizer):
    """Puts converted layers into a model, and writes down which.

    The weights keep their dtype, so the model can be trained, saved again, and moved like any other.
    """

    quantization_config: SurgeonConfig

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse a dense checkpoint.

        Raises:
            UsageError: the checkpoint has no converted layers.
        """
        if not self.pre_quantized:
            raise UsageError(
                "This checkpoint has no converted layers. Convert it with `surgeon apply`, then `surgeon export`."
            )

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        plan = fitted(self.quantization_config.plan, model)
        dtype = torch.get_default_dtype()
        put(model, plan, {path: empty_layer(layer, device=None, dtype=dtype) for path, layer in plan.layers.items()})
        self.quantization_config.plan = plan
        # Its code for new weights may look for weights that are gone. Every weight of these modules is in the file.
        for path in (*plan.layers, *plan.passed, *plan.ones):
            while path := path.rpartition(".")[0]:
                vars(model.get_submodule(path))["_is_hf_initialized"] = True

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        """Refuse a model whose converted layers are not all in its files: transformers only warns.

        Raises:
            LoadError: a weight of a converted layer was not loaded.
        """
        missing = [
            f"{path}.{name}"
            for path in self.quantization_config.plan.layers
            for name, tensor in _tensors(model.get_submodule(path))
            # What is kept on disk was read from a file. transformers marks what it loaded.
            if tensor.device.type != "meta" and not getattr(tensor, "_is_hf_initialized", False)
        ]
        if missing:
            raise LoadError(
                f"The weight files do not contain {some(missing)}, which the plan in config.json has. The files do not "
                "belong together: export the surgery again."
            )
        setattr(model, GRAFT, Graft(self.quantization_config.plan))

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[None, dict[str, Any]]:
        """Bring the plan up to date before the model is saved: its rules may have been set, and means computed."""
        plan = plan_of(model, self.quantization_config.plan)
        self.quantization_config.plan = plan
        model.config.quantization_config = self.quantization_config
        return None, {}

    def is_serializable(self) -> bool:
        """Yes: `save_pretrained` writes it."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Yes, with adapters."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Yes, its own weights too."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Yes: a converted layer is one op to a compiler."""
        return True


def _tensors(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def attach(model: PreTrainedModel, plan: Plan) -> None:
    """Let a model with converted layers be saved by `save_pretrained` and trained by `Trainer`."""
    quantizer = SurgeonQuantizer(SurgeonConfig(plan))
    model.hf_quantizer = quantizer  # type: ignore[assignment]
    model.config.quantization_config = quantizer.quantization_config
    vars(model).update(is_quantized=True, quantization_method=METHOD)


def check_described(model: PreTrainedModel, plan: Plan) -> None:
    """Refuse a model that its config does not describe, such as one with pruned layers that stay dense.

    transformers would give the layers that it misses random weights, with a warning.

    Raises:
        UsageError: a model that is built from the config lacks a tensor, or has one too many or one of another shape.
    """
    with torch.device("meta"):
        built = type(model)(copy.deepcopy(model.config))
        put(built, plan, {path: empty_layer(layer, device="meta", dtype=None) for path, layer in plan.layers.items()})
    own, described = ({name: tuple(value.shape) for name, value in m.state_dict().items()} for m in (model, built))
    differ = [name for name in {**own, **described} if own.get(name) != described.get(name)]
    if differ:
        name = differ[0]
        shapes = [str(list(part[name])) if name in part else "not there" for part in (own, described)]
        raise UsageError(
            f"The model's config describes another model, so from_pretrained could not read this one: {name} is "
            f"{shapes[0]}, and by the config {shapes[1]} ({len(differ)} such). Where layers were pruned, convert all "
            "of them, or correct the config. Surgery.save and surgeon.graft work with any widths."
        )


def fitted(plan: Plan, model: PreTrainedModel) -> Plan:
    """Return the part of a plan that is for a model, with the paths of the model.

    A checkpoint may be loaded into another class than it was saved from: a body without its head, or with another one.
    Then paths lose or get the prefix of the body. Parts that the class lacks, such as a decoder, are left out.

    Raises:
        LoadError: the plan is for another model, or names a function that the model does not have.
    """
    prefix = f"{model.base_model_prefix}."
    known = {name for name, _ in model.named_modules()}
    ways: tuple[Callable[[str], str], ...] = (str, lambda path: path.removeprefix(prefix), lambda path: prefix + path)
    paths = [*plan.layers, *plan.passed, *plan.ones, *(path for path, _ in plan.functions)]
    renamed = max(ways, key=lambda way: sum(way(path) in known for path in paths))
    missing = [path for path in paths if renamed(path) not in known]
    if len(missing) == len(paths):
        raise LoadError(
            f"config.json plans converted layers at {some(paths)}, but {type(model).__name__} has no such modules."
        )
    if missing:
        log.info("%s has no %s: these converted layers are left out.", type(model).__name__, some(missing))

    def kept(given: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(renamed(path) for path in given if renamed(path) in known)

    layers: dict[str, Layer] = {renamed(path): layer for path, layer in plan.layers.items() if renamed(path) in known}
    functions = tuple((renamed(path), name) for path, name in plan.functions if renamed(path) in known)
    for path, name in functions:
        if not callable(vars(model.get_submodule(path)).get(name)):
            raise LoadError(f"config.json is damaged: {type(model).__name__} has no function {path}.{name}.")
    return Plan(layers, kept(plan.passed), kept(plan.ones), functions)

"""Store the weights of experts and routers as small integers, and route and run the experts in one op."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from surgeon.data.data import Data
from surgeon.described import Fact, was_and_is
from surgeon.errors import UsageError
from surgeon.graph.edit import emit, get_attr
from surgeon.graph.holder import parameters_only
from surgeon.graph.traced import TracedGraph, aten
from surgeon.kernels.experts import selected
from surgeon.kernels.int8_arguments import Int8Call
from surgeon.kernels.panels import PLACES, WIDEST
from surgeon.moe.int8 import TENSORS, Int8MoE, parameter_sizes
from surgeon.moe.module import SKIPPED_MEAN, MoE
from surgeon.moe.ops import masked_ffn, routed_ffn_int8, selection_threshold
from surgeon.moe.rebuild import moe_module
from surgeon.moe.site import MoESite, find_moes
from surgeon.passes.base import Pass
from surgeon.passes.contract import SiteKind, SiteRefused
from surgeon.passes.options import option
from surgeon.passes.report import SiteChange
from surgeon.sites.rejection import Rejection
from surgeon.training.loop import FitReport, RunSettings
from surgeon.training.observe import collect_calls

# Tokens on which the inputs' sizes are seen and the error is measured; those that are compared at a time.
_TOKENS, _PART = 4096, 256
# At this share of the experts, the selections by the router before and after are compared.
_SHARE = 0.2
_WORDS = {"int8": "8 bits", "int4": "4 bits", "fp8": "float8"}


class _Accuracy(NamedTuple):
    """How a quantised layer differs: its output, relative, and the share of the selected experts that stay selected."""

    error: float
    agreement: float


@dataclass(frozen=True, kw_only=True)
class Quantize(Pass[MoESite, Tensor | None]):
    """Store the experts' weights in 8 or 4 bits and the routers' in 12, and route and run the experts in one op.

    Every neuron has a scale, and so has every output. Inputs and hidden values are rounded to 8 bits when the op runs,
    with a scale for each token; to float16 if weights are in float8 (E4M3, arXiv 2209.05433). With data, inputs that
    are often large are made smaller and their weights larger first (SmoothQuant, arXiv 2211.10438); inputs that the
    data never shows are then rounded coarsely. Weights of 4 bits have a factor for each group of inputs too (as in
    QServe, arXiv 2405.04532). They are for decoding, where reading weights takes most of the time. A quantised layer
    cannot be trained: run passes that train before. tau, rule and compensation work as before. This pass is not part
    of D2DMoE.
    """

    name: ClassVar[str] = "quantize"
    works_on: ClassVar[SiteKind] = "moe"
    preserves: ClassVar[bool] = False
    calibrates: ClassVar[bool] = True

    smooth: float = option(
        0.5,
        "How much of the inputs' different sizes moves into the weights, if there is data: 0 is nothing, and 1 is all.",
        least=0,
        most=1,
    )
    weights: Literal["int8", "int4", "fp8"] = option(
        "int8",
        "How the experts' weights are stored. int4 is smaller and faster for few tokens, and less exact. fp8 is 8-bit "
        "floating point, for GPUs: less exact than int8, unless a few inputs or hidden values are far larger than the "
        "others.",
    )
    group: int = option(
        32,
        "With weights=int4, how many inputs share a factor, a multiple of 8. Few are more exact and take more memory.",
        least=PLACES,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group % PLACES:
            raise UsageError(f"quantize: group is {self.group}, but must be a multiple of {PLACES}.")
        if self.weights != "int4" and self.group != type(self).group:
            raise UsageError("quantize: only weights=int4 have groups. Drop group, or add weights=int4.")

    def match(self, graph: GraphModule, site: MoESite) -> Rejection | None:
        if site.form == "int8":
            return Rejection("already-done", "its weights already have 8 or 4 bits")
        if (width := max(site.d_in, site.size)) > WIDEST and self.weights != "fp8":
            return Rejection("too-wide", f"{width} products would be added up, and 32 bits hold {WIDEST}")
        try:
            moe = moe_module(graph, site)
        except ValueError as error:
            return Rejection("unknown-router", str(error))
        if isinstance(moe, MoE) and moe.router.activation is not None:
            return Rejection(
                "neuron-router", "its router scores by hidden values, but the op of small integers does not"
            )
        if not all(bool(torch.isfinite(tensor).all()) for tensor in moe.parameters()):
            return Rejection("not-finite", "its weights contain NaN or infinity")
        return None

    def observe(
        self, graph: TracedGraph, sites: Sequence[MoESite], data: Data | None, settings: RunSettings
    ) -> Mapping[str, Tensor]:
        if data is None or not sites:
            return {}
        names = {site.path: [str(node.args[0].name) for node in site.nodes] for site in sites}  # type: ignore[union-attr]
        return collect_calls(graph, names, data, tokens=_TOKENS, progress=settings.progress)

    @torch.no_grad()
    def rewrite(self, graph: TracedGraph, site: MoESite, seen: Tensor | None) -> SiteChange:
        if seen is not None and not bool(torch.isfinite(seen).all()):
            raise SiteRefused("not-finite", "its inputs on the data contain NaN or infinity")
        moe = moe_module(graph, site)
        assert isinstance(moe, MoE)
        x_scale = None if seen is None else _input_scale(moe, seen, self.smooth)
        group = self.group if self.weights == "int4" else None
        made = Int8MoE.of(moe, x_scale, group, float8=self.weights == "fp8")
        accuracy = None if seen is None else _accuracy(moe, made, seen)
        before = sum(parameter.numel() for parameter in moe.parameters())
        holder = parameters_only(made)
        if site.form != "module":
            # Another layer's router may still read the trunk of this one.
            holder.add_module("router", graph.get_submodule(f"{site.path}.router"))
        graph.set_submodule(site.path, holder)
        names = [_replace(graph, site, node, made) for node in site.nodes]
        after = next(found for found in find_moes(graph) if found.path == site.path)
        words = f"{after.describe} in {_WORDS[self.weights]}"
        added: dict[str, Fact] = {"weights": self.weights}
        if accuracy is not None:
            added |= {"error": accuracy.error, "same_selections": accuracy.agreement}
            words += f", error {accuracy.error:.2%}, {accuracy.agreement:.2%} of the selections the same"
        return SiteChange(
            site.path,
            site.describe,
            words,
            (before, sum(parameter_sizes(made).values())),
            (site.multiply_adds, after.multiply_adds),
            (site.nodes[-1].name, names[-1]),
            made=(site.path,),
            facts=was_and_is(site.facts, {**after.facts, **added}),
        )

    def finish(
        self, graph: TracedGraph, sites: Sequence[MoESite], changes: Sequence[SiteChange], fit: FitReport | None
    ) -> tuple[str, ...]:
        if not sites:
            return ()
        made = {site.path: site for site in find_moes(graph)}
        before = sum(_float_bytes(site, made[site.path]) for site in sites)
        after = sum(_bytes(made[site.path]) for site in sites)
        notes = [f"The experts' weights take {_size(after)} instead of {_size(before)}."]
        if self.weights == "fp8":
            notes.append("Kernels for float8 are for GPUs. On a processor every expert is computed: take int8 there.")
        if " error " not in changes[0].after:
            notes.append("Without data the inputs' sizes are unknown, so nothing was smoothed and no error measured.")
        else:
            notes.append(
                f"error: of the layer's output, on {_TOKENS} tokens of the data at most. Selections: the share of the "
                f"experts in the largest {_SHARE:.0%} of the scores that stay there."
            )
        return tuple(notes)


def _input_scale(moe: MoE, x: Tensor, smooth: float) -> Tensor:
    """Return what to multiply inputs by, [d_in]: the size of the weights over that of the inputs, each to a power."""
    weights = moe.weights
    matrices = [weights.w1] if weights.gate is None else [weights.w1, weights.gate]
    size = torch.stack([matrix.detach().float().abs().amax((0, 1)) for matrix in matrices]).amax(0)
    inputs = x.float().abs().amax(0)
    # An input that was never seen, or is never read, must not get an extreme scale.
    inputs, size = (value.clamp_min(1e-4 * float(value.max())).clamp_min(1e-12) for value in (inputs, size))
    return size.pow(smooth) / inputs.pow(smooth)


def _accuracy(moe: MoE, made: Int8MoE, x: Tensor) -> _Accuracy:
    different, whole, same, chosen = 0.0, 0.0, 0, 0
    tau = torch.tensor(1 - _SHARE, device=x.device)
    for part in torch.split(x, _PART):
        scores, threshold = moe.route(part)
        before = masked_ffn(part, scores, threshold, *moe.weights, moe.output_bias, moe.activation)
        # In float32 the squares of large outputs are infinite.
        different += float((made(part).double() - before.double()).square().sum())
        whole += float(before.double().square().sum())
        masks = [
            selected(found, selection_threshold(found, tau, "top_k"))
            for found in (layer.route(part)[0][..., moe.shared :] for layer in (moe, made))
        ]
        same, chosen = same + int((masks[0] & masks[1]).sum()), chosen + int(masks[0].sum())
    return _Accuracy((different / max(whole, 1e-300)) ** 0.5, same / max(chosen, 1))


def _replace(graph: TracedGraph, site: MoESite, node: Node, made: Int8MoE) -> str:
    """Put the op in the place of a layer's node, and return its name."""
    with graph.graph.inserting_before(node):
        values = {
            name: None if getattr(made, name) is None else get_attr(graph, f"{site.path}.{name}") for name in TENSORS
        }
        if hasattr(made, SKIPPED_MEAN):
            mean, b2 = get_attr(graph, f"{site.path}.{SKIPPED_MEAN}"), values["b2"]
            values["b2"] = mean if b2 is None else emit(graph, aten.add.Tensor, b2, mean, path=site.path)
        given = {
            "x": node.args[0],
            "tau": get_attr(graph, f"{site.path}.tau"),
            "rule": made.rule,
            "shared": made.shared,
            "hidden": made.hidden,
            "output": made.output,
            "activation": made.activation,
            **values,
        }
        call = emit(graph, routed_ffn_int8, *(given[name] for name in Int8Call._fields), path=site.path)
    node.replace_all_uses_with(call)
    graph.graph.erase_node(node)
    return call.name


def _float_bytes(before: MoESite, after: MoESite) -> int:
    """The bytes that a layer's experts took, whose tensors are empty by now if the run had to save memory."""
    biases = sum(bias is not None for bias in (before.stored.b1, before.stored.b_gate))
    numbers = after.experts * after.size * (after.neuron_multiply_adds + biases)
    return numbers * before.stored.w1.element_size()


def _bytes(site: MoESite) -> int:
    """The bytes that the experts of an 8-bit layer take, scales included."""
    return sum(tensor.numel() * tensor.element_size() for tensor in site.stored if tensor is not None)


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"

"""Without training: skipped inputs made up for by a refit, a low rank or a rotation; thresholds or top-k.

python examples/frontier/skipped_inputs.py digits WORK OUT.json
python examples/frontier/skipped_inputs.py code WORK OUT.json

Every linear layer W x + b of a trained model computes A s + M d + bias. Here d is what x is away from its centre, s is
d without the inputs that are skipped, and M has a small rank, or is zero. All is fitted on the dense model's inputs.
Every layer costs the same share of the dense one, low rank and rotation counted. The divergence from the dense model is
measured on held-out data, and read off at the cost that was found there. WORK is that of digits.py or language.py,
whose dense models are used. What OUT has already is not done again.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import digits
import language
import torch
import torch.nn.functional as F
from study import Run
from torch import Tensor, nn
from untrained import at, parts

from surgeon.inputs.calibration import calibrate, scores
from surgeon.inputs.fitting import Fitted, fit
from surgeon.kernels.sparse_linear import threshold

COSTS = (0.25, 0.35, 0.45, 0.55)
RIDGE = 0.01  # that of refit
ROWS, HELD, BATCH = 64, 48, 16  # of code: rows of 128 tokens


@dataclass(frozen=True)
class Method:
    """What a layer does.

    weighted, centre: the criterion, as in sparsify-inputs. top_k: so many inputs for each token, in place of a
    threshold. refit: A and M are fitted; else A is W, and M the truncated SVD of W for what is skipped. rank: of M, as
    a share of the smaller of d_in and d_out; of several, each layer has the one with the least error on tokens that
    were held back. None: as large as the cost allows, and every input is skipped. rotated: inputs are turned into their
    principal components. "one": all layers read the residual stream in the same basis, which can be folded into the
    weights, and so can a basis for each head of attention's output. "each": every layer that reads the residual stream
    has its own, for d_in² multiply-adds. "free": every layer has its own, also inside feed-forward layers, and it is
    not counted, which no model can do.
    """

    weighted: bool = True
    centre: bool = True
    top_k: bool = False
    refit: bool = False
    rank: tuple[float | None, ...] = (0.0,)
    rotated: str | None = None


def methods() -> dict[str, Method]:
    """The methods by name. The criterion is weighted with centres where none is named."""
    teal, wina = {"weighted": False, "centre": False}, {"centre": False}
    return {
        "refit": Method(refit=True),
        "refit, rank 1/8": Method(refit=True, rank=(1 / 8,)),
        "refit, basis: one": Method(refit=True, rotated="one"),
        "TEAL": Method(**teal),
        "R-Sparse, rank 1/8": Method(**wina, rank=(1 / 8,)),
        "LaRoSA, basis: one": Method(**teal, top_k=True, rotated="one"),
        "low rank alone": Method(refit=True, rank=(None,)),
        "refit, rank 1/4": Method(refit=True, rank=(1 / 4,)),
        "refit, rank by layer": Method(refit=True, rank=(0.0, 1 / 32, 1 / 16, 1 / 8, 1 / 4)),
        "refit, top-k": Method(refit=True, top_k=True),
        "WINA": Method(**wina),
        "weighted, centres": Method(),
        "refit, basis: each": Method(refit=True, rotated="each"),
        "refit, basis: free": Method(refit=True, rotated="free"),
        "weighted, centres, top-k": Method(top_k=True),
        "TEAL, top-k": Method(**teal, top_k=True),
        "WINA, top-k": Method(**wina, top_k=True),
        "TEAL, refit": Method(**teal, refit=True),
        "WINA, refit": Method(**wina, refit=True),
        "R-Sparse, rank 1/32": Method(**wina, rank=(1 / 32,)),
        "R-Sparse, rank 1/16": Method(**wina, rank=(1 / 16,)),
        "refit, rank 1/32": Method(refit=True, rank=(1 / 32,)),
        "refit, rank 1/16": Method(refit=True, rank=(1 / 16,)),
        "LaRoSA, basis: each": Method(**teal, top_k=True, rotated="each"),
        "LaRoSA, basis: free": Method(**teal, top_k=True, rotated="free"),
    }


@dataclass
class Layer:
    """A linear layer of a model. norm: what makes its input, if that comes from the residual stream. heads: of it."""

    path: str
    module: nn.Module
    ffn: bool
    norm: nn.LayerNorm | None = None
    heads: int = 1
    x: Tensor = field(default_factory=lambda: torch.empty(0))
    basis: Tensor | None = None

    @property
    def weight(self) -> Tensor:
        """[d_out, d_in]."""
        weight = self.module.weight.detach()
        return weight if isinstance(self.module, nn.Linear) else weight.t()

    @property
    def bias(self) -> Tensor:
        d_out = self.weight.shape[0]
        return torch.zeros(d_out) if self.module.bias is None else self.module.bias.detach()


class Skipping(nn.Module):
    """x [..., d_in] → [..., d_out]. kept, tokens: what calls have kept so far. error: on the tokens held back."""

    def __init__(self, turn: Turn, select: Select, fitted: Fitted, bias: Tensor) -> None:
        super().__init__()
        self.turn, self.select, self.fitted, self.bias = turn, select, fitted, bias
        self.kept = self.tokens = 0
        self.error = 0.0

    def forward(self, x: Tensor) -> Tensor:
        d = self.turn(x)
        d = d if self.select.centre is None else d - self.select.centre
        mask = self.select(d)
        self.kept += int(mask.sum())
        self.tokens += mask[..., 0].numel()
        return self.fitted(d * mask, d) + self.bias

    @property
    def ran(self) -> float:
        """Multiply-adds of the calls."""
        fixed = self.fitted.low_in.numel() + self.fitted.low_out.numel() + self.turn.cost
        return self.kept * len(self.bias) + self.tokens * fixed


@dataclass
class Turn:
    """How the inputs of a layer are turned: (x - shift) / gain @ basis. cost: multiply-adds for each token."""

    shift: Tensor | None = None
    gain: Tensor | None = None
    basis: Tensor | None = None
    cost: int = 0

    def __call__(self, x: Tensor) -> Tensor:
        if self.gain is not None:
            x = (x - self.shift) / self.gain
        return x if self.basis is None else x @ self.basis

    def weights(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """The weight and the bias that do the same for turned inputs."""
        if self.gain is not None:
            weight, bias = weight * self.gain, bias + weight @ self.shift
        return weight if self.basis is None else weight @ self.basis, bias


@dataclass
class Select:
    """Which inputs d [..., d_in] are kept: those above a threshold, or so many for each token."""

    centre: Tensor | None
    scale: Tensor | None
    threshold: Tensor
    count: int | None

    def __call__(self, d: Tensor) -> Tensor:
        found = scores(d, self.scale, None)
        if self.count is None:
            return found > self.threshold
        return torch.zeros_like(found, dtype=torch.bool).scatter_(-1, found.topk(self.count).indices, True)


def fitted(layer: Layer, method: Method, cost: float) -> Skipping | None:
    """The layer at a cost; None if what does not depend on the token costs as much already."""
    turn = turned(layer, method)
    found = [one for rank in method.rank if (one := with_rank(layer, method, turn, rank, cost)) is not None]
    return min(found, key=lambda one: one.error) if found else None


def with_rank(layer: Layer, method: Method, turn: Turn, share: float | None, cost: float) -> Skipping | None:
    weight, bias = turn.weights(layer.weight, layer.bias)
    d_out, d_in = weight.shape
    rank = int(cost * d_in * d_out / (d_in + d_out)) if share is None else round(share * min(d_in, d_out))
    left = 0.0 if share is None else cost - (rank * (d_in + d_out) + turn.cost) / weight.numel()
    if share is not None and left < 0.02:
        return None
    d, select = selection(turn(layer.x), weight, method, left)
    s = d * select(d)
    held_back = torch.arange(len(d)) % 8 == 7
    if method.refit:
        made = fit(weight, d[~held_back], s[~held_back], rank, RIDGE)
    else:
        u, values, v = torch.linalg.svd(weight, full_matrices=False)
        low_out, low_in = u[:, :rank] * values[:rank], v[:rank]
        made = Fitted(weight - low_out @ low_in, low_in, low_out, torch.zeros(d_out))
    found = Skipping(turn, select, made, bias if select.centre is None else bias + weight @ select.centre)
    found.error = float((d[held_back] @ weight.t() - made(s[held_back], d[held_back])).square().mean())
    return found


def selection(x: Tensor, weight: Tensor, method: Method, share: float) -> tuple[Tensor, Select]:
    """What inputs are away from their centres, and what is selected so that this share is kept."""
    known = calibrate(x[::4], weight, weighted=method.weighted, centred=method.centre)
    d = x if known.centre is None else x - known.centre
    level = threshold(known.levels, torch.tensor(1 - share)) if share else torch.tensor(torch.inf)
    count = max(1, round(share * x.shape[1])) if method.top_k else None
    return d, Select(known.centre, known.scale, level, count)


def turned(layer: Layer, method: Method) -> Turn:
    if method.rotated is None:
        return Turn()
    turn, d_in = Turn(), layer.weight.shape[1]
    if layer.norm is not None:
        turn.shift, turn.gain = layer.norm.bias.detach(), layer.norm.weight.detach()
        turn.basis = layer.basis if method.rotated == "one" else principal(turn(layer.x))
        turn.cost = d_in**2 if method.rotated == "each" else 0
    elif layer.heads > 1:
        parts = layer.x.unflatten(-1, (layer.heads, -1)).unbind(-2)
        turn.basis = torch.block_diag(*(principal(part) for part in parts))
    elif method.rotated == "free":
        turn.basis = principal(layer.x)
    return turn


def principal(x: Tensor) -> Tensor:
    """The principal components of x [N, d] as columns."""
    return torch.linalg.eigh((x.t() @ x).double())[1].float()


# --- models -----------------------------------------------------------------------------------------------------------


def layers_of(model: nn.Module) -> list[Layer]:
    found = []
    if isinstance(model, digits.demo.DigitsViT):
        for i, block in enumerate(model.blocks):
            heads = block.attention.heads
            found += [
                Layer(f"blocks.{i}.attention.qkv", block.attention.qkv, False, block.norm1),
                Layer(f"blocks.{i}.attention.proj", block.attention.proj, False, heads=heads),
                Layer(f"blocks.{i}.mlp.0", block.mlp[0], True, block.norm2),
                Layer(f"blocks.{i}.mlp.3", block.mlp[3], True),
            ]
        return found
    for i, block in enumerate(model.transformer.h):
        found += [
            Layer(f"transformer.h.{i}.attn.c_attn", block.attn.c_attn, False, block.ln_1),
            Layer(f"transformer.h.{i}.attn.c_proj", block.attn.c_proj, False, heads=block.attn.num_heads),
            Layer(f"transformer.h.{i}.mlp.c_fc", block.mlp.c_fc, True, block.ln_2),
            Layer(f"transformer.h.{i}.mlp.c_proj", block.mlp.c_proj, True),
        ]
    return [*found, Layer("lm_head", model.lm_head, False, model.transformer.ln_f)]


@contextmanager
def replaced(model: nn.Module, made: dict[str, Skipping]) -> Iterator[None]:
    before = {path: model.get_submodule(path) for path in made}
    for path, module in made.items():
        module.kept = module.tokens = 0
        model.set_submodule(path, module)
    try:
        yield
    finally:
        for path, module in before.items():
            model.set_submodule(path, module)


@torch.no_grad()
def observed(model: nn.Module, call: Callable[[Any], Tensor], batches: Sequence[Any]) -> list[Layer]:
    """The layers with their inputs on the data."""
    layers = layers_of(model)
    seen: dict[str, list[Tensor]] = {layer.path: [] for layer in layers}
    hooks = [
        layer.module.register_forward_pre_hook(
            lambda _, args, path=layer.path: seen[path].append(args[0].flatten(0, -2))
        )
        for layer in layers
    ]
    for batch in batches:
        call(batch)
    for hook in hooks:
        hook.remove()
    for layer in layers:
        layer.x = torch.cat(seen.pop(layer.path))
    stream = [layer for layer in layers if layer.norm is not None]
    pooled = [Turn(layer.norm.bias.detach(), layer.norm.weight.detach())(layer.x)[::4] for layer in stream]
    basis = principal(torch.cat(pooled))
    for layer in stream:
        layer.basis = basis
    return layers


@dataclass
class Task:
    """A model and its data. answers: the log-probabilities on held-out data. quality: from those."""

    model: nn.Module
    call: Callable[[Any], Tensor]
    seen: Sequence[Any]
    held: Sequence[Any]
    quality: Callable[[Tensor], float]

    @torch.no_grad()
    def answers(self) -> Tensor:
        return torch.cat([self.call(batch) for batch in self.held]).float().log_softmax(-1)


def of_digits(work: Path, seed: int) -> Task:
    run = Run(digits.STUDY, seed, work / "digits" / str(seed))
    model = run.dense_model()
    data, others = parts(seed)
    labels = torch.cat([batch.labels for batch in digits.demo.digits(seed).eval])
    images = [batch.args[0] for batch in others]

    def accuracy(found: Tensor) -> float:
        return float((found[-len(labels) :].argmax(-1) == labels).double().mean())

    return Task(model, model, [batch.args[0] for batch in data.train], images, accuracy)


def of_code(work: Path, seed: int) -> Task:
    run = Run(language.study(False), seed, work / "code" / str(seed))
    model, (train, held) = run.dense_model(), language.tokens()
    targets = held[:HELD, 1:].reshape(-1)

    def loss(found: Tensor) -> float:
        return float(F.nll_loss(found[:, :-1].flatten(0, 1), targets))

    return Task(
        model, lambda rows: model(input_ids=rows).logits, train[:ROWS].split(BATCH), held[:HELD].split(BATCH), loss
    )


@torch.no_grad()
def curves(task: Task, found: dict[str, Any], stored: Callable[[], None]) -> None:
    """Add points of (cost, divergence, quality) for every method: of feed-forward layers alone, and of all."""
    dense = task.answers()
    layers = observed(task.model, task.call, task.seen)
    found["dense"] = task.quality(dense)
    for name, method in methods().items():
        if name in found["methods"]:
            continue
        started = time.monotonic()
        points: dict[str, list[tuple[float, float, float]]] = {"ffn": [], "whole": []}
        for cost in COSTS:
            made = {layer.path: one for layer in layers if (one := fitted(layer, method, cost)) is not None}
            for part, chosen in (("ffn", [layer for layer in layers if layer.ffn]), ("whole", layers)):
                if any(layer.path not in made for layer in chosen):
                    continue
                with replaced(task.model, {layer.path: made[layer.path] for layer in chosen}):
                    answers = task.answers()
                whole = sum(made[layer.path].tokens * layer.weight.numel() for layer in chosen)
                ran = sum(made[layer.path].ran for layer in chosen)
                divergence = float((dense.exp() * (dense - answers)).sum(-1).mean())
                points[part].append((round(ran / whole, 5), divergence, task.quality(answers)))
        found["methods"][name] = {part: sorted(values) for part, values in points.items()}
        stored()
        print(f"{name}: {time.monotonic() - started:.0f} s", flush=True)


def table(found: dict[str, Any]) -> str:
    """The divergence at equal cost, as Markdown."""
    costs = (0.3, 0.4, 0.5)
    head = [f"{part}, {cost:.0%}" for part in ("feed-forward", "all layers") for cost in costs]
    lines = [f"| cost of the layers | {' | '.join(head)} |", "| --- " * (1 + len(head)) + "|"]
    for name, curve in found["methods"].items():
        values = [at([point[:2] for point in curve[part]], cost) for part in ("ffn", "whole") for cost in costs]
        cells = ["—" if value is None else f"{value:.4f}" for value in values]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def opened(description: str | None, key: str) -> tuple[argparse.Namespace, dict[str, Any], Task]:
    """What was typed, what OUT has already, with the results under this key, and the task."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=["digits", "code"])
    parser.add_argument("work", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    found = json.loads(args.out.read_text()) if args.out.exists() else {"task": args.task, "seed": 0, key: {}}
    return args, found, {"digits": of_digits, "code": of_code}[args.task](args.work, found["seed"])


def main() -> None:
    args, found, task = opened(__doc__, "methods")
    curves(task, found, lambda: args.out.write_text(json.dumps(found, indent=1)) and None)
    print(table(found))


if __name__ == "__main__":
    main()

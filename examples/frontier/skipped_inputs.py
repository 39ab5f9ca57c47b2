"""What to do about skipped inputs without training: nothing, refit, low rank, rotation; a threshold or top-k.

python examples/frontier/skipped_inputs.py digits WORK OUT.json --seeds 0 1 2
python examples/frontier/skipped_inputs.py code WORK OUT.json

Every linear layer y = W x + b of a trained model computes y = A s + U V d + bias. Here d is what x is away from its
centre, s is d without the inputs that are skipped, and U V has a small rank, or none. Inputs are those of the dense
model. Every layer costs the same share of the dense one, the low rank and the rotation counted, and the divergence
from the dense model is read off at the cost that was found on held-out data. WORK is that of digits.py or language.py,
whose dense models are used.
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

from surgeon.inputs.calibration import levels_of, scores
from surgeon.inputs.calibration import calibrate
from surgeon.kernels.sparse_linear import threshold

COSTS = (0.2, 0.3, 0.4, 0.5, 0.6)
RIDGE = 0.01  # that of refit
ROWS, HELD, BATCH = 128, 64, 16  # of code: rows of 128 tokens


@dataclass(frozen=True)
class Method:
    """What a layer does.

    weighted, centre: as the criteria of sparsify-inputs. top_k: as many inputs for each token, in place of a threshold.
    refit: A is fitted, else it is W. rank: of U V, as a share of the smaller of d_in and d_out; several: the one with
    the least error on the calibration data, for each layer. svd: U V is that of W, else it is fitted. rotated: inputs
    are turned into their principal components. "one": all layers read the residual stream in the same basis, which
    costs nothing; nor does one for each head. "each": every such layer has its own, d_in² multiply-adds. "free": every
    layer has its own, and it is not counted.
    """

    weighted: bool = True
    centre: bool = True
    top_k: bool = False
    refit: bool = False
    rank: tuple[float, ...] = (0.0,)
    svd: bool = False
    rotated: str | None = None


def methods() -> dict[str, Method]:
    found = {"TEAL": Method(False, False), "WINA": Method(True, False), "centres": Method()}
    plain = dict(found)
    found |= {f"{name}, top-k": Method(one.weighted, one.centre, top_k=True) for name, one in plain.items()}
    found |= {f"{name}, refit": Method(one.weighted, one.centre, refit=True) for name, one in plain.items()}
    found["centres, top-k, refit"] = Method(top_k=True, refit=True)
    for words, rank in (("1/32", 1 / 32), ("1/16", 1 / 16), ("1/8", 1 / 8)):
        found[f"R-Sparse, rank {words}"] = Method(centre=False, rank=(rank,), svd=True)
        found[f"centres, rank {words}"] = Method(rank=(rank,))
        found[f"centres, refit, rank {words}"] = Method(refit=True, rank=(rank,))
    found["centres, refit, rank by layer"] = Method(refit=True, rank=(0.0, 1 / 64, 1 / 32, 1 / 16, 1 / 8))
    for basis in ("one", "each", "free"):
        found[f"LaRoSA, basis {basis}"] = Method(False, False, top_k=True, rotated=basis)
        found[f"centres, refit, basis {basis}"] = Method(refit=True, rotated=basis)
    return found


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
    """x [..., d_in] → [..., d_out]: turned, inputs skipped, low rank. kept, tokens: what calls have kept so far."""

    def __init__(self, turn: Turn, select: Select, read: Tensor, low: tuple[Tensor, Tensor] | None, bias: Tensor):
        super().__init__()
        self.turn, self.select, self.read, self.low, self.bias = turn, select, read, low, bias
        self.kept = self.tokens = 0
        self.error = 0.0

    def forward(self, x: Tensor) -> Tensor:
        d = self.turn(x)
        d = d if self.select.centre is None else d - self.select.centre
        mask = self.select(d)
        self.kept += int(mask.sum())
        self.tokens += mask[..., 0].numel()
        y = (d * mask) @ self.read.t() + self.bias
        return y if self.low is None else y + (d @ self.low[1].t()) @ self.low[0].t()

    @property
    def ran(self) -> float:
        """Multiply-adds of the calls."""
        d_out = self.read.shape[0]
        low = 0 if self.low is None else sum(part.numel() for part in self.low)
        return self.kept * d_out + self.tokens * (low + self.turn.cost)


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
    """The layer at a cost; None if what is not skipped costs as much already."""
    turn = turned(layer, method)
    found = [one for rank in method.rank if (one := fitted_rank(layer, method, turn, rank, cost)) is not None]
    return min(found, key=lambda one: one.error) if found else None


def fitted_rank(layer: Layer, method: Method, turn: Turn, share: float, cost: float) -> Skipping | None:
    weight, bias = turn.weights(layer.weight, layer.bias)
    d_out, d_in = weight.shape
    rank = round(share * min(d_in, d_out))
    left = cost - (rank * (d_in + d_out) + turn.cost) / weight.numel()
    if left < 0.02:
        return None
    d, select = selection(turn(layer.x), weight, method, left)
    s = d * select(d)
    if select.centre is not None:
        bias = bias + weight @ select.centre
    if not method.refit and not method.centre:
        low = svd(weight, rank) if rank else None
        read = weight if low is None else weight - low[0] @ low[1]
        return Skipping(turn, select, read, low, bias)
    mean_d, mean_s = d.mean(0), s.mean(0)
    if method.refit:
        s0, d0 = s - mean_s, d - mean_d
        gram, cross = (s0.t() @ s0).double() / len(s), (d0.t() @ s0).double() / len(s)
        gram.diagonal().add_(RIDGE * float(s.square().mean()) + 1e-30)
        left_out = torch.linalg.solve(gram, (cross - gram).t()).t()  # what d - s is on the mean, from s
        rest = (d0.t() @ d0).double() / len(d) - cross @ torch.linalg.solve(gram, cross.t())
    else:
        r = d - s - (mean_d - mean_s)
        left_out, rest = torch.zeros(d_in, d_in, dtype=torch.double), (r.t() @ r).double() / len(r)
    wide = weight.double()
    values, vectors = torch.linalg.eigh(wide @ rest @ wide.t())
    low, missing = None, wide
    if rank:
        u = vectors[:, -rank:]
        low, missing = (u.float(), (u.t() @ wide).float()), wide - u @ (u.t() @ wide)
    read = missing + missing @ left_out
    offset = (missing @ mean_d.double() - read @ mean_s.double()) if method.refit or rank else torch.zeros(d_out)
    made = Skipping(turn, select, read.float(), low, (bias + offset).float())
    made.error = float(values[: d_out - rank].clamp_min(0).sum())
    return made


def selection(x: Tensor, weight: Tensor, method: Method, share: float) -> tuple[Tensor, Select]:
    """What is selected so that this share is kept, and the inputs from their centres."""
    known = calibrate(x[::4], weight, weighted=method.weighted, centred=method.centre)
    d = x if known.centre is None else x - known.centre
    level = threshold(known.levels, torch.tensor(1 - share))
    count = max(1, round(share * x.shape[1])) if method.top_k else None
    return d, Select(known.centre, known.scale, level, count)


def svd(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    u, values, v = torch.linalg.svd(weight, full_matrices=False)
    return u[:, :rank] * values[:rank], v[:rank]


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
def curves(task: Task, only: Sequence[str]) -> dict[str, Any]:
    """For every method points of (cost, divergence, quality): of feed-forward layers alone, and of all."""
    dense, layers = task.answers(), observed(task.model, task.call, task.seen)
    found: dict[str, Any] = {"dense": task.quality(dense), "methods": {}}
    for name, method in methods().items():
        if only and name not in only:
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
        found["methods"][name] = points
        shown = {part: [f"{at([p[:2] for p in sorted(ps)], c) or float('nan'):.4f}" for c in (.3, .4, .5)] for part, ps in points.items()}
        print(f"{name}: {shown} {time.monotonic() - started:.0f} s", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=["digits", "code"])
    parser.add_argument("work", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="+", default=[], help="some of the methods")
    args = parser.parse_args()
    make = {"digits": of_digits, "code": of_code}[args.task]
    seeds = {str(seed): curves(make(args.work, seed), args.only) for seed in args.seeds}
    args.out.write_text(json.dumps({"task": args.task, "seeds": seeds}, indent=1))


if __name__ == "__main__":
    main()

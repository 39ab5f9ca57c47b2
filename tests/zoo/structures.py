"""Whole plain-torch models: where FFNs sit, what they share, and what surrounds them."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .body import HIDDEN, OUTPUTS, TOKENS, WIDTH, Block, Body, Stack, randomize, sequence, weight
from .case import Case, Inputs, Registry
from .plain import DOWN, SITES, UP

CASES = Registry("structure")
PAIR = {"up": UP, "down": DOWN}
SWIGLU = {"gate": UP, **PAIR}
HEADS = 4


def model(
    *required: str, inputs: Callable[[int], Inputs] = sequence, half: torch.dtype | None = None, **fields: Any
) -> Callable[[Callable[[], nn.Module]], Callable[[], nn.Module]]:
    """Register the decorated function, which builds a model, as a case; `half` is a dtype to convert the model to."""

    def register(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        def finished() -> nn.Module:
            built = randomize(build())
            return (built if half is None else built.to(half)).eval()

        CASES.add(Case(name=build.__name__, build=finished, inputs=inputs, required=required, **fields))
        return build

    return register


def relu_ffn(d_in: int = WIDTH, hidden: int = HIDDEN, d_out: int | None = None) -> Body:
    """Return `down(relu(up x))`."""
    return Body(lambda m, x: m.down(F.relu(m.up(x))), up=(d_in, hidden), down=(hidden, d_out or d_in))


def gelu_ffn() -> Body:
    """Return `drop(down(drop(gelu(up x))))`."""
    return Body(lambda m, x: m.drop(m.down(m.drop(F.gelu(m.up(x))))), **PAIR, drop=lambda: nn.Dropout(0.1))


def swiglu_ffn() -> Body:
    """Return `down(silu(gate x) · up x)`."""
    return Body(lambda m, x: m.down(F.silu(m.gate(x)) * m.up(x)), **SWIGLU)


def attention() -> Body:
    """Return causal self-attention with one fused projection."""

    def forward(m: Any, x: Tensor) -> Tensor:
        shape = (*x.shape[:-1], HEADS, WIDTH // HEADS)
        q, k, v = (part.view(shape).transpose(1, 2) for part in m.qkv(x).chunk(3, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=0.1 if m.training else 0.0)
        return m.out(y.transpose(1, 2).flatten(2))

    return Body(forward, qkv=(WIDTH, 3 * WIDTH), out=(WIDTH, WIDTH))


def rows(batch: int) -> Inputs:
    """Return one vector for each sample, [batch, WIDTH]."""
    return (torch.randn(batch, WIDTH),)


def images(batch: int) -> Inputs:
    """Return channels-last feature maps, [batch, 3, 4, WIDTH]."""
    return (torch.randn(batch, 3, 4, WIDTH),)


def tokens(batch: int) -> Inputs:
    """Return token ids, [batch, TOKENS], as a keyword argument."""
    return {"ids": torch.randint(0, 11, (batch, TOKENS))}


# Where the FFN sits --------------------------------------------------------------------------------------------------


@model("", count=1, activation="relu")
def ffn_is_the_model() -> nn.Module:
    return relu_ffn(d_out=OUTPUTS)


@model("", count=1, activation="gelu")
def sequential_is_the_model() -> nn.Module:
    return nn.Sequential(nn.Linear(*UP), nn.GELU(), nn.Linear(HIDDEN, OUTPUTS))


@model("0", "2", "4", count=3, activation="relu", inputs=rows)
def sequential_of_ffns() -> nn.Module:
    return nn.Sequential(relu_ffn(), nn.LayerNorm(WIDTH), relu_ffn(), nn.LayerNorm(WIDTH), relu_ffn(d_out=OUTPUTS))


@model(count=1, activation="relu", inputs=rows, note="of two overlapping sites one must be chosen")
def mlp_of_three_linears() -> nn.Module:
    return nn.Sequential(nn.Linear(*UP), nn.ReLU(), nn.Linear(HIDDEN, 28), nn.ReLU(), nn.Linear(28, OUTPUTS))


@model(count=2, alternatives=(1,), activation="gelu", inputs=rows, note="of three overlapping sites two fit")
def mlp_of_four_linears() -> nn.Module:
    sizes = [WIDTH, HIDDEN, 28, 32, OUTPUTS]
    layers = [nn.Sequential(nn.GELU(), nn.Linear(a, b)) for a, b in zip(sizes[1:], sizes[2:], strict=False)]
    return nn.Sequential(nn.Linear(*sizes[:2]), *layers)


@model(count=1, gated=True, activation="silu", inputs=rows, note="a gated and a plain site overlap")
def gated_then_plain_overlapping() -> nn.Module:
    body = lambda m, x: m.last(F.relu(m.down(F.silu(m.gate(x)) * m.up(x))))  # noqa: E731
    return Body(body, **SWIGLU, last=(WIDTH, OUTPUTS))


@model("0", count=1, activation="relu", inputs=rows)
def hidden_narrower_than_input() -> nn.Module:
    return nn.Sequential(relu_ffn(WIDTH, 8, WIDTH), nn.LayerNorm(WIDTH))


@model("0", count=1, activation="relu", inputs=rows)
def hidden_as_wide_as_input() -> nn.Module:
    return nn.Sequential(relu_ffn(WIDTH, WIDTH, WIDTH), nn.LayerNorm(WIDTH))


@model("0", count=1, activation="relu", inputs=rows)
def one_output() -> nn.Module:
    return nn.Sequential(relu_ffn(WIDTH, HIDDEN, 1), nn.Sigmoid())


@model("0", count=1, activation="relu", inputs=lambda b: (torch.randn(b, TOKENS, 1),))
def one_input_feature() -> nn.Module:
    return nn.Sequential(relu_ffn(1, HIDDEN, WIDTH), nn.LayerNorm(WIDTH))


@model("0", count=1, activation="relu", inputs=rows, note="25 neurons do not divide by 4 experts")
def odd_hidden_width() -> nn.Module:
    return nn.Sequential(relu_ffn(WIDTH, 25, WIDTH), nn.LayerNorm(WIDTH))


@model("0", count=1, activation="relu", inputs=lambda b: (torch.randn(WIDTH),), fixed_batch=True)
def single_vector() -> nn.Module:
    return nn.Sequential(relu_ffn(), nn.LayerNorm(WIDTH))


@model(*SITES, activation="relu", inputs=lambda b: sequence(1), fixed_batch=True)
def batch_of_one() -> nn.Module:
    return Stack(Block(ffn=relu_ffn()), Block(ffn=relu_ffn()))


@model(*SITES, activation="relu", inputs=lambda b: (torch.randn(b, 1, WIDTH),))
def sequence_of_one() -> nn.Module:
    return Stack(Block(ffn=relu_ffn()), Block(ffn=relu_ffn()))


@model(*SITES, activation="relu", inputs=images)
def channels_last_images() -> nn.Module:
    return Stack(Block(ffn=relu_ffn()), Block(ffn=relu_ffn()))


@model(*SITES, activation="relu", inputs=lambda b: (torch.randn(b, 2, 3, 2, WIDTH),))
def five_dimensions() -> nn.Module:
    return Stack(Block(ffn=relu_ffn()), Block(ffn=relu_ffn()))


@model("1", count=1, activation="gelu", inputs=lambda b: (torch.randn(b, 3, 8, 8),))
def channels_first_images() -> nn.Module:
    body = lambda m, x: x + m.down(F.gelu(m.up(x.permute(0, 2, 3, 1)))).permute(0, 3, 1, 2)  # noqa: E731
    return nn.Sequential(nn.Conv2d(3, WIDTH, 4, 4), Body(body, **PAIR), nn.AdaptiveAvgPool2d(1), nn.Flatten())


@model("blocks.0.ffn", "blocks.1.ffn", "blocks.0.mix", "blocks.1.mix", count=4, activation="gelu")
def mixer() -> nn.Module:
    def mix() -> nn.Module:
        return Body(lambda m, x: m.down(F.gelu(m.up(x.mT))).mT, up=(TOKENS, 12), down=(12, TOKENS))

    return Stack(Block(mix=mix(), ffn=gelu_ffn()), Block(mix=mix(), ffn=gelu_ffn()))


@model(*SITES, activation="gelu")
def pre_norm_transformer() -> nn.Module:
    return Stack(Block(attn=attention(), ffn=gelu_ffn()), Block(attn=attention(), ffn=gelu_ffn()))


@model(*SITES, activation="gelu")
def post_norm_transformer() -> nn.Module:
    def block() -> nn.Module:
        def forward(m: Any, x: Tensor) -> Tensor:
            x = m.norm1(x + m.attn(x))
            return m.norm2(x + m.ffn(x))

        norm = lambda: nn.LayerNorm(WIDTH)  # noqa: E731
        return Body(forward, attn=attention, ffn=gelu_ffn, norm1=norm, norm2=norm)

    return Stack(block(), block())


@model(*SITES, activation="gelu")
def parallel_attention_and_ffn() -> nn.Module:
    def block() -> nn.Module:
        body = lambda m, x: x + m.attn(h := m.norm(x)) + m.ffn(h)  # noqa: E731
        return Body(body, attn=attention, ffn=gelu_ffn, norm=lambda: nn.LayerNorm(WIDTH))

    return Stack(block(), block())


@model(exact=False, note="one projection for attention and FFN; may be refused")
def parallel_with_one_projection() -> nn.Module:
    def block() -> nn.Module:
        def forward(m: Any, x: Tensor) -> Tensor:
            q, k, v, h = m.into(m.norm(x)).split([WIDTH, WIDTH, WIDTH, HIDDEN], dim=-1)
            y = F.scaled_dot_product_attention(q, k, v)
            return x + m.out(torch.cat([y, F.gelu(h)], dim=-1))

        return Body(
            forward, into=(WIDTH, 3 * WIDTH + HIDDEN), out=(WIDTH + HIDDEN, WIDTH), norm=lambda: nn.LayerNorm(WIDTH)
        )

    return Stack(block(), block())


@model("blocks.0.first", "blocks.0.second", "blocks.1.first", "blocks.1.second", activation="silu")
def macaron() -> nn.Module:
    def block() -> nn.Module:
        def half() -> nn.Module:
            return Body(lambda m, x: 0.5 * m.down(F.silu(m.up(m.norm(x)))), **PAIR, norm=lambda: nn.LayerNorm(WIDTH))

        def forward(m: Any, x: Tensor) -> Tensor:
            x = x + m.first(x)
            x = x + m.attn(x)
            return m.norm(x + m.second(x))

        return Body(forward, first=half, second=half, attn=attention, norm=lambda: nn.LayerNorm(WIDTH))

    return Stack(block(), block())


@model("blocks.0", "blocks.0", "blocks.1", "blocks.1", count=4, activation="relu", note="the linears lie side by side")
def two_ffns_in_one_module() -> nn.Module:
    def block() -> nn.Module:
        body = lambda m, x: x + m.b(F.relu(m.a(m.n(x)))) + m.d(F.relu(m.c(m.n(x))))  # noqa: E731
        return Body(body, a=UP, b=DOWN, c=UP, d=DOWN, n=lambda: nn.LayerNorm(WIDTH))

    return Stack(block(), block())


@model(*SITES, activation="gelu")
def layer_scale() -> nn.Module:
    def ffn() -> nn.Module:
        return Body(lambda m, x: m.gamma * m.down(F.gelu(m.up(x))), **PAIR, gamma=weight(WIDTH))

    return Stack(Block(ffn=ffn()), Block(ffn=ffn()))


@model(*SITES, activation="relu")
def output_masked() -> nn.Module:
    def ffn() -> nn.Module:
        return Body(lambda m, x: m.down(F.relu(m.up(x))) * (x.sum(-1, keepdim=True) > 0), **PAIR)

    return Stack(Block(ffn=ffn()), Block(ffn=ffn()))


@model(*SITES, activation="gelu", note="whole branches are dropped at random in training")
def stochastic_depth() -> nn.Module:
    def ffn() -> nn.Module:
        def forward(m: Any, x: Tensor) -> Tensor:
            y = m.down(F.gelu(m.up(x)))
            return y * x.new_empty(x.shape[0], 1, 1).bernoulli_(0.9).div_(0.9) if m.training else y

        return Body(forward, **PAIR)

    return Stack(Block(ffn=ffn()), Block(ffn=ffn()))


@model(*SITES, activation="gelu", note="what is dropped at random is so small that outputs hardly tell")
def stochastic_depth_behind_tiny_layer_scale() -> nn.Module:
    def ffn() -> nn.Module:
        def forward(m: Any, x: Tensor) -> Tensor:
            y = 2e-5 * m.down(F.gelu(m.up(x)))
            return y * (torch.rand(x.shape[0], 1, 1) > 0.1) / 0.9 if m.training else y

        return Body(forward, **PAIR)

    return Stack(Block(ffn=ffn()), Block(ffn=ffn()))


@model(*SITES, activation="gelu", note="whole layers are skipped by a Python comparison in training")
def layer_drop() -> nn.Module:
    def block() -> nn.Module:
        def forward(m: Any, x: Tensor) -> Tensor:
            if m.training and torch.rand(()) < 0.1:
                return x
            return x + m.ffn(m.norm(x))

        return Body(forward, ffn=gelu_ffn, norm=lambda: nn.LayerNorm(WIDTH))

    return Stack(block(), block())


@model("cls", count=1, activation="relu")
def only_on_first_token() -> nn.Module:
    return Body(lambda m, x: m.head(m.cls(x[:, 0]) + x.mean(1)), cls=relu_ffn, head=(WIDTH, OUTPUTS))


@model("ffn", count=1, activation="relu", note="the number of rows depends on the values")
def only_on_selected_tokens() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        chosen = x.sum(-1) > 0
        return m.head(torch.zeros_like(x).masked_scatter(chosen.unsqueeze(-1), m.ffn(x[chosen])))

    return Body(forward, ffn=relu_ffn, head=(WIDTH, OUTPUTS))


@model("ffn", count=1, activation="relu", note="selects no row at all")
def on_no_token() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        chosen = x.sum(-1) > 1e6
        return m.head(x).sum(1) + m.ffn(x[chosen]).sum(0)[:OUTPUTS]

    return Body(forward, ffn=relu_ffn, head=(WIDTH, OUTPUTS))


@model("ffn", count=1, activation="relu", note="all rows of the input share their memory")
def on_an_expanded_input() -> nn.Module:
    return Body(lambda m, x: x + m.ffn(x[:, :1].expand_as(x)), ffn=relu_ffn)


@model("ffn", count=1, activation="relu", inputs=lambda b: (torch.randn(1, WIDTH),), fixed_batch=True)
def single_row_overwritten() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.ffn(x)
        y += 1.0
        return y

    return Body(forward, ffn=relu_ffn)


@model("ffn", count=1, activation="relu", inputs=lambda b: (*sequence(b), torch.tensor([0, 3, 1])))
def on_gathered_tokens() -> nn.Module:
    return Body(lambda m, x, places: m.head(m.ffn(x.index_select(1, places))), ffn=relu_ffn, head=(WIDTH, OUTPUTS))


# Names and containers ------------------------------------------------------------------------------------------------


@model("zoo-keeper.7 of 9", "zoo-keeper.été", count=2, activation="gelu")
def awkward_names() -> nn.Module:
    children = nn.ModuleDict({"7 of 9": gelu_ffn(), "été": gelu_ffn()})
    root = Body(
        lambda m, x: m.head(x + sum(f(m.norm(x)) for f in getattr(m, "zoo-keeper").values())), head=(WIDTH, OUTPUTS)
    )
    root.add_module("norm", nn.LayerNorm(WIDTH))
    root.add_module("zoo-keeper", children)
    return root


@model("class.0", "class.1", count=2, activation="gelu", untraceable="torch.fx cannot write a name that is a keyword")
def keyword_names() -> nn.Module:
    root = Body(lambda m, x: m.head(m._modules["class"](x)), head=(WIDTH, OUTPUTS))
    root.add_module("class", nn.Sequential(relu_like(), relu_like()))
    return root


def relu_like() -> nn.Module:
    """Return a residual GELU FFN with its own norm."""
    return Body(lambda m, x: x + m.down(F.gelu(m.up(m.norm(x)))), **PAIR, norm=lambda: nn.LayerNorm(WIDTH))


@model("blocks.0.ffn", "blocks.1.ffn", activation="gelu")
def names_of_graph_internals() -> nn.Module:
    def ffn() -> nn.Module:
        body = lambda m, x: getattr(m, "output")(F.gelu(getattr(m, "placeholder")(x)))  # noqa: B009, E731
        return Body(body, placeholder=UP, output=DOWN)

    return Stack(Block(ffn=ffn()), Block(ffn=ffn()))


@model("moe", "moe_1", count=2, activation="gelu", note="names that a rewrite may want for itself")
def names_of_rewritten_modules() -> nn.Module:
    body = lambda m, x: m.head(m.moe_1(x + m.moe(x)))  # noqa: E731
    return Body(body, moe=relu_like, moe_1=relu_like, head=(WIDTH, OUTPUTS))


@model("experts.0.moe", "experts.0.router", count=2, activation="gelu")
def names_of_rewritten_modules_nested() -> nn.Module:
    inner = Body(lambda m, x: m.router(x + m.moe(x)), moe=relu_like, router=relu_like)
    root = Body(lambda m, x: m.head(m.experts[0](x)), head=(WIDTH, OUTPUTS))
    root.add_module("experts", nn.ModuleList([inner]))
    return root


@model("layers.first.mlp", "layers.second.mlp", count=2, activation="relu")
def ordered_dict_of_layers() -> nn.Module:
    def mlp() -> nn.Module:
        parts = OrderedDict(fc1=nn.Linear(*UP), act=nn.ReLU(), drop=nn.Dropout(0.1), fc2=nn.Linear(*DOWN))
        return nn.Sequential(OrderedDict(norm=nn.LayerNorm(WIDTH), mlp=nn.Sequential(parts)))

    layers = nn.Sequential(OrderedDict(first=mlp(), second=mlp()))
    return Body(lambda m, x: m.head(m.layers(x)), layers=lambda: layers, head=(WIDTH, OUTPUTS))


@model("up.0", "up.1", count=2, activation="gelu", note="first and second linears in lists of their own", exact=False)
def linears_in_parallel_lists() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        for up, down, norm in zip(m.up, m.down, m.norm, strict=True):
            x = x + down(F.gelu(up(norm(x))))
        return x

    lists = {"up": UP, "down": DOWN}
    root = Body(forward, norm=lambda: nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2)))
    for name, shape in lists.items():
        root.add_module(name, nn.ModuleList(nn.Linear(*shape) for _ in range(2)))
    return root


@model("0", "1", count=2, activation="gelu")
def activation_module_shared() -> nn.Module:
    act, drop = nn.GELU(), nn.Dropout(0.1)
    layers = [nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(*UP), act, drop, nn.Linear(*DOWN)) for _ in range(2)]
    return nn.Sequential(*layers)


@model(count=2, activation="relu", note="parameters lie at the top of the model")
def parameters_at_top() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = F.layer_norm(x + F.linear(F.relu(F.linear(x, m.a1, m.ab)), m.a2), (WIDTH,))
        return F.linear(F.relu(F.linear(x, m.b1)), m.b2, m.bb)

    shapes = {"a1": (HIDDEN, WIDTH), "ab": (HIDDEN,), "a2": (WIDTH, HIDDEN)}
    shapes |= {"b1": (HIDDEN, WIDTH), "b2": (WIDTH, HIDDEN), "bb": (WIDTH,)}
    return Body(forward, **{name: weight(*shape) for name, shape in shapes.items()})


# Sharing -------------------------------------------------------------------------------------------------------------


@model("shared.ffn", count=1, alternatives=(3,), activation="gelu", note="ALBERT: one block run three times")
def block_repeated() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        for _ in range(3):
            x = m.shared(x)
        return m.head(m.norm(x))

    shared = Block(attn=attention(), ffn=gelu_ffn())
    return Body(forward, shared=lambda: shared, norm=lambda: nn.LayerNorm(WIDTH), head=(WIDTH, OUTPUTS))


@model(count=1, alternatives=(2,), activation="gelu")
def ffn_module_shared_by_blocks() -> nn.Module:
    ffn = gelu_ffn()
    return Stack(Block(attn=attention(), ffn=ffn), Block(attn=attention(), ffn=ffn))


@model(count=1, alternatives=(2,), activation="gelu", note="two modules hold the same parameters")
def parameters_shared_by_blocks() -> nn.Module:
    first, second = gelu_ffn(), gelu_ffn()
    for name in ("up", "down"):
        getattr(second, name).weight = getattr(first, name).weight
        getattr(second, name).bias = getattr(first, name).bias
    return Stack(Block(ffn=first), Block(ffn=second))


@model(count=1, alternatives=(0, 2), activation="gelu", exact=False, note="weights shared, biases not")
def weights_shared_biases_not() -> nn.Module:
    first, second = gelu_ffn(), gelu_ffn()
    for name in ("up", "down"):
        getattr(second, name).weight = getattr(first, name).weight
    return Stack(Block(ffn=first), Block(ffn=second))


@model(count=1, alternatives=(0, 2), exact=False, note="the same weights with two activations")
def weights_shared_activations_not() -> nn.Module:
    first, second = gelu_ffn(), relu_ffn()
    second.up, second.down = first.up, first.down
    return Stack(Block(ffn=first), Block(ffn=second))


@model(count=1, alternatives=(0, 2), exact=False, note="only the first linear is shared")
def first_linear_shared_across_blocks() -> nn.Module:
    first, second = relu_ffn(), relu_ffn()
    second.up = first.up
    return Stack(Block(ffn=first), Block(ffn=second))


@model(
    "encoder.ffn",
    count=1,
    alternatives=(2,),
    activation="gelu",
    inputs=lambda b: (*sequence(b), torch.randn(b, 3, WIDTH)),
)
def siamese() -> nn.Module:
    encoder = Block(attn=attention(), ffn=gelu_ffn())
    return Body(lambda m, a, b: m.encoder(a).mean(1) - m.encoder(b).mean(1), encoder=lambda: encoder)


@model("ffn", count=1, alternatives=(TOKENS,), activation="relu", note="called for each token of a Python loop")
def called_for_each_token() -> nn.Module:
    body = lambda m, x: torch.stack([m.ffn(x[:, t]) for t in range(TOKENS)], dim=1)  # noqa: E731
    return Body(body, ffn=relu_ffn)


@model("ffn", count=1, alternatives=(2,), activation="relu", note="called for each half of the tokens")
def called_in_chunks() -> nn.Module:
    body = lambda m, x: m.head(torch.cat([m.ffn(part) for part in x.split([2, 3], dim=1)], 1))  # noqa: E731
    return Body(body, ffn=relu_ffn, head=(WIDTH, OUTPUTS))


@model("ffn", count=1, alternatives=(2,), activation="relu", note="its own output is its next input")
def called_on_its_own_output() -> nn.Module:
    return Body(
        lambda m, x: m.head(m.norm(m.ffn(m.ffn(x)))),
        ffn=relu_ffn,
        norm=lambda: nn.LayerNorm(WIDTH),
        head=(WIDTH, OUTPUTS),
    )


class _Language(nn.Module):
    """A causal language model; `tied` gives the head the embedding's weight."""

    def __init__(self, ffn: Callable[[], nn.Module], *, tied: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, WIDTH)
        self.positions = nn.Parameter(torch.randn(TOKENS, WIDTH) * 0.1)
        self.blocks = nn.ModuleList(Block(attn=attention(), ffn=ffn()) for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 11, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.embed(ids) + self.positions[: ids.shape[1]]
        if mask is not None:
            x = x * mask.unsqueeze(-1)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


@model(*SITES, activation="gelu", inputs=tokens)
def language_model_tied() -> nn.Module:
    return _Language(gelu_ffn, tied=True)


@model(*SITES, activation="silu", gated=True, inputs=tokens)
def language_model_untied() -> nn.Module:
    return _Language(swiglu_ffn, tied=False)


# Inputs and outputs --------------------------------------------------------------------------------------------------


class Output(NamedTuple):
    """A named tuple as an output."""

    scores: Tensor
    hidden: Tensor


@dataclass
class Result:
    """A dataclass as an output."""

    scores: Tensor
    hidden: Tensor | None = None


torch.export.register_dataclass(Result, serialized_type_name="tests.zoo.Result")

OUTPUT_KINDS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "tuple": lambda y, x: (y, x),
    "list": lambda y, x: [y, x],
    "dict": lambda y, x: {"scores": y, "hidden": x},
    "nested": lambda y, x: {"scores": (y, [x]), "none": None},
    "named_tuple": Output,
    "dataclass": Result,
    "dataclass_with_none": Result,
    "input_as_output": lambda y, x: (y, x),
    "constant_as_output": lambda y, x: (y, torch.ones(2), 3, "text", None),
    "parameter_free": lambda y, x: (y.argmax(-1), y > 0, y),
}


def _with_output(kind: str, make: Callable[..., Any]) -> None:
    def forward(m: Any, x: Tensor) -> Any:
        y = m.stack(x)
        if kind == "dataclass_with_none":
            return make(y)
        return make(y, x if kind == "input_as_output" else y.relu())

    def build() -> nn.Module:
        stack = Stack(Block(ffn=relu_ffn()), Block(ffn=relu_ffn()))
        return randomize(Body(forward, stack=lambda: stack)).eval()

    required = tuple(f"stack.{site}" for site in SITES)
    CASES.add(Case(name=f"output_{kind}", build=build, inputs=sequence, required=required, activation="relu"))


for _kind, _make in OUTPUT_KINDS.items():
    _with_output(_kind, _make)


@model(*SITES, activation="gelu", inputs=lambda b: {"ids": tokens(b)["ids"], "mask": None})  # type: ignore[call-overload]
def none_as_input() -> nn.Module:
    return _Language(gelu_ffn, tied=False)


@model(*SITES, activation="gelu", inputs=lambda b: {**tokens(b), "mask": torch.ones(b, TOKENS)})  # type: ignore[dict-item]
def mask_as_input() -> nn.Module:
    return _Language(gelu_ffn, tied=False)


class _KeywordOnly(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ffn, self.other = relu_ffn(), swiglu_ffn()

    def forward(self, *, x: Tensor, scale: float = 1.0, flip: bool = False, mode: str = "sum") -> Tensor:
        y = self.ffn(x) * scale + self.other(x.flip(1) if flip else x)
        return y.sum(1) if mode == "sum" else y


@model("ffn", "other", inputs=lambda b: {"x": torch.randn(b, TOKENS, WIDTH)})
def keyword_only_inputs() -> nn.Module:
    return _KeywordOnly()


@model(
    "ffn", "other", inputs=lambda b: {"x": torch.randn(b, TOKENS, WIDTH), "scale": 0.5, "flip": True, "mode": "none"}
)
def numbers_flags_and_strings_as_inputs() -> nn.Module:
    return _KeywordOnly()


@model("ffn", count=1, activation="relu", inputs=lambda b: ([torch.randn(b, WIDTH), {"a": torch.randn(b, WIDTH)}],))
def nested_inputs() -> nn.Module:
    return Body(lambda m, xs: m.ffn(xs[0] + xs[1]["a"]), ffn=relu_ffn)


@model("ffn", count=1, activation="relu", inputs=lambda b: (torch.randn(b, WIDTH), torch.randn(b, WIDTH), None))
def positional_none_input() -> nn.Module:
    return Body(lambda m, x, y, z: m.ffn(x - y) if z is None else z, ffn=relu_ffn)


class _Variadic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ffn = relu_ffn()

    def forward(self, *xs: Tensor, **more: Tensor) -> Tensor:
        return self.ffn(sum(xs)) + sum(more.values())


@model("ffn", count=1, activation="relu", inputs=lambda b: (torch.randn(b, WIDTH), torch.randn(b, WIDTH)))
def variadic_inputs() -> nn.Module:
    return _Variadic()


@model("ffn", count=1, activation="relu", inputs=lambda b: {"a": torch.randn(b, WIDTH), "b": torch.randn(b, WIDTH)})
def variadic_keyword_inputs() -> nn.Module:
    body = lambda m, **xs: m.ffn(xs["a"] * xs["b"])  # noqa: E731
    return Body(body, ffn=relu_ffn)


@model("ffn", count=1, activation="relu", inputs=lambda b: (torch.randn(b, WIDTH), torch.randn(4, WIDTH)))
def second_input_without_batch() -> nn.Module:
    return Body(lambda m, x, memory: m.ffn(torch.softmax(x @ memory.T, -1) @ memory), ffn=relu_ffn)


@model("ffn", count=1, activation="relu", inputs=lambda b: (torch.randn(TOKENS, b, WIDTH),))
def batch_second() -> nn.Module:
    return Body(lambda m, x: m.ffn(x).mean(0), ffn=relu_ffn)


@model(
    "ffn", count=1, activation="relu", inputs=lambda b: (torch.randint(0, 9, (b, TOKENS)), torch.rand(b, TOKENS) > 0.3)
)
def boolean_mask_input() -> nn.Module:
    def forward(m: Any, ids: Tensor, keep: Tensor) -> Tensor:
        return m.ffn(m.embed(ids).masked_fill(~keep.unsqueeze(-1), 0.0))

    return Body(forward, embed=lambda: nn.Embedding(9, WIDTH), ffn=relu_ffn)


# Number formats, modes and regions -----------------------------------------------------------------------------------


@model(
    *SITES,
    activation="gelu",
    half=torch.float64,
    inputs=lambda b: (torch.randn(b, TOKENS, WIDTH, dtype=torch.float64),),
)
def float64() -> nn.Module:
    return Stack(Block(attn=attention(), ffn=gelu_ffn()), Block(ffn=gelu_ffn()))


@model(
    *SITES, activation="silu", gated=True, half=torch.bfloat16, tolerance=5e-2,
    inputs=lambda b: (torch.randn(b, TOKENS, WIDTH, dtype=torch.bfloat16),),
)  # fmt: skip
def bfloat16() -> nn.Module:
    return Stack(Block(attn=attention(), ffn=swiglu_ffn()), Block(ffn=swiglu_ffn()))


@model(
    *SITES, activation="gelu", half=torch.float16, tolerance=1e-2,
    inputs=lambda b: (torch.randn(b, TOKENS, WIDTH, dtype=torch.float16),),
)  # fmt: skip
def float16() -> nn.Module:
    return Stack(Block(ffn=gelu_ffn()), Block(ffn=gelu_ffn()))


@model(*SITES, activation="gelu", tolerance=5e-2, note="the FFN in bfloat16, the rest in float32")
def mixed_number_formats() -> nn.Module:
    def ffn() -> nn.Module:
        body = Body(lambda m, x: m.down(F.gelu(m.up(x.bfloat16()))).float(), **PAIR)
        return body.to(torch.bfloat16)

    return Stack(Block(ffn=ffn()), Block(ffn=ffn()))


@model(
    *SITES, activation="gelu", tolerance=5e-2, half=torch.bfloat16,
    inputs=lambda b: (torch.randn(b, TOKENS, WIDTH, dtype=torch.bfloat16),),
    note="the activation in float32, the rest in bfloat16",
)  # fmt: skip
def activation_in_float32() -> nn.Module:
    def ffn() -> nn.Module:
        return Body(lambda m, x: m.down(F.gelu(m.up(x).float()).to(x.dtype)), **PAIR)

    return Stack(Block(ffn=ffn()), Block(ffn=ffn()))


@model(exact=False, tolerance=5e-2, note="a region of lower precision; may be refused")
def autocast() -> nn.Module:
    def ffn() -> nn.Module:
        def forward(m: Any, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return m.down(F.gelu(m.up(x))).float()

        return Body(forward, **PAIR)

    return Stack(Block(ffn=ffn()), Block(ffn=ffn()))


@model(*SITES, activation="gelu", note="an autocast region that is switched off")
def autocast_disabled() -> nn.Module:
    def ffn() -> nn.Module:
        def forward(m: Any, x: Tensor) -> Tensor:
            with torch.autocast("cpu", enabled=False):
                return m.down(F.gelu(m.up(x)))

        return Body(forward, **PAIR)

    return Stack(Block(ffn=ffn()), Block(ffn=ffn()))


@model(
    "ffn", activation="gelu", exact=False, note="a frozen backbone without gradients, whose FFNs may be found as well"
)
def no_grad_backbone() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = m.backbone(x)
        return m.head(m.ffn(x))

    parts: dict[str, Any] = {"backbone": lambda: Block(ffn=gelu_ffn()), "ffn": gelu_ffn, "head": (WIDTH, OUTPUTS)}
    return Body(forward, **parts)


@model(*SITES, activation="gelu", note="every block runs without gradients")
def no_grad_everywhere() -> nn.Module:
    stack = Stack(Block(ffn=gelu_ffn()), Block(ffn=gelu_ffn()))
    stack.forward = torch.no_grad()(stack.forward)  # type: ignore[method-assign]
    return stack


@model(*SITES, activation="gelu")
def detached_input() -> nn.Module:
    def ffn() -> nn.Module:
        return Body(lambda m, x: m.down(F.gelu(m.up(x.detach()))), **PAIR)

    return Stack(Block(ffn=ffn()), Block(ffn=ffn()))


@model(*SITES, activation="gelu")
def checkpointed() -> nn.Module:
    def ffn() -> nn.Module:
        return Body(lambda m, x: checkpoint(m.inner, x, use_reentrant=False), inner=gelu_ffn)

    return Stack(Block(ffn=ffn()), Block(ffn=ffn()))


@model(*SITES, activation="gelu", note="checkpointed only in training, the older way")
def checkpointed_reentrant() -> nn.Module:
    def ffn() -> nn.Module:
        def forward(m: Any, x: Tensor) -> Tensor:
            return checkpoint(m.inner, x, use_reentrant=True) if m.training and x.requires_grad else m.inner(x)

        return Body(forward, inner=gelu_ffn)

    return Stack(Block(ffn=ffn()), Block(ffn=ffn()))


@model(*SITES, activation="gelu")
def frozen() -> nn.Module:
    return Stack(Block(ffn=gelu_ffn()), Block(ffn=gelu_ffn())).requires_grad_(False)


@model(*SITES, activation="gelu", note="a hook doubles what the FFN returns")
def hook_on_output() -> nn.Module:
    ffn = gelu_ffn()
    ffn.register_forward_hook(lambda module, args, output: 2 * output)
    return Stack(Block(ffn=ffn), Block(ffn=gelu_ffn()))


@model(*SITES, activation=None, note="a hook halves the hidden values")
def hook_on_hidden() -> nn.Module:
    def ffn() -> nn.Module:
        inner = Body(lambda m, x: m.down(m.act(m.up(x))), **PAIR, act=nn.GELU)
        inner.act.register_forward_hook(lambda module, args, output: 0.5 * output)
        return inner

    return Stack(Block(ffn=ffn()), Block(ffn=ffn()))


@model(*SITES, activation="gelu", note="buffers: one saved, one not, one that counts calls")
def buffers() -> nn.Module:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stack = Stack(Block(ffn=gelu_ffn()), Block(ffn=gelu_ffn()))
            self.blocks = self.stack.blocks
            self.register_buffer("calls", torch.zeros((), dtype=torch.long))
            self.register_buffer("shift", torch.randn(WIDTH), persistent=False)
            self.register_buffer("average", torch.zeros(WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                self.calls += 1
                self.average.mul_(0.9).add_(0.1 * x.detach().mean((0, 1)))
            return self.stack(x + self.shift - self.average)

    return Counting()


@model(
    "2", "5", count=2, activation="relu", inputs=lambda b: (torch.randn(b, WIDTH),), note="batch norms around the FFNs"
)
def batch_norm_around() -> nn.Module:
    return nn.Sequential(
        nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), relu_ffn(), nn.BatchNorm1d(WIDTH), nn.Identity(), relu_ffn()
    )  # fmt: skip


@model("ffn", count=1, activation="relu", note="the batch norm uses the batch's statistics in evaluation too")
def batch_norm_without_running_statistics() -> nn.Module:
    norm = lambda: nn.BatchNorm1d(WIDTH, track_running_stats=False)  # noqa: E731
    return Body(lambda m, x: m.ffn(m.norm(x.mT).mT), norm=norm, ffn=relu_ffn)


@model(
    "ffn", count=1, activation="relu", note="weights are standardised by a batch norm that is always in training mode"
)
def convolution_with_standardized_weight() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        w = m.conv.weight
        standard = F.batch_norm(w.flatten(1).unsqueeze(0), None, None, training=True, momentum=0.0).view_as(w)
        return m.ffn(F.conv1d(x.mT, standard, m.conv.bias).mT)

    return Body(forward, conv=lambda: nn.Conv1d(WIDTH, WIDTH, 3, padding=1), ffn=relu_ffn)


@model("ffn", count=1, activation="relu")
def instance_norm() -> nn.Module:
    return Body(lambda m, x: m.ffn(m.norm(x.mT).mT), norm=lambda: nn.InstanceNorm1d(WIDTH, affine=True), ffn=relu_ffn)


@model("ffn", count=1, activation="relu", inputs=lambda b: (torch.randn(b, 3, 16, 16),))
def convolutional_stem() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(m.norm(m.conv(x))), 2).flatten(2).mT
        return m.head(x + m.ffn(x)).mean(1)

    return Body(
        forward,
        conv=lambda: nn.Conv2d(3, WIDTH, 3),
        norm=lambda: nn.BatchNorm2d(WIDTH),
        ffn=relu_ffn,
        head=(WIDTH, OUTPUTS),
    )


@model("ffn", count=1, activation="relu")
def recurrent_stem() -> nn.Module:
    return Body(
        lambda m, x: m.ffn(m.lstm(x)[0]),
        lstm=lambda: nn.LSTM(WIDTH, WIDTH, 2, batch_first=True, dropout=0.1),
        ffn=relu_ffn,
    )


@model("ffn", count=1, activation="relu")
def complex_numbers_around() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        z = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
        turned = torch.view_as_real(z * torch.polar(torch.ones_like(z.real), z.real)).flatten(2)
        return m.ffn(turned + torch.fft.fft(x, dim=1).real)

    return Body(forward, ffn=relu_ffn)


@model("ffn", count=1, activation="relu", note="a plain tensor attribute, neither parameter nor buffer")
def tensor_attribute() -> nn.Module:
    body = Body(lambda m, x: m.ffn(x * m.compute_scale), ffn=relu_ffn)
    object.__setattr__(body, "compute_scale", torch.rand(WIDTH))
    return body


# torch.nn's own layers and wrappers ------------------------------------------------------------------------------------


def _encoder(**options: Any) -> nn.Module:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, HIDDEN, **{"batch_first": True, **options})
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "relu": ("relu", {}),
    "gelu": ("gelu", {"activation": "gelu"}),
    "norm_first": ("relu", {"norm_first": True}),
    "norm_first_gelu_no_bias": ("gelu", {"norm_first": True, "activation": F.gelu, "bias": False}),
    "silu": ("silu", {"activation": F.silu}),
    "batch_second": ("relu", {"batch_first": False}),
}
for _kind, (_activation, _options) in ENCODERS.items():
    CASES.add(
        Case(
            name=f"torch_encoder_{_kind}",
            build=lambda options=_options: randomize(_encoder(**options)).eval(),  # type: ignore[misc]
            inputs=sequence,
            required=("layers.0", "layers.1"),
            activation=_activation,
        )
    )


@model("layers.0", "layers.1", activation="relu", inputs=lambda b: {
    "src": torch.randn(b, TOKENS, WIDTH), "src_key_padding_mask": torch.arange(TOKENS).expand(b, -1) >= 4,
})  # fmt: skip
def torch_encoder_padded() -> nn.Module:
    return _encoder()


@model(
    "layers.0",
    "layers.1",
    activation="relu",
    inputs=lambda b: (torch.randn(b, TOKENS, WIDTH), torch.randn(b, 3, WIDTH)),
)
def torch_decoder() -> nn.Module:
    return nn.TransformerDecoder(nn.TransformerDecoderLayer(WIDTH, HEADS, HIDDEN, batch_first=True), 2)


@model(count=4, activation="gelu", inputs=lambda b: (torch.randn(b, TOKENS, WIDTH), torch.randn(b, 3, WIDTH)))
def torch_transformer() -> nn.Module:
    return nn.Transformer(WIDTH, HEADS, 2, 2, HIDDEN, activation="gelu", batch_first=True)


@model("ffn", count=1, activation="relu")
def torch_multihead_attention() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        attended, weights = m.attn(x, x, x, need_weights=True)
        return m.ffn(x + attended) + weights.mean()

    return Body(forward, attn=lambda: nn.MultiheadAttention(WIDTH, HEADS, batch_first=True), ffn=relu_ffn)


@model(*SITES, activation="gelu", note="the model is a torch.fx graph of modules")
def symbolically_traced() -> nn.Module:
    class Ffn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.act, self.down = nn.Linear(*UP), nn.GELU(), nn.Linear(*DOWN)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.act(self.up(x)))

    return torch.fx.symbolic_trace(Stack(Block(ffn=Ffn()), Block(ffn=Ffn())))


@model(exact=False, note="the model is an exported program's module")
def exported() -> nn.Module:
    stack = Stack(Block(ffn=relu_ffn()), Block(ffn=relu_ffn())).eval()
    free = {0: torch.export.Dim.AUTO}
    program = torch.export.export(stack, sequence(2), dynamic_shapes=(free,), strict=False)
    return _AlwaysEval(program.module(check_guards=False))


class _AlwaysEval(nn.Module):
    """Hide that exported modules refuse `eval()`."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def train(self, mode: bool = True) -> _AlwaysEval:
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


@model(*SITES, activation="relu", note="submodules are compiled")
def compiled_submodule() -> nn.Module:
    return Stack(Block(ffn=torch.compile(relu_ffn(), backend="eager")), Block(ffn=relu_ffn()))


@model(*SITES, activation="relu", note="the model was deep-copied after sharing an activation")
def deep_copied() -> nn.Module:
    return copy.deepcopy(Stack(Block(ffn=relu_ffn()), Block(ffn=relu_ffn())))


@model(
    "expert.0", "expert.1", count=2, activation="silu", gated=True, note="a dense mixture: experts are FFNs, all run"
)
def dense_mixture() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        share = torch.softmax(m.router(x), dim=-1)
        return sum(expert(x) * share[..., i : i + 1] for i, expert in enumerate(m.expert))

    root = Body(forward, router=(WIDTH, 2))
    root.add_module("expert", nn.ModuleList([swiglu_ffn(), swiglu_ffn()]))
    return root


@model("mix.0", "mix.1", count=2, activation="relu2", note="RWKV's channel mixing: relu² inside a sigmoid gate")
def channel_mixing() -> nn.Module:
    def mix() -> nn.Module:
        def forward(m: Any, x: Tensor) -> Tensor:
            shifted = F.pad(x, (0, 0, 1, -1))
            k, r = x * m.mk + shifted * (1 - m.mk), x * m.mr + shifted * (1 - m.mr)
            return x + torch.sigmoid(m.r(r)) * m.down(torch.square(F.relu(m.up(k))))

        scale = lambda: nn.Parameter(torch.rand(WIDTH))  # noqa: E731
        return Body(forward, **PAIR, r=(WIDTH, WIDTH), mk=scale, mr=scale)

    root = Body(lambda m, x: m.mix[1](m.mix[0](x)))
    root.add_module("mix", nn.ModuleList([mix(), mix()]))
    return root


@model(count=0, inputs=rows)
def one_linear_only() -> nn.Module:
    return nn.Linear(WIDTH, OUTPUTS)


@model(count=0, inputs=rows)
def no_linear() -> nn.Module:
    return nn.Sequential(nn.LayerNorm(WIDTH), nn.ReLU())


@model(count=0, inputs=rows, note="a BERT pooler with its classifier")
def pooler_and_classifier() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Dropout(0.1), nn.Linear(WIDTH, OUTPUTS))


@model(count=0, note="one dense linear for each side of an attention")
def attention_only() -> nn.Module:
    return Stack(Block(attn=attention()), Block(attn=attention()))


@model("ffn", count=1, untraceable="what it runs depends on the values of the input")
def data_dependent_branch() -> nn.Module:
    return Body(lambda m, x: m.ffn(x) if x.sum() > 0 else x, ffn=relu_ffn)

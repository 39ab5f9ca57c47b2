"""The recommended recipe on other text than it was chosen on: MiniLM on newspaper editorials, or tweets.

As it is on editorials, where only the epochs of router training were chosen, and on tweets with the settings that it
finds in half an hour:

    pip install ".[examples]"
    python examples/reviews.py editorials --of editorials
    python examples/frontier/held_out.py work examples/frontier/results
    python examples/reviews.py tweets --of tweets
    python examples/frontier/held_out.py work examples/frontier/results --data tweets --budget-minutes 30

trains the dense model, runs `surgeon apply --recipe recommended` and `surgeon sweep`, and writes held_out.json and
held_out.png, or held_out_tweets. What is done is not done again, and a recipe that was stopped goes on.
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


def train_dense(out: Path, of: str) -> None:
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
    parser.add_argument("--data", default=DATA, help="the folder that reviews.py wrote")
    parser.add_argument("--budget-minutes", type=float, help="let the recipe find its settings within this time")
    args = parser.parse_args()
    args.results.mkdir(parents=True, exist_ok=True)
    name = "held-out" if args.data == DATA else f"held-out-{Path(args.data).name}"
    dense, made = args.work / name / "dense", args.work / name / "recommended"
    if not dense.exists():
        train_dense(dense, args.data)
    data = ("--data", args.data, "--task", sentiment.TASK, "--max-length", LENGTH)
    if not made.exists():
        resume = ("--resume",) if made.with_name(f"{made.name}.work").exists() else ()
        search = () if args.budget_minutes is None else ("--budget-minutes", args.budget_minutes)
        run("apply", dense, "--recipe", "recommended", *data, *search, *resume, "-o", made)
    to = args.results / name.replace("-", "_")
    taus = "0,0.02,0.05,0.1,0.15,0.2,0.3,0.4,0.5,0.7"
    run("sweep", made, *data, "--tau", taus, "-o", f"{to}.json", "-o", f"{to}.png")


if __name__ == "__main__":
    main()

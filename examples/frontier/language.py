"""A GPT of about 10 million parameters on the source of Python's standard library: loss against cost.

python examples/frontier/language.py work            # GELU, made ReLU
python examples/frontier/language.py work --gated    # a llama, its SiLU gates made ReLU gates
"""

from __future__ import annotations

import random
import sys
import sysconfig
from functools import cache
from pathlib import Path
from typing import Any

import torch
from study import main
from torch import Tensor, nn
from variants import Study, Variant, recipe, without_training

from surgeon.data.batch import Batch
from surgeon.data.data import Data
from surgeon.passes import Lower, Moeify, Pass, Recover, Rotate, Sparsify, SparsifyInputs, SwapActivation

VOCABULARY, LENGTH, BATCH = 2048, 128, 16
TRAIN_TOKENS, EVAL_TOKENS = 2_000_000, 32_768
EPOCH = TRAIN_TOKENS // LENGTH // BATCH
# Optimiser steps of 2,048 tokens: of dense training, of fine-tuning, and of ours with experts skipped.
DENSE, TUNING, RECOVERY = 500, 150, 50
WIDTH, LAYERS, HEADS = 320, 6, 5
LR = 1e-3
FINE_TUNING: dict[str, Any] = {"lr": LR / 2, "steps": TUNING, "weight_decay": 0.1}
PUBLISHED: dict[str, Any] = {"split": "weights", "router": "trained", "router_width": 128, "steps": 100}
TAUS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
# Without training, the shares of inputs that all layers skip alike: feed-forward layers alone, and every linear layer.
LAYERS_ONLY, FFN_TAUS, WHOLE_TAUS = ("*.mlp.*",), (0.3, 0.5, 0.6, 0.7, 0.8), (0.2, 0.3, 0.4, 0.5, 0.6)


@cache
def tokens() -> tuple[Tensor, Tensor]:
    """Token ids to train on and of held-out files, [N, LENGTH] each: every twentieth file is held out."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"site-packages", "dist-packages", "test", "tests", "lib2to3", "idlelib"}
    files = sorted(file for file in root.rglob("*.py") if not left_out & set(file.relative_to(root).parts))
    random.Random(0).shuffle(files)
    texts = [file.read_text(encoding="utf-8", errors="replace") for file in files]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts[1::10], trainer)
    parts: tuple[list[int], list[int]] = ([], [])
    for place, text in enumerate(texts):
        # Of a held-out file only the first tokens, so that many files are looked at.
        part, enough, most = (
            (parts[0], TRAIN_TOKENS, None) if place % 20 else (parts[1], EVAL_TOKENS, EVAL_TOKENS // 32)
        )
        if len(part) < enough:
            part += tokenizer.encode(text).ids[:most][: enough - len(part)]
    return tuple(torch.tensor(part[: len(part) // LENGTH * LENGTH]).view(-1, LENGTH) for part in parts)


class Chunks:
    """Batches in another order in each epoch, which follows from the seed."""

    def __init__(self, rows: Tensor, seed: int) -> None:
        self.rows, self.seed, self.epoch = rows, seed, 0

    def __iter__(self) -> Any:
        order = torch.randperm(len(self.rows), generator=torch.Generator().manual_seed(self.seed + self.epoch))
        self.epoch += 1
        for chosen in order.split(BATCH):
            yield Batch((), {"input_ids": self.rows[chosen]})

    def __len__(self) -> int:
        return -(-len(self.rows) // BATCH)


def data(seed: int) -> Data:
    train, held = tokens()
    return Data(
        Chunks(train, seed), [Batch((), {"input_ids": rows}) for rows in held.split(BATCH)], task="causal-lm",
        description="Python's standard library",
    )  # fmt: skip


def inputs(data: Data) -> dict[str, Tensor]:
    return {"input_ids": tokens()[1][:2]}


def gpt(seed: int) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, resid_pdrop=0.0,
            embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False, bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip


def llama(seed: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=864, num_hidden_layers=LAYERS,
            num_attention_heads=HEADS, max_position_embeddings=LENGTH, use_cache=False, bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip


def ours(**sparsify: Any) -> list[Pass[Any]]:
    return [
        SwapActivation(),
        Sparsify(**FINE_TUNING, **sparsify),
        Moeify(expert_size=16, steps=60),
        Recover(lr=LR / 4, steps=RECOVERY, weight_decay=0.1, tau=0.3),
        Lower(),
    ]


def with_inputs(passes: list[Pass[Any]], *turned: Rotate) -> list[Pass[Any]]:
    """Ours, and every other linear layer skips inputs: experts where there is an activation, inputs elsewhere."""
    *before, moeify, recover, lower = passes
    return [*before, *turned, moeify, SparsifyInputs(), recover, lower]


def study(gated: bool) -> Study:
    return Study(
        name="code_gated" if gated else "code",
        task="causal-lm",
        keep=1.01,
        data=data,
        model=llama if gated else gpt,
        inputs=inputs,
        dense={"epochs": DENSE / EPOCH, "lr": LR, "weight_decay": 0.1, "schedule": "cosine"},
        longer={"epochs": (TUNING + RECOVERY) / EPOCH, "lr": LR / 2, "weight_decay": 0.1, "schedule": "linear"},
        variants={
            "ours": Variant(
                ours(target=0.15 if gated else 0.1), TAUS, budgets=(0.46,), oracle=True
            ),
            "moefication": Variant(
                [
                    SwapActivation(**FINE_TUNING),
                    Moeify(expert_size=16, **PUBLISHED, objective="activation", rule="top_k"),
                    Lower(),
                ],
                (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8),
            ),
            "d2dmoe": Variant(
                [
                    SwapActivation(),
                    Sparsify(alpha=1e-4, **FINE_TUNING),
                    Moeify(expert_size=16, **PUBLISHED, objective="norm"),
                    Lower(),
                ],
                TAUS,
                oracle=True,
            ),
            "ours_inputs": Variant(
                with_inputs(ours(target=0.15 if gated else 0.1)), budgets=(0.36, 0.32, 0.28)
            ),
            # The same in the principal components of the stream.
            "ours_rotated": Variant(
                with_inputs(ours(target=0.15 if gated else 0.1), Rotate()), budgets=(0.36, 0.3, 0.25, 0.21, 0.18)
            ),
            "untrained": Variant([Moeify(expert_size=16, epochs=0), Lower()], TAUS),
            "cmoe": Variant(recipe("cmoe"), (0.0, 0.15, 0.3, 0.5, 0.65, 0.72, 0.79, 0.86, 0.93)),
            **without_training(LAYERS_ONLY, FFN_TAUS, WHOLE_TAUS, tuned=False),
        },
        calibration_batches=2,
    )  # fmt: skip


if __name__ == "__main__":
    gated = "--gated" in sys.argv
    if gated:
        sys.argv.remove("--gated")
    main(study(gated))

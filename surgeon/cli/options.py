"""Options that several commands share, each with its help text."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from surgeon.cli import completion


class OutputMode(StrEnum):
    """The format of answers."""

    rich = "rich"
    plain = "plain"
    json = "json"


# Options of every command.
Output = Annotated[
    OutputMode | None,
    typer.Option("--output", help="Output format: rich (default on a terminal), plain (default when piped) or json."),
]
Verbose = Annotated[
    int, typer.Option("--verbose", "-v", count=True, show_default=False, help="Show the log; give it twice for more.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Hide progress.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]

# Options of commands that read a model.
Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A Hugging Face directory, a .pt2, .pt or .safetensors file, a directory that surgeon saved, or "
        "module:function (file.py:function) that returns a module.",
        show_default=False,
    ),
]
Saved = Annotated[Path, typer.Argument(metavar="DIR", help="A directory that surgeon saved.", show_default=False)]
PassList = Annotated[
    str | None,
    typer.Option(
        "--passes",
        metavar="A,B,...",
        help="Passes in order, separated by commas.",
        show_default=False,
        autocompletion=completion.passes,
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="PASS.OPTION=VALUE",
        help="Set an option of a pass, for example moeify.experts=16.",
        autocompletion=completion.settings,
    ),
]
InputsOption = Annotated[
    str | None,
    typer.Option("--inputs", metavar="X", help="Example inputs: a file of tensors, or module:function."),
]
TrustPickle = Annotated[
    bool, typer.Option("--trust-pickle", help="Load a pickled module, which runs code from the file.")
]
TrustModules = Annotated[
    list[str] | None,
    typer.Option(
        "--trust-module",
        metavar="M",
        help="Import this Python module first. An exported program or a saved surgery may use output classes and "
        "operators that it registers.",
    ),
]
Arch = Annotated[
    str | None,
    typer.Option(
        "--arch",
        metavar="A",
        help="Architecture of a state dict: a model type such as gpt2, a config.json, or module:function.",
    ),
]
TaskName = Literal[
    "causal-lm", "masked-lm", "seq2seq-lm", "audio-classification", "sequence-classification", "token-classification",
    "question-answering", "image-classification", "ctc", "speech-seq2seq", "feature-extraction", "classification",
    "imitate",
]  # fmt: skip
Task = Annotated[
    TaskName | None,
    typer.Option(
        "--task",
        metavar="T",
        help="Task: causal-lm, masked-lm, seq2seq-lm, sequence-classification, token-classification, "
        "question-answering, image-classification, audio-classification, ctc, speech-seq2seq, feature-extraction, "
        "classification, or imitate, which trains for the dense model's outputs and needs no labels. By default the "
        "model's class decides.",
    ),
]
# Options of commands that read data, by the field of `DataOptions` that each sets.
DATA_OPTIONS: dict[str, Any] = {
    "spec": Annotated[
        str | None,
        typer.Option(
            "--data",
            metavar="D",
            help="A JSONL, CSV, Parquet or text file, a folder of images or sounds, a saved dataset, or "
            "module:function.",
            show_default=False,
        ),
    ],
    "text": Annotated[
        str | None, typer.Option("--text", metavar="COLUMN", help="The column with the text, image or sound.")
    ],
    "label": Annotated[
        str | None,
        typer.Option(
            "--label",
            metavar="COLUMN",
            help="The column with the class (a number from 0 or a name), the tags, the answer or the text to write.",
        ),
    ],
    "task": Task,
    "batch_size": Annotated[int, typer.Option("--batch-size", help="Samples in a batch.")],
    "max_length": Annotated[
        int, typer.Option("--max-length", help="Cut texts after this many tokens, or as many as the model takes.")
    ],
    "limit": Annotated[int | None, typer.Option("--limit", help="Read at most this many rows of each split.")],
    "eval_fraction": Annotated[
        float,
        typer.Option("--eval-fraction", help="Share of the data held out to measure quality, if it has one split."),
    ],
    "seed": Annotated[
        int | None,
        typer.Option("--seed", help="Random seed for order and held-out data.  [default: that of the surgery]"),
    ],
}


# Options of commands that measure or change a saved surgery.
DenseModel = Annotated[
    str | None,
    typer.Option("--dense", metavar="MODEL", help="The model before the surgery, to compare with."),
]
Out = Annotated[
    Path | None,
    typer.Option("--out", "-o", metavar="DIR", help="Directory for the result; by default it replaces DIR."),
]
Taus = Annotated[
    str | None,
    typer.Option(
        "--tau",
        metavar="T,T,...",
        help="Values of tau; 0, at which everything runs, is added. By default up to 0.5, for top_k up to 0.95.",
    ),
]
Rules = Annotated[
    str | None,
    typer.Option(
        "--rule",
        metavar="R,R,...",
        help="Selection rules: max, cumulative, energy, top_k. By default the stored ones.",
        autocompletion=completion.list_of(completion.RULES),
    ),
]
Files = Annotated[
    list[Path] | None,
    typer.Option("--out", "-o", metavar="FILE", help="Also write the numbers (.json) or a picture (.png, .svg, .pdf)."),
]

# Options of benchmarks: which layers, and how they are timed.
Tokens = Annotated[str, typer.Option("--tokens", metavar="N,N,...", help="Numbers of tokens in a call.")]
Share = Annotated[str, typer.Option("--share", metavar="S,S,...", help="Shares of the experts that are selected.")]
Size = Annotated[str, typer.Option("--size", metavar="N,N,...", help="Neurons in an expert; must divide --hidden.")]
Width = Annotated[int, typer.Option("--width", help="Width of inputs and outputs.")]
Hidden = Annotated[int | None, typer.Option("--hidden", help="Width of the hidden layer.  [default: 4 times --width]")]
Dtype = Annotated[
    str,
    typer.Option(
        "--dtype",
        metavar="D,D,...",
        help="Data types: float32, bfloat16, float16.",
        autocompletion=completion.list_of(completion.DTYPES),
    ),
]
Gated = Annotated[bool, typer.Option("--gated", help="Use a gated layer, with three matrices.")]
Threads = Annotated[int, typer.Option("--threads", help="CPU threads to use.")]
Device = Annotated[
    str | None,
    typer.Option(
        "--device",
        help="cpu or cuda.  [default: cuda if available]",
        autocompletion=completion.one_of(completion.DEVICES),
    ),
]

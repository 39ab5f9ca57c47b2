"""`surgeon generate`: let a converted language model write text, timed beside the dense model."""

# The annotations are read when commands are made, so they are not postponed.
from pathlib import Path
from typing import Annotated

import typer

from surgeon.cli.app import Run, command


@command(order=94)
def generate(
    run: Run,
    model: Annotated[
        Path, typer.Argument(metavar="DIR", help="A saved surgery or an exported model.", show_default=False)
    ],
    prompt: Annotated[str, typer.Argument(help="The text to continue.", show_default=False)],
    *,
    tau: Annotated[
        str | None,
        typer.Option("--tau", metavar="T,T,...", help="Values of tau to compare, beside 0.  [default: as stored]"),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Tokens to generate.")] = 64,
    sample: Annotated[bool, typer.Option("--sample", help="Draw tokens at random instead of the likeliest.")] = False,
    temperature: Annotated[float, typer.Option("--temperature", min=0.01, help="Of --sample.")] = 1.0,
    chat: Annotated[bool, typer.Option("--chat", help="Take the prompt as a message to a chat model.")] = False,
    dense: Annotated[
        Path | None,
        typer.Option(
            "--dense", metavar="D", help="The dense model to compare with. By default the one the surgery started from."
        ),
    ] = None,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Timed runs of each setting, in turns.")] = 3,
    seed: Annotated[int, typer.Option("--seed", help="Random seed.")] = 0,
) -> None:
    """Continue a text with a converted language model, with its key-value cache, and show tokens per second.

    The dense model is timed in the same run, in turns. The last column says how many tokens from the start are the
    same as the dense model's.

    Example: surgeon generate gpt2-surgery "Once upon a time" --tau 0.05,0.1,0.2
    """
    from surgeon.jobs import generate as generating
    from surgeon.jobs.sweep import parse_taus
    from surgeon.render.generate import generate_view

    chosen = parse_taus(tau) or ()
    options = generating.GenerateOptions(max_new_tokens, sample, temperature, seed, chat, rounds)
    opened = generating.open_generator(model, dense, stage=run.screen.stage)
    found = generating.generate(opened, prompt, chosen, options, stage=run.screen.stage)
    run.screen.show(generate_view(found))
    run.answer(found)

"""`surgeon load`: what tokens run, layer by layer, and which tokens run many."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import surgeon

from .harness import NET, Run, answer_in

REVIEWS = ("--data", "reviews.csv", "--eval-fraction", "0")


def test_every_layer_has_its_distribution(run: Run, tmp_path: Path) -> None:
    result = run("load", "bert-moe", *REVIEWS, "--tau", "0.9", "-o", "a.json", "-o", "a.png", "--output", "json")
    assert result.code == 0, result.err
    found = result.json
    assert set(found) == {"model", "data", "tau", "layers", "shown", "notes"}
    assert [layer["path"] for layer in found["layers"]] == list(found["tau"])
    assert list(found["tau"].values()) == pytest.approx([0.9, 0.9])
    swept = run("-q", "sweep", "bert-moe", *REVIEWS, "--tau", "0.9", "--no-oracle", "--output", "json").json
    shares = swept["points"][-1]["shares"]
    for layer in found["layers"]:
        assert sum(layer["histogram"]) == layer["tokens"]
        assert layer["executed"]["mean"] / layer["experts"] == pytest.approx(shares[layer["path"]])
        assert layer["neurons"] == 32
    assert answer_in((tmp_path / "a.json").read_text()) == found
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert set(surgeon.get_tau(surgeon.load("bert-moe")).values()) == {0.0}  # nothing is stored


def test_tokens_of_a_text_are_shown_with_their_loads(run: Run) -> None:
    args = ("-q", "load", "bert-moe", "--tau", "0.9", "--map-text", "the film was dull", "-o", "a.png")
    shown = run(*args)
    assert shown.code == 0, shown.err
    assert re.match(r"the \S+%  film \S+%  was \S+%  dull \S+%", shown.out)
    found = run(*args, "--output", "json").json
    assert (found["data"], found["layers"], found["shown"]["rows"]) == (None, [], 0)
    assert found["shown"]["texts"] == ["the", "film", "was", "dull"]
    graph = surgeon.load("bert-moe")
    surgeon.set_tau(graph, 0.9)
    tokenizer = transformers.AutoTokenizer.from_pretrained("bert")
    loads = surgeon.token_load(graph, dict(tokenizer(["the film was dull"], return_tensors="pt")))
    assert found["shown"]["loads"] == pytest.approx(loads[0].tolist())
    (note,) = run("-q", "load", "bert-moe", "--map-text", "a", "--output", "json").json["notes"]
    assert note == "tau is 0, at which everything runs. Give another one with --tau."


def test_patches_of_an_image_are_drawn(run: Run, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4,
    )  # fmt: skip
    transformers.ViTForImageClassification(config).save_pretrained("vit")
    made = run("-q", "apply", "--passes", "moeify,lower", "vit", "--set", "moeify.experts=4", "-o", "vit-moe")
    assert made.code == 0, made.err
    pixels = np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save("a.png")
    found = run("-q", "load", "vit-moe", "--tau", "0.8", "--map-image", "a.png", "-o", "map.png", "--output", "json")
    assert found.code == 0, found.err
    shown = found.json["shown"]
    graph = surgeon.load("vit-moe")
    surgeon.set_tau(graph, 0.8)
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
    loads = surgeon.token_load(graph, {"pixel_values": image})[0]
    assert (shown["rows"], len(loads)) == (4, 17)
    assert shown["loads"] == pytest.approx(loads[1:].tolist())  # without the class token
    assert (tmp_path / "map.png").stat().st_size > 5000


def test_what_has_no_map_is_refused(run: Run, tmp_path: Path) -> None:
    Image.new("L", (8, 8)).save("a.png")
    (tmp_path / "no.png").write_text("no picture")
    assert run("-q", "apply", "--passes", "moeify", *NET, "-o", "net", "--set", "moeify.experts=4").code == 0
    for options, words in (
        (("bert-moe",), "There is nothing to run. Give data with --data, or a sample with --map-text or --map-image."),
        (("bert-moe", "--map-text", "a", "--map-image", "a.png"), "Give --map-text or --map-image, not both."),
        (("bert-moe", "--map-image", "a.png"), "--map-image is drawn. Give a .png file with -o."),
        (("bert-moe", "--map-image", "a.png", "-o", "b.png"), "bert-moe does not take images [B, C, H, W]"),
        (("bert-moe", "--map-image", "none.png", "-o", "b.png"), "none.png"),
        (("net", "--map-text", "a"), "net has no tokenizer, so it takes no text."),
        (("bert", "--map-text", "a"), "The model has no layers that skip, so no token has a load."),
    ):
        result = run("-q", "load", *options)
        assert (result.code, result.out) == (2, ""), (options, result.err)
        assert words in result.err

"""`surgeon bench`: the benchmarks, each in a module of its own."""

from surgeon.cli.app import group

bench = group("bench", order=100, help="Time a layer or a saved surgery, or predict times on a GPU.")

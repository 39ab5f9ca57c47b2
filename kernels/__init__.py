"""Kernels of the dynamic-k FFN. `import surgeon.kernels.dynamic_k` registers the operators.

| what | where |
| --- | --- |
| the operators: schemas, checks, autograd, autocast, FLOP counts | `dynamic_k` |
| thresholds: the rules that say which experts a token needs | `selection` |
| weights of experts, and what selection means | `experts` |
| the table of activations | `activations` |
| what a backend offers, and the list of backends | `backends` |
| the general backend, in torch code: every device, dtype and activation | `torch/` |
| native kernels for processors, C++ built on the machine where they run | `cpu/` |
| kernels for GPUs, in Triton | `triton/` |
| what the ways through a layer should cost on a GPU, by which `triton/` chooses | `gpu_model/` |

To add a backend: a folder `<name>/` with a module `backend` that has a `BACKEND = Backend(takes, forward, ...)`, as
`backends` describes it, and a test in tests/kernels/. It is found by its place. `cpu/backend.py` is the shortest one.

To add an activation: a line in `activations.ACTIVATIONS` and its definition in tests/kernels/oracle.py. Fast kernels
that do not know it leave it to torch, and a warning says so once. They know those of `cpu/activations.inc` (a line is
all) and of `triton/elementwise.py` (the name, the function, its gradient).

Nothing is imported here: Hugging Face's `transformers` imports a top-level package named `kernels` when it finds one,
and finds this folder when Python runs from the root of the repository.
"""

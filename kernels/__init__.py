"""Kernels of the dynamic-k FFN. `import surgeon.kernels.dynamic_k` registers the operators.

| what | where |
| --- | --- |
| the operators: schemas, checks, autograd, autocast, FLOP counts | `dynamic_k` |
| thresholds: the rules that say which experts a token needs | `selection` |
| weights of experts, and what selection means | `experts` |
| experts with 8-bit weights: the operator, its arguments, how weights are stored | `int8`, `int8_arguments`, `panels` |
| the functions of routers | `scores` |
| the table of activations | `activations` |
| what a backend offers, and the list of backends | `backends` |
| linear layers that read only the inputs that matter: the operators, the definition | `sparse_linear` |
| gated layers that compute only the neurons that their gate keeps: the operators, the definition | `sparse_neurons` |
| the general backend, in torch code: every device, dtype and activation | `torch/` |
| libraries that are built on this machine: cache, lock, checksum, compiler | `building` |
| native kernels for CPUs, in C++ built on the machine where they run | `cpu/` |
| the operator with 8-bit weights for OpenVINO, with the same kernels | `openvino/` |
| kernels for GPUs, in Triton | `triton/` |
| a cost model of the ways to compute a layer on a GPU, by which `triton/` chooses | `gpu_model/` |

To add a backend, add a folder `<name>/` and a test in tests/kernels/. The folder has a module `backend` with a
`BACKEND = Backend(takes, forward, ...)`, as `backends` describes it. It is found by its place. `cpu/backend.py` is the
shortest example.

To add an activation, add a line to `activations.ACTIVATIONS` and its definition to tests/kernels/oracle.py. Fast
kernels that do not know it leave it to torch and warn once. They know the activations of `cpu/activations.inc` (one
line each) and of `triton/elementwise.py` (the name, the function and its gradient).

Nothing is imported here: Hugging Face's `transformers` imports a top-level package named `kernels` when it finds one,
and finds this folder when Python runs from the root of the repository.
"""

"""Graphs as bytes, with the shapes and module paths of their nodes.

torch.fx pickles the generated code, and traces it again when it is read, which loses the metadata of all nodes. PyTorch
has a second way, made for its compiler's cache, which keeps them.
"""

from __future__ import annotations

import importlib
from typing import cast

from torch.fx import GraphModule

from surgeon.errors import SaveError, first_line

# torch's own way is imported where it is used: it brings its compilers along, which take longer than torch itself.

# Where the graph was traced: no pass reads it, and some of it cannot be pickled.
_LEFT_OUT = ("from_node", "stack_trace", "torch_fn", "source_fn_stack", "fwd_source_fn_stack", "tensor_meta")


def dumps(graph: GraphModule) -> bytes:
    """Return a graph with everything in it, its tensors too, as bytes.

    Raises:
        SaveError: something in it cannot be pickled.
    """
    from torch.fx._graph_pickler import GraphPickler, Options

    kept = Options(ops_filter=None, node_metadata_key_filter=lambda key: key not in _LEFT_OUT)
    try:
        return GraphPickler.dumps(graph, kept)
    except Exception as error:
        raise SaveError(
            f"The graph cannot be pickled: {first_line(error)}. Save the surgery with Surgery.save, or the weights "
            "with graph.state_dict()."
        ) from error


def loads(content: bytes) -> GraphModule:
    """Read what `dumps` wrote. Like every pickle, it can run code: read only what you wrote yourself."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx._graph_pickler import GraphPickler
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    importlib.import_module("surgeon.kernels.dynamic_k")  # registers the operators that the graph may run
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    graph = cast("GraphModule", GraphPickler.loads(content, mode))
    for module in graph.modules():
        if isinstance(module, GraphModule):
            module.recompile()
    return graph

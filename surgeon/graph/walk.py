"""Walk over a graph from a node, forward to its users or back to its inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch.fx import Node


def walk_users(start: Node, through: Callable[[Node], bool]) -> Iterator[Node]:
    """Yield once each the users of `start`, and the users of every visited node for which `through` is true.

    `start` itself is not yielded. The order is depth first: after all users of a node come the users of the last of
    them. `through` is called after a node was yielded, so it may depend on what the caller did with the node.
    """
    stack, seen = [start], {start}
    while stack:
        for user in stack.pop().users:
            if user not in seen:
                seen.add(user)
                yield user
                if through(user):
                    stack.append(user)


def walk_sources(start: Node, through: Callable[[Node], bool] = lambda _: True) -> Iterator[Node]:
    """Yield once each `start`, and the inputs of every visited node for which `through` is true.

    The order is depth first: the last input of a node comes next, with everything it reads. `through` is called after a
    node was yielded, so it may depend on what the caller did with the node.
    """
    stack, seen = [start], set()
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        yield node
        if through(node):
            stack.extend(node.all_input_nodes)

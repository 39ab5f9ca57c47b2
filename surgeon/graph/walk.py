"""Walk over a graph, from a node to all that read it or to all that it reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch.fx import Node


def walk_users(start: Node, through: Callable[[Node], bool]) -> Iterator[Node]:
    """Yield the users of `start`, and the users of every node met that `through` lets pass: each node once.

    `start` is not among them. Depth first: of the users of a node the last one's own users come next, after all users
    of the node. `through` is asked about a node after it was yielded, so it may depend on what the caller did with it.
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
    """Yield `start`, and the inputs of every node met that `through` lets pass: each node once.

    Depth first: the last input of a node comes next, with all that it reads. `through` is asked about a node after it
    was yielded, so it may depend on what the caller did with it.
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

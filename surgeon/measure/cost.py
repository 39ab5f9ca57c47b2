"""What a call of a model costs, and what each of its layers that skip ran."""

from __future__ import annotations

from dataclasses import dataclass

from surgeon.json_values import Plain


@dataclass
class LayerRun:
    """What one expert layer ran.

    pairs, ran: the number of expert-token pairs, and how many of them ran. multiply_adds, executed_multiply_adds:
    those of all pairs, and of the pairs that ran; filling neurons do not count. tokens: the number of tokens.
    computed: multiply-adds of the experts that a counter saw, filling, padding and samples that had left included.
    per_token: multiply-adds of the router, or of a gate, per token. gate: those of the gate alone, which the dense
    layer has too. seconds: time spent in the experts.
    """

    pairs: int = 0
    ran: int = 0
    multiply_adds: int = 0
    executed_multiply_adds: int = 0
    computed: int = 0
    tokens: int = 0
    per_token: int = 0
    gate: int = 0
    seconds: float = 0.0

    @property
    def share(self) -> float:
        """Share of the experts' multiply-adds that ran. If experts are equally large, it is the share of the pairs."""
        return self.executed_multiply_adds / self.multiply_adds if self.multiply_adds else 1.0


@dataclass(frozen=True)
class Cost(Plain):
    """The cost of one call of the model on the example inputs.

    parameters: the number of parameters, tied ones counted once. multiply_adds: multiply-adds if every expert runs.
    executed_multiply_adds: multiply-adds that ran, including routers, attention and head.
    executed: the share of the experts' multiply-adds that ran, None without experts.
    uncounted: the names of ops that multiply but have no formula. Their multiply-adds are left out.
    """

    parameters: int
    multiply_adds: int
    executed_multiply_adds: int
    executed: float | None = None
    uncounted: tuple[str, ...] = ()

    @property
    def notes(self) -> tuple[str, ...]:
        """What to say about the numbers."""
        if not self.uncounted:
            return ()
        return (f"The multiply-adds leave out {', '.join(self.uncounted)}: there is no formula.",)

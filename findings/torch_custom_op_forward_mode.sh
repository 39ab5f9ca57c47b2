#!/usr/bin/env bash
# torch 2.13.0: forward-mode derivatives of a custom op are zero, without an error, although its backward formula is
# registered and right.
#
# One would guess an error: built-in operators without a forward formula raise one ("Trying to use forward AD with ...
# that does not support it"), and an autograd.Function without `jvp` does too. An operator of torch.library.custom_op
# with register_autograd is made of such a Function, but it is only entered when an input requires grad. In jvp, jacfwd
# and with dual numbers no input does: the tangents are dropped, and the derivative of x * x at 1 is 0. backward gives 2.
#
# Whoever takes Hessians by jacfwd over jacrev, or Jacobian-vector products, through a fused kernel meets this. What
# helps: an implementation for the Autograd key that computes with plain operators while a forward-mode level is open.
#
# Output seen:
#     torch 2.13.0+cpu
#     backward 2.0
#     jvp 0.0
#     jacfwd 0.0
#     an autograd.Function without jvp: NotImplementedError
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6

"$folder/venv/bin/python" - <<'PYTHON'
import sys
import warnings

import torch
from torch.func import jacfwd, jvp

warnings.simplefilter("ignore")


@torch.library.custom_op("demo::square", mutates_args=())
def square(x: torch.Tensor) -> torch.Tensor:
    return x * x


square.register_fake(torch.empty_like)
square.register_autograd(
    lambda ctx, grad: 2 * grad * ctx.saved_tensors[0],
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[0]),
)


class Square(torch.autograd.Function):
    @staticmethod
    def forward(x):
        return x * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad * ctx.saved_tensors[0]


one, leaf = torch.ones(()), torch.ones((), requires_grad=True)
found = {
    "backward": torch.autograd.grad(square(leaf), leaf)[0].item(),
    "jvp": jvp(square, (one,), (one,))[1].item(),
    "jacfwd": jacfwd(square)(one).item(),
}
print("torch", torch.__version__)
for name, value in found.items():
    print(name, value)
try:
    jvp(Square.apply, (one,), (one,))
    raised = "nothing"
except NotImplementedError as error:
    raised = type(error).__name__
print("an autograd.Function without jvp:", raised)
seen = found == {"backward": 2.0, "jvp": 0.0, "jacfwd": 0.0} and raised == "NotImplementedError"
sys.exit(0 if seen else "This has changed: the note at the top of the file no longer holds.")
PYTHON

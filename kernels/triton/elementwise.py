"""Activation functions and their vector-Jacobian products, for use inside kernels. Everything is fp32.

They follow `surgeon.kernels.activations`, also for NaN: `where` keeps it, but a maximum would not.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: N803, SIM108
# Triton gives parameters their types when it compiles; the only annotation it reads is `constexpr`, and those are
# constants. Conditions on them decide what is compiled, so each is a statement of its own.

import triton
import triton.language as tl

ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "quick_gelu", "silu", "relu2", "identity")
"""The activations of `activate` and `activate_backward`. All are 0 at 0, so neurons that pad a tile add nothing."""


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """act(z)."""
    if ACTIVATION == "relu":
        a = tl.where(z < 0.0, 0.0, z)
    elif ACTIVATION == "relu2":
        a = tl.where(z < 0.0, 0.0, z * z)
    elif ACTIVATION == "gelu":
        a = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh u) / 2 is the logistic function of 2u.
        a = z * tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
    elif ACTIVATION == "quick_gelu":
        a = z * tl.sigmoid(1.702 * z)
    elif ACTIVATION == "silu":
        a = z * tl.sigmoid(z)
    else:
        tl.static_assert(ACTIVATION == "identity")
        a = z
    return a


@triton.jit
def gated_activation(up, z, gate, ACTIVATION: tl.constexpr):
    """act(z) · up, or act(up) if `gate` is None. Nothing else about `gate` matters."""
    if gate is not None:
        h = activate(z, ACTIVATION) * up
    else:
        h = activate(up, ACTIVATION)
    return h


@triton.jit
def activate_backward(grad, z, ACTIVATION: tl.constexpr):
    """grad · act'(z)."""
    if ACTIVATION == "relu":
        g = tl.where(z <= 0.0, 0.0, grad)
    elif ACTIVATION == "relu2":
        g = 2.0 * grad * tl.where(z < 0.0, 0.0, z)
    elif ACTIVATION == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * z * z)
        g = grad * (0.5 * (1.0 + tl.erf(z * 0.7071067811865476)) + z * density)
    elif ACTIVATION == "gelu_tanh":
        s = tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
        g = grad * (s + z * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * z * z))
    elif ACTIVATION == "quick_gelu":
        s = tl.sigmoid(1.702 * z)
        g = grad * (s + 1.702 * z * s * (1.0 - s))
    elif ACTIVATION == "silu":
        s = tl.sigmoid(z)
        g = grad * s * (1.0 + z * (1.0 - s))
    else:
        tl.static_assert(ACTIVATION == "identity")
        g = grad
    return g


@triton.jit
def gated_backward(grad, up, z, gate, ACTIVATION: tl.constexpr):
    """The gradients of `up` and `z` in `gated_activation`. If `gate` is None, that of `z` is meaningless."""
    if gate is not None:
        up_gradient = grad * activate(z, ACTIVATION)
        z_gradient = activate_backward(grad * up, z, ACTIVATION)
    else:
        up_gradient = activate_backward(grad, up, ACTIVATION)
        z_gradient = up_gradient
    return up_gradient, z_gradient

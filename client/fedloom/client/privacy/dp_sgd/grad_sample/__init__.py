"""Per-example gradients of adapter parameters in one backward pass.

Autograd would sum the gradient over the batch. Here the layers that own a trained parameter run through functions
that keep the layer's input and its output gradient on a tape and give autograd no gradient for the parameter. What
the tape then has, or can form, is what Opacus's `DPOptimizer` reads: a gradient of shape (batch, *parameter.shape).

`layers` says how each kind of layer is recorded and how another is added; a few kinds that only Opacus knows go
through its hooks. A parameter whose gradient mixes examples (prompt tokens, batch norm) would be clipped wrongly in
silence, so everything that is on neither list is refused by name.
"""

from fedloom.client.privacy.dp_sgd.grad_sample.experts import inside, routers
from fedloom.client.privacy.dp_sgd.grad_sample.hooks import hooked
from fedloom.client.privacy.dp_sgd.grad_sample.layers import (
    LAYERS,
    is_rms_norm,
    product,
    rule,
    scale,
    shift,
    sparse_product,
)
from fedloom.client.privacy.dp_sgd.grad_sample.recording import recording
from fedloom.client.privacy.dp_sgd.grad_sample.tape import Tape

__all__ = [
    "LAYERS",
    "Tape",
    "hooked",
    "inside",
    "is_rms_norm",
    "product",
    "recording",
    "routers",
    "rule",
    "scale",
    "shift",
    "sparse_product",
]

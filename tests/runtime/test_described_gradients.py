"""What a description calls differentiable has a gradient, and nothing else has."""

from registry import ops
from runtime.call import autograd, backward


def test_every_differentiable_tensor_of_the_forward_has_a_gradient():
    described = {t.public for t in ops.get("fwd").tensors if t.differentiable}
    assert described == {"q", "k", "v", "sink", *backward.GRADIENT_OF.values()}


def test_every_op_with_gradients_names_who_computes_them():
    named = {op.backward for op in map(ops.get, ops.OPS) if op.backward}
    assert named == set(autograd.GRADIENTS)

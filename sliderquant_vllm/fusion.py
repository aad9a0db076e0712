"""A pass over the compiled graph of a served model: a quantizer becomes one op with the layer before it.

Inductor runs it where vLLM lets users put passes of their own, behind vLLM's. It sees RMSNorm and SiluAndMul as what
they are made of, or RMSNorm as an op of vLLM's IR. What it does not know it leaves as it is: slower, and as right.
"""

from __future__ import annotations

import inspect
import operator
import sys
from typing import Any, ClassVar

import torch
from torch import fx

from sliderquant_vllm.compat import InductorPass

aten, convert = torch.ops.aten, torch.ops.prims.convert_element_type.default
HALVES = (torch.bfloat16, torch.float16)


class NoMatch(Exception):
    """The graph is not what was looked for."""


class QuantizerFusion(InductorPass):
    """Replaces ``quantize_per_token`` behind RMSNorm or SiluAndMul by the op that does both.

    The uuid, which compiled graphs are cached under, is a hash of this source.
    """

    fused: ClassVar[dict[str, int]] = {}  # op -> how often it was put into a graph by this process

    def __call__(self, graph: fx.Graph) -> None:
        places = {node: place for place, node in enumerate(graph.nodes)}
        quantizers = graph.find_nodes(
            op="call_function", target=torch.ops.sliderquant.quantize_per_token.default, sort=True
        )
        for quantizer in quantizers:
            source = quantizer.args[0]
            if len(source.users) > 1:  # something else needs it in 16 bits
                continue
            for fuse in (_silu_mul, _rms_norm, _add_rms_norm, _rms_norm_of_ir):
                try:
                    target, inputs, sums = fuse(source)
                except (NoMatch, ValueError):  # also where an op has other arguments than here
                    continue
                # Behind its last input: whatever needs a result comes after that.
                last = max((node for node in inputs if isinstance(node, fx.Node)), key=places.__getitem__)
                with graph.inserting_after(last):
                    fused = graph.call_function(target, (*inputs, *quantizer.args[1:]))
                places[fused] = places[last]
                if sums:
                    with graph.inserting_after(fused):
                        total = graph.call_function(operator.getitem, (fused, 4))
                    total.meta["val"] = _value(sums[0])
                    places[total] = places[last]
                    for node in sums:
                        node.replace_all_uses_with(total)
                quantizer.replace_all_uses_with(fused)
                _erase_unused(graph, [quantizer, *sums])
                name = target._schema.name.partition("::")[2]
                self.fused[name] = self.fused.get(name, 0) + 1
                break

    def uuid(self) -> str:
        return self.hash_source(inspect.getsource(sys.modules[__name__]))


def _erase_unused(graph: fx.Graph, nodes: list[fx.Node]) -> None:
    """Erase nodes that nothing takes any more, and what they were made of."""
    while nodes:
        node = nodes.pop()
        if node.op == "call_function" and not node.users and not node._erased:
            nodes.extend(node.all_input_nodes)
            graph.erase_node(node)


def _arguments(node: Any, target: Any) -> tuple:
    """The positional arguments of a call of ``target``."""
    _expect(isinstance(node, fx.Node), getattr(node, "target", None) is target)
    _expect(not node.kwargs)
    return node.args


def _expect(*conditions: bool) -> None:
    if not all(conditions):
        raise NoMatch


def _value(node: Any) -> torch.Tensor:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    _expect(isinstance(value, torch.Tensor))
    return value


def _widened(node: fx.Node) -> fx.Node:
    """The 16-bit tensor that became this one in fp32."""
    source, dtype = _arguments(node, convert)
    _expect(dtype is torch.float32, _value(source).dtype in HALVES, _value(source).dim() == 2)
    return source


def _silu_mul(source: fx.Node) -> tuple[Any, tuple, list[fx.Node]]:
    """``silu(x[:, :half]) * x[:, half:]``"""
    activated, up = _arguments(source, aten.mul.Tensor)
    quotient, dtype = _arguments(activated, convert)
    wide, denominator = _arguments(quotient, aten.div.Tensor)
    exponential, one = _arguments(denominator, aten.add.Tensor)
    (negative,) = _arguments(*_arguments(exponential, aten.exp.default), aten.neg.default)
    gate = _widened(wide)
    x, dim, begin, half = _arguments(gate, aten.slice.Tensor)
    of_up, up_dim, middle, end = _arguments(up, aten.slice.Tensor)
    _expect(negative is wide, one == 1, of_up is x, dim == up_dim == 1, begin == 0, middle == half)
    _expect(dtype is _value(x).dtype, _value(x).shape[1] == 2 * half, end >= 2 * half)
    return torch.ops.sliderquant.silu_mul_quantize.default, (x,), []


def _norm(source: fx.Node) -> tuple[fx.Node, fx.Node, float]:
    """(fp32 rows, weight, epsilon) of a norm of the rows that is rounded before the weight."""
    rounded, weight = _arguments(source, aten.mul.Tensor)
    scaled, dtype = _arguments(rounded, convert)
    wide, factor = _arguments(scaled, aten.mul.Tensor)
    mean, epsilon = _arguments(*_arguments(factor, aten.rsqrt.default), aten.add.Tensor)
    squares, dims, keep = _arguments(mean, aten.mean.dim)
    base, exponent = _arguments(squares, aten.pow.Tensor_Scalar)
    _expect(base is wide, exponent == 2, list(dims) in ([-1], [1]), keep is True, isinstance(epsilon, float))
    _expect(dtype in HALVES, _value(source).dtype is dtype)
    _check_weight(weight, _value(wide), dtype)
    return wide, weight, epsilon


def _check_weight(weight: fx.Node, rows: torch.Tensor, dtype: torch.dtype) -> None:
    value = _value(weight)
    _expect(value.dtype is dtype, value.dim() == 1, rows.dim() == 2)
    _expect(value.shape[0] == rows.shape[1])


def _rms_norm(source: fx.Node) -> tuple[Any, tuple, list[fx.Node]]:
    wide, weight, epsilon = _norm(source)
    x = _widened(wide)
    _expect(_value(x).dtype is _value(weight).dtype)
    return torch.ops.sliderquant.rms_norm_quantize.default, (x, None, weight, epsilon), []


def _add_rms_norm(source: fx.Node) -> tuple[Any, tuple, list[fx.Node]]:
    wide, weight, epsilon = _norm(source)
    x, residual = map(_widened, _arguments(wide, aten.add.Tensor))
    dtype = _value(weight).dtype
    _expect(_value(x).dtype is dtype, _value(residual).dtype is dtype, _value(x).shape == _value(residual).shape)
    sums = [user for user in wide.users if user.target is convert and user.args[1] is dtype]
    return torch.ops.sliderquant.rms_norm_quantize.default, (x, residual, weight, epsilon), sums


def _rms_norm_of_ir(source: fx.Node) -> tuple[Any, tuple, list[fx.Node]]:
    """The same where vLLM keeps the norm in one piece until its own passes are done."""
    norms = torch.ops.vllm_ir
    _expect(hasattr(norms, "rms_norm"))
    _expect(hasattr(norms, "fused_add_rms_norm"))
    sums, norm = [], source
    if source.op == "call_function" and source.target is operator.getitem:
        norm = source.args[0]
        _expect(source.args[1] == 0, norm.op == "call_function", norm.target is norms.fused_add_rms_norm.default)
        sums = [user for user in norm.users if user.args[1] == 1]
    else:
        _expect(source.op == "call_function", source.target is norms.rms_norm.default)
    names = [argument.name for argument in norm.target._schema.arguments]
    given = dict(zip(names, norm.args, strict=False)) | norm.kwargs
    x, weight, residual = given["x"], given["weight"], given.get("x_residual")
    _expect(given.get("variance_size") is None, _value(x).dtype in HALVES)
    _check_weight(weight, _value(x), _value(x).dtype)
    _expect(residual is None or _value(residual).dtype is _value(x).dtype)
    return torch.ops.sliderquant.rms_norm_quantize.default, (x, residual, weight, given["epsilon"]), sums

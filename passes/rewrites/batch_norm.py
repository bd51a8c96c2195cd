"""`fold_batch_norm`: the scale of a batch norm goes into the weight of the matmul or convolution before it.

A pass from program to program, run after `trace` and before `find_sites`. With y = op(x, W) and a normalisation
(y + bias - mean) * m + beta, where m = scale * rsqrt(var + eps) has one value per output feature:

* **Running statistics** (inference): m depends on parameters and state only, and the program becomes
  op(x, W * m) + ((bias - mean) * m + beta). `W * m` is one derived matrix, which `find_sites` sees as a `Fold`.
* **Batch statistics** (training): m depends on y. The op becomes op(x, W * r) / r, where r is m with the running
  variance *before* this step's update in place of the batch variance; everything after it stays as it is. So
  fake-quant of `W * r` sees the matrix that inference will quantize, while the statistics stay those of y
  (Krishnamoorthi, arXiv 1806.08342, section 3.2.2; `torch.ao.nn.intrinsic.qat.ConvBn2d`). Where r is 0, as in
  residual networks that start with scale 0, 1 stands for it: nothing is divided by 0, and the norm gives beta anyway.

Without quantization, values and gradients are those of the program as it was, up to float rounding.

What is recognised is arithmetic, not a module: the multiplier of a flow that comes from state through a root (`rsqrt`,
`sqrt`, `pow`) or, for batch statistics, through a root from a value that some state is averaged with; that state is the
running variance. Between the op and the normalisation there may be additions and multiplications by parameters, casts,
transposes and reshapes that keep the feature axis, and no value on that way may be used for anything else than the
statistics. A normalisation that fails one of these tests
is left alone and reported with the reason (`passes.analysis.normalisations` finds them). One whose
statistics do not touch state (layer norm, or batch norm that keeps no running average) is none of this pass's business.

Preserved: inputs, their paths, results with their shapes and dtypes; every other equation with its parameters. Plain
`jit` calls around a matmul, with state among their operands or of a few pointwise equations are inlined; other
higher-order equations are rebuilt (`control_flow.REBUILD`) where something in them changes. Addresses are those of the
new program.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Literal as JaxprLiteral
from jax.extend.core import primitives as prims

from qjax.passes.analysis.normalisations import (
    NORM_MOVES,
    Atom,
    Batch,
    Folded,
    KnownValue,
    Norm,
    NormBody,
    Unfolded,
    aval_of,
    shape_of,
)
from qjax.passes.jaxpr import control_flow
from qjax.passes.jaxpr.trace import Program


class _Folder:
    """Runs a body with the normalisations folded that were found in it."""

    def __init__(self, body: NormBody):
        self.body = body

    def run(self, values: Sequence[Any]) -> list[Any]:
        """The results of the body, with its normalisations folded, on arrays."""
        env: dict[Atom, Any] = {**dict(zip(self.body.inputs, values, strict=True)), **self.body.consts}
        ends = {norm.steps[-1].node: norm for norm in self.body.norms.values() if norm.batch is None}
        later = {i for norm in ends.values() for i in (norm.op, *(step.node for step in norm.steps))}
        done: set[int] = set()

        def read(atom: Atom) -> Any:
            """A value; a known one may be asked for before its turn."""
            if isinstance(atom, JaxprLiteral):
                return atom.val
            if atom not in env:
                execute(self.body.producer[atom])
            return env[atom]

        def execute(i: int) -> None:
            if i in done:
                return
            done.add(i)
            node, norm = self.body.nodes[i], self.body.norms.get(i)
            if i in ends:
                results = [self.with_running(ends[i], read)]
            elif norm is not None:
                results = [self.with_batch(norm, read)]
            elif any(child.folded for child in self.body.children.get(i, {}).values()):
                results = self.rebuild(i, list(map(read, node.ins)))
            else:
                results = control_flow.bind(node.eqn, list(map(read, node.ins)))
            env.update(zip(node.outs, results, strict=True))

        for i in range(len(self.body.nodes)):
            if i not in later or i in ends:
                execute(i)
        return list(map(read, self.body.outputs))

    def rebuild(self, i: int, values: list[Any]) -> list[Any]:
        eqn, children = self.body.nodes[i].eqn, self.body.children[i]
        jaxprs = {body.name: body.jaxpr for body in control_flow.bodies(eqn)}

        def run(name: str, args: Sequence[Any], index: Any = None) -> tuple[list[Any], dict[str, Any]]:
            if name in children:
                return _Folder(children[name]).run(args), {}
            return _Folder(NormBody(jaxprs[name], [None] * len(args))).run(args), {}

        return control_flow.REBUILD[eqn.primitive](eqn, values, run, lambda value: False)[0]

    def narrow(self, atom: Atom, rank: int, axes: Mapping[int, int], read: Callable[[Atom], Any]) -> Any:
        """A value that is the same along all but the given axes, with size 1 along the others."""
        node, shape = self.body.by(atom), shape_of(atom)
        small = [shape[axis] if axis in axes else 1 for axis in range(rank)] if shape else [1] * rank
        if node is not None and node.primitive is prims.broadcast_in_dim_p:
            where = node.eqn.params["broadcast_dimensions"]
            return lax.broadcast_in_dim(read(node.ins[0]), small, where)
        return jnp.reshape(read(atom), small)

    def affine(self, norm: Norm, read: Callable[[Atom], Any]) -> tuple[Any, Any]:
        """What the steps of a fold make of y: y * factor + term, each with one value per feature.

        Both have the rank of the last value, size 1 along all axes but those of features, and at least float32.
        """
        dtypes = (aval_of(self.body.nodes[step.node].outs[0]).dtype for step in norm.steps)
        dtype = functools.reduce(jnp.promote_types, dtypes, jnp.dtype(jnp.float32))
        factor = term = None
        for step in norm.steps:
            node = self.body.nodes[step.node]
            shape = shape_of(node.outs[0])
            if node.primitive in NORM_MOVES:
                factor, term = (
                    None if a is None else _replaced(a, step.before, step.axes, shape) for a in (factor, term)
                )
                continue
            other = node.ins[1 - step.operand]
            if norm.batch is not None and step.node == norm.at:
                known = self.narrow(other, len(shape), step.axes, self.estimate(norm.batch, read))
            elif self.body.fact(other) is None:
                continue  # the mean of the batch, which leaves the factor as it is
            else:
                known = self.narrow(other, len(shape), step.axes, read)
            known = known.astype(dtype)
            if node.primitive is prims.mul_p:
                factor, term = (known if factor is None else factor * known), None if term is None else term * known
            elif node.primitive is prims.div_p:
                factor, term = (1 if factor is None else factor) / known, None if term is None else term / known
            elif node.primitive is prims.add_p:
                term = known if term is None else term + known
            elif step.operand == 0:
                term = -known if term is None else term - known
            else:
                factor = -jnp.ones_like(known) if factor is None else -factor
                term = known if term is None else known - term
        return factor, term

    def estimate(self, batch: Batch, read: Callable[[Atom], Any]) -> Callable[[Atom], Any]:
        """Reads values of the program with the running variance in place of the batch variance, in its dtype.

        Where the program computes the statistics of a batch in bfloat16, inference uses the running ones in float32.
        """
        running = read(batch.running)
        dtype = jnp.promote_types(running.dtype, aval_of(batch.variance).dtype)
        env: dict[Atom, Any] = {batch.variance: running.astype(dtype)}

        def value(atom: Atom) -> Any:
            return env[atom] if not isinstance(atom, JaxprLiteral) and atom in env else read(atom)

        def wide(atom: Atom) -> Any:
            return jnp.asarray(value(atom), dtype if jnp.issubdtype(aval_of(atom).dtype, jnp.floating) else None)

        for i in batch.chain:
            node = self.body.nodes[i]
            operands = list(map(wide, node.ins))
            cast = node.primitive is prims.convert_element_type_p
            env.update(zip(node.outs, operands if cast else control_flow.bind(node.eqn, operands), strict=True))
        return value

    def weighted(self, norm: Norm, factor: Any, read: Callable[[Atom], Any]) -> Any:
        """The matmul of a fold on its input and the weight times a factor of the weight's rank."""
        op = self.body.nodes[norm.op]
        atom = op.ins[norm.weight]
        dtype = aval_of(atom).dtype
        cast = self.body.by(atom)
        # The product is rounded once: before a narrowing cast that the program makes of the weight, not after it.
        if (
            cast is not None
            and cast.primitive is prims.convert_element_type_p
            and jnp.promote_types(aval_of(cast.ins[0]).dtype, dtype) == aval_of(cast.ins[0]).dtype
        ):
            atom = cast.ins[0]
        w = read(atom)
        wide = jnp.promote_types(w.dtype, factor.dtype)
        w = (w.astype(wide) * factor.astype(wide)).astype(dtype)
        x = read(op.ins[1 - norm.weight])
        return control_flow.bind(op.eqn, [w, x] if norm.weight == 0 else [x, w])[0]

    def on_weight(self, norm: Norm, factor: Any) -> Any:
        """A factor of the last value as a factor of the weight."""
        shape = shape_of(self.body.nodes[norm.op].ins[norm.weight])
        axes = norm.steps[-1].axes
        return _replaced(factor, axes, {axis: axis for axis in axes.values()}, shape, dict(axes))

    def with_running(self, norm: Norm, read: Callable[[Atom], Any]) -> Any:
        """The result of the last step: op(x, W * factor), moved as the program moves it, + term."""
        factor, term = self.affine(norm, read)
        y = self.weighted(norm, self.on_weight(norm, factor), read)
        for step in norm.steps:
            node = self.body.nodes[step.node]
            if node.primitive in NORM_MOVES:
                y = control_flow.bind(node.eqn, [y, *map(read, node.ins[1:])])[0]
        return y if term is None else (y.astype(term.dtype) + term).astype(y.dtype)

    def with_batch(self, norm: Norm, read: Callable[[Atom], Any]) -> Any:
        """The result of the matmul: op(x, W * factor) / factor."""
        op = self.body.nodes[norm.op]
        factor, _ = self.affine(norm, read)  # the term stays where it is
        factor = lax.select(factor == 0, jnp.ones_like(factor), factor)
        y = self.weighted(norm, self.on_weight(norm, factor), read)
        last, first = norm.steps[-1].axes, norm.steps[0].before
        back = {old: new for old, w in last.items() for new, other in first.items() if w == other}
        divisor = _replaced(factor, last, {axis: axis for axis in first}, y.shape, back)
        wide = jnp.promote_types(y.dtype, divisor.dtype)
        return (y.astype(wide) / divisor.astype(wide)).astype(aval_of(op.outs[0]).dtype)


def _replaced(
    a: Any, before: Mapping[int, int], after: Mapping[int, int], shape: Sequence[int], to: dict[int, int] | None = None
) -> Any:
    """An array with size 1 but along `before`, with those axes at their place in an array of shape `shape`.

    `to` maps old axes to new ones; without it, axes of the same weight axis belong together.
    """
    if a.ndim == 0:
        return jnp.reshape(a, (1,) * len(shape))
    where = to or {old: new for old, w in before.items() for new, other in after.items() if w == other}
    order = sorted(where, key=where.__getitem__)
    rest = [axis for axis in range(a.ndim) if axis not in order]
    sizes = dict(zip(sorted(where.values()), (a.shape[axis] for axis in order), strict=True))
    small = [sizes.get(axis, 1) for axis in range(len(shape))]
    return jnp.reshape(jnp.transpose(a, [*rest, *order]), small)


def fold_batch_norm(program: Program) -> tuple[Program, tuple[Folded, ...], tuple[Unfolded, ...]]:
    """The program with the scale of every batch norm that allows it in the weight of the matmul before it.

    Args:
        program: what `trace` gave. Only statistics that are inputs with a `state` path are recognised.

    Returns:
        The new program, with the same inputs, `paths`, `state` and results; what was folded; and which normalisations
        were left as they are, with reasons. Without anything to fold, the program itself.
    """
    if not any(program.state):
        return program, (), ()
    facts: list[KnownValue | None] = []
    for path, state in zip(program.paths, program.state, strict=True):
        if path is not None:
            facts.append(KnownValue(params=frozenset({path})))
        else:
            facts.append(None if state is None else KnownValue(state=frozenset({state}), leaf=True))
    body = NormBody(program.jaxpr, facts)
    if body.folded:
        jaxpr = jax.make_jaxpr(lambda *values: _Folder(body).run(values))(*program.jaxpr.in_avals)
        pairs = zip(jaxpr.out_avals, program.jaxpr.out_avals, strict=True)
        assert all((a.shape, a.dtype) == (b.shape, b.dtype) for a, b in pairs), "folding changed the type of a result"
        program = dataclasses.replace(program, jaxpr=jaxpr)
    return program, tuple(body.folded), tuple(body.unfolded)

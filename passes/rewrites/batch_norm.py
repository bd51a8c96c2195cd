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
statistics. A normalisation that fails one of these tests is left alone and reported with the reason. One whose
statistics do not touch state (layer norm, or batch norm that keeps no running average) is none of this pass's business.

Preserved: inputs, their paths, results with their shapes and dtypes; every other equation with its parameters. Plain
`jit` calls around a matmul, with state among their operands or of a few pointwise equations are inlined; other
higher-order equations are rebuilt (`control_flow.REBUILD`) where something in them changes. Addresses are those of the
new program.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Literal as JaxprLiteral
from jax.extend.core import Primitive
from jax.extend.core import primitives as prims

from qjax.passes.jaxpr import control_flow
from qjax.passes.jaxpr.trace import Program


@dataclasses.dataclass(frozen=True)
class Folded:
    """A normalisation whose scale went into a weight.

    Attributes:
        name: path of the norm ('bn'), as far as its parameters or its state tell.
        statistics: which ones it normalises with.
        weight: paths of the parameters that the weight is made of.
        scale: paths of the parameters that the factor on the weight reads.
        state: paths of the state that the factor on the weight reads (the running variance).
    """

    name: str
    statistics: Literal["running", "batch"]
    weight: tuple[str, ...]
    scale: tuple[str, ...]
    state: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Unfolded:
    """A normalisation that was left as it is, and why."""

    name: str
    reason: str


@dataclasses.dataclass(frozen=True)
class _Known:
    """What a value that no activation enters is made of.

    Attributes:
        params, state: paths of the inputs it depends on.
        root: whether state reached it through a root (a standard deviation).
        leaf: whether it is a state input itself, or a slice of one in a scan.
    """

    params: frozenset[str] = frozenset()
    state: frozenset[str] = frozenset()
    root: bool = False
    leaf: bool = False


# A value of a body: a literal, or the variable with the number of the inlined call that it belongs to (the same jaxpr,
# with the same variables, may be called twice).
_Atom = Any

_ROOTS = {prims.rsqrt_p, prims.sqrt_p, prims.pow_p}

_SUMS = {prims.add_p, prims.sub_p}

_FACTORS = {prims.mul_p, prims.div_p}

# what may lie between a matmul and its normalisation beside sums and factors; operand 0 is moved
_MOVES = {
    prims.convert_element_type_p,
    prims.transpose_p,
    prims.reshape_p,
    prims.squeeze_p,
    prims.broadcast_in_dim_p,
    prims.copy_p,
}

# what may lie between a variance and the factor made of it
_POINTWISE = {
    *(_ROOTS | _SUMS | _FACTORS | _MOVES),
    *(prims.max_p, prims.min_p, prims.neg_p, prims.stop_gradient_p, prims.integer_pow_p, prims.square_p),
}

# what statistics are made of before they are summed over the batch
_BEFORE_SUM = {
    *(prims.convert_element_type_p, prims.square_p, prims.integer_pow_p, prims.abs_p, prims.neg_p, prims.copy_p),
    *(prims.sub_p, prims.mul_p, prims.reshape_p, prims.select_n_p, prims.stop_gradient_p),
}

_MATMULS = {prims.dot_general_p, prims.conv_general_dilated_p}

# bodies that are no place for a derived weight, and why
_CLOSED = {
    "custom_jvp": "it is inside a custom_jvp rule",
    "custom_vjp": "it is inside a custom_vjp rule",
    "shard_map": "it is inside shard_map",
}


@dataclasses.dataclass(frozen=True, eq=False)
class _Node:
    """An equation with its operands and results as atoms of the body."""

    eqn: Any
    ins: tuple[_Atom, ...]
    outs: tuple[_Atom, ...]

    @property
    def primitive(self) -> Primitive:
        return self.eqn.primitive


@dataclasses.dataclass(frozen=True)
class _Batch:
    """How the factor of a normalisation follows from the batch variance, and the running variance to use instead."""

    chain: tuple[int, ...]  # the nodes from the variance to the factor
    variance: _Atom
    running: _Atom


@dataclasses.dataclass(frozen=True)
class _Step:
    """A node on the way of the matmul's result, the operand through which it passes, and where its axes come from.

    `axes` maps axes of the node's result to the axes of the weight that they run over; `before` is that of its operand.
    """

    node: int
    operand: int
    before: Mapping[int, int]
    axes: Mapping[int, int]


@dataclasses.dataclass(frozen=True)
class _Norm:
    """A normalisation that can be folded: the matmul, which operand is its weight, and the way up to the last sum."""

    op: int
    weight: int
    steps: tuple[_Step, ...]
    at: int  # the node of the normalisation's own factor
    batch: _Batch | None


def _aval(atom: _Atom) -> Any:
    return atom.aval if isinstance(atom, JaxprLiteral) else atom[1].aval


def _shape(atom: _Atom) -> tuple[int, ...]:
    return tuple(_aval(atom).shape)


class _Body:
    """A jaxpr as a list of nodes, what is known about its values, and the normalisations to fold in it."""

    def __init__(self, jaxpr: Any, facts: Sequence[_Known | None]):
        self.nodes: list[_Node] = []
        self.calls = 0
        self.consts: dict[_Atom, Any] = {}
        self.facts: dict[_Atom, _Known] = {}
        self.producer: dict[_Atom, int] = {}
        self.users: dict[_Atom, list[int]] = {}
        self.children: dict[int, dict[str, _Body]] = {}
        self.inputs = [(0, var) for var in jaxpr.invars]
        self.facts.update((atom, fact) for atom, fact in zip(self.inputs, facts, strict=True) if fact is not None)
        self.outputs = self.add(jaxpr, self.inputs)
        self.live = self.find_live()
        self.norms: dict[int, _Norm] = {}  # by matmul
        self.folded: list[Folded] = []
        self.unfolded: list[Unfolded] = []
        for i in sorted(self.live):
            for side, batch in self.factors(i):
                self.decide(i, side, batch)
            for child in self.children.get(i, {}).values():
                self.folded += child.folded
                self.unfolded += child.unfolded

    # --- Reading the program ---------------------------------------------------------------------------------

    def add(self, jaxpr: Any, atoms: Sequence[_Atom]) -> list[_Atom]:
        """Appends the equations of a jaxpr whose inputs are `atoms`; returns its results."""
        call = self.calls
        self.calls += 1
        names: dict[Any, _Atom] = dict(zip(jaxpr.invars, atoms, strict=True))
        for var, const in zip(jaxpr.constvars, control_flow.consts_of(jaxpr), strict=False):
            names[var] = (call, var)
            self.consts[names[var]] = const
            self.facts[names[var]] = _Known()
        for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
            ins = tuple(v if isinstance(v, JaxprLiteral) else names[v] for v in eqn.invars)
            if control_flow.is_plain_jit(eqn) and self.matters(eqn, ins):
                outs = self.add(control_flow.bodies(eqn)[0].jaxpr, ins)
            else:
                outs = [(call, v) for v in eqn.outvars]
                self.node(_Node(eqn, ins, tuple(outs)))
            names.update(zip(eqn.outvars, outs, strict=True))
        return [v if isinstance(v, JaxprLiteral) else names[v] for v in jaxpr.outvars]

    def matters(self, eqn: Any, ins: Sequence[_Atom]) -> bool:
        """Whether a part of what this pass looks for may be inside a call (`jnp.where` of masked statistics is one)."""
        state = any(fact and fact.state for fact in map(self.fact, ins))
        return state or _has_matmul(eqn) or all(e.primitive in _BEFORE_SUM | _MOVES for e in _equations(eqn))

    def node(self, node: _Node) -> None:
        i = len(self.nodes)
        self.nodes.append(node)
        self.producer.update((out, i) for out in node.outs)
        for atom in {atom for atom in node.ins if not isinstance(atom, JaxprLiteral)}:
            self.users.setdefault(atom, []).append(i)
        facts = [self.fact(atom) for atom in node.ins]
        known = [fact for fact in facts if fact is not None]
        if len(known) == len(facts) and not node.eqn.effects:
            fact = _Known(
                frozenset().union(*(f.params for f in known)),
                frozenset().union(*(f.state for f in known)),
                any(f.root or (f.state and node.primitive in _ROOTS) for f in known),
            )
            self.facts.update((out, fact) for out in node.outs)
            return
        for body in control_flow.bodies(node.eqn):
            inner = [None if feed.how == "carried" else facts[feed.operand] for feed in body.feeds]
            child = _Body(body.jaxpr, inner)
            if (why := _CLOSED.get(body.name)) is not None:
                child = child.refused(why)
            if child.folded or child.unfolded:
                self.children.setdefault(i, {})[body.name] = child

    def refused(self, why: str) -> _Body:
        """Itself, with nothing folded."""
        self.unfolded += [Unfolded(folded.name, why) for folded in self.folded]
        self.folded, self.norms, self.children = [], {}, {}
        return self

    def find_live(self) -> set[int]:
        """The nodes on which a result of the body depends: tracing keeps the others, which use nothing."""
        wanted = {atom for atom in self.outputs if not isinstance(atom, JaxprLiteral)}
        live: set[int] = set()
        for i in reversed(range(len(self.nodes))):
            node = self.nodes[i]
            if node.eqn.effects or any(out in wanted for out in node.outs):
                live.add(i)
                wanted.update(atom for atom in node.ins if not isinstance(atom, JaxprLiteral))
        return live

    def uses(self, atom: _Atom) -> list[int]:
        """The live nodes that use a value."""
        return [i for i in self.users.get(atom, ()) if i in self.live]

    def fact(self, atom: _Atom) -> _Known | None:
        """What is known about a value; None for one that an activation enters."""
        return _Known() if isinstance(atom, JaxprLiteral) else self.facts.get(atom)

    def by(self, atom: _Atom) -> _Node | None:
        """The node that makes a value; None for a literal or an input."""
        at = None if isinstance(atom, JaxprLiteral) else self.producer.get(atom)
        return None if at is None else self.nodes[at]

    def varies(self, atom: _Atom) -> set[int]:
        """The axes along which a value may vary."""
        node = self.by(atom)
        if node is not None and node.primitive is prims.broadcast_in_dim_p:
            where = node.eqn.params["broadcast_dimensions"]
            return {axis for axis, size in zip(where, _shape(node.ins[0]), strict=True) if size > 1}
        return {axis for axis, size in enumerate(_shape(atom)) if size > 1}

    # --- Finding normalisations ------------------------------------------------------------------------------

    def factors(self, i: int) -> Iterator[tuple[int, _Batch | None]]:
        """Which operands of node i are the factor of a normalisation, and how it follows from batch statistics."""
        node = self.nodes[i]
        for side in (1, 0) if node.primitive is prims.mul_p else (1,) if node.primitive is prims.div_p else ():
            factor, flow = node.ins[side], node.ins[1 - side]
            fact = self.fact(factor)
            if self.fact(flow) is not None:
                continue
            if fact is not None and fact.root:
                yield side, None
            elif fact is None and (batch := self.batch(factor)) is not None:
                yield side, batch
                return

    def batch(self, factor: _Atom) -> _Batch | None:
        """How a factor follows through a root from a variance that state is averaged with; None if it does not."""
        chain: list[int] = []
        atom, rooted = factor, False
        while (i := self.producer.get(atom)) is not None:
            node = self.nodes[i]
            flows = [a for a in node.ins if self.fact(a) is None]
            if node.primitive not in _POINTWISE or len(flows) != 1:
                return None
            chain.insert(0, i)
            rooted = rooted or node.primitive in _ROOTS
            atom = flows[0]
            if rooted and (running := self.running(atom)) is not None:
                return _Batch(tuple(chain), atom, running)
        return None

    def running(self, variance: _Atom) -> _Atom | None:
        """The state that is averaged with a variance: running = momentum * running + (1 - momentum) * variance."""
        todo = [variance]
        while todo:
            atom = todo.pop()
            for i in self.users.get(atom, ()):
                node = self.nodes[i]
                others = [a for a in node.ins if a is not atom and a != atom]
                if node.primitive in _SUMS and others and self.fact(others[0]) is not None:
                    leaf = self.state_leaf(others[0])
                    if leaf is not None and _shape(leaf) == _shape(variance):
                        return leaf
                scaled = node.primitive in _FACTORS and others and self.fact(others[0]) is not None
                if scaled or node.primitive in _MOVES | {prims.stop_gradient_p}:
                    todo += node.outs
        return None

    def state_leaf(self, atom: _Atom) -> _Atom | None:
        """The state input of which a value is a multiple."""
        while (fact := self.fact(atom)) is not None and not isinstance(atom, JaxprLiteral):
            if fact.leaf:
                return atom
            node = self.by(atom)
            if node is None or node.primitive not in _FACTORS | _MOVES | {prims.stop_gradient_p}:
                return None
            of_state = [a for a in node.ins if (f := self.fact(a)) and f.state]
            if len(of_state) != 1:
                return None
            atom = of_state[0]
        return None

    # --- Deciding --------------------------------------------------------------------------------------------

    def decide(self, i: int, side: int, batch: _Batch | None) -> None:
        found = self.norm(i, 1 - side, batch)
        operands = [a for step in found.steps for a in self.nodes[step.node].ins] if isinstance(found, _Norm) else []
        factor = self.factor_fact(i, side, batch)
        name = _norm_name(factor, [fact for a in operands if (fact := self.fact(a))])
        if isinstance(found, str):
            self.unfolded.append(Unfolded(name, found))
            return
        on_weight = [factor, *(self.factor_fact(s.node, 1 - s.operand, None) for s in self.scaling(found))]
        weight = self.fact(self.nodes[found.op].ins[found.weight])
        assert weight is not None
        self.norms[found.op] = found
        scale = sorted(frozenset().union(*(fact.params for fact in on_weight)))
        state = sorted(frozenset().union(*(fact.state for fact in on_weight)))
        statistics = "batch" if batch else "running"
        self.folded.append(Folded(name, statistics, tuple(sorted(weight.params)), tuple(scale), tuple(state)))

    def scaling(self, norm: _Norm) -> list[_Step]:
        """The steps of a fold that multiply by a known value, beside the normalisation itself."""
        steps = [step for step in norm.steps if self.nodes[step.node].primitive in _FACTORS]
        return [step for step in steps if step.node != norm.at]

    def factor_fact(self, i: int, side: int, batch: _Batch | None) -> _Known:
        """What the factor of node i is made of; with batch statistics, the one that stands for it on the weight."""
        node = self.nodes[i]
        if batch is None:
            return self.fact(node.ins[side]) or _Known()
        facts = [self.fact(batch.running)] + [self.fact(a) for j in batch.chain for a in self.nodes[j].ins]
        known = [fact for fact in facts if fact is not None]
        return _Known(frozenset().union(*(f.params for f in known)), frozenset().union(*(f.state for f in known)))

    def norm(self, i: int, operand: int, batch: _Batch | None) -> _Norm | str:
        """How to fold the normalisation whose factor multiplies operand `operand` in node i, or why not."""
        way: list[tuple[int, int]] = [(i, operand)]
        while True:
            node, through = self.nodes[way[0][0]], way[0][1]
            at = self.producer.get(node.ins[through])
            if at is None:
                return "its input comes from outside, not from a matmul with a weight"
            before = self.nodes[at]
            if before.primitive in _MATMULS:
                break
            passed = self.passes(before, batch)
            if passed is None:
                return f"its input is the result of '{before.primitive.name}', not of a matmul with a weight"
            way.insert(0, (at, passed))
        op = self.nodes[at]
        what = f"'{op.primitive.name}'"
        weights = [side for side in (1, 0) if (fact := self.fact(op.ins[side])) and fact.params]
        if len(weights) != 1 or self.fact(op.ins[1 - weights[0]]) is not None:
            return f"no operand of the {what} before it is a weight"
        if op.primitive is prims.conv_general_dilated_p and weights != [1]:
            return f"the weight of the {what} before it is its input"
        if at in self.norms:
            return f"the {what} before it has another normalisation folded into its weight"
        axes = _weight_axes(op, weights[0])
        steps: list[_Step] = []
        value = op.outs[0]
        for at_node, through in way:
            step = self.step(at_node, through, axes, batch)
            if step is None:
                name = self.nodes[at_node].primitive.name
                return f"'{name}' between the {what} and it does not keep one value per output feature"
            if (use := self.used_elsewhere(value, at_node, axes, batch)) is not None:
                return f"the result of the {what} before it is {use} as well"
            steps.append(step)
            value, axes = self.nodes[at_node].outs[0], step.axes
        steps += self.following(value, axes)
        return _Norm(at, weights[0], tuple(steps), i, batch)

    def passes(self, node: _Node, batch: _Batch | None) -> int | None:
        """The operand of a node whose value its result is, but for a known term, factor or move."""
        if node.primitive in _MOVES:
            return 0
        flows = [k for k, atom in enumerate(node.ins) if self.fact(atom) is None]
        if node.primitive in _SUMS | _FACTORS and len(flows) == 1:
            return None if node.primitive is prims.div_p and flows == [1] else flows[0]
        if node.primitive is prims.sub_p and batch is not None:
            return 0  # the mean of the batch; `step` looks at its shape
        return None

    def step(self, i: int, operand: int, axes: Mapping[int, int], batch: _Batch | None) -> _Step | None:
        """The step of node i, or None where what it adds or multiplies with is not one value per feature."""
        node = self.nodes[i]
        if node.primitive in _MOVES:
            moved = _moved(node, axes)
            return None if moved is None else _Step(i, operand, axes, moved)
        other = node.ins[1 - operand]
        if _shape(node.outs[0]) != _shape(node.ins[operand]) or not self.varies(other) <= set(axes):
            return None
        return _Step(i, operand, axes, axes)

    def used_elsewhere(self, value: _Atom, by: int, axes: Mapping[int, int], batch: _Batch | None) -> str | None:
        """Who else uses a value on the way than node `by`: None, or a phrase.

        With batch statistics, their computation may: a use that ends, through pointwise equations, in sums over
        everything but the features.
        """
        if value in self.outputs:
            return "returned"
        features = math.prod(_shape(value)[axis] for axis in axes)
        seen, todo = {value}, [value]
        while todo:
            atom = todo.pop()
            for i in self.uses(atom):
                if i == by and atom == value:
                    continue
                node = self.nodes[i]
                if batch is None:
                    return f"used by '{node.primitive.name}'"
                if all(math.prod(_shape(out)) <= features for out in node.outs):
                    continue
                others = node.ins[1:] if node.primitive is prims.select_n_p else node.ins  # a mask may be anything
                fits = (a in seen or math.prod(_shape(a)) <= features or self.fact(a) is not None for a in others)
                if node.primitive not in _BEFORE_SUM or not all(fits) or node.outs[0] in self.outputs:
                    return f"used by '{node.primitive.name}'"
                if node.outs[0] not in seen:
                    seen.add(node.outs[0])
                    todo.append(node.outs[0])
        return None

    def following(self, value: _Atom, axes: Mapping[int, int]) -> list[_Step]:
        """The known factors after a normalisation, and the one term after them."""
        steps: list[_Step] = []
        while value not in self.outputs and len(self.uses(value)) == 1:
            i = self.uses(value)[0]
            node = self.nodes[i]
            others = [k for k, atom in enumerate(node.ins) if atom != value]
            if node.primitive not in _SUMS | _FACTORS or len(others) != 1:
                break
            known = self.fact(node.ins[others[0]])
            step = self.step(i, 1 - others[0], axes, None)
            if known is None or known.root or step is None or (node.primitive is prims.div_p and others == [0]):
                break
            steps.append(step)
            value = node.outs[0]
            if node.primitive in _SUMS:
                break
        return steps

    # --- Running the program with them folded ----------------------------------------------------------------

    def run(self, values: Sequence[Any]) -> list[Any]:
        """The results of the body, with its normalisations folded, on arrays."""
        env: dict[_Atom, Any] = {**dict(zip(self.inputs, values, strict=True)), **self.consts}
        ends = {norm.steps[-1].node: norm for norm in self.norms.values() if norm.batch is None}
        later = {i for norm in ends.values() for i in (norm.op, *(step.node for step in norm.steps))}
        done: set[int] = set()

        def read(atom: _Atom) -> Any:
            """A value; a known one may be asked for before its turn."""
            if isinstance(atom, JaxprLiteral):
                return atom.val
            if atom not in env:
                execute(self.producer[atom])
            return env[atom]

        def execute(i: int) -> None:
            if i in done:
                return
            done.add(i)
            node, norm = self.nodes[i], self.norms.get(i)
            if i in ends:
                results = [self.with_running(ends[i], read)]
            elif norm is not None:
                results = [self.with_batch(norm, read)]
            elif any(child.folded for child in self.children.get(i, {}).values()):
                results = self.rebuild(i, list(map(read, node.ins)))
            else:
                results = control_flow.bind(node.eqn, list(map(read, node.ins)))
            env.update(zip(node.outs, results, strict=True))

        for i in range(len(self.nodes)):
            if i not in later or i in ends:
                execute(i)
        return list(map(read, self.outputs))

    def rebuild(self, i: int, values: list[Any]) -> list[Any]:
        eqn, children = self.nodes[i].eqn, self.children[i]
        jaxprs = {body.name: body.jaxpr for body in control_flow.bodies(eqn)}

        def run(name: str, args: Sequence[Any], index: Any = None) -> tuple[list[Any], dict[str, Any]]:
            if name in children:
                return children[name].run(args), {}
            return _Body(jaxprs[name], [None] * len(args)).run(args), {}

        return control_flow.REBUILD[eqn.primitive](eqn, values, run, lambda value: False)[0]

    def narrow(self, atom: _Atom, rank: int, axes: Mapping[int, int], read: Callable[[_Atom], Any]) -> Any:
        """A value that is the same along all but the given axes, with size 1 along the others."""
        node, shape = self.by(atom), _shape(atom)
        small = [shape[axis] if axis in axes else 1 for axis in range(rank)] if shape else [1] * rank
        if node is not None and node.primitive is prims.broadcast_in_dim_p:
            where = node.eqn.params["broadcast_dimensions"]
            return lax.broadcast_in_dim(read(node.ins[0]), small, where)
        return jnp.reshape(read(atom), small)

    def affine(self, norm: _Norm, read: Callable[[_Atom], Any]) -> tuple[Any, Any]:
        """What the steps of a fold make of y: y * factor + term, each with one value per feature.

        Both have the rank of the last value, size 1 along all axes but those of features, and at least float32.
        """
        dtype = functools.reduce(jnp.promote_types, (_aval(self.nodes[s.node].outs[0]).dtype for s in norm.steps))
        dtype = jnp.promote_types(dtype, jnp.float32)
        factor = term = None
        for step in norm.steps:
            node = self.nodes[step.node]
            shape = _shape(node.outs[0])
            if node.primitive in _MOVES:
                factor, term = (
                    None if a is None else _replaced(a, step.before, step.axes, shape) for a in (factor, term)
                )
                continue
            other = node.ins[1 - step.operand]
            if norm.batch is not None and step.node == norm.at:
                known = self.narrow(other, len(shape), step.axes, self.estimate(norm.batch, read))
            elif self.fact(other) is None:
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

    def estimate(self, batch: _Batch, read: Callable[[_Atom], Any]) -> Callable[[_Atom], Any]:
        """Reads values of the program with the running variance in place of the batch variance, in its dtype.

        Where the program computes the statistics of a batch in bfloat16, inference uses the running ones in float32.
        """
        running = read(batch.running)
        dtype = jnp.promote_types(running.dtype, _aval(batch.variance).dtype)
        env: dict[_Atom, Any] = {batch.variance: running.astype(dtype)}

        def value(atom: _Atom) -> Any:
            return env[atom] if not isinstance(atom, JaxprLiteral) and atom in env else read(atom)

        def wide(atom: _Atom) -> Any:
            return jnp.asarray(value(atom), dtype if jnp.issubdtype(_aval(atom).dtype, jnp.floating) else None)

        for i in batch.chain:
            node = self.nodes[i]
            operands = list(map(wide, node.ins))
            cast = node.primitive is prims.convert_element_type_p
            env.update(zip(node.outs, operands if cast else control_flow.bind(node.eqn, operands), strict=True))
        return value

    def weighted(self, norm: _Norm, factor: Any, read: Callable[[_Atom], Any]) -> Any:
        """The matmul of a fold on its input and the weight times a factor of the weight's rank."""
        op = self.nodes[norm.op]
        atom = op.ins[norm.weight]
        dtype = _aval(atom).dtype
        cast = self.by(atom)
        # The product is rounded once: before a narrowing cast that the program makes of the weight, not after it.
        if (
            cast is not None
            and cast.primitive is prims.convert_element_type_p
            and jnp.promote_types(_aval(cast.ins[0]).dtype, dtype) == _aval(cast.ins[0]).dtype
        ):
            atom = cast.ins[0]
        w = read(atom)
        wide = jnp.promote_types(w.dtype, factor.dtype)
        w = (w.astype(wide) * factor.astype(wide)).astype(dtype)
        x = read(op.ins[1 - norm.weight])
        return control_flow.bind(op.eqn, [w, x] if norm.weight == 0 else [x, w])[0]

    def on_weight(self, norm: _Norm, factor: Any) -> Any:
        """A factor of the last value as a factor of the weight."""
        shape = _shape(self.nodes[norm.op].ins[norm.weight])
        axes = norm.steps[-1].axes
        return _replaced(factor, axes, {axis: axis for axis in axes.values()}, shape, dict(axes))

    def with_running(self, norm: _Norm, read: Callable[[_Atom], Any]) -> Any:
        """The result of the last step: op(x, W * factor), moved as the program moves it, + term."""
        factor, term = self.affine(norm, read)
        y = self.weighted(norm, self.on_weight(norm, factor), read)
        for step in norm.steps:
            node = self.nodes[step.node]
            if node.primitive in _MOVES:
                y = control_flow.bind(node.eqn, [y, *map(read, node.ins[1:])])[0]
        return y if term is None else (y.astype(term.dtype) + term).astype(y.dtype)

    def with_batch(self, norm: _Norm, read: Callable[[_Atom], Any]) -> Any:
        """The result of the matmul: op(x, W * factor) / factor."""
        op = self.nodes[norm.op]
        factor, _ = self.affine(norm, read)  # the term stays where it is
        factor = lax.select(factor == 0, jnp.ones_like(factor), factor)
        y = self.weighted(norm, self.on_weight(norm, factor), read)
        last, first = norm.steps[-1].axes, norm.steps[0].before
        back = {old: new for old, w in last.items() for new, other in first.items() if w == other}
        divisor = _replaced(factor, last, {axis: axis for axis in first}, y.shape, back)
        wide = jnp.promote_types(y.dtype, divisor.dtype)
        return (y.astype(wide) / divisor.astype(wide)).astype(_aval(op.outs[0]).dtype)


def _has_matmul(eqn: Any) -> bool:
    return any(e.primitive in _MATMULS or _has_matmul(e) for e in _equations(eqn))


def _equations(eqn: Any) -> list[Any]:
    return [e for body in control_flow.bodies(eqn) for e in getattr(body.jaxpr, "jaxpr", body.jaxpr).eqns]


def _parent(path: str) -> str:
    return path.rpartition("/")[0]


def _norm_name(factor: _Known, operands: Sequence[_Known]) -> str:
    """'bn' for a factor of 'bn/scale' and 'batch_stats/bn/var'; 'batch_stats/bn' if no parameter tells."""
    state = sorted(map(_parent, factor.state))
    params = sorted({_parent(path) for fact in (factor, *operands) for path in fact.params}, key=len, reverse=True)
    matching = [path for path in params for norm in state if norm == path or norm.endswith("/" + path)]
    return (matching or state or ["?"])[0]


def _weight_axes(op: _Node, weight: int) -> dict[int, int]:
    """Axis of the result -> axis of the weight, for the axes longer than 1 that they share."""
    shape = _shape(op.ins[weight])
    if op.primitive is prims.conv_general_dilated_p:
        numbers = op.eqn.params["dimension_numbers"]
        pairs = [(numbers.out_spec[1], numbers.rhs_spec[0])]
    else:
        contract, batch = op.eqn.params["dimension_numbers"]
        free = [
            [axis for axis in range(len(_shape(atom))) if axis not in (*contract[k], *batch[k])]
            for k, atom in enumerate(op.ins[:2])
        ]
        first = len(batch[0]) + (len(free[0]) if weight == 1 else 0)
        pairs = [*enumerate(batch[weight]), *enumerate(free[weight], first)]
    return {out: axis for out, axis in pairs if shape[axis] > 1}


def _moved(node: _Node, axes: Mapping[int, int]) -> dict[int, int] | None:
    """`axes` after a move; None where it does not keep each of them an axis."""
    before, after = _shape(node.ins[0]), _shape(node.outs[0])
    params = node.eqn.params
    if node.primitive is prims.transpose_p:
        where = {old: new for new, old in enumerate(params["permutation"])}
    elif node.primitive is prims.broadcast_in_dim_p:
        if math.prod(before) != math.prod(after):
            return None
        where = dict(enumerate(params["broadcast_dimensions"]))
    elif node.primitive in (prims.reshape_p, prims.squeeze_p):
        # an axis is kept if as many elements lie inside it as before
        inner = {(math.prod(after[i:]), after[i]): i for i in range(len(after)) if after[i] > 1}
        where = {i: inner.get((math.prod(before[i:]), before[i])) for i in axes}
    else:
        if not jnp.issubdtype(_aval(node.outs[0]).dtype, jnp.floating):
            return None
        where = {axis: axis for axis in axes}
    moved = {where[axis]: w for axis, w in axes.items()}
    return None if None in moved else moved  # pyright: ignore[reportReturnType]


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
    facts: list[_Known | None] = []
    for path, state in zip(program.paths, program.state, strict=True):
        if path is not None:
            facts.append(_Known(params=frozenset({path})))
        else:
            facts.append(None if state is None else _Known(state=frozenset({state}), leaf=True))
    body = _Body(program.jaxpr, facts)
    if body.folded:
        jaxpr = jax.make_jaxpr(lambda *values: body.run(values))(*program.jaxpr.in_avals)
        pairs = zip(jaxpr.out_avals, program.jaxpr.out_avals, strict=True)
        assert all((a.shape, a.dtype) == (b.shape, b.dtype) for a, b in pairs), "folding changed the type of a result"
        program = dataclasses.replace(program, jaxpr=jaxpr)
    return program, tuple(body.folded), tuple(body.unfolded)

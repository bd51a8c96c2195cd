"""Normalisations that can be folded into the matmul or convolution before them, found by their arithmetic.

`NormBody` reads a jaxpr as a list of nodes, calls inlined, with what is known of each value: the parameters and the
state that it is computed from. The factor of a normalisation is a known value that comes from state through a root;
what lies between it and a matmul is followed back, and whatever stands in the way is a reason (`Unfolded`). What is
recognised and why is said in `passes.rewrites.batch_norm`, which carries it out.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from jax.extend.core import Literal as JaxprLiteral
from jax.extend.core import Primitive
from jax.extend.core import primitives as prims

from qjax.passes.jaxpr import control_flow
from qjax.passes.jaxpr.moves import MOVES, UNCHANGED, repeated_axes


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
class KnownValue:
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
Atom = Any

_ROOTS = {prims.rsqrt_p, prims.sqrt_p, prims.pow_p}

_SUMS = {prims.add_p, prims.sub_p}

_FACTORS = {prims.mul_p, prims.div_p}

# what may lie between a matmul and its normalisation beside sums and factors; operand 0 is moved
NORM_MOVES = {
    prims.convert_element_type_p,
    prims.transpose_p,
    prims.reshape_p,
    prims.squeeze_p,
    prims.broadcast_in_dim_p,
    *(UNCHANGED - {prims.stop_gradient_p}),
}

# what may lie between a variance and the factor made of it
_POINTWISE = {
    *(_ROOTS | _SUMS | _FACTORS | NORM_MOVES),
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
class Node:
    """An equation with its operands and results as atoms of the body."""

    eqn: Any
    ins: tuple[Atom, ...]
    outs: tuple[Atom, ...]

    @property
    def primitive(self) -> Primitive:
        """That of the equation."""
        return self.eqn.primitive


@dataclasses.dataclass(frozen=True)
class Batch:
    """How the factor of a normalisation follows from the batch variance, and the running variance to use instead."""

    chain: tuple[int, ...]  # the nodes from the variance to the factor
    variance: Atom
    running: Atom


@dataclasses.dataclass(frozen=True)
class Step:
    """A node on the way of the matmul's result, the operand through which it passes, and where its axes come from.

    `axes` maps axes of the node's result to the axes of the weight that they run over; `before` is that of its operand.
    """

    node: int
    operand: int
    before: Mapping[int, int]
    axes: Mapping[int, int]


@dataclasses.dataclass(frozen=True)
class Norm:
    """A normalisation that can be folded: the matmul, which operand is its weight, and the way up to the last sum."""

    op: int
    weight: int
    steps: tuple[Step, ...]
    at: int  # the node of the normalisation's own factor
    batch: Batch | None


def aval_of(atom: Atom) -> Any:
    """The type of a value."""
    return atom.aval if isinstance(atom, JaxprLiteral) else atom[1].aval


def shape_of(atom: Atom) -> tuple[int, ...]:
    """The shape of a value."""
    return tuple(aval_of(atom).shape)


class NormBody:
    """A jaxpr as a list of nodes, what is known about its values, and the normalisations to fold in it."""

    def __init__(self, jaxpr: Any, facts: Sequence[KnownValue | None]):
        self.nodes: list[Node] = []
        self.calls = 0
        self.consts: dict[Atom, Any] = {}
        self.facts: dict[Atom, KnownValue] = {}
        self.producer: dict[Atom, int] = {}
        self.users: dict[Atom, list[int]] = {}
        self.children: dict[int, dict[str, NormBody]] = {}
        self.inputs = [(0, var) for var in jaxpr.invars]
        self.facts.update((atom, fact) for atom, fact in zip(self.inputs, facts, strict=True) if fact is not None)
        self.outputs = self.add(jaxpr, self.inputs)
        self.live = self.find_live()
        self.norms: dict[int, Norm] = {}  # by matmul
        self.folded: list[Folded] = []
        self.unfolded: list[Unfolded] = []
        for i in sorted(self.live):
            for side, batch in self.factors(i):
                self.decide(i, side, batch)
            for child in self.children.get(i, {}).values():
                self.folded += child.folded
                self.unfolded += child.unfolded

    # --- Reading the program ---------------------------------------------------------------------------------

    def add(self, jaxpr: Any, atoms: Sequence[Atom]) -> list[Atom]:
        """Appends the equations of a jaxpr whose inputs are `atoms`; returns its results."""
        call = self.calls
        self.calls += 1
        names: dict[Any, Atom] = dict(zip(jaxpr.invars, atoms, strict=True))
        for var, const in zip(jaxpr.constvars, control_flow.consts_of(jaxpr), strict=False):
            names[var] = (call, var)
            self.consts[names[var]] = const
            self.facts[names[var]] = KnownValue()
        for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
            ins = tuple(v if isinstance(v, JaxprLiteral) else names[v] for v in eqn.invars)
            if control_flow.is_plain_jit(eqn) and self.matters(eqn, ins):
                outs = self.add(control_flow.bodies(eqn)[0].jaxpr, ins)
            else:
                outs = [(call, v) for v in eqn.outvars]
                self.node(Node(eqn, ins, tuple(outs)))
            names.update(zip(eqn.outvars, outs, strict=True))
        return [v if isinstance(v, JaxprLiteral) else names[v] for v in jaxpr.outvars]

    def matters(self, eqn: Any, ins: Sequence[Atom]) -> bool:
        """Whether a part of what this pass looks for may be inside a call (`jnp.where` of masked statistics is one)."""
        state = any(fact and fact.state for fact in map(self.fact, ins))
        return state or _has_matmul(eqn) or all(e.primitive in _BEFORE_SUM | NORM_MOVES for e in _equations(eqn))

    def node(self, node: Node) -> None:
        """Appends a node, with what is known of its results and what is found in its bodies."""
        i = len(self.nodes)
        self.nodes.append(node)
        self.producer.update((out, i) for out in node.outs)
        for atom in {atom for atom in node.ins if not isinstance(atom, JaxprLiteral)}:
            self.users.setdefault(atom, []).append(i)
        facts = [self.fact(atom) for atom in node.ins]
        known = [fact for fact in facts if fact is not None]
        if len(known) == len(facts) and not node.eqn.effects:
            fact = KnownValue(
                frozenset().union(*(f.params for f in known)),
                frozenset().union(*(f.state for f in known)),
                any(f.root or (f.state and node.primitive in _ROOTS) for f in known),
            )
            self.facts.update((out, fact) for out in node.outs)
            return
        for body in control_flow.bodies(node.eqn):
            inner = [None if feed.how == "carried" else facts[feed.operand] for feed in body.feeds]
            child = NormBody(body.jaxpr, inner)
            if (why := _CLOSED.get(body.name)) is not None:
                child = child.refused(why)
            if child.folded or child.unfolded:
                self.children.setdefault(i, {})[body.name] = child

    def refused(self, why: str) -> NormBody:
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

    def uses(self, atom: Atom) -> list[int]:
        """The live nodes that use a value."""
        return [i for i in self.users.get(atom, ()) if i in self.live]

    def fact(self, atom: Atom) -> KnownValue | None:
        """What is known about a value; None for one that an activation enters."""
        return KnownValue() if isinstance(atom, JaxprLiteral) else self.facts.get(atom)

    def by(self, atom: Atom) -> Node | None:
        """The node that makes a value; None for a literal or an input."""
        at = None if isinstance(atom, JaxprLiteral) else self.producer.get(atom)
        return None if at is None else self.nodes[at]

    def varies(self, atom: Atom) -> set[int]:
        """The axes along which a value may vary."""
        node = self.by(atom)
        repeated = set() if node is None else repeated_axes(node.eqn)
        return {axis for axis, size in enumerate(shape_of(atom)) if size > 1 and axis not in repeated}

    # --- Finding normalisations ------------------------------------------------------------------------------

    def factors(self, i: int) -> Iterator[tuple[int, Batch | None]]:
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

    def batch(self, factor: Atom) -> Batch | None:
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
                return Batch(tuple(chain), atom, running)
        return None

    def running(self, variance: Atom) -> Atom | None:
        """The state that is averaged with a variance: running = momentum * running + (1 - momentum) * variance."""
        todo = [variance]
        while todo:
            atom = todo.pop()
            for i in self.users.get(atom, ()):
                node = self.nodes[i]
                others = [a for a in node.ins if a is not atom and a != atom]
                if node.primitive in _SUMS and others and self.fact(others[0]) is not None:
                    leaf = self.state_leaf(others[0])
                    if leaf is not None and shape_of(leaf) == shape_of(variance):
                        return leaf
                scaled = node.primitive in _FACTORS and others and self.fact(others[0]) is not None
                if scaled or node.primitive in NORM_MOVES | {prims.stop_gradient_p}:
                    todo += node.outs
        return None

    def state_leaf(self, atom: Atom) -> Atom | None:
        """The state input of which a value is a multiple."""
        while (fact := self.fact(atom)) is not None and not isinstance(atom, JaxprLiteral):
            if fact.leaf:
                return atom
            node = self.by(atom)
            if node is None or node.primitive not in _FACTORS | NORM_MOVES | {prims.stop_gradient_p}:
                return None
            of_state = [a for a in node.ins if (f := self.fact(a)) and f.state]
            if len(of_state) != 1:
                return None
            atom = of_state[0]
        return None

    # --- Deciding --------------------------------------------------------------------------------------------

    def decide(self, i: int, side: int, batch: Batch | None) -> None:
        """Notes that the normalisation whose factor is an operand of a node is folded, or why it is not."""
        found = self.norm(i, 1 - side, batch)
        operands = [a for step in found.steps for a in self.nodes[step.node].ins] if isinstance(found, Norm) else []
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

    def scaling(self, norm: Norm) -> list[Step]:
        """The steps of a fold that multiply by a known value, beside the normalisation itself."""
        steps = [step for step in norm.steps if self.nodes[step.node].primitive in _FACTORS]
        return [step for step in steps if step.node != norm.at]

    def factor_fact(self, i: int, side: int, batch: Batch | None) -> KnownValue:
        """What the factor of node i is made of; with batch statistics, the one that stands for it on the weight."""
        node = self.nodes[i]
        if batch is None:
            return self.fact(node.ins[side]) or KnownValue()
        facts = [self.fact(batch.running)] + [self.fact(a) for j in batch.chain for a in self.nodes[j].ins]
        known = [fact for fact in facts if fact is not None]
        return KnownValue(frozenset().union(*(f.params for f in known)), frozenset().union(*(f.state for f in known)))

    def norm(self, i: int, operand: int, batch: Batch | None) -> Norm | str:
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
        steps: list[Step] = []
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
        return Norm(at, weights[0], tuple(steps), i, batch)

    def passes(self, node: Node, batch: Batch | None) -> int | None:
        """The operand of a node whose value its result is, but for a known term, factor or move."""
        if node.primitive in NORM_MOVES:
            return 0
        flows = [k for k, atom in enumerate(node.ins) if self.fact(atom) is None]
        if node.primitive in _SUMS | _FACTORS and len(flows) == 1:
            return None if node.primitive is prims.div_p and flows == [1] else flows[0]
        if node.primitive is prims.sub_p and batch is not None:
            return 0  # the mean of the batch; `step` looks at its shape
        return None

    def step(self, i: int, operand: int, axes: Mapping[int, int], batch: Batch | None) -> Step | None:
        """The step of node i, or None where what it adds or multiplies with is not one value per feature."""
        node = self.nodes[i]
        if node.primitive in NORM_MOVES:
            moved = _moved(node, axes)
            return None if moved is None else Step(i, operand, axes, moved)
        other = node.ins[1 - operand]
        if shape_of(node.outs[0]) != shape_of(node.ins[operand]) or not self.varies(other) <= set(axes):
            return None
        return Step(i, operand, axes, axes)

    def used_elsewhere(self, value: Atom, by: int, axes: Mapping[int, int], batch: Batch | None) -> str | None:
        """Who else uses a value on the way than node `by`: None, or a phrase.

        With batch statistics, their computation may: a use that ends, through pointwise equations, in sums over
        everything but the features.
        """
        if value in self.outputs:
            return "returned"
        features = math.prod(shape_of(value)[axis] for axis in axes)
        seen, todo = {value}, [value]
        while todo:
            atom = todo.pop()
            for i in self.uses(atom):
                if i == by and atom == value:
                    continue
                node = self.nodes[i]
                if batch is None:
                    return f"used by '{node.primitive.name}'"
                if all(math.prod(shape_of(out)) <= features for out in node.outs):
                    continue
                others = node.ins[1:] if node.primitive is prims.select_n_p else node.ins  # a mask may be anything
                fits = (a in seen or math.prod(shape_of(a)) <= features or self.fact(a) is not None for a in others)
                if node.primitive not in _BEFORE_SUM or not all(fits) or node.outs[0] in self.outputs:
                    return f"used by '{node.primitive.name}'"
                if node.outs[0] not in seen:
                    seen.add(node.outs[0])
                    todo.append(node.outs[0])
        return None

    def following(self, value: Atom, axes: Mapping[int, int]) -> list[Step]:
        """The known factors after a normalisation, and the one term after them."""
        steps: list[Step] = []
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


def _has_matmul(eqn: Any) -> bool:
    return any(e.primitive in _MATMULS or _has_matmul(e) for e in _equations(eqn))


def _equations(eqn: Any) -> list[Any]:
    return [e for body in control_flow.bodies(eqn) for e in getattr(body.jaxpr, "jaxpr", body.jaxpr).eqns]


def _parent(path: str) -> str:
    return path.rpartition("/")[0]


def _norm_name(factor: KnownValue, operands: Sequence[KnownValue]) -> str:
    """'bn' for a factor of 'bn/scale' and 'batch_stats/bn/var'; 'batch_stats/bn' if no parameter tells."""
    state = sorted(map(_parent, factor.state))
    params = sorted({_parent(path) for fact in (factor, *operands) for path in fact.params}, key=len, reverse=True)
    matching = [path for path in params for norm in state if norm == path or norm.endswith("/" + path)]
    return (matching or state or ["?"])[0]


def _weight_axes(op: Node, weight: int) -> dict[int, int]:
    """Axis of the result -> axis of the weight, for the axes longer than 1 that they share."""
    shape = shape_of(op.ins[weight])
    if op.primitive is prims.conv_general_dilated_p:
        numbers = op.eqn.params["dimension_numbers"]
        pairs = [(numbers.out_spec[1], numbers.rhs_spec[0])]
    else:
        contract, batch = op.eqn.params["dimension_numbers"]
        free = [
            [axis for axis in range(len(shape_of(atom))) if axis not in (*contract[k], *batch[k])]
            for k, atom in enumerate(op.ins[:2])
        ]
        first = len(batch[0]) + (len(free[0]) if weight == 1 else 0)
        pairs = [*enumerate(batch[weight]), *enumerate(free[weight], first)]
    return {out: axis for out, axis in pairs if shape[axis] > 1}


def _moved(node: Node, axes: Mapping[int, int]) -> dict[int, int] | None:
    """`axes` after a move; None where it does not keep each of them an axis."""
    where = MOVES[node.primitive].axes(node.eqn, 0)
    if where is None or not where.keys() >= axes.keys():
        return None
    if math.prod(shape_of(node.ins[0])) != math.prod(shape_of(node.outs[0])):
        return None  # elements are repeated
    return {where[axis]: w for axis, w in axes.items()}

"""Values in flight while a program is replayed, and what may be done to its equations."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array

from qjax.pallas_kernels.packed import qcache
from qjax.pallas_kernels.packed.layout import Layout
from qjax.pallas_kernels.packed.qcache import QCache
from qjax.pallas_kernels.packed.qtensor import QTensor
from qjax.passes.jaxpr.trace import Address
from qjax.passes.jaxpr.views import View

# --- Replay ----------------------------------------------------------------------------------------------------


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class Cached:
    """A packed cache, or a part of one, in flight.

    Attributes:
        stored: the packed arrays.
        layer: where the cache is one of a stack, which `stored` is: its index along the first axis.
        stack: says which stack, where there is a layer.
    """

    stored: QCache
    layer: Any = None
    stack: Any = None
    shadow = None

    def tree_flatten(self):
        """The packed cache and the index are its children."""
        return (self.stored, self.layer), self.stack

    @classmethod
    def tree_unflatten(cls, stack, children):
        """Rebuilds from `tree_flatten`."""
        stored, layer = children
        return cls(stored, layer, stack)

    @property
    def base(self) -> QCache:
        """The packed cache by itself: a copy, where it is one of a stack."""
        return self.stored if self.layer is None else qcache.layer_of(self.stored, self.layer)

    @property
    def whole(self) -> Cached:
        """All caches of the stack."""
        return Cached(self.stored)

    @property
    def position(self) -> int:
        """The vector axis, counted from the front."""
        return self.stored.axis + self.stored.ndim - (self.layer is not None)

    def materialize(self) -> Array:
        """The float value."""
        return jax.jit(qcache.dequantize)(self.base)

    def can_index(self, axis: int) -> bool:
        """Whether `at_layer` has the elements of this axis."""
        return axis == 0 and self.position > 0 and self.layer is None

    def at_layer(self, layer: Array, stack: Any) -> Cached:
        """One element of the first axis, which is not taken out of the stack: it is read and updated there."""
        return Cached(self.stored, layer, stack)

    def shard(self, spec: Any, mesh: Any) -> None:
        """A `shard_map` gets the float value."""
        return None


def float_value(value: Any) -> Any:
    """Anything that has a float value as that; anything else as it is."""
    return value.materialize() if hasattr(value, "materialize") else value


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class Ref:
    """A parameter seen through a view: `indices` holds one value per indexed axis of `view`.

    Handlers meet packed ones; a float one is what the identity replay of the tests tracks.
    """

    base: Any  # QTensor or array
    view: Any
    indices: Any = ()
    shadow: Any = None

    def tree_flatten(self):
        """Packed arrays, indices and shadow as leaves, the view static."""
        return (self.base, self.indices, self.shadow), self.view

    @classmethod
    def tree_unflatten(cls, view, children):
        """Rebuilds from `tree_flatten`."""
        return cls(children[0], view, *children[1:])

    def materialize(self) -> Array:
        """The float value, as the program would have computed it from the dequantized parameter."""
        if self.shadow is not None:
            return self.shadow
        base = jax.jit(QTensor.dequantize)(self.base) if isinstance(self.base, QTensor) else self.base
        return self.view.apply(base, self.indices)

    def can_index(self, axis: int) -> bool:
        """Whether one element of `axis` can be picked without making it float."""
        return self.view.index(axis, None) is not None

    def index(self, axis: int, value: Any, shadow: Any = None) -> Ref:
        """The Ref of one element of `axis`, with the shadow that belongs to it."""
        view = self.view.index(axis, ("run", len(self.view.indexed)))
        assert view is not None
        picked = (value,) if len(view.indexed) > len(self.view.indexed) else ()
        return Ref(self.base, view, self.indices + picked, shadow)

    def shard(self, spec: PartitionSpec, mesh: Mesh) -> tuple[Ref, Callable[[Ref], Ref]] | None:
        """How `shard_map` should split the packed arrays, and what a shard's Ref is; None if it cannot.

        Leading stack axes and N may be sharded; K may not (a shard could cut a group or a word).
        """
        if not isinstance(self.base, QTensor) or self.shadow is not None:
            return None
        q, layout = self.base, self.base.layout
        lead = q.ndim - len(layout.axes)
        names = [*spec, *(None,) * (q.ndim - len(spec))]
        if not self.view.is_identity or q.spec.double_quant or layout.sizes("stack"):
            return None
        inner = [i for i in range(lead, q.ndim) if names[i] is not None]
        produced = [i for i in range(lead, q.ndim) if any(role == "n" for _, role in layout.axes[i - lead])]
        if inner and (inner != produced[:1] or len(layout.axes[inner[0] - lead]) != 1):
            return None
        shards = 1
        for name in jax.tree.leaves(names[inner[0]]) if inner else ():
            shards *= mesh.shape[name]
        axis = inner[0] - lead if inner else -1
        local = Layout(tuple(((a[0][0] // shards, "n"),) if i == axis else a for i, a in enumerate(layout.axes)))
        column = names[inner[0]] if inner else None

        def array_spec(a: Any) -> PartitionSpec:
            last = (None, column) if q.order == "kn" else (column, None)
            wide = a.shape[-1 if q.order == "kn" else -2] == layout.n
            return PartitionSpec(*names[:lead], *(last if wide else (None, None)))

        specs = jax.tree.map(array_spec, self)

        def localize(ref: Ref) -> Ref:
            base = dataclasses.replace(ref.base, layout=local)
            return Ref(base, View.identity(base.shape))

        return specs, localize


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Absorbed:
    """Stands where a parameter was that only a folded matrix uses."""

    path: str
    shadow = None

    def materialize(self) -> Absorbed:
        """Itself: it has no value."""
        return self

    def can_index(self, axis: int) -> bool:
        """Always."""
        return True

    def index(self, axis: int, value: Any, shadow: Any = None) -> Absorbed:
        """Itself."""
        return self

    def shard(self, spec: PartitionSpec, mesh: Mesh) -> tuple[Absorbed, Callable[[Any], Any]]:
        """Itself, in every shard."""
        return self, lambda value: value


def is_ref(value: Any) -> bool:
    """Whether a value in flight is anything but an array."""
    return isinstance(value, Ref | Absorbed | Cached)


def as_float(value: Any) -> Any:
    """A packed value in flight as the float array that it stands for; anything else as it is."""
    return value.materialize() if isinstance(value, Ref | Cached) else value


# rule(eqn, values, operand) -> results, or None to have the Ref dequantized and the equation bound as it is;
# `operand` is the number of the operand that is a Ref
EquationRule = Callable[[Any, list[Any], int], list[Any] | None]


@dataclasses.dataclass
class Scope:
    """What an equation that is taken over by address may know and leave behind; one for each body that is replayed.

    Attributes:
        indices: the loop index of each scan around the equation, by the address of its body.
        memo: results that other equations of this body may use again.
        taps: statistics by name, with the scans over whose steps they are to stay apart.
    """

    indices: Mapping[Address, Any]
    memo: dict[Any, Any] = dataclasses.field(default_factory=dict)
    taps: dict[str, tuple[Any, frozenset[Address]]] = dataclasses.field(default_factory=dict)

    def tap(self, name: str, statistic: Any, loops: Iterable[Address]) -> None:
        """Lets a statistic out; one that has the name already is merged with it."""
        old = self.taps.get(name)
        self.taps[name] = (old[0].merge(statistic) if old else statistic, frozenset(loops))


# rule(eqn, values, scope) -> results, for the equation at one address; a packed operand is a Ref
AtRule = Callable[[Any, list[Any], Scope], list[Any]]


@dataclasses.dataclass(frozen=True)
class Fused:
    """Equations of one body that are carried out together, in the place of one of them.

    Other equations use the results of that one and of those after it.

    Attributes:
        body: address of the body.
        equations: their numbers, ascending; each has one result.
        rule: `rule(equations of the body, value of an atom, scope)` -> those results, or None to have each run by
            itself.
        place: number of the one in whose place it is.
        reads: numbers of other equations, before it, whose operands the rule reads.
        before: numbers of other equations, after it, that are run before the rule.
    """

    body: Address
    equations: tuple[int, ...]
    rule: Callable[[Sequence[Any], Callable[[Any], Any], Scope], Sequence[Any] | None]
    place: int
    reads: tuple[int, ...] = ()
    before: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class FoldValue:
    """What replaces result `out` of the equation at `address`: packed or float, stacked over `loops`."""

    address: Address
    out: int
    loops: tuple[Address, ...]
    value: Array | QTensor
    shadow: Array | None = None


def is_packed_ref(value: Any) -> bool:
    """Whether a value in flight is a packed parameter that is served, or absorbed."""
    return isinstance(value, Absorbed) or (
        isinstance(value, Ref) and isinstance(value.base, QTensor) and value.shadow is None
    )

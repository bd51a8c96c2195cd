"""`Plan`: every decision about a model, as data."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from rich.console import RenderableType

from qjax.pallas_kernels.backends.epilogue import Epilogue
from qjax.pallas_kernels.numbers.activation_ranges import ActSpec
from qjax.pallas_kernels.numbers.formats import QuantSpec
from qjax.pallas_kernels.packed import qcache
from qjax.pallas_kernels.packed.layout import Layout
from qjax.pallas_kernels.packed.qcache import CacheSpec, QCache
from qjax.pallas_kernels.packed.qtensor import packed_nbytes
from qjax.passes.jaxpr.trace import Address
from qjax.passes.plan import show


@dataclasses.dataclass(frozen=True)
class Attention:
    """The decision to carry out attention on packed caches as one operation.

    Attributes:
        body: address of the body that has them.
        equations: their numbers in it, in order.
        scores, result: the numbers of the two products.
        weights: which operand of the second is the probabilities.
        order, steps: as in `AttentionSpec`; a step ("mask", ...) belongs to `mask`.
        keys: which operand of the first product is the packed keys.
        mask: the equation and its operand that is the mask, or None.
        dtype: of the probabilities.
        names: of the two products, as the plan lists matmuls of activations.
    """

    body: Address
    equations: tuple[int, ...]
    scores: int
    result: int
    weights: int
    order: tuple[int, ...]
    steps: tuple[Any, ...]
    keys: int
    mask: tuple[int, int] | None
    dtype: Any
    names: tuple[str, ...] = ()

    def __str__(self) -> str:
        return ", ".join(self.names)


@dataclasses.dataclass(frozen=True)
class Other:
    """An operand of a region that is not one of its products: where it is read, and how it lies in the result.

    Attributes:
        equation, operand: number of the equation in the body, and of its operand.
        axes: the axes of the result that are the axes of the operand; it is repeated along the others.
    """

    equation: int
    operand: int
    axes: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Codes:
    """What the result of a region is quantized for.

    Attributes:
        site: one of the equations that read it, the decision for it.
        entering: the operand that it is there.
        readers: numbers of all of these equations.
    """

    site: QuantizedSite
    entering: QuantizedInput
    readers: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Fusion:
    """The decision to carry out equations of one body as one product.

    Attributes:
        names: of the parameters or folds that are multiplied, one or two.
        body: address of the body.
        dots: numbers of the equations that multiply.
        steps: numbers of the equations after them that become part of it, ascending.
        repeats: numbers of equations that only repeat an operand along axes of the result.
        others: what else the steps read.
        epilogue: the steps as a kernel runs them.
        batch, rows: how many axes of the result come from axes that both operands have, and how many from x alone.
        operations: the steps as the plan prints them.
        site: the decision for the input, where integers are multiplied; that of the first dot.
        codes: what the result is quantized for, or None where it is float.
        reason: why it is float though an equation that reads it has a range for it; empty if there is no such.
    """

    names: tuple[str, ...]
    body: Address
    dots: tuple[int, ...]
    steps: tuple[int, ...]
    repeats: tuple[int, ...]
    others: tuple[Other, ...]
    epilogue: Epilogue
    batch: int
    rows: int
    operations: tuple[str, ...]
    site: QuantizedSite | None = None
    codes: Codes | None = None
    reason: str = ""

    @property
    def equations(self) -> tuple[int, ...]:
        """The equations that are carried out together, ascending."""
        return tuple(sorted((*self.dots, *self.steps)))

    @property
    def multiplying(self) -> list[Address]:
        """Addresses of the equations whose products have to be what the plan says they are."""
        return [(*self.body, i) for i in (*self.dots, *(self.codes.readers if self.codes else ()))]

    def __str__(self) -> str:
        operations = ", ".join([*self.operations, *(["quantize"] if self.codes else [])])
        return f"{', '.join(self.names)}: {operations}" + (f" (not quantize: {self.reason})" if self.reason else "")


def key_of(site: QuantizedSite, entering: QuantizedInput) -> Any:
    """Under which `Scope.memo` has a quantized input: what sites that share it have in common."""
    return entering.flow, entering.axes, site.spec, entering.range


@dataclasses.dataclass(frozen=True)
class Joint:
    """The decision to carry out dots of one body as one product.

    Attributes:
        names: of the parameters or folds that are multiplied.
        body: address of the body.
        dots: numbers of the equations, ascending.
        operands: for each, which operand is the weight.
        before: numbers of equations after the first dot that read weights of the others.
    """

    names: tuple[str, ...]
    body: Address
    dots: tuple[int, ...]
    operands: tuple[int, ...]
    before: tuple[int, ...]

    def __str__(self) -> str:
        return ", ".join(self.names)


_quantize_jitted = jax.jit(qcache.quantize, static_argnums=(1, 2))


@dataclasses.dataclass(frozen=True)
class CacheEntry:
    """The decision for one state variable.

    Attributes:
        name: its path.
        shape, dtype: of the float value.
        spec: the format, or None where it stays float.
        axis: the vector axis, counted from the end; set with `spec`.
        reason: why it stays float, or what else there is to know.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    spec: CacheSpec | None
    axis: int | None = None
    reason: str = ""

    @property
    def float_bytes(self) -> int:
        """Bytes of the float value."""
        return math.prod(self.shape) * jnp.dtype(self.dtype).itemsize

    @property
    def stored_bytes(self) -> int:
        """Bytes after conversion: those of the arrays that are allocated."""
        if self.spec is None or self.axis is None:
            return self.float_bytes
        return qcache.packed_nbytes(self.shape, self.spec, self.axis)

    def pack(self, value: Any) -> QCache:
        """The packed form of a float cache; of a `jax.ShapeDtypeStruct`, that of zeros."""
        assert self.spec is not None
        assert self.axis is not None
        if isinstance(value, jax.ShapeDtypeStruct):
            return qcache.zeros(value.shape, value.dtype, self.spec, self.axis)
        return _quantize_jitted(jnp.asarray(value), self.spec, self.axis)


@dataclasses.dataclass(frozen=True)
class CachePlan:
    """The decisions about state.

    Attributes:
        entries: one for each float state variable of at least two axes, in the order of the program's inputs.
        kept: results (equation, number) that stay packed where the operation alone does not tell.
        results: per result of the program, the state of which it is the new value and which is packed, or None.
        dots: (equation, operand) -> how a dot reads the codes of a cache: "scores", where it contracts the vectors, or
            "values", where it makes them. Every other equation that is no move gets floats.
    """

    entries: tuple[CacheEntry, ...] = ()
    kept: frozenset[tuple[Address, int]] = frozenset()
    results: tuple[CacheEntry | None, ...] = ()
    dots: Mapping[tuple[Address, int | None], str] = dataclasses.field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.entries)

    def __getitem__(self, name: str) -> CacheEntry:
        for entry in self.entries:
            if entry.name == name:
                return entry
        names = ", ".join(entry.name for entry in self.entries)
        raise KeyError(f"qjax: no cache {name!r} in the plan; it has {names or 'none'}.")

    @property
    def quantized(self) -> tuple[CacheEntry, ...]:
        """The entries that have a format."""
        return tuple(entry for entry in self.entries if entry.spec is not None)

    @property
    def float_bytes(self) -> int:
        """Bytes of all entries in float."""
        return sum(entry.float_bytes for entry in self.entries)

    @property
    def stored_bytes(self) -> int:
        """Bytes of all entries after conversion."""
        return sum(entry.stored_bytes for entry in self.entries)

    def to_json(self) -> list[dict[str, Any]]:
        """The entries as plain data."""
        return show.cache_json(self)

    def __rich__(self) -> RenderableType:
        return show.cache_table(self)


NO_CACHES = CachePlan()
"""The plan of a call without packed caches."""

Product = Literal["integer", "fp8", "float"]


@dataclasses.dataclass(frozen=True)
class QuantizedInput:
    """One input of a matmul or convolution that is quantized.

    Attributes:
        operand: which operand of the equation it is.
        flow: inputs of equal flow and axes in one body are quantized once.
        axes: the axes that the product contracts.
        range: name under which its range is kept, where that is known before the call.
    """

    operand: int
    flow: int
    axes: tuple[int, ...]
    range: str | None


@dataclasses.dataclass(frozen=True)
class QuantizedSite:
    """The decision for the inputs of one equation.

    Attributes:
        name: of the parameter or fold that they are multiplied with, or of the matmul.
        address: of the equation.
        weight: the operand that is the parameter; None where both are activations.
        spec: how the inputs are quantized.
        inputs: one, or both of a matmul of activations.
        product: "integer": codes are multiplied and added up as integers. "fp8": codes are multiplied as 8-bit floats
            and added up in float32. "float": the quantized values are multiplied as floats, where the two formats are
            not of one kind, or weights share no scale along what is contracted by a convolution or by 8-bit floats.
        loops: the scans around it that run over layers: its range has an entry for each of their steps.
    """

    name: str
    address: Address
    weight: int | None
    spec: ActSpec
    inputs: tuple[QuantizedInput, ...]
    product: Product
    loops: tuple[Address, ...]


@dataclasses.dataclass(frozen=True)
class Entry:
    """The decision for one parameter, or for one matrix folded from several.

    Attributes:
        name: path of the parameter, or name of the fold.
        shape, dtype: of the float value.
        spec: the format, or None where it stays float.
        layout: canonical matrix; set with `spec`.
        order: storage order of the packed matrix; set with `spec`.
        ops: the operations it is used in, in program order.
        reason: why it stays float, or what else there is to know; empty for a plain quantized one.
        folded_into: for a parameter: the quantized folds that absorb it.
        kept: whether the parameter itself is needed beside the folds that absorb it.
        sources: for a fold: the parameters it is made from.
        activations: how the inputs of its matmuls are quantized, or None where they stay float.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    spec: QuantSpec | None
    layout: Layout | None = None
    order: Literal["kn", "nk"] = "kn"
    ops: tuple[str, ...] = ()
    reason: str = ""
    folded_into: tuple[str, ...] = ()
    kept: bool = True
    sources: tuple[str, ...] = ()
    activations: ActSpec | None = None

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def float_bytes(self) -> int:
        """Bytes of the float value."""
        return self.size * jnp.dtype(self.dtype).itemsize

    @property
    def stored_bytes(self) -> int:
        """Bytes after conversion; a parameter that lives on only inside folds takes none."""
        if self.spec is None or self.layout is None:
            return self.float_bytes if self.kept and not self.sources else 0
        return packed_nbytes(self.shape, self.spec, self.layout)


@dataclasses.dataclass(frozen=True)
class Run:
    """What one packed operation of the served program runs as.

    Attributes:
        names: of the parameters, folds and caches that it reads.
        operation: its name in the program.
        runs: what computes it.
        reason: why that is not the best kernel of the platform; empty where it is, or where there is none.
    """

    names: tuple[str, ...]
    operation: str
    runs: str
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {"names": list(self.names), "operation": self.operation, "runs": self.runs, "reason": self.reason}


@dataclasses.dataclass(frozen=True)
class Plan:
    """Every decision about a model: what is quantized, how, and why the rest is not.

    Attributes:
        entries: one per parameter, in path order, then one per fold.
        unweighted: matmuls and convolutions without a parameter, as (what, what is done or why nothing is).
        sites: the matmuls and convolutions whose inputs are quantized, in program order.
        norms: batch normalisations, where they are folded, as (name, what is done or why nothing is).
        caches: the same for state, where the recipe says how key-value caches are stored; else None.
        fusions: what becomes part of the products of packed weights.
        joints: products of packed weights that are carried out as one.
        attentions: attention on packed caches that is carried out as one.
        runs: what each packed operation runs as on the platform that the plan was made for.
    """

    entries: tuple[Entry, ...]
    unweighted: tuple[tuple[str, str], ...]
    sites: tuple[QuantizedSite, ...] = ()
    norms: tuple[tuple[str, str], ...] = ()
    caches: CachePlan | None = None
    fusions: tuple[Fusion, ...] = ()
    joints: tuple[Joint, ...] = ()
    attentions: tuple[Attention, ...] = ()
    runs: tuple[Run, ...] = ()

    @functools.cached_property
    def _by_name(self) -> dict[str, Entry]:
        return {entry.name: entry for entry in self.entries}

    def __getitem__(self, name: str) -> Entry:
        if name not in self._by_name:
            raise KeyError(f"qjax: no parameter {name!r} in the plan; it has {', '.join(self._by_name)}.")
        return self._by_name[name]

    @property
    def quantized(self) -> tuple[Entry, ...]:
        """The entries that have a format."""
        return tuple(e for e in self.entries if e.spec is not None)

    @property
    def float_bytes(self) -> int:
        """Bytes of all parameters in float."""
        return sum(e.float_bytes for e in self.entries if not e.sources)

    @property
    def stored_bytes(self) -> int:
        """Bytes of all parameters after conversion."""
        return sum(e.stored_bytes for e in self.entries)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per parameter value, over the whole model, what stays float included."""
        size = sum(e.size for e in self.entries if not e.sources)
        return 8 * self.stored_bytes / size if size else 0.0

    def runs_of(self, name: str) -> tuple[Run, ...]:
        """What the operations that read a parameter, fold or cache run as; none where that was not asked for."""
        return tuple(run for run in self.runs if name in run.names)

    @property
    def fallbacks(self) -> tuple[Run, ...]:
        """The operations that run as something else than the best kernel of the platform, each with its reason."""
        return tuple(run for run in self.runs if run.reason)

    def to_json(self) -> dict[str, Any]:
        """The plan as plain data."""
        return show.plan_json(self)

    def save(self, path: str) -> None:
        """Writes `to_json` to a file."""
        show.save_json(self.to_json(), path)

    def __rich__(self) -> RenderableType:
        return show.plan_renderable(self)

    def __str__(self) -> str:
        return show.plain_text(self)

    __repr__ = __str__

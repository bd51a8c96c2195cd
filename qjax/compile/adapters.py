"""Low-rank adapters of a compiled call: their arrays, beginnings, merging."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from qjax.compile.call import Call, Variables
from qjax.compile.compiled import Compiled, Wanted, compile_call
from qjax.compile.convert import convert_call, pack_jitted
from qjax.compile.ranges import Flat, flatten
from qjax.pallas_kernels.packed.qtensor import FoldedParam, QTensor, is_packed
from qjax.passes.plan.adapters import AdapterPlan, AdapterSpec, plan_adapters
from qjax.passes.rewrites.adapters import Adapter, adapter, attach
from qjax.recipes import Recipe

LORA = "lora"
"""Name of the collection."""


def take_adapters(variables: Variables) -> tuple[dict[str, Any], Flat]:
    """The other collections, and the adapters by path."""
    return {name: tree for name, tree in variables.items() if name != LORA}, flatten(variables.get(LORA))


def with_adapters(call: Call, adapters: Flat, scale: float) -> Call:
    """The call, so that it runs with adapters."""

    def rewrite(compiled: Compiled, values: list[Any], at: Mapping[Any, Any]) -> tuple[list[Any], dict[Any, Any]]:
        return attach(compiled.program, compiled.sites, compiled.plan, values, at, adapters, scale)

    call.rewrite = rewrite if adapters else None
    return call


def planned_adapters(call: Call, recipe: Recipe, spec: AdapterSpec) -> AdapterPlan:
    """What is decided about adapters of a call."""
    compiled = compile_call(call, recipe, Wanted(), strict=False)
    return plan_adapters(compiled.program, compiled.sites, compiled.plan, spec)


def packed_leaves(call: Call) -> dict[str, Any]:
    """The parameters of a call, by path."""
    return {path: leaf for path, leaf in zip(call.paths, call.leaves, strict=True) if path is not None}


# --- First values ------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("plan",))
def _initial(key: Array, plan: AdapterPlan) -> Flat:
    """`a` uniform with variance 1 / (3 K), `b` zero: LoRA's own initialisation, and no change to the model at first."""
    out: Flat = {}
    rank = plan.spec.rank
    for entry in plan.adapted:
        assert entry.matrix is not None
        *stack, k, n = entry.matrix
        bound = k**-0.5
        own = jax.random.fold_in(key, zlib.crc32(entry.name.encode()))  # adding a target leaves the others as they are
        a = jax.random.uniform(own, (*stack, k, rank), jnp.float32, -bound, bound)
        out[entry.name] = {"a": a, "b": jnp.zeros((*stack, rank, n), jnp.float32)}
    return out


@functools.partial(jax.jit, static_argnames=("rank", "scale"))
def _factors(w: Array, q: QTensor, rank: int, scale: float) -> tuple[Array, Array, Array]:
    """`a` and `b` of the best rank-`rank` fit to what `q` lacks of `w`, and the squared error that remains."""
    rest = q.layout.to_matrix(w.astype(jnp.float32)) - q.matrix(jnp.dtype("float32"))
    u, s, v = jnp.linalg.svd(rest, full_matrices=False)
    s = jnp.sqrt(s[..., :rank] / scale)
    a, b = u[..., :rank] * s[..., None, :], s[..., :, None] * v[..., :rank, :]
    short = rank - a.shape[-1]  # the rank may exceed that of the matrix
    a, b = (jnp.pad(x, [(0, 0)] * (x.ndim - 2) + p) for x, p in ((a, [(0, 0), (0, short)]), (b, [(0, short), (0, 0)])))
    error = jnp.sum((rest - Adapter(a, b, q.layout, scale).matrix()) ** 2)
    return a, b, error


@jax.jit
def _without(w: Array, part: Adapter) -> Array:
    """A float parameter less its adapter."""
    matrix = part.layout.to_matrix(w.astype(jnp.float32)) - part.matrix()
    return part.layout.from_matrix(matrix.astype(w.dtype))


@jax.jit
def _with(q: QTensor, part: Adapter) -> Array:
    """A packed parameter and its adapter as one float parameter."""
    return q.layout.from_matrix((q.matrix(jnp.dtype("float32")) + part.matrix()).astype(q.dtype))


def _packed_like(w: Array, like: QTensor) -> QTensor:
    return pack_jitted(w, spec=like.spec, layout=like.layout, order=like.order)


def _loftq(
    floats: Mapping[str, Any], packed: dict[str, Any], plan: AdapterPlan, iterations: int
) -> tuple[dict[str, Any], Flat]:
    """LoftQ (arXiv 2310.08659), algorithm 1: Q_t = quantize(W - A_t-1 B_t-1), then A_t, B_t = SVD_r(W - Q_t).

    The best iterate of each parameter is kept: nothing says that a further quantization cannot lose.
    """
    out, scale = dict(packed), plan.spec.scale
    adapters: Flat = {}
    for entry in plan.adapted:
        w, q = jnp.asarray(floats[entry.name]), packed[entry.name]
        least = jnp.inf
        for iteration in range(iterations):
            if iteration:
                q = _packed_like(_without(w, Adapter(a, b, q.layout, scale)), q)
            a, b, error = _factors(w, q, plan.spec.rank, scale)
            if error < least:
                least, out[entry.name], adapters[entry.name] = error, q, {"a": a, "b": b}
    return out, adapters


def initial_adapters(
    call: Call, recipe: Recipe, spec: AdapterSpec, key: Array, iterations: int, known: Flat
) -> tuple[dict[str, Any], Flat]:
    """The parameters to replace, by path, and the adapters."""
    if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 0:
        raise ValueError(f"qjax: loftq_iterations={iterations!r} is a whole number; 0 starts from b = 0.")
    plan = planned_adapters(call, recipe, spec)
    if not iterations:
        return {}, _initial(key, plan)
    floats = packed_leaves(call)
    if done := [entry.name for entry in plan.adapted if is_packed(floats[entry.name])]:
        raise TypeError(
            f"qjax: {done[0]!r} is packed already: LoftQ needs the float weights, of which it quantizes what the "
            "adapters leave. Pass the float variables, or loftq_iterations=0."
        )
    return _loftq(floats, convert_call(call, recipe, known, caches=False).params, plan, iterations)


# --- Merging -----------------------------------------------------------------------------------------------------


def merged_variables(leaves: Mapping[str, Any], adapters: Flat, scale: float, requantize: bool) -> dict[str, Any]:
    """The parameters, by path, with their adapters added: float, or packed again as they were."""
    out: dict[str, Any] = {}
    for name in adapters:
        if not isinstance(leaves.get(name), QTensor):
            raise ValueError(f"qjax: 'lora' has an adapter for {name!r}, which is no packed parameter of the model.")
    for name, leaf in leaves.items():
        if not is_packed(leaf) or (requantize and name not in adapters):
            continue
        if isinstance(leaf, FoldedParam) and not is_packed(leaf.own):
            if leaf.own is None:
                raise ValueError(
                    f"qjax: {name!r} was packed as part of {', '.join(leaf.derived) or 'a folded matrix'} and has no "
                    "float value of its own any more. Merge with requantize=True, which leaves it packed."
                )
            out[name] = leaf.own
            continue
        q = leaf.own if isinstance(leaf, FoldedParam) else leaf
        if name not in adapters:
            out[name] = jax.jit(QTensor.dequantize)(q)
            continue
        w = _with(q, adapter(name, adapters[name], q.shape, q.layout, scale))
        out[name] = _packed_like(w, q) if requantize else w
    return out

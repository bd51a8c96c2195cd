"""Higher-order primitives: what they contain, and how to build them again.

The only file that reads the parameters of `scan`, `while`, `cond`, `jit`, `remat`, `custom_jvp`, `custom_vjp`
and `shard_map`, and the only one with names that JAX does not export; `tests/passes/test_contracts.py` lists both.
Parameters are read by name, as found in jax 0.10 (a closed jaxpr is a `ClosedJaxpr`; scan counts its operands)
and from 0.11 on (a `Jaxpr` carries its constants; scan's `ft_in` holds the split).

`bodies` serves analysis: the sub-jaxprs of an equation and where their inputs come from. `REBUILD` serves replay:
each entry calls the public combinator again with a body that is replayed. Operands of a rebuilt equation may be
`Ref`s (a parameter that is packed, see `passes.jaxpr.replay`): they reach the body by closure or as pytrees, so no
float copy of them is made, and a `Ref` among the scanned operands is indexed in the body, not sliced.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax._src.lax.lax import ragged_dot_general_p
from jax._src.shard_map import shard_map_p
from jax.core import eval_jaxpr
from jax.extend.core import Primitive
from jax.extend.core import primitives as prims

CALLS = {prims.jit_p, prims.remat_p, prims.closed_call_p}

LOOPS = {prims.scan_p, prims.while_p}

__all__ = [
    "REBUILD",
    "Body",
    "Feed",
    "bind",
    "bodies",
    "consts_of",
    "evaluate",
    "has_bodies",
    "ragged_dot_general_p",
    "shard_map_p",
    "varying",
]


def consts_of(jaxpr: Any) -> tuple[Any, ...]:
    """The constants of a closed jaxpr; an open one has none."""
    return tuple(getattr(jaxpr, "consts", ()))


def bind(eqn: Any, values: Sequence[Any]) -> list[Any]:
    """Runs one equation unchanged, with all of its parameters; always a list of results."""
    out = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
    return list(out) if eqn.primitive.multiple_results else [out]


def varying(value: Any, aval: Any) -> Any:
    """A value with the type of the one that it stands for: inside `shard_map`, varying over the mesh axes of `aval`."""
    wanted = getattr(getattr(aval, "manual_axis_type", None), "varying", frozenset())
    missing = wanted - jax.typeof(value).manual_axis_type.varying if wanted else wanted
    return lax.pcast(value, tuple(sorted(missing)), to="varying") if missing else value


@dataclasses.dataclass(frozen=True)
class Feed:
    """Where one input of a body comes from: operand number, and whether whole, one slice a step, or carried."""

    operand: int
    how: Literal["whole", "scanned", "carried"]


@dataclasses.dataclass(frozen=True)
class Body:
    """A sub-jaxpr of an equation.

    Attributes:
        name: what to call it in an address; unique within the equation.
        jaxpr: the sub-jaxpr, open or closed.
        feeds: one entry per `jaxpr.invars`.
        results: per result of the equation, the number of the body's result that it equals on every path
            through this body, or None where it is collected, carried or produced elsewhere.
        first_carry: where the carries of a loop begin among `jaxpr.invars`, those handed on untouched among them.
    """

    name: str
    jaxpr: Any
    feeds: tuple[Feed, ...]
    results: tuple[int | None, ...]
    first_carry: int = 0


def _whole(operands: Sequence[int]) -> tuple[Feed, ...]:
    return tuple(Feed(i, "whole") for i in operands)


def scan_counts(params: dict[str, Any]) -> tuple[int, int]:
    """Numbers of constants and of carries among a scan's operands."""
    if "ft_in" in params:
        consts, carry, _ = params["ft_in"].unpack()
        return len(consts), len(carry)
    return params["num_consts"], params["num_carry"]


def _invariant(jaxpr: Any, first: int, count: int) -> list[bool]:
    """Which of the carries, inputs `first` to `first + count` of the body, the body hands on untouched."""
    return [jaxpr.outvars[i] is jaxpr.invars[first + i] for i in range(count)]


def _scan_bodies(eqn: Any) -> list[Body]:
    jaxpr = eqn.params["jaxpr"]
    n_consts, n_carry = scan_counts(eqn.params)
    kept = _invariant(jaxpr, n_consts, n_carry)
    how: list[Any] = ["whole"] * n_consts + ["whole" if k else "carried" for k in kept]
    how += ["scanned"] * (len(eqn.invars) - len(how))
    results = [i if k else None for i, k in enumerate(kept)] + [None] * (len(eqn.outvars) - n_carry)
    return [Body("scan", jaxpr, tuple(Feed(i, h) for i, h in enumerate(how)), tuple(results), n_consts)]


def _while_bodies(eqn: Any) -> list[Body]:
    cond, body = eqn.params["cond_jaxpr"], eqn.params["body_jaxpr"]
    n_cond, n_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    kept = _invariant(body, n_body, len(eqn.outvars))
    carry = tuple(Feed(n_cond + n_body + i, "whole" if k else "carried") for i, k in enumerate(kept))
    results = tuple(i if k else None for i, k in enumerate(kept))
    return [
        Body("while_cond", cond, _whole(range(n_cond)) + carry, (None,) * len(eqn.outvars), n_cond),
        Body("while", body, _whole(range(n_cond, n_cond + n_body)) + carry, results, n_body),
    ]


def _cond_bodies(eqn: Any) -> list[Body]:
    feeds = _whole(range(1, len(eqn.invars)))
    results = tuple(range(len(eqn.outvars)))
    return [Body(f"branch{i}", branch, feeds, results) for i, branch in enumerate(eqn.params["branches"])]


def _call_bodies(name: str, param: str) -> Callable[[Any], list[Body]]:
    def bodies(eqn: Any) -> list[Body]:
        return [Body(name, eqn.params[param], _whole(range(len(eqn.invars))), tuple(range(len(eqn.outvars))))]

    return bodies


_BODIES: dict[Primitive, Callable[[Any], list[Body]]] = {
    prims.scan_p: _scan_bodies,
    prims.while_p: _while_bodies,
    prims.cond_p: _cond_bodies,
    prims.jit_p: _call_bodies("jit", "jaxpr"),
    prims.remat_p: _call_bodies("remat", "jaxpr"),
    prims.closed_call_p: _call_bodies("call", "call_jaxpr"),
    prims.custom_jvp_call_p: _call_bodies("custom_jvp", "call_jaxpr"),
    prims.custom_vjp_call_p: _call_bodies("custom_vjp", "call_jaxpr"),
    shard_map_p: _call_bodies("shard_map", "jaxpr"),
}


def has_bodies(eqn: Any) -> bool:
    """Whether an equation is a higher-order one."""
    return eqn.primitive in _BODIES


def bodies(eqn: Any) -> list[Body]:
    """The sub-jaxprs of an equation; empty for a first-order one."""
    find = _BODIES.get(eqn.primitive)
    return find(eqn) if find else []


# --- Rebuilding -------------------------------------------------------------------------------------------
#
# Each rule is rebuild(eqn, values, run, is_ref) -> (results, taps). `run(body_name, values, index=None)` replays the
# named body on values that may hold Refs; it returns the body's results, Refs among them made float, and the statistics
# tapped in it (`passes.calibration.statistic.Statistic`, by name), which leave the body as further results. Those of a
# scan come out stacked. A while loop cannot let any out: the plan puts none there.

Taps = dict[str, Any]

Rebuilt = tuple[list[Any], Taps]


def _float(value: Any) -> Any:
    """A Ref as the float array it stands for; anything else as it is."""
    return value.materialize() if hasattr(value, "materialize") else value


def _rebuild_scan(eqn: Any, values: list[Any], run: Any, is_ref: Callable[[Any], bool]) -> Rebuilt:
    """A packed cache among the scanned operands that has a new value among the stacked results is carried as a stack.

    Else each step would copy its cache out of one stack and into another.
    """
    params = eqn.params
    n_consts, n_carry = scan_counts(params)
    kept = _invariant(params["jaxpr"], n_consts, n_carry)
    consts, carry, xs = values[:n_consts], values[n_consts : n_consts + n_carry], values[n_consts + n_carry :]
    carry = [c if k else _float(c) for c, k in zip(carry, kept, strict=True)]
    xs = [x if is_ref(x) and x.can_index(0) else _float(x) for x in xs]
    moving = [i for i, c in enumerate(carry) if not is_ref(c)]  # a packed carry never changes: closed over
    sliced = [i for i, x in enumerate(xs) if not is_ref(x)]
    stacks: dict[Any, int] = {_Stack(): i for i, x in enumerate(xs) if hasattr(x, "at_layer")}
    names = {i: stack for stack, i in stacks.items()}

    def scan(updated: dict[int, int], found: dict[int, int]) -> Any:
        """The loop, with these results carried, by scanned operand; those that can be are found."""

        def body(state, step):
            moved, whole = state
            index, slices, shadows = step
            full_carry, full_xs = list(carry), [None] * len(xs)
            for i, value in zip(moving, moved, strict=True):
                full_carry[i] = value
            for i, value in zip(sliced, slices, strict=True):
                full_xs[i] = value
            for i, x in enumerate(xs):
                if i in names:
                    full_xs[i] = whole.get(i, x).at_layer(index, names[i])
                elif is_ref(x):
                    full_xs[i] = x.index(0, index, shadows[i])
            out, taps = run("scan", [*consts, *full_carry, *full_xs], index)
            ys, after = out[n_carry:], {}
            for j, y in enumerate(ys):
                own = stacks.get(getattr(y, "stack", None))
                if own is not None:
                    found.setdefault(own, j)
                if own is not None and updated.get(own) == j:
                    after[own], ys[j] = y.whole, None
                elif hasattr(y, "at_layer"):
                    ys[j] = y.base
            return ([out[i] for i in moving], after), (ys, taps)

        return lax.scan(
            body,
            ([carry[i] for i in moving], {i: xs[i] for i in updated}),
            (
                jnp.arange(params["length"], dtype=jnp.int32),
                [xs[i] for i in sliced],
                [x.shadow if is_ref(x) else None for x in xs],
            ),
            length=params["length"],
            reverse=params["reverse"],
            unroll=params["unroll"],
        )

    updated: dict[int, int] = {}
    if stacks:  # which result belongs to which operand shows when the body is traced
        jax.eval_shape(lambda: scan({}, updated))
    (state, whole), (ys, taps) = scan(updated, {})
    for i, value in zip(moving, state, strict=True):
        carry[i] = value
    for i, j in updated.items():
        ys[j] = whole[i]
    return [*carry, *ys], taps


class _Stack:
    """Stands for one packed cache among the scanned operands of one scan."""


def _rebuild_while(eqn: Any, values: list[Any], run: Any, is_ref: Callable[[Any], bool]) -> Rebuilt:
    params = eqn.params
    n_cond, n_body = params["cond_nconsts"], params["body_nconsts"]
    kept = _invariant(params["body_jaxpr"], n_body, len(eqn.outvars))
    cond_consts, body_consts, carry = (
        values[:n_cond],
        values[n_cond : n_cond + n_body],
        values[n_cond + n_body :],
    )
    carry = [c if k else _float(c) for c, k in zip(carry, kept, strict=True)]
    moving = [i for i, c in enumerate(carry) if not is_ref(c)]

    def full(state):
        whole = list(carry)
        for i, value in zip(moving, state, strict=True):
            whole[i] = value
        return whole

    def cond(state):
        return run("while_cond", [*cond_consts, *full(state)])[0][0]

    def body(state):
        out, _ = run("while", [*body_consts, *full(state)])
        return [out[i] for i in moving]

    return full(lax.while_loop(cond, body, [carry[i] for i in moving])), {}


def _rebuild_cond(eqn: Any, values: list[Any], run: Any, is_ref: Callable[[Any], bool]) -> Rebuilt:
    index, operands = values[0], values[1:]
    plain = [i for i, v in enumerate(operands) if not is_ref(v)]
    taps: Taps = {}

    def branch(name: str) -> Callable[..., Rebuilt]:
        def fn(*args):
            full = list(operands)
            for i, value in zip(plain, args, strict=True):
                full[i] = value
            out, own = run(name, full)
            return out, {**taps, **own}

        return fn

    names = [f"branch{i}" for i in range(len(eqn.params["branches"]))]
    arguments = [operands[i] for i in plain]
    for name in names:  # a branch that does not reach a tap gives the statistic of no values
        _, own = jax.eval_shape(branch(name), *arguments)
        taps.update({tap: statistic.nothing() for tap, statistic in own.items()})
    return lax.switch(_float(index), [branch(name) for name in names], *arguments)


def _is_specified(sharding: Any) -> bool:
    return isinstance(sharding, jax.sharding.Sharding)


def is_plain_jit(eqn: Any) -> bool:
    """Whether an equation is a `jit` that constrains no sharding, so that its body may stand in its place."""
    if eqn.primitive is not prims.jit_p:
        return False
    return not any(map(_is_specified, (*eqn.params["in_shardings"], *eqn.params["out_shardings"])))


def _rebuild_jit(eqn: Any, values: list[Any], run: Any, is_ref: Callable[[Any], bool]) -> Rebuilt:
    params = eqn.params
    values = [
        lax.with_sharding_constraint(v, s) if _is_specified(s) and not is_ref(v) else v
        for v, s in zip(values, params["in_shardings"], strict=True)
    ]

    def fn(*args):
        return run("jit", list(args))

    fn.__name__ = fn.__qualname__ = str(params["name"])
    out, taps = jax.jit(fn)(*values)
    out = [
        lax.with_sharding_constraint(v, s) if _is_specified(s) else v
        for v, s in zip(out, params["out_shardings"], strict=True)
    ]
    return out, taps


def _rebuild_remat(eqn: Any, values: list[Any], run: Any, is_ref: Callable[[Any], bool]) -> Rebuilt:
    fn = jax.checkpoint(
        lambda *args: run("remat", list(args)),
        prevent_cse=eqn.params["prevent_cse"],
        policy=eqn.params["policy"],
    )
    return fn(*values)


def _rebuild_call(eqn: Any, values: list[Any], run: Any, is_ref: Callable[[Any], bool]) -> Rebuilt:
    return run("call", values)


def _rebuild_custom_jvp(eqn: Any, values: list[Any], run: Any, is_ref: Callable[[Any], bool]) -> Rebuilt:
    """The rewritten body forward; the user's own rule, on the dequantized parameter, for tangents."""

    @jax.custom_jvp
    def fn(*args):
        return run("custom_jvp", list(args))[0]

    @fn.defjvp
    def _(primals, tangents):
        plain = [i for i, v in enumerate(primals) if not is_ref(v)]

        def original(*args):
            full = [_float(v) for v in primals]
            for i, value in zip(plain, args, strict=True):
                full[i] = value
            return bind(eqn, full)

        _, out = jax.jvp(original, [primals[i] for i in plain], [tangents[i] for i in plain])
        return fn(*primals), out

    return fn(*values), {}


def _rebuild_custom_vjp(eqn: Any, values: list[Any], run: Any, is_ref: Callable[[Any], bool]) -> Rebuilt:
    """The rewritten body forward; the user's own rule, on the dequantized parameter, backward."""

    @jax.custom_vjp
    def fn(*args):
        return run("custom_vjp", list(args))[0]

    def backward(args, cotangents):
        # Only float operands have a gradient; the packed ones and the integers get none.
        inexact = [i for i, v in enumerate(args) if not is_ref(v) and jnp.issubdtype(v.dtype, jnp.inexact)]

        def original(*some):
            full = [_float(v) for v in args]
            for i, value in zip(inexact, some, strict=True):
                full[i] = value
            return bind(eqn, full)

        _, pullback = jax.vjp(original, *(args[i] for i in inexact))
        out: list[Any] = [None] * len(args)
        for i, value in zip(inexact, pullback(cotangents), strict=True):
            out[i] = value
        return tuple(out)

    fn.defvjp(lambda *args: (fn(*args), args), backward)
    return fn(*values), {}


def _rebuild_shard_map(eqn: Any, values: list[Any], run: Any, is_ref: Callable[[Any], bool]) -> Rebuilt:
    params = eqn.params
    mesh, specs, values = params["mesh"], list(params["in_specs"]), list(values)
    locals_: list[Callable[[Any], Any]] = []
    for i, value in enumerate(values):
        sharded = value.shard(specs[i], mesh) if is_ref(value) else None
        if is_ref(value) and sharded is None:
            values[i] = value.materialize()
        if sharded is not None:
            specs[i], localize = sharded
            locals_.append(localize)
        else:
            locals_.append(lambda v: v)

    def fn(*args):
        return run("shard_map", [local(v) for local, v in zip(locals_, args, strict=True)])[0]

    out = jax.shard_map(
        fn,
        mesh=mesh,
        in_specs=tuple(specs),
        out_specs=list(params["out_specs"]),
        check_vma=params["check_vma"],
        axis_names=set(params["newly_manual_axes"]),
    )(*values)
    return out, {}


# primitive -> rebuild(eqn, values, run, is_ref) -> (results, taps)
REBUILD: dict[Primitive, Callable[..., Rebuilt]] = {
    prims.scan_p: _rebuild_scan,
    prims.while_p: _rebuild_while,
    prims.cond_p: _rebuild_cond,
    prims.jit_p: _rebuild_jit,
    prims.remat_p: _rebuild_remat,
    prims.closed_call_p: _rebuild_call,
    prims.custom_jvp_call_p: _rebuild_custom_jvp,
    prims.custom_vjp_call_p: _rebuild_custom_vjp,
    shard_map_p: _rebuild_shard_map,
}


def evaluate(jaxpr: Any, values: Sequence[Any]) -> list[Any]:
    """Runs a closed jaxpr unchanged."""
    return eval_jaxpr(jaxpr.jaxpr, jaxpr.consts, *values)


def carries_of(eqn: Any) -> int:
    """Number of carries of a loop: its first results."""
    return len(eqn.outvars) if eqn.primitive is prims.while_p else scan_counts(eqn.params)[1]

"""One call of a model: traced, compiled by the passes, run, converted, observed.

What the three kinds of wrapped models (`qjax.model`) and models with adapters (`qjax.lora`) have in common.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal

from pallas_kernels import numerics
from pallas_kernels.activations import ActSpec, MovingAverage
from pallas_kernels.kv_cache import QCache
from pallas_kernels.qtensor import FoldedParam, QTensor, fake_quant, fake_quant_with_codes, is_packed
from pallas_kernels.qtensor import quantize as pack
from passes import control_flow, integer, lower
from passes.batch_norm import fold_batch_norm
from passes.fuse import carried_out, plan_fusions
from passes.joint import joined, plan_joints
from passes.kv_cache import NO_CACHES, plan_caches, plan_given
from passes.plan import Entry, Plan, PlanError, make_plan, with_dynamic
from passes.replay import Absorbed, FoldValue, Ref, replay
from passes.sites import Sites, evaluate_fold, find_sites
from passes.trace import Program, path_name, trace
from passes.views import View
from qjax.ranges import (
    KEPT,
    LEARNED,
    STEP,
    Calibration,
    Flat,
    arguments,
    counted,
    flatten,
    moved,
    nest,
    not_served,
    specs_of,
)
from qjax.ranges import check as check_ranges
from qjax.recipes import Recipe

Variables = Any
"""A tree of arrays (float or packed) as `Module.apply` takes it."""


def is_array(value: Any) -> bool:
    """Whether a leaf of a call is traced: an array, float or packed, or its shape."""
    return isinstance(value, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct) or _is_leaf(value)


def _is_leaf(value: Any) -> bool:
    return is_packed(value) or isinstance(value, QCache)


@dataclasses.dataclass
class Call:
    """One call of a model as a flat function: its array inputs, which of them are parameters, and its results.

    Whatever is no array (flags, strings, None, Python numbers) is part of the call, as it is for `Module.apply`.
    """

    fn: Callable[..., Any]
    inputs: Any  # a tree; the arguments of fn
    is_param: Callable[[tuple], bool]  # says of a key path into `inputs` whether its leaf is a parameter
    name: Callable[[tuple], str]  # the path name of such a leaf
    state: Callable[[tuple], str | None] = lambda path: None  # the path name of a variable that is no parameter
    # says of a key path into the results of fn of which variable it is the new value; None where that is not known
    updates: Callable[[tuple], str | None] | None = None
    rewrite: Callable[..., tuple[list[Any], dict[Any, Any]]] | None = None  # (compiled, values, at) -> (values, at)

    def __post_init__(self):
        flat, self.tree = jax.tree_util.tree_flatten_with_path(self.inputs, is_leaf=_is_leaf)
        self.static = {i: leaf for i, (_, leaf) in enumerate(flat) if not is_array(leaf)}
        dynamic = [(path, leaf) for path, leaf in flat if is_array(leaf)]
        self.leaves = [leaf for _, leaf in dynamic]
        self.paths = [
            self.name(path) if self.is_param(path) and not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else None
            for path, leaf in dynamic
        ]
        self.state_paths = [
            self.state(path) if own is None else None for own, (path, _) in zip(self.paths, dynamic, strict=True)
        ]
        for path, state, leaf in zip(self.paths, self.state_paths, self.leaves, strict=True):
            if path is None and is_packed(leaf):
                raise TypeError("qjax: a packed tensor was passed where the model takes no parameter.")
            if state is None and isinstance(leaf, QCache):
                raise TypeError("qjax: a packed cache was passed where the model takes no state.")

    def _flat(self, *leaves: Any) -> list[Any]:
        rest, size = iter(leaves), len(self.static) + len(leaves)
        whole = [self.static[i] if i in self.static else next(rest) for i in range(size)]
        flat, self.out_tree = jax.tree_util.tree_flatten_with_path(self.fn(*jax.tree.unflatten(self.tree, whole)))
        self.out_static = {i: leaf for i, (_, leaf) in enumerate(flat) if not is_array(leaf)}
        self.out_paths = [path for path, leaf in flat if is_array(leaf)]
        return [leaf for _, leaf in flat if is_array(leaf)]

    def trace(self) -> Program:
        """The float program: packed parameters stand in it as the float arrays they were."""
        avals = [jax.ShapeDtypeStruct(x.shape, x.dtype) if _is_leaf(x) else x for x in self.leaves]
        return trace(self._flat, avals, self.paths, self.state_paths)

    def results(self, flat: Sequence[Any]) -> Any:
        """The results of the call as the model's own structure."""
        rest, size = iter(flat), len(self.out_static) + len(flat)
        whole = [self.out_static[i] if i in self.out_static else next(rest) for i in range(size)]
        return jax.tree.unflatten(self.out_tree, whole)

    def new_state(self) -> list[str | None] | None:
        """After `trace`: per result, the variable of which it is the new value."""
        return None if self.updates is None else [self.updates(path) for path in self.out_paths]

    def with_params(self, values: Mapping[str, Any], state: Mapping[str, Any] | None = None) -> Any:
        """`inputs` with some parameters and some state replaced."""
        state = state or {}
        rest = iter(
            values.get(path, leaf) if path is not None else state.get(other, leaf) if other is not None else leaf
            for path, other, leaf in zip(self.paths, self.state_paths, self.leaves, strict=True)
        )
        size = len(self.static) + len(self.leaves)
        whole = [self.static[i] if i in self.static else next(rest) for i in range(size)]
        return jax.tree.unflatten(self.tree, whole)


@dataclasses.dataclass
class Compiled:
    """A call after tracing: its program, what is in it, what is decided, and the values of its variables by path."""

    program: Program
    sites: Sites
    plan: Plan
    params: dict[str, Any]  # parameters, and the state that a folded normalisation reads


def compile_call(
    call: Call, recipe: Recipe, *, strict: bool, ranges: Flat | None = None, deciding: bool = True
) -> Compiled:
    """Traces a call and decides; with `deciding` False nothing about caches that are not packed, and
    nothing about fusing where no weight is.

    `ranges` are those of the variables: the inputs that calibration found none for are dynamic.
    """
    program = call.trace()
    known: dict[str, Any] = {}
    norms: list[tuple[str, str]] = []
    if recipe.fold_batch_norm:
        program, folded, unfolded = fold_batch_norm(program)
        read = {path for norm in folded for path in norm.state}
        known = {path: leaf for path, leaf in zip(call.state_paths, call.leaves, strict=True) if path in read}
        norms = [(n.name, f"folded into {', '.join(n.weight)} ({n.statistics} statistics)") for n in folded]
        norms += [(n.name, n.reason) for n in unfolded]
        if strict and not norms:
            raise PlanError("qjax: fold_batch_norm=True, but this call has no batch normalisation. Leave it out.")
    sites = find_sites(program, frozenset(known))
    plan = with_dynamic(make_plan(sites, recipe.rules, strict=strict), not_served(ranges or {}))
    packed = any(is_packed(leaf) for leaf in call.leaves)
    fusions = plan_fusions(program, sites, plan) if deciding or packed else ()
    joints = plan_joints(program, sites, plan, fusions) if deciding or packed else ()
    plan = dataclasses.replace(plan, norms=tuple(norms), fusions=fusions, joints=joints)
    state = zip(call.state_paths, call.leaves, strict=True)
    given = {name: leaf for name, leaf in state if name is not None and isinstance(leaf, QCache)}
    if given:
        plan = dataclasses.replace(plan, caches=plan_given(program, call.new_state(), given))
    elif recipe.kv_cache and deciding:
        caches = plan_caches(program, call.new_state(), recipe.kv_cache, strict=strict)
        plan = dataclasses.replace(plan, caches=caches)
    params = {path: leaf for path, leaf in zip(call.paths, call.leaves, strict=True) if path is not None}
    return Compiled(program, sites, plan, {**known, **params})


def plan_call(call: Call, recipe: Recipe, ranges: Flat) -> Plan:
    """What the recipe decides about a call."""
    return compile_call(call, recipe, strict=recipe.strict, ranges=ranges).plan


@dataclasses.dataclass(frozen=True)
class CallRanges:
    """Ranges that a call is given, and whether it updates them."""

    known: Flat
    step: Any = None
    update: bool = False


def run_call(call: Call, recipe: Recipe, ranges: CallRanges) -> tuple[Any, CallRanges]:
    """Runs a call: fake-quant for float parameters that the recipe quantizes, packed kernels for packed ones.

    Returns the results and the ranges after the call.
    """
    training = any(not is_packed(leaf) for path, leaf in zip(call.paths, call.leaves, strict=True) if path is not None)
    if training:
        recipe.check_patterns([path for path in call.paths if path is not None])
    compiled = compile_call(call, recipe, strict=False, ranges=ranges.known, deciding=False)
    plan = compiled.plan
    check_ranges(plan, ranges.known)
    packed = any(is_packed(leaf) for leaf in compiled.params.values())
    enabled, frozen = None, False
    if recipe.schedule is not None and not packed:
        if ranges.step is None:
            raise ValueError(
                f"qjax: the recipe has a schedule, which counts steps in '{KEPT}': start from q.calibrate(variables, "
                "batches)."
            )
        enabled = ranges.step >= recipe.schedule.start
        frozen = False if recipe.schedule.freeze is None else ranges.step >= recipe.schedule.freeze

    # A weight whose product is one of codes is needed as codes in training too.
    by_codes = {site.address for site in plan.sites if site.product != "float" and site.weight is not None}
    coded = {site.source for site in compiled.sites.sites if site.address in by_codes}

    def simulated(w: Any, entry: Entry) -> tuple[Any, QTensor | None]:
        """The fake-quantized value of a float one, and its codes where they are needed."""
        assert entry.spec is not None
        assert entry.layout is not None
        codes = None
        if entry.name in coded:
            value, codes = fake_quant_with_codes(w, entry.spec, entry.layout, entry.order)
        else:
            value = fake_quant(w, entry.spec, entry.layout)
        return (value if enabled is None else jnp.where(enabled, value, w)), codes

    values: list[Any] = []
    for path, leaf in zip(call.paths, call.leaves, strict=True):
        if isinstance(leaf, FoldedParam):
            values.append(Absorbed(str(path)) if leaf.own is None else leaf.own)
        elif isinstance(leaf, QTensor | QCache):
            values.append(leaf)
        elif path is None or (entry := plan[path]).spec is None:
            values.append(jnp.asarray(leaf))  # NumPy inputs are welcome
        else:
            value, codes = simulated(jnp.asarray(leaf), entry)
            values.append(value if codes is None else Ref(codes, View.identity(codes.shape), shadow=value))
    folds = _fold_values(compiled, simulated)
    at = {
        site.address: integer.quantized(site, ranges.known, tap=ranges.update and not packed, enabled=enabled)
        for site in plan.sites
    }
    own = at
    if call.rewrite is not None:
        values, at = call.rewrite(compiled, values, at)
    statistics: dict[str, Any] = {}
    if folds or at or any(isinstance(v, QTensor | Absorbed | QCache) for v in values):
        caches = plan.caches or NO_CACHES
        kept = (f for f in plan.fusions if all(at.get(address) is own.get(address) for address in f.multiplying))
        fused = [carried_out(f, ranges.known) for f in kept]
        fused += [joined(j) for j in plan.joints if not any((*j.body, dot) in at for dot in j.dots)]
        how: dict[str, Any] = {"rules": lower.RULES, "folds": folds, "at": at, "fused": fused, "caches": caches}
        out, statistics = replay(compiled.program, values, **how)
    else:
        out = control_flow.evaluate(compiled.program.jaxpr, values)

    # A parameter that the model hands back (mutable=True) is handed back as it came in.
    inputs = dict(zip(compiled.program.jaxpr.jaxpr.invars, call.leaves, strict=True))
    given = {var: leaf for (var, leaf), path in zip(inputs.items(), call.paths, strict=True) if path is not None}
    returned = compiled.program.jaxpr.jaxpr.outvars
    out = [given.get(var, value) if _is_var(var) else value for var, value in zip(returned, out, strict=True)]
    after = ranges
    if ranges.update and not packed:
        step = None if ranges.step is None else ranges.step + 1
        after = CallRanges(moved(plan, ranges.known, statistics, frozen), step, True)
    return call.results(out), after


def _is_var(atom: Any) -> bool:
    return not isinstance(atom, Literal)


def _fold_values(compiled: Compiled, simulated: Callable[[Any, Entry], tuple[Any, Any]]) -> list[FoldValue]:
    params = compiled.params
    stored: dict[str, QTensor] = {}
    for leaf in params.values():
        if isinstance(leaf, FoldedParam):
            stored.update(leaf.derived)
    out = []
    for fold in compiled.sites.folds.values():
        entry, shadow = compiled.plan[fold.name], None
        if fold.name in stored:
            value: Any = stored[fold.name]
        elif absorbed := [p for p in fold.expr.params if isinstance(params[p], FoldedParam)]:
            raise ValueError(
                f"qjax: the model makes {fold.name!r} from {', '.join(absorbed)}, which were packed as part of "
                f"{', '.join(stored) or 'nothing'}. The packed variables come from another call of the model "
                "(another method or other flags): convert with the inputs and flags that apply uses."
            )
        elif entry.spec is None:
            continue
        else:
            value, codes = simulated(evaluate_fold(fold, params.__getitem__), entry)
            value, shadow = (value, None) if codes is None else (codes, value)
        out.append(FoldValue(fold.address, fold.expr.out, fold.loops, value, shadow))
    return out


def convert_call(call: Call, recipe: Recipe, ranges: Flat) -> dict[str, Any]:
    """The packed form of every parameter that the plan quantizes, by path."""
    compiled = compile_call(call, recipe, strict=recipe.strict, ranges=ranges)
    sites, plan = compiled.sites, compiled.plan
    check_ranges(plan, ranges)
    params = compiled.params
    for path, leaf in params.items():
        if is_packed(leaf):
            raise TypeError(f"qjax: {path!r} is packed already ({leaf!r}); convert takes float variables.")
        if isinstance(leaf, jax.ShapeDtypeStruct) or path not in call.paths:
            continue
        if plan[path].spec is not None or plan[path].folded_into:
            numerics.check_finite(leaf, path)

    packed: dict[str, Any] = {}
    for entry in plan.quantized:
        if entry.sources:
            continue
        packed[entry.name] = _pack(jnp.asarray(params[entry.name]), entry)
    derived: dict[str, dict[str, QTensor]] = {}
    for fold in sites.folds.values():
        entry = plan[fold.name]
        if entry.spec is None:
            continue
        floats = {p: jnp.asarray(params[p]) for p in fold.expr.params}
        value = evaluate_fold(fold, floats.__getitem__)
        numerics.check_finite(value, fold.name)
        own_parts = [path for path in fold.expr.params if path in call.paths]  # state stays where it is
        derived.setdefault(own_parts[0], {})[fold.name] = _pack(value, entry)
        for path in own_parts:
            derived.setdefault(path, {})
    for path, matrices in derived.items():
        leaf = params[path]
        keep = path in packed or plan[path].kept
        own = (packed.get(path, leaf)) if keep else None
        packed[path] = FoldedParam(own, matrices, tuple(leaf.shape), jnp.dtype(leaf.dtype))
    return packed


def convert_caches(call: Call, recipe: Recipe) -> dict[str, Any]:
    """The packed form of every cache that the recipe quantizes, by path of the state."""
    if not recipe.kv_cache:
        return {}
    state = dict(zip(call.state_paths, call.leaves, strict=True))
    if any(isinstance(leaf, QCache) for leaf in state.values()):
        return {}
    program = call.trace()
    plan = plan_caches(program, call.new_state(), recipe.kv_cache, strict=recipe.strict)
    return {entry.name: entry.pack(state[entry.name]) for entry in plan.quantized}


def observe_call(call: Call, recipe: Recipe) -> tuple[dict[str, Any], Plan]:
    """The statistics of one batch, by name of the range, while the float model runs."""
    compiled = compile_call(call, recipe, strict=recipe.strict, deciding=False)
    for path, leaf in compiled.params.items():
        if is_packed(leaf):
            raise TypeError(f"qjax: {path!r} is packed already; calibration runs the float model.")
    kept = [site for site in compiled.plan.sites if any(i.range is not None for i in site.inputs)]
    at = {site.address: integer.observed(site) for site in kept}
    values = [jnp.asarray(leaf) for leaf in call.leaves]
    return replay(compiled.program, values, rules={}, at=at)[1], compiled.plan


def jit_batches(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn(*trees, arguments)` as a function of `(*trees, batch)`, compiled once for each shape of batch.

    A batch is a tuple of arguments, or the only one. Flags and the like in it are part of the program, as they are for
    `apply`: a traced one could not be branched on.
    """

    @functools.partial(jax.jit, static_argnums=(2, 3))
    def run(trees: tuple, arrays: list[Any], static: tuple, tree: Any) -> Any:
        rest, fixed = iter(arrays), dict(static)
        leaves = [fixed[i] if i in fixed else next(rest) for i in range(tree.num_leaves)]
        return fn(*trees, jax.tree.unflatten(tree, leaves))

    def of_batch(*trees_and_batch: Any) -> Any:
        *trees, batch = trees_and_batch
        leaves, tree = jax.tree.flatten(arguments(batch))
        static = tuple((i, leaf) for i, leaf in enumerate(leaves) if not is_array(leaf))
        return run(tuple(trees), [leaf for leaf in leaves if is_array(leaf)], static, tree)

    return of_batch


def calibrate_over(
    step: Callable[[Any, tuple], tuple[dict[str, Any], Plan]],
    variables: Any,
    batches: Iterable[Any],
    start: Calibration | None,
    progress: bool,
) -> Calibration:
    """Runs `step(variables, arguments) -> statistics of the batch` over batches, compiled once for each shape."""
    specs: dict[str, ActSpec] = {} if start is None else start.specs
    total: Any = None if start is None else start.statistics
    count = 0 if start is None else start.batches

    @jit_batches
    def update(variables: Any, total: Any, args: tuple) -> Any:
        seen, plan = step(variables, args)
        found = specs_of(plan)
        if specs and specs != found:
            raise ValueError("qjax: this calibration was begun with another model or recipe.")
        specs.update(found)
        before = {name: s.nothing() for name, s in seen.items()} if total is None else total
        decays = {n: s.range.decay if isinstance(s.range, MovingAverage) else 0.0 for n, s in found.items()}
        return {name: before[name].follow(s, decays[name]) for name, s in seen.items()}

    for batch in counted(batches, progress):
        total = update(variables, total, batch)
        count += 1
    return Calibration(jax.device_get(total or {}), specs, count)


pack_jitted = jax.jit(pack, static_argnames=("spec", "layout", "order"))


def _pack(w: Any, entry: Entry) -> QTensor:
    return pack_jitted(w, spec=entry.spec, layout=entry.layout, order=entry.order)


# --- Collections of ranges ---------------------------------------------------------------------------------------


def take_ranges(variables: Mapping[str, Any], update: bool = False) -> tuple[dict[str, Any], CallRanges]:
    """The variables that the model itself has, and the ranges beside them."""
    kept, learned = variables.get(KEPT) or {}, variables.get(LEARNED) or {}
    own = {name: tree for name, tree in variables.items() if name not in (KEPT, LEARNED)}
    return own, CallRanges(flatten(kept, learned), kept.get(STEP), update and bool(kept))


def param_paths(params: Any) -> list[str]:
    """The paths of all parameters of a tree."""
    return [path_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(params, is_leaf=is_packed)[0]]


def kept_after(variables: Mapping[str, Any], after: CallRanges) -> dict[str, Any]:
    """The collection `quant_stats` after a call."""
    names = flatten(variables.get(KEPT))
    step = {} if after.step is None else {STEP: after.step}
    return {**nest({name: after.known[name] for name in names}), **step}


def ranges_of(variables: Mapping[str, Any]) -> dict[str, Any]:
    """The collections of ranges, to go with converted variables; the count of training steps stays behind."""
    kept = {name: tree for name, tree in (variables.get(KEPT) or {}).items() if name != STEP}
    found = {KEPT: kept, LEARNED: variables.get(LEARNED)}
    return {name: tree for name, tree in found.items() if tree}


def calibrated(calibration: Calibration, recipe: Recipe) -> dict[str, Any]:
    """The collections that a calibration gives."""
    kept, learned = calibration.ranges()
    if recipe.schedule is not None:
        kept = {**kept, STEP: jnp.zeros((), jnp.int32)}
    return {name: tree for name, tree in {KEPT: kept, LEARNED: learned}.items() if tree}

"""`quantize`: wraps a Linen module, an NNX module or a function so that it runs quantized.

A wrapped model is polymorphic in its variables: on float ones it runs fake-quant nodes (training), on packed ones
the packed kernels (serving). Every call traces the model anew, so the jit around it is the only cache. Ranges of
activations travel in collections of their own beside the parameters (`qjax.ranges`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx
from flax.core.scope import in_filter
from jax.extend.core import Literal

from pallas_kernels import numerics
from pallas_kernels.activations import ActSpec, MovingAverage
from pallas_kernels.kv_cache import QCache
from pallas_kernels.qtensor import FoldedParam, QTensor, fake_quant, fake_quant_with_codes, is_packed
from pallas_kernels.qtensor import quantize as pack
from passes import control_flow, integer, lower
from passes.batch_norm import fold_batch_norm
from passes.kv_cache import NO_CACHES, as_cache_rules, plan_caches, plan_given
from passes.plan import Entry, Plan, PlanError, make_plan
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
    Schedule,
    arguments,
    counted,
    flatten,
    moved,
    nest,
    specs_of,
)
from qjax.ranges import check as check_ranges
from qjax.recipes import Recipe, as_recipe

Variables = Any
"""A tree of arrays (float or packed) as `Module.apply` takes it."""


def _is_array(value: Any) -> bool:
    return isinstance(value, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct) or _is_leaf(value)


def _is_leaf(value: Any) -> bool:
    return is_packed(value) or isinstance(value, QCache)


@dataclasses.dataclass
class _Call:
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
        self.static = {i: leaf for i, (_, leaf) in enumerate(flat) if not _is_array(leaf)}
        dynamic = [(path, leaf) for path, leaf in flat if _is_array(leaf)]
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
        self.out_static = {i: leaf for i, (_, leaf) in enumerate(flat) if not _is_array(leaf)}
        self.out_paths = [path for path, leaf in flat if _is_array(leaf)]
        return [leaf for _, leaf in flat if _is_array(leaf)]

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
class _Compiled:
    """A call after tracing: its program, what is in it, what is decided, and the values of its variables by path."""

    program: Program
    sites: Sites
    plan: Plan
    params: dict[str, Any]  # parameters, and the state that a folded normalisation reads


def _compile(call: _Call, recipe: Recipe, *, strict: bool, deciding: bool = True) -> _Compiled:
    """Traces a call and decides; with `deciding` False nothing about caches that are not packed."""
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
    plan = dataclasses.replace(make_plan(sites, recipe.rules, strict=strict), norms=tuple(norms))
    state = zip(call.state_paths, call.leaves, strict=True)
    given = {name: leaf for name, leaf in state if name is not None and isinstance(leaf, QCache)}
    if given:
        plan = dataclasses.replace(plan, caches=plan_given(program, call.new_state(), given))
    elif recipe.kv_cache and deciding:
        caches = plan_caches(program, call.new_state(), recipe.kv_cache, strict=strict)
        plan = dataclasses.replace(plan, caches=caches)
    params = {path: leaf for path, leaf in zip(call.paths, call.leaves, strict=True) if path is not None}
    return _Compiled(program, sites, plan, {**known, **params})


def _plan(call: _Call, recipe: Recipe) -> Plan:
    return _compile(call, recipe, strict=recipe.strict).plan


@dataclasses.dataclass(frozen=True)
class _Ranges:
    """Ranges that a call is given, and whether it updates them."""

    known: Flat
    step: Any = None
    update: bool = False


def _run(call: _Call, recipe: Recipe, ranges: _Ranges) -> tuple[Any, _Ranges]:
    """Runs a call: fake-quant for float parameters that the recipe quantizes, packed kernels for packed ones.

    Returns the results and the ranges after the call.
    """
    training = any(not is_packed(leaf) for path, leaf in zip(call.paths, call.leaves, strict=True) if path is not None)
    if training:
        recipe.check_patterns([path for path in call.paths if path is not None])
    compiled = _compile(call, recipe, strict=False, deciding=False)
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

    # A weight whose product is one of integers is needed as codes in training too.
    by_codes = {site.address for site in plan.sites if site.product == "integer" and site.weight is not None}
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
    if call.rewrite is not None:
        values, at = call.rewrite(compiled, values, at)
    statistics: dict[str, Any] = {}
    if folds or at or any(isinstance(v, QTensor | Absorbed | QCache) for v in values):
        caches = plan.caches or NO_CACHES
        out, statistics = replay(compiled.program, values, rules=lower.RULES, folds=folds, at=at, caches=caches)
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
        after = _Ranges(moved(plan, ranges.known, statistics, frozen), step, True)
    return call.results(out), after


def _is_var(atom: Any) -> bool:
    return not isinstance(atom, Literal)


def _fold_values(compiled: _Compiled, simulated: Callable[[Any, Entry], tuple[Any, Any]]) -> list[FoldValue]:
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


def _convert(call: _Call, recipe: Recipe, ranges: Flat) -> dict[str, Any]:
    """The packed form of every parameter that the plan quantizes, by path."""
    compiled = _compile(call, recipe, strict=recipe.strict)
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


def _convert_caches(call: _Call, recipe: Recipe) -> dict[str, Any]:
    """The packed form of every cache that the recipe quantizes, by path of the state."""
    if not recipe.kv_cache:
        return {}
    state = dict(zip(call.state_paths, call.leaves, strict=True))
    if any(isinstance(leaf, QCache) for leaf in state.values()):
        return {}
    program = call.trace()
    plan = plan_caches(program, call.new_state(), recipe.kv_cache, strict=recipe.strict)
    return {entry.name: entry.pack(state[entry.name]) for entry in plan.quantized}


def _observe(call: _Call, recipe: Recipe) -> tuple[dict[str, Any], Plan]:
    """The statistics of one batch, by name of the range, while the float model runs."""
    compiled = _compile(call, recipe, strict=recipe.strict, deciding=False)
    for path, leaf in compiled.params.items():
        if is_packed(leaf):
            raise TypeError(f"qjax: {path!r} is packed already; calibration runs the float model.")
    kept = [site for site in compiled.plan.sites if any(i.range is not None for i in site.inputs)]
    at = {site.address: integer.observed(site) for site in kept}
    values = [jnp.asarray(leaf) for leaf in call.leaves]
    return replay(compiled.program, values, rules={}, at=at)[1], compiled.plan


def _calibration(
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

    @functools.partial(jax.jit, static_argnums=(3, 4))
    def update(variables: Any, total: Any, arrays: list[Any], static: tuple, tree: Any) -> Any:
        rest, fixed = iter(arrays), dict(static)
        leaves = [fixed[i] if i in fixed else next(rest) for i in range(tree.num_leaves)]
        seen, plan = step(variables, jax.tree.unflatten(tree, leaves))
        found = specs_of(plan)
        if specs and specs != found:
            raise ValueError("qjax: this calibration was begun with another model or recipe.")
        specs.update(found)
        before = {name: s.nothing() for name, s in seen.items()} if total is None else total
        decays = {n: s.range.decay if isinstance(s.range, MovingAverage) else 0.0 for n, s in found.items()}
        return {name: before[name].follow(s, decays[name]) for name, s in seen.items()}

    for batch in counted(batches, progress):
        leaves, tree = jax.tree.flatten(arguments(batch))
        arrays = [leaf for leaf in leaves if _is_array(leaf)]
        static = tuple((i, leaf) for i, leaf in enumerate(leaves) if not _is_array(leaf))
        total = update(variables, total, arrays, static, tree)
        count += 1
    return Calibration(jax.device_get(total or {}), specs, count)


_pack_jitted = jax.jit(pack, static_argnames=("spec", "layout", "order"))


def _pack(w: Any, entry: Entry) -> QTensor:
    return _pack_jitted(w, spec=entry.spec, layout=entry.layout, order=entry.order)


# --- The three kinds of model --------------------------------------------------------------------------------


def _take_ranges(variables: Mapping[str, Any], update: bool = False) -> tuple[dict[str, Any], _Ranges]:
    """The variables that the model itself has, and the ranges beside them."""
    kept, learned = variables.get(KEPT) or {}, variables.get(LEARNED) or {}
    own = {name: tree for name, tree in variables.items() if name not in (KEPT, LEARNED)}
    return own, _Ranges(flatten(kept, learned), kept.get(STEP), update and bool(kept))


def _paths(params: Any) -> list[str]:
    return [path_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(params, is_leaf=is_packed)[0]]


def _kept(variables: Mapping[str, Any], after: _Ranges) -> dict[str, Any]:
    """The collection `quant_stats` after a call."""
    names = flatten(variables.get(KEPT))
    step = {} if after.step is None else {STEP: after.step}
    return {**nest({name: after.known[name] for name in names}), **step}


def _ranges_of(variables: Mapping[str, Any]) -> dict[str, Any]:
    """The collections of ranges, to go with converted variables; the count of training steps stays behind."""
    kept = {name: tree for name, tree in (variables.get(KEPT) or {}).items() if name != STEP}
    found = {KEPT: kept, LEARNED: variables.get(LEARNED)}
    return {name: tree for name, tree in found.items() if tree}


def _calibrated(calibration: Calibration, recipe: Recipe) -> dict[str, Any]:
    """The collections that a calibration gives."""
    kept, learned = calibration.ranges()
    if recipe.schedule is not None:
        kept = {**kept, STEP: jnp.zeros((), jnp.int32)}
    return {name: tree for name, tree in {KEPT: kept, LEARNED: learned}.items() if tree}


@dataclasses.dataclass(frozen=True, eq=False)
class QuantizedLinen:
    """A Linen module that runs quantized; `apply` has the signature of `Module.apply`."""

    module: linen.Module
    recipe: Recipe
    _adapts: ClassVar[bool] = False  # whether "lora" is a collection of its own

    def _call(self, variables: Variables, args: tuple, kwargs: dict[str, Any], how: dict[str, Any]) -> _Call:
        rngs = how.pop("rngs", None)

        def fn(variables: Any, args: tuple, kwargs: dict[str, Any], rngs: Any) -> Any:
            return self.module.apply(variables, *args, rngs=rngs, **how, **kwargs)

        def collection(path: tuple) -> str | None:
            return getattr(path[1], "key", None) if path[0].idx == 0 else None

        def state(path: tuple) -> str | None:
            name = collection(path)
            return None if name in (None, "params") else f"{name}/{path_name(path[2:])}"

        return _Call(
            fn,
            (variables, args, kwargs, rngs),
            is_param=lambda path: collection(path) == "params",
            name=lambda path: path_name(path[2:]),
            state=state,
            # with `mutable`, apply returns its result and the collections
            updates=lambda path: (
                None if how.get("mutable", False) is False or path[0].idx == 0 else path_name(path[1:])
            ),
        )

    @staticmethod
    def _check(variables: Variables) -> None:
        if not isinstance(variables, Mapping):
            raise TypeError(
                "qjax: the first argument is the variables as Module.apply takes them, {'params': ...}; got "
                f"{type(variables).__name__}."
            )

    def init(self, *args: Any, **kwargs: Any) -> Variables:
        """`Module.init`: float variables."""
        return self.module.init(*args, **kwargs)

    def apply(
        self,
        variables: Variables,
        *args: Any,
        rngs: Any = None,
        method: Any = None,
        mutable: Any = False,
        capture_intermediates: Any = False,
        **kwargs: Any,
    ) -> Any:
        """Runs the model: fake-quant on float variables, packed kernels on packed ones.

        Arguments and results are those of `flax.linen.Module.apply`. Where ranges of activations are kept, they are in
        the collections "quant_stats" and "quant"; `mutable=["quant_stats"]` (beside the model's own) updates moving
        averages and the step of a schedule, as "batch_stats" are updated.
        """
        self._check(variables)
        adapters = set(flatten(variables.get("lora"))) & set(_paths(variables.get("params")))
        if adapters and not self._adapts:
            raise ValueError(
                f"qjax: the variables have an adapter for {min(adapters)!r} in 'lora', which only the model that "
                "qjax.lora gave applies. Call that one, or leave the collection out."
            )
        update = mutable is not False and in_filter(mutable, KEPT)
        if isinstance(mutable, str) and mutable == KEPT:
            inner: Any = []
        else:
            inner = mutable if isinstance(mutable, bool | str) else [m for m in mutable if m != KEPT]
        how = {
            "rngs": rngs,
            "method": method,
            "mutable": inner,
            "capture_intermediates": capture_intermediates,
        }
        own, ranges = _take_ranges(variables, update)
        out, after = _run(self._call(own, args, kwargs, how), self.recipe, ranges)
        if not after.update:
            return out
        result, updates = out
        return result, {**updates, KEPT: _kept(variables, after)}

    __call__ = apply

    def plan(
        self,
        variables: Variables,
        *args: Any,
        rngs: Any = None,
        method: Any = None,
        mutable: Any = False,
        **kwargs: Any,
    ) -> Plan:
        """Every parameter with its format, or why it stays float.

        Args:
            variables: float variables; `jax.ShapeDtypeStruct`s will do.
            args, rngs, method, mutable, kwargs: as for `apply`; only shapes and dtypes matter.

        Raises:
            PlanError: the recipe does not fit the model.
        """
        self._check(variables)
        how = {"rngs": rngs, "method": method, "mutable": mutable}
        return _plan(self._call(_take_ranges(variables)[0], args, kwargs, how), self.recipe)

    def convert(
        self,
        variables: Variables,
        *args: Any,
        calibration: Iterable[Any] | None = None,
        rngs: Any = None,
        method: Any = None,
        mutable: Any = False,
        **kwargs: Any,
    ) -> Variables:
        """The variables with every planned parameter packed, in the same tree.

        Args:
            variables: float variables.
            args, rngs, method, mutable, kwargs: as for `apply`; only shapes and dtypes matter.
            calibration: batches to calibrate the ranges of activations with, as for `calibrate`; not needed where
                `variables` have them, or where none is kept.

        Raises:
            PlanError: the recipe does not fit the model.
            ValueError: a parameter has NaN or infinite values, or a range is missing; the message names it.
        """
        self._check(variables)
        how = {"rngs": rngs, "method": method, "mutable": mutable}
        if calibration is not None:
            variables = self.calibrate(variables, calibration, progress=False, **how, **kwargs)
        own, ranges = _take_ranges(variables)
        call = self._call(own, args, kwargs, how)
        packed = _convert(call, self.recipe, ranges.known)
        return {**call.with_params(packed, _convert_caches(call, self.recipe))[0], **_ranges_of(variables)}

    def observe(
        self,
        variables: Variables,
        batches: Iterable[Any],
        *,
        start: Calibration | None = None,
        progress: bool = True,
        rngs: Any = None,
        method: Any = None,
        mutable: Any = False,
        **kwargs: Any,
    ) -> Calibration:
        """Runs the float model on batches and collects what the ranges of activations need.

        One compiled step for each batch shape; memory does not grow with the number of batches.

        Args:
            variables: float variables.
            batches: what `apply` takes after the variables, one batch at a time: a tuple of arguments, or the only one.
            start: an earlier calibration of the same model and recipe to go on with.
            progress: show a progress bar.
            rngs, method, mutable, kwargs: as for `apply`.
        """
        self._check(variables)
        how = {"rngs": rngs, "method": method, "mutable": mutable}

        def step(own: Any, args: tuple) -> tuple[dict[str, Any], Plan]:
            return _observe(self._call(own, args, kwargs, dict(how)), self.recipe)

        return _calibration(step, _take_ranges(variables)[0], batches, start, progress)

    def calibrate(
        self, variables: Variables, batches: Iterable[Any] | Calibration, *, progress: bool = True, **kwargs: Any
    ) -> Variables:
        """The variables with the ranges of activations that batches show: collections "quant_stats" and "quant".

        Args:
            variables: float variables.
            batches: as for `observe`, or what `observe` gave.
            progress, kwargs: as for `observe`.

        Raises:
            ValueError: no batches; NaN or infinity in an activation; an activation that no batch reached.
        """
        if not isinstance(batches, Calibration):
            batches = self.observe(variables, batches, progress=progress, **kwargs)
        return {**_take_ranges(variables)[0], **_calibrated(batches, self.recipe)}


@dataclasses.dataclass(frozen=True, eq=False)
class QuantizedFunction:
    """A function `fn(params, *args, **kwargs)` that runs quantized; `params` is any tree of arrays.

    Where ranges of activations are kept, what `calibrate` gives takes the place of `params`: a dict with the entries
    "params", "quant_stats" and "quant".
    """

    fn: Callable[..., Any]
    recipe: Recipe

    def _call(self, params: Variables, args: tuple, kwargs: dict[str, Any]) -> _Call:
        return _Call(
            lambda params, args, kwargs: self.fn(params, *args, **kwargs),
            (params, args, kwargs),
            is_param=lambda path: path[0].idx == 0,
            name=lambda path: path_name(path[1:]),
            state=lambda path: None if path[0].idx == 0 else path_name(path[1:]),
        )

    @staticmethod
    def _split(params: Variables) -> tuple[Variables, dict[str, Any]]:
        """The params, and the collections of ranges that came with them."""
        names = set(params) if isinstance(params, Mapping) else set()
        if "params" in names and names & {KEPT, LEARNED} and names <= {"params", KEPT, LEARNED}:
            return params["params"], {name: params[name] for name in names - {"params"}}
        return params, {}

    def apply(self, params: Variables, *args: Any, **kwargs: Any) -> Any:
        """Runs the function: fake-quant on float parameters, packed kernels on packed ones."""
        own, ranges = self._split(params)
        return _run(self._call(own, args, kwargs), self.recipe, _take_ranges(ranges)[1])[0]

    __call__ = apply

    def plan(self, params: Variables, *args: Any, **kwargs: Any) -> Plan:
        """Every parameter with its format, or why it stays float; arguments as for `apply`."""
        return _plan(self._call(self._split(params)[0], args, kwargs), self.recipe)

    def convert(
        self, params: Variables, *args: Any, calibration: Iterable[Any] | None = None, **kwargs: Any
    ) -> Variables:
        """The parameters with every planned one packed; arguments and errors as for `QuantizedLinen.convert`."""
        if calibration is not None:
            params = self.calibrate(params, calibration, progress=False, **kwargs)
        own, ranges = self._split(params)
        call = self._call(own, args, kwargs)
        values = _convert(call, self.recipe, _take_ranges(ranges)[1].known)
        packed = call.with_params(values)[0]
        return {"params": packed, **_ranges_of(ranges)} if ranges else packed

    def observe(
        self,
        params: Variables,
        batches: Iterable[Any],
        *,
        start: Calibration | None = None,
        progress: bool = True,
        **kwargs: Any,
    ) -> Calibration:
        """Collects what the ranges of activations need; arguments as for `QuantizedLinen.observe`."""

        def step(own: Any, args: tuple) -> tuple[dict[str, Any], Plan]:
            return _observe(self._call(own, args, kwargs), self.recipe)

        return _calibration(step, self._split(params)[0], batches, start, progress)

    def calibrate(
        self, params: Variables, batches: Iterable[Any] | Calibration, *, progress: bool = True, **kwargs: Any
    ) -> Variables:
        """`{"params": params, "quant_stats": ..., "quant": ...}`; arguments as for `QuantizedLinen.calibrate`."""
        if not isinstance(batches, Calibration):
            batches = self.observe(params, batches, progress=progress, **kwargs)
        return {"params": self._split(params)[0], **_calibrated(batches, self.recipe)}


def _is_nnx(value: Any) -> bool:
    return isinstance(value, nnx.Module | nnx.Rngs)


class QuantParam(nnx.Param):
    """A learned range of an activation."""


class QuantStat(nnx.Variable):
    """A calibrated or averaged range of an activation, or the step of a schedule."""


class Ranges(nnx.Module):
    """The ranges of a `QuantizedNNX`: a variable for each array, named 'quant_stats/path/of/the/kernel/low'."""

    def values(self) -> dict[str, Any]:
        """Their arrays, by name."""
        variables = {n: v for n, v in vars(self).items() if isinstance(v, QuantStat | QuantParam)}
        return {name: variable.get_value() for name, variable in variables.items()}

    def set(self, values: Mapping[str, Any]) -> None:
        """Takes over arrays, by name."""
        for name, value in values.items():
            kind = QuantParam if name.startswith(f"{LEARNED}/") else QuantStat
            if isinstance(old := getattr(self, name, None), kind):
                old.set_value(value)
            else:
                setattr(self, name, kind(value))

    def collections(self) -> dict[str, dict[str, Any]]:
        """Their arrays as the collections "quant_stats" and "quant"."""
        found: dict[str, Flat] = {KEPT: {}, LEARNED: {}}
        steps = {}
        for name, value in self.values().items():
            collection, _, rest = name.partition("/")
            path, _, part = rest.rpartition("/")
            if path:
                found[collection].setdefault(path, {})[part] = value
            else:
                steps[part] = value
        return {KEPT: {**nest(found[KEPT]), **steps}, LEARNED: nest(found[LEARNED])}

    def keep(self, collections: Mapping[str, Any]) -> None:
        """Takes over collections."""
        for collection in (KEPT, LEARNED):
            tree = collections.get(collection) or {}
            named = {f"{name}/{part}": a for name, arrays in flatten(tree).items() for part, a in arrays.items()}
            named |= {STEP: tree[STEP]} if STEP in tree else {}
            self.set({f"{collection}/{name}": value for name, value in named.items()})


class QuantizedNNX(nnx.Module):
    """An NNX module that runs quantized, itself an `nnx.Module`.

    `nnx.jit`, `nnx.grad`, `nnx.split`, `nnx.merge` and optimizers work on it as on the module that it wraps
    (`model`, whose parameters it shares); other state (batch statistics, random counters, caches) is updated in
    place by a call. Ranges of activations are in `ranges`: learned ones are `nnx.Param`s; moving averages and the
    step of a schedule are updated by a call while `use_running_average` is False, which `train()` and `eval()` set as
    they do for `nnx.BatchNorm`.
    """

    def __init__(self, model: nnx.Module, recipe: Recipe):
        self.model = model
        self.recipe = recipe
        self.ranges = Ranges()
        self.use_running_average = True

    def _call(self, args: tuple, kwargs: dict[str, Any], method: Any) -> tuple[_Call, Callable[[Any], None]]:
        """The call, whose results are the method's and the state after it, and a function that keeps that state.

        NNX objects among the arguments (`rngs=`) have state too.
        """
        leaves, tree = jax.tree.flatten((args, kwargs), is_leaf=_is_nnx)
        objects = [self.model, *(leaf for leaf in leaves if _is_nnx(leaf))]
        graphs = [nnx.graphdef(o) for o in objects]
        states = [nnx_state(o) for o in objects]
        params = {name for name, _, variable in states[0] if isinstance(variable, nnx.Param)}
        after: list[list[Any]] = []

        def fn(values: Any, inputs: list[Any], others: list[Any]) -> Any:
            merged = []
            for graph, state, new in zip(graphs, states, [values, *others], strict=True):
                flat = [(path, variable.replace(new[name])) for name, path, variable in state]
                merged.append(nnx.merge(graph, nnx.from_flat_state(flat)))
            rest, arguments = iter(merged[1:]), iter(inputs)
            args, kwargs = jax.tree.unflatten(tree, [next(rest if _is_nnx(x) else arguments) for x in leaves])
            model = merged[0]
            bound = getattr(type(model), method) if isinstance(method, str) else method or type(model).__call__
            out = bound(model, *args, **kwargs)
            kept = [[v for v in nnx_state(o) if i > 0 or v[0] not in params] for i, o in enumerate(merged)]
            after[:] = kept
            return out, [[variable.get_value() for _, _, variable in state] for state in kept]

        first, *others = [{name: variable.get_value() for name, _, variable in state} for state in states]
        call = _Call(
            fn,
            (first, [leaf for leaf in leaves if not _is_nnx(leaf)], others),
            is_param=lambda path: path[0].idx == 0 and path[1].key in params,
            name=lambda path: path_name(path[1:]),
            state=lambda path: path_name(path[1:]) if path[0].idx == 0 else None,
            # (result, the state of the module and of other objects after the call)
            updates=lambda path: after[0][path[2].idx][0] if path[0].idx == 1 and path[1].idx == 0 else None,
        )

        def keep(values: Any) -> None:
            for o, state, new in zip(objects, after, values, strict=True):
                flat = [(path, variable.replace(v)) for (_, path, variable), v in zip(state, new, strict=True)]
                nnx.update(o, nnx.from_flat_state(flat))

        return call, keep

    def __call__(self, *args: Any, method: Any = None, **kwargs: Any) -> Any:
        """Runs the module: fake-quant on float parameters, packed kernels on packed ones.

        `method` is another method of the module to run, or its name.
        """
        return self._execute(*self._call(args, kwargs, method))

    def _execute(self, call: _Call, keep: Callable[[Any], None]) -> Any:
        collections = self.ranges.collections()
        (out, values), after = _run(call, self.recipe, _take_ranges(collections, not self.use_running_average)[1])
        keep(values)
        if after.update:
            self.ranges.keep({KEPT: _kept(collections, after)})
        return out

    def plan(self, *args: Any, method: Any = None, **kwargs: Any) -> Plan:
        """Every parameter with its format, or why it stays float; arguments as for a call."""
        return _plan(self._call(args, kwargs, method)[0], self.recipe)

    def convert(
        self, *args: Any, calibration: Iterable[Any] | None = None, method: Any = None, **kwargs: Any
    ) -> QuantizedNNX:
        """A copy of this module with every planned parameter packed; this one is left as it is.

        Arguments as for a call, and `calibration` as for `QuantizedLinen.convert`; errors as there.
        """
        collections = self.ranges.collections()
        if calibration is not None:
            seen = self.observe(calibration, progress=False, method=method, **kwargs)
            collections = _calibrated(seen, self.recipe)
        known = _take_ranges(collections)[1].known
        call, _ = self._call(args, kwargs, method)
        packed, caches = _convert(call, self.recipe, known), _convert_caches(call, self.recipe)
        out = QuantizedNNX(with_nnx_values(self.model, {**packed, **caches}), self.recipe)
        out.ranges.keep(_ranges_of(collections))
        return out

    def observe(
        self,
        batches: Iterable[Any],
        *,
        start: Calibration | None = None,
        progress: bool = True,
        method: Any = None,
        **kwargs: Any,
    ) -> Calibration:
        """Collects what the ranges of activations need; arguments as for `QuantizedLinen.observe`.

        State that a call changes (batch statistics, random counters) is left as it is.
        """
        graph, state = nnx.split(self)

        def step(state: Any, args: tuple) -> tuple[dict[str, Any], Plan]:
            module = nnx.merge(graph, state)
            return _observe(module._call(args, kwargs, method)[0], module.recipe)

        return _calibration(step, state, batches, start, progress)

    def calibrate(
        self, batches: Iterable[Any] | Calibration, *, progress: bool = True, method: Any = None, **kwargs: Any
    ) -> QuantizedNNX:
        """Sets the ranges of activations to what batches show, in place; returns this module.

        Arguments and errors as for `QuantizedLinen.calibrate`.
        """
        if not isinstance(batches, Calibration):
            batches = self.observe(batches, progress=progress, method=method, **kwargs)
        self.ranges.keep(_calibrated(batches, self.recipe))
        return self


def nnx_state(model: Any) -> list[tuple[str, tuple[Any, ...], nnx.Variable]]:
    """Every variable of an NNX object: path name, path, variable; a shared one once."""
    flat = nnx.to_flat_state(nnx.state(model))
    return [("/".join(map(str, path)), path, variable) for path, variable in flat]


def with_nnx_values(model: nnx.Module, values: Mapping[str, Any]) -> nnx.Module:
    """A copy of an NNX module with the values of some variables replaced, by path name."""
    state = [(path, v.replace(values.get(name, v.get_value()))) for name, path, v in nnx_state(model)]
    return nnx.merge(nnx.graphdef(model), nnx.from_flat_state(state))


def quantize(
    model: Any,
    recipe: Any,
    *,
    strict: bool = True,
    fold_batch_norm: bool = False,
    schedule: Schedule | None = None,
    kv_cache: Any = None,
) -> Any:
    """Wraps a model so that it runs quantized.

    Args:
        model: a Linen module, an NNX module, or a function `fn(params, *args, **kwargs)`.
        recipe: a name (see `qjax.RECIPES`), a format such as `qjax.int4(group=64)`, or a sequence of
            `qjax.Rule`s, of which the first that matches a parameter wins.
        strict: raise a `PlanError` for a rule that does nothing, and for a parameter that a rule names (its pattern
            does not end in a wildcard) but that cannot be quantized.
        fold_batch_norm: multiply batch normalisation into the convolution or matmul before it, in training as in
            serving (`passes.batch_norm`).
        schedule: when training begins to quantize and stops to update moving averages.
        kv_cache: how key-value caches are stored: "int8", "int4" or any other format, `qjax.cache(...)`, or
            {pattern: one of these or None}, where a pattern is a path such as "cache/**/cached_key". `convert` packs
            them; a call takes packed and float ones.

    Returns:
        `QuantizedLinen`, `QuantizedNNX` or `QuantizedFunction`, each with `plan`, `convert` and a call.

    Raises:
        TypeError: `model` or `recipe` is none of these.
        ValueError: no recipe of that name.

    Example:
        >>> q = qjax.quantize(model, "int4")
        >>> print(q.plan(variables, tokens))
        >>> packed = q.convert(variables, tokens)
        >>> logits = q.apply(packed, tokens)
    """
    resolved = as_recipe(recipe, strict=strict)
    if fold_batch_norm or schedule is not None:
        resolved = dataclasses.replace(resolved, fold_batch_norm=fold_batch_norm, schedule=schedule)
    if kv_cache is not None:
        resolved = dataclasses.replace(resolved, kv_cache=as_cache_rules(kv_cache))
    if isinstance(model, linen.Module):
        return QuantizedLinen(model, resolved)
    if isinstance(model, nnx.Module):
        return QuantizedNNX(model, resolved)
    if isinstance(model, type):
        raise TypeError(f"qjax: quantize takes a module instance, not the class {model.__name__}.")
    if callable(model):
        return QuantizedFunction(model, resolved)
    raise TypeError(f"qjax: quantize takes a Linen module, an NNX module or a function, not {type(model).__name__}.")

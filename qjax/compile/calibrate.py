"""Runs the float model over batches and collects statistics."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from qjax.compile.calibration import Calibration, arguments, counted
from qjax.compile.call import Call, is_array
from qjax.compile.compiled import Wanted, compile_call
from qjax.compile.ranges import specs_of
from qjax.pallas_kernels.numbers.activation_ranges import ActSpec, MovingAverage
from qjax.pallas_kernels.packed.qtensor import is_packed
from qjax.passes.jaxpr.replay import replay
from qjax.passes.plan.decisions import Plan
from qjax.passes.rewrites import taps
from qjax.recipes import Recipe


def observe_call(call: Call, recipe: Recipe) -> tuple[dict[str, Any], Plan]:
    """The statistics of one batch, by name of the range, while the float model runs."""
    compiled = compile_call(call, recipe, Wanted(), strict=bool(recipe.strict))
    for path, leaf in compiled.params.items():
        if is_packed(leaf):
            raise TypeError(f"qjax: {path!r} is packed already; calibration runs the float model.")
    kept = [site for site in compiled.plan.sites if any(i.range is not None for i in site.inputs)]
    at = {site.address: taps.observed(site) for site in kept}
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

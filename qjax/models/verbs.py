"""What a wrapped model of any framework does: plan, show, run, convert, observe, calibrate, and the same with adapters.

Each verb is a function of a binding, a wrapped model and its variables in parts. What it finds is given back as parts,
which the binding joins to what the user holds; only `run` has effects, those of `Invocation.finish`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
from jaxtyping import Array

from qjax.compile.adapters import initial_adapters, merged_variables, packed_leaves, planned_adapters, with_adapters
from qjax.compile.calibrate import calibrate_over, observe_call
from qjax.compile.calibration import Calibration, calibrated
from qjax.compile.convert import convert_call
from qjax.compile.plan import plan_call
from qjax.compile.ranges import kept_after, ranges_of
from qjax.compile.run import run_call
from qjax.compile.stages import show_call
from qjax.models.binding import Binding, Inputs, Invocation, Parts
from qjax.pallas_kernels.packed.qtensor import is_packed
from qjax.passes.jaxpr.listing import Listing
from qjax.passes.plan.adapters import AdapterPlan
from qjax.passes.plan.decisions import Plan


def _invocation(binding: Binding, q: Any, parts: Parts, inputs: Inputs) -> Invocation:
    invocation = binding.invocation(q, parts.own, inputs)
    if parts.adapters:
        with_adapters(invocation.call, parts.adapters, q.spec.scale)
    return invocation


def run(binding: Binding, q: Any, parts: Parts, inputs: Inputs) -> Any:
    """Runs the model: fake-quant on float parameters, packed kernels on packed ones."""
    invocation = _invocation(binding, q, parts, inputs)
    out, after = run_call(invocation.call, q.recipe, parts.known(invocation.updates_ranges))
    return invocation.finish(out, kept_after(parts.ranges, after) if after.update else None)


def plan(binding: Binding, q: Any, parts: Parts, inputs: Inputs) -> Plan:
    """Every parameter with its format, or why it stays float."""
    return plan_call(_invocation(binding, q, parts, inputs).call, q.recipe, parts.known().known)


def show(binding: Binding, q: Any, parts: Parts, inputs: Inputs, after: str) -> Listing:
    """The program as it is after a pass."""
    return show_call(_invocation(binding, q, parts, inputs).call, q.recipe, parts.known(), after)


def convert(
    binding: Binding, q: Any, parts: Parts, inputs: Inputs, calibration: Iterable[Any] | Calibration | None = None
) -> Parts:
    """The parts with every planned parameter and cache packed, without adapters.

    With `calibration`, the ranges are those that its batches show.
    """
    if calibration is not None:
        if not isinstance(calibration, Calibration):
            calibration = observe(binding, q, parts, inputs, calibration, progress=False)
        parts = calibrate(q, parts, calibration)
    invocation = _invocation(binding, q, parts, inputs)
    made = convert_call(invocation.call, q.recipe, parts.known().known, caches=invocation.has_caches)
    return Parts(invocation.call.with_params(made.params, made.caches)[0], ranges_of(parts.ranges))


def observe(
    binding: Binding,
    q: Any,
    parts: Parts,
    inputs: Inputs,
    batches: Iterable[Any],
    *,
    start: Calibration | None = None,
    progress: bool = True,
) -> Calibration:
    """What the ranges of activations need; the batches take the place of `inputs.args`, and no state is changed."""

    def step(own: Any, args: tuple) -> tuple[dict[str, Any], Plan]:
        of_batch = dataclasses.replace(inputs, args=args)
        return observe_call(binding.invocation(q, own, of_batch).call, q.recipe)

    return calibrate_over(step, parts.own, batches, start, progress)


def calibrate(q: Any, parts: Parts, seen: Calibration) -> Parts:
    """The parts with the ranges of activations that `observe` saw."""
    return dataclasses.replace(parts, ranges=calibrated(seen, q.recipe))


# --- Adapters ----------------------------------------------------------------------------------------------------


def plan_adapted(binding: Binding, q: Any, parts: Parts, inputs: Inputs) -> AdapterPlan:
    """Which parameters take adapters, and why others that a target matches do not."""
    return planned_adapters(binding.invocation(q, parts.own, inputs).call, q.recipe, q.spec)


def init_adapters(binding: Binding, q: Any, parts: Parts, inputs: Inputs, key: Array, loftq_iterations: int) -> Parts:
    """The parts with new adapters; with `loftq_iterations` also with packed parameters in place of the float ones."""
    call = binding.invocation(q, parts.own, inputs).call
    new, adapters = initial_adapters(call, q.recipe, q.spec, key, loftq_iterations, parts.known().known)
    return Parts(call.with_params(new)[0], ranges_of(parts.ranges), adapters)


def merge(binding: Binding, q: Any, parts: Parts, requantize: bool, pack: Callable[[], Parts]) -> Parts:
    """The parts with the adapters added to the weights: float, or packed again. Float ones `pack` packs first."""
    adapters = parts.adapters or {}
    if not any(map(is_packed, jax.tree.leaves(parts.own, is_leaf=is_packed))):
        parts = pack()
    call = binding.invocation(q, parts.own, Inputs()).call
    new = merged_variables(packed_leaves(call), adapters, q.spec.scale, requantize)
    return Parts(call.with_params(new)[0], ranges_of(parts.ranges))

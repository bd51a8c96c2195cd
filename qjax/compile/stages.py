"""`show_call`: the program of a call as it is after a pass.

trace             the model's own program
fold_batch_norm   batch normalisations multiplied into the weights before them, where the recipe says so
observe           what calibration runs: statistics are tapped
fake_quant        what training runs
lower             what serving runs: packed weights, packed operations
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from qjax.compile.calibrate import observe_call
from qjax.compile.call import Call
from qjax.compile.compiled import EVERYTHING, Wanted, compile_call
from qjax.compile.ranges import CallRanges
from qjax.compile.run import run_call
from qjax.compile.served import packed_call, served_program, with_leaves
from qjax.passes.jaxpr.listing import Listing, listing
from qjax.recipes import Recipe


def _names(call: Call, arrays: Callable[[Any], int]) -> list[str]:
    """Names of the arrays that go into a call, of which a leaf may have several."""
    names, others = [], 0
    for path, state, leaf in zip(call.paths, call.state_paths, call.leaves, strict=True):
        name = path or state or f"input{others}"
        others += path is None and state is None
        names += [name] * arrays(leaf)
    return names


def _of_program(call: Call, jaxpr: Any) -> Listing:
    return listing(jaxpr, _names(call, lambda leaf: 1))


def _of_run(call: Call, run: Callable[[Call], Any]) -> Listing:
    """What `run` does with the leaves of a call."""

    def flat(*leaves: Any) -> list[Any]:
        return [x for x in jax.tree.leaves(run(with_leaves(call, leaves))) if hasattr(x, "dtype")]

    return listing(jax.make_jaxpr(flat)(*call.leaves), _names(call, lambda leaf: len(jax.tree.leaves(leaf))))


def _served(call: Call, recipe: Recipe, ranges: CallRanges) -> Listing:
    compiled = compile_call(call, recipe, EVERYTHING, strict=bool(recipe.strict), ranges=ranges.known)
    served = packed_call(call, compiled)
    names = _names(served, lambda leaf: len(jax.tree.leaves(leaf)))
    return listing(served_program(call, compiled, recipe, ranges.known)[0], names)


STAGES: dict[str, Callable[[Call, Recipe, CallRanges], Listing]] = {
    "trace": lambda call, recipe, ranges: _of_program(call, call.trace().jaxpr),
    "fold_batch_norm": lambda call, recipe, ranges: _of_program(
        call, compile_call(call, recipe, Wanted(), strict=bool(recipe.strict)).program.jaxpr
    ),
    "observe": lambda call, recipe, ranges: _of_run(call, lambda call: observe_call(call, recipe)[0]),
    "fake_quant": lambda call, recipe, ranges: _of_run(call, lambda call: run_call(call, recipe, ranges)[0]),
    "lower": _served,
}


def show_call(call: Call, recipe: Recipe, ranges: CallRanges, after: str) -> Listing:
    """The program of a call after a pass.

    Args:
        call, recipe: the call, on float variables (or, for "lower", on packed ones).
        ranges: those of the variables.
        after: one of `STAGES`.

    Raises:
        ValueError: there is no such pass.
    """
    if after not in STAGES:
        raise ValueError(f"qjax: show(after={after!r}): the passes are {', '.join(STAGES)}.")
    return STAGES[after](call, recipe, ranges)

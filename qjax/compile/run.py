"""`run_call`: fake-quant on float parameters, packed kernels on packed ones."""

from __future__ import annotations

from typing import Any

from qjax.compile.call import Call
from qjax.compile.compiled import Wanted, compile_call
from qjax.compile.execute import run_compiled
from qjax.compile.ranges import CallRanges
from qjax.compile.ranges import check as check_ranges
from qjax.compile.served import refuse_fallbacks
from qjax.pallas_kernels.packed.qtensor import is_packed
from qjax.recipes import Recipe


def run_call(call: Call, recipe: Recipe, ranges: CallRanges) -> tuple[Any, CallRanges]:
    """Runs a call: fake-quant for float parameters that the recipe quantizes, packed kernels for packed ones.

    Returns the results and the ranges after the call.
    """
    training = any(not is_packed(leaf) for path, leaf in zip(call.paths, call.leaves, strict=True) if path is not None)
    if training:
        recipe.check_patterns([path for path in call.paths if path is not None])
    packed = any(is_packed(leaf) for leaf in call.leaves)
    compiled = compile_call(call, recipe, Wanted(products=packed), strict=False, ranges=ranges.known)
    check_ranges(compiled.plan, ranges.known)
    if packed:
        refuse_fallbacks(call, compiled, recipe, ranges.known)
    return run_compiled(call, compiled, recipe, ranges)

"""`quantize`: wraps a model of any framework so that it runs quantized.

A wrapped model is polymorphic in its variables: on float ones it runs fake-quant nodes (training), on packed ones
the packed kernels (serving). Every call traces the model anew, so the jit around it is the only cache. Ranges of
activations travel in collections of their own beside the parameters (`qjax.compile.ranges`).
"""

from __future__ import annotations

import dataclasses
from typing import Any

from qjax.models.frameworks import binding_of_float, titles
from qjax.passes.plan.rules import as_cache_rules
from qjax.recipes import Schedule, Strict, as_recipe


def quantize(
    model: Any,
    recipe: Any,
    *,
    strict: Strict = True,
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
            does not end in a wildcard) but that cannot be quantized. "kernels": also for a product of a packed weight
            that no kernel takes, on the chip of `qjax.target_chip` or on the platform that JAX runs on: `plan` says
            what each runs as.
        fold_batch_norm: multiply batch normalisation into the convolution or matmul before it, in training as in
            serving (`passes.rewrites.batch_norm`).
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
    if binding := binding_of_float(model):
        return binding.wrap(model, resolved)
    if isinstance(model, type):
        raise TypeError(f"qjax: quantize takes a module instance, not the class {model.__name__}.")
    raise TypeError(f"qjax: quantize takes {titles()}, not {type(model).__name__}.")

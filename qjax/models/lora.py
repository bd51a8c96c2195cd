"""`lora`: low-rank adapters on a quantized model (QLoRA, arXiv 2305.14314), trained while the packed weights stay.

Adapters travel in a collection "lora" beside "params", nested by the path of their parameter:
`{"params": packed, "lora": {"up": {"kernel": {"a": ..., "b": ...}}}}`. They are float32 and the only leaves that train;
the forward multiplies them in the dtype of its activations.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
from flax import nnx
from jaxtyping import Array

from qjax.compile.adapters import (
    LORA,
    initial_adapters,
    merged_variables,
    packed_leaves,
    planned_adapters,
    take_adapters,
    with_adapters,
)
from qjax.compile.call import Call, Variables
from qjax.compile.ranges import Flat, nest, ranges_of, take_ranges
from qjax.compile.run import run_call
from qjax.models.function import QuantizedFunction
from qjax.models.linen import QuantizedLinen
from qjax.models.nnx import QuantizedNNX, nnx_state, with_nnx_values
from qjax.pallas_kernels.packed.qtensor import is_packed
from qjax.passes.plan.adapters import AdapterPlan, AdapterSpec

# --- The three kinds of model ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class LoraLinen(QuantizedLinen):
    """A quantized Linen module with adapters.

    `apply` is that of `QuantizedLinen` and takes the adapters as the collection "lora"; without it, it is the model
    without adapters.
    """

    spec: AdapterSpec
    _adapts: ClassVar[bool] = True

    def _call(self, variables: Variables, args: tuple, kwargs: dict[str, Any], how: dict[str, Any]) -> Call:
        own, adapters = take_adapters(variables)
        return with_adapters(super()._call(own, args, kwargs, how), adapters, self.spec.scale)

    def plan(  # type: ignore[override]
        self,
        variables: Variables,
        *args: Any,
        rngs: Any = None,
        method: Any = None,
        mutable: Any = False,
        **kwargs: Any,
    ) -> AdapterPlan:
        """Which parameters take adapters, and why others that a target matches do not.

        Args:
            variables: float or packed; `jax.ShapeDtypeStruct`s will do.
            args, rngs, method, mutable, kwargs: as for `apply`; only shapes and dtypes matter.

        Raises:
            PlanError: the targets do not fit the model.
        """
        self._check(variables)
        how = {"rngs": rngs, "method": method, "mutable": mutable}
        return planned_adapters(self._call(take_ranges(variables)[0], args, kwargs, how), self.recipe, self.spec)

    def init(  # type: ignore[override]
        self,
        key: Array,
        variables: Variables,
        *args: Any,
        loftq_iterations: int = 0,
        rngs: Any = None,
        method: Any = None,
        mutable: Any = False,
        **kwargs: Any,
    ) -> Variables:
        """The variables with new adapters in the collection "lora".

        Args:
            key: for the values of `a`; `b` starts at zero, so that the model starts unchanged.
            variables: packed ones as `convert` gave them; with `loftq_iterations` float ones, which are packed.
            args, rngs, method, mutable, kwargs: as for `apply`; only shapes and dtypes matter.
            loftq_iterations: start from weights and adapters whose sum is close to the float weights (LoftQ, arXiv
                2310.08659), found in so many alternations of quantizing and a singular value decomposition.

        Raises:
            PlanError: the targets do not fit the model.
            TypeError: LoftQ from packed variables.
        """
        self._check(variables)
        how = {"rngs": rngs, "method": method, "mutable": mutable}
        own, ranges = take_ranges(variables)
        call = self._call(own, args, kwargs, how)
        new, adapters = initial_adapters(call, self.recipe, self.spec, key, loftq_iterations, ranges.known)
        return {**call.with_params(new)[0], **ranges_of(variables), LORA: nest(adapters)}

    def merge(self, variables: Variables, *args: Any, requantize: bool = False, **kwargs: Any) -> Variables:
        """The variables with the adapters added to the weights, without the collection "lora".

        Args:
            variables: with adapters.
            args, kwargs: as for `convert`; needed where the variables are float, which are packed first.
            requantize: pack the sums in the format of their weights again. Otherwise every packed parameter becomes
                float: to serve as it is, or to `convert` with another recipe.
        """
        own, adapters = take_adapters(variables)
        if not any(map(is_packed, jax.tree.leaves(own, is_leaf=is_packed))):
            own = self.convert(own, *args, **kwargs)
        call = super()._call(take_ranges(own)[0], (), {}, {})
        new = merged_variables(packed_leaves(call), adapters, self.spec.scale, requantize)
        return {**call.with_params(new)[0], **ranges_of(own)}


@dataclasses.dataclass(frozen=True, eq=False)
class LoraFunction(QuantizedFunction):
    """A quantized function with adapters; its variables are a dict with the entries "params" and "lora".

    Ranges of activations stand beside them, as `QuantizedFunction` says.
    """

    spec: AdapterSpec

    @staticmethod
    def _split_adapters(variables: Variables) -> tuple[Variables, dict[str, Any], Flat]:
        """The params, the ranges and the adapters."""
        if not (isinstance(variables, Mapping) and {"params", LORA} <= set(variables)):
            raise TypeError(
                f"qjax: an adapted function takes {{'params': ..., '{LORA}': ...}}, as init gives them; to run it "
                "without adapters, call the quantized function."
            )
        rest, adapters = take_adapters(variables)
        params, ranges = QuantizedFunction._split(rest)
        return (params if ranges else rest["params"]), ranges, adapters

    def _given(self, params: Variables) -> tuple[Variables, dict[str, Any]]:
        """The params and the ranges, of variables with adapters or without."""
        adapted = isinstance(params, Mapping) and {"params", LORA} <= set(params)
        return self._split_adapters(params)[:2] if adapted else self._split(params)

    def apply(self, variables: Variables, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Runs the function with adapters."""
        own, ranges, adapters = self._split_adapters(variables)
        call = with_adapters(self._call(own, args, kwargs), adapters, self.spec.scale)
        return run_call(call, self.recipe, take_ranges(ranges)[1])[0]

    __call__ = apply

    def plan(self, params: Variables, *args: Any, **kwargs: Any) -> AdapterPlan:  # type: ignore[override]
        """Which parameters take adapters; arguments and errors as for `LoraLinen.plan`."""
        return planned_adapters(self._call(self._given(params)[0], args, kwargs), self.recipe, self.spec)

    def init(self, key: Array, params: Variables, *args: Any, loftq_iterations: int = 0, **kwargs: Any) -> Variables:
        """`{"params": params, "lora": adapters}`; arguments and errors as for `LoraLinen.init`."""
        own, ranges = self._given(params)
        call = self._call(own, args, kwargs)
        known = take_ranges(ranges)[1].known
        new, adapters = initial_adapters(call, self.recipe, self.spec, key, loftq_iterations, known)
        return {"params": call.with_params(new)[0], **ranges_of(ranges), LORA: nest(adapters)}

    def merge(self, variables: Variables, *args: Any, requantize: bool = False, **kwargs: Any) -> Variables:
        """The params with the adapters added (beside ranges, where there are some); as for `LoraLinen.merge`."""
        own, ranges, adapters = self._split_adapters(variables)
        if not any(map(is_packed, jax.tree.leaves(own, is_leaf=is_packed))):
            given = {"params": own, **ranges} if ranges else own
            own, ranges = self._split(self.convert(given, *args, **kwargs))
        call = self._call(own, (), {})
        merged = call.with_params(merged_variables(packed_leaves(call), adapters, self.spec.scale, requantize))[0]
        return {"params": merged, **ranges} if ranges else merged


class Adapters(nnx.Module):
    """The adapters of a `LoraNNX`: an `nnx.LoRAParam` for each array, named 'path/of/the/kernel/a'."""

    def __init__(self, adapters: Flat):
        for name, pair in adapters.items():
            for part, value in pair.items():
                setattr(self, f"{name}/{part}", nnx.LoRAParam(value))

    def flat(self) -> Flat:
        """Path of a parameter -> its arrays `a` and `b`."""
        found: Flat = {}
        for name, variable in vars(self).items():
            if isinstance(variable, nnx.LoRAParam):
                path, _, part = name.rpartition("/")
                found.setdefault(path, {})[part] = variable.get_value()
        return found


class LoraNNX(nnx.Module):
    """A quantized NNX module with adapters, itself an `nnx.Module`.

    `base` is the `QuantizedNNX` whose variables it shares, `adapters` holds an `nnx.LoRAParam` for each array:
    `nnx.Optimizer(m, tx, wrt=nnx.LoRAParam)` and `nnx.DiffState(0, nnx.LoRAParam)` train these and nothing else.
    """

    def __init__(self, base: QuantizedNNX, spec: AdapterSpec, adapters: Flat | None = None):
        self.base = base
        self.spec = spec
        self.adapters = Adapters(adapters or {})

    def __call__(self, *args: Any, method: Any = None, **kwargs: Any) -> Any:
        """Runs the module with adapters; before `init`, without."""
        call, keep = self.base._call(args, kwargs, method)
        return self.base._execute(with_adapters(call, self.adapters.flat(), self.spec.scale), keep)

    def plan(self, *args: Any, method: Any = None, **kwargs: Any) -> AdapterPlan:
        """Which parameters take adapters; errors as for `LoraLinen.plan`."""
        return planned_adapters(self.base._call(args, kwargs, method)[0], self.base.recipe, self.spec)

    def init(self, key: Array, *args: Any, loftq_iterations: int = 0, method: Any = None, **kwargs: Any) -> LoraNNX:
        """A module with new adapters on the same base; errors as for `LoraLinen.init`.

        With `loftq_iterations` the base must be float: the new module has a packed copy of it.
        """
        collections = self.base.ranges.collections()
        call, known = self.base._call(args, kwargs, method)[0], take_ranges(collections)[1].known
        new, adapters = initial_adapters(call, self.base.recipe, self.spec, key, loftq_iterations, known)
        base = self.base
        if loftq_iterations:
            base = QuantizedNNX(with_nnx_values(self.base.model, new), self.base.recipe)
            base.ranges.keep(ranges_of(collections))
        return LoraNNX(base, self.spec, adapters)

    def merge(self, *args: Any, requantize: bool = False, method: Any = None, **kwargs: Any) -> Any:
        """A copy of the wrapped module with the adapters added to its weights: float, or packed again.

        Float, it is a module of the class that was wrapped; packed, a `QuantizedNNX`. Arguments as for
        `LoraLinen.merge`.
        """
        params = [(name, v.get_value()) for name, _, v in nnx_state(self.base.model) if isinstance(v, nnx.Param)]
        base = self.base
        if not any(is_packed(value) for _, value in params):
            base = base.convert(*args, method=method, **kwargs)
            params = [(name, v.get_value()) for name, _, v in nnx_state(base.model)]
        new = merged_variables(dict(params), self.adapters.flat(), self.spec.scale, requantize)
        merged = with_nnx_values(base.model, new)
        if not requantize:
            return merged
        out = QuantizedNNX(merged, base.recipe)
        out.ranges.keep(ranges_of(base.ranges.collections()))
        return out


def lora(q: Any, *, rank: int = 16, alpha: float = 32.0, targets: str | Sequence[str] = "**") -> Any:
    """Adds low-rank adapters to a quantized model: `y = x @ W + (x @ a) @ b * (alpha / rank)`.

    Args:
        q: what `qjax.quantize` (for NNX also `convert`) gave.
        rank: columns of `a`, rows of `b`.
        alpha: the adapters' product is multiplied by `alpha / rank`.
        targets: which parameters take adapters: a pattern of paths or several, as those of a `qjax.Rule`. One that ends
            in a wildcard takes what can be adapted, and `plan` says why the rest cannot; one that ends in a name means
            each parameter that it matches, and one of these that cannot be adapted is an error.

    Returns:
        `LoraLinen`, `LoraFunction` or `LoraNNX`, each with `plan`, `init`, `merge` and a call.

    Raises:
        TypeError: `q` is none of these.
        ValueError: a rank or an alpha that is not positive.

    Example:
        >>> q = qjax.quantize(model, "nf4")
        >>> m = qjax.lora(q, rank=16, targets="layers/**")
        >>> variables = m.init(jax.random.key(0), q.convert(variables, tokens), tokens)
        >>> gradient = jax.grad(lambda lora: loss(m.apply({**variables, "lora": lora}, tokens)))(variables["lora"])
    """
    patterns = (targets,) if isinstance(targets, str) else tuple(targets)
    spec = AdapterSpec(rank, float(alpha), patterns)
    if isinstance(q, LoraLinen | LoraFunction | LoraNNX):
        raise TypeError("qjax: this model has adapters already.")
    if isinstance(q, QuantizedLinen):
        return LoraLinen(q.module, q.recipe, spec)
    if isinstance(q, QuantizedNNX):
        return LoraNNX(q, spec)
    if isinstance(q, QuantizedFunction):
        return LoraFunction(q.fn, q.recipe, spec)
    raise TypeError(f"qjax: lora takes what qjax.quantize gives, not {type(q).__name__}. Quantize the model first.")

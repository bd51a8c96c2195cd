"""Named recipes, and the constructors of the formats that rules use."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

from qjax.pallas_kernels.numbers.activation_ranges import (
    ActSpec,
    Dynamic,
    LearnedClip,
    LearnedStep,
    MovingAverage,
    MseRange,
    Observer,
)
from qjax.pallas_kernels.numbers.formats import (
    FORMATS,
    AbsMax,
    MseSearch,
    PerChannel,
    PerGroup,
    PerTensor,
    QuantSpec,
    QuickSearch,
)
from qjax.pallas_kernels.packed.qcache import CacheSpec
from qjax.passes.plan.rules import CacheRule, PlanError, Rule, check_patterns


@dataclasses.dataclass(frozen=True)
class Schedule:
    """When quantization-aware training quantizes, in calls that update `quant_stats`.

    Attributes:
        start: the first step whose weights and activations are quantized; the model is the float one before.
        freeze: the first step that no longer updates moving averages; None for never.
    """

    start: int = 0
    freeze: int | None = None

    def __post_init__(self) -> None:
        """Checks the steps."""
        if self.start < 0 or (self.freeze is not None and self.freeze < 0):
            raise ValueError(f"qjax: {self!r}: steps are counted from 0.")


ScaleDtype = Literal["float32", "bfloat16", "float16"]


def _format(name: str, default_group: int | None) -> Callable[..., QuantSpec]:
    fmt = FORMATS[name]

    def make(
        *,
        group: int | None = default_group,
        per_tensor: bool = False,
        zero_point: bool = False,
        double_quant: bool = False,
        scale: Any = None,
        scale_dtype: ScaleDtype | None = None,
    ) -> QuantSpec:
        if per_tensor:
            granularity: PerTensor | PerChannel | PerGroup = PerTensor()
        else:
            granularity = PerChannel() if group is None else PerGroup(group)
        coarse = not isinstance(granularity, PerGroup)
        return QuantSpec(
            fmt,
            granularity,
            zero_point=zero_point,
            double_quant=double_quant,
            scale_rule=MseSearch() if scale is None else scale,
            # per group a float32 scale would be half a bit per weight; rounded first, bfloat16 costs no accuracy
            scale_dtype=scale_dtype or ("float32" if coarse or double_quant else "bfloat16"),
        )

    make.__name__ = make.__qualname__ = name
    where = f"group {default_group} along K" if default_group else "one scale per output channel"
    make.__doc__ = f"""The {fmt.bits}-bit format `{name}` as a weight format; by default {where}.

    Args:
        group: values along K that share a scale; None for one scale per output channel.
        per_tensor: one scale for each matrix.
        zero_point: an integer zero point beside each scale (integer formats).
        double_quant: store the scales themselves in 8 bits (QLoRA, arXiv 2305.14314).
        scale: the rule that chooses scales: `qjax.MseSearch()` (default), `qjax.AbsMax()`, ...
        scale_dtype: "float32", "bfloat16" or "float16"; by default bfloat16 for groups, else float32.

    Raises:
        ValueError: the combination makes no sense; the message says why.
    """
    return make


# name -> group size by default (None: one scale per output channel)
_DEFAULT_GROUPS: dict[str, int | None] = {
    "int2": 64,
    "int3": 64,
    "int4": 64,
    "int5": 64,
    "int6": 64,
    "int7": None,
    "int8": None,
    "nf4": 64,
    "fp4_e2m1": 32,
    "fp8_e4m3": None,
    "fp8_e5m2": None,
}

_MAKERS = {name: _format(name, group) for name, group in _DEFAULT_GROUPS.items()}

int2, int3, int4, int5 = (_MAKERS[f"int{bits}"] for bits in (2, 3, 4, 5))

int6, int7, int8 = (_MAKERS[f"int{bits}"] for bits in (6, 7, 8))

nf4, fp4_e2m1 = _MAKERS["nf4"], _MAKERS["fp4_e2m1"]

fp8_e4m3, fp8_e5m2 = _MAKERS["fp8_e4m3"], _MAKERS["fp8_e5m2"]


Strict = bool | Literal["kernels"]
"""How much is an error; see `Recipe.strict`."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Rules, first match wins, and how they are carried out.

    Attributes:
        rules: of several that match, the first wins.
        strict: whether a rule that does nothing is an error; "kernels": a product that no kernel of the platform takes
            is one too.
        fold_batch_norm: whether batch normalisation is multiplied into the weights before it.
        schedule: when training quantizes; None for always.
        kv_cache: how state is stored; of several rules that match, the first wins.
    """

    rules: tuple[Rule, ...]
    strict: Strict = True
    fold_batch_norm: bool = False
    schedule: Schedule | None = None
    kv_cache: tuple[CacheRule, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """A plain dict that `from_json` reads back; the schedule of training is not part of it."""
        rules = [rule.to_json() for rule in self.rules]
        caches = {"kv_cache": [rule.to_json() for rule in self.kv_cache]} if self.kv_cache else {}
        return {"rules": rules, "strict": self.strict, "fold_batch_norm": self.fold_batch_norm, **caches}

    @staticmethod
    def from_json(data: dict[str, Any]) -> Recipe:
        """Reads what `to_json` wrote."""
        rules = tuple(Rule.from_json(rule) for rule in data["rules"])
        caches = tuple(CacheRule.from_json(rule) for rule in data.get("kv_cache", ()))
        return Recipe(rules, data["strict"], bool(data.get("fold_batch_norm", False)), kv_cache=caches)

    def check_patterns(self, paths: Sequence[str]) -> None:
        """Raises a `PlanError` for a rule that matches none of the paths, if strict."""
        if self.strict and (problems := check_patterns(self.rules, paths)):
            raise PlanError("\n  - ".join(["qjax: the recipe does not fit the model (strict=True):", *problems]))


def _training(name: str) -> QuantSpec:
    """The format with a scale rule of a few passes: training chooses scales at every step, a search takes twenty."""
    return _MAKERS[name](scale=QuickSearch() if FORMATS[name].kind == "int" else AbsMax())


def dynamic(format: str = "int8", *, per: Literal["token", "tensor"] = "token", zero_point: bool = False) -> ActSpec:
    """Activations quantized by the range that they have in each call; no calibration.

    Args:
        format: an integer or fp8 format by name.
        per: "token": a scale for each row of the matmul (each example of a convolution); "tensor": one.
        zero_point: let the range be asymmetric about 0.
    """
    return ActSpec(_activation_format(format), Dynamic(), per, zero_point)


def static(
    format: str = "int8",
    *,
    observer: Observer | None = None,
    zero_point: bool = True,
    dynamic_above: float | int | None = None,
) -> ActSpec:
    """Activations quantized by a range that calibration finds, one for the tensor.

    Args:
        format: an integer or fp8 format by name.
        observer: how the range follows from what was seen: `qjax.MinMax()`, `qjax.MovingAverage()` (which training goes
            on with), `qjax.Percentile(99.99)`, `qjax.MseRange()` (default) or `qjax.EntropyRange()`.
        zero_point: let the range be asymmetric about 0; only integers can.
        dynamic_above: an input that one range does not serve is quantized by a scale for each token instead: one whose
            squared error in calibration was more than this many times that of such scales. The plan says where.
    """
    fmt = _activation_format(format)
    rule = MseRange() if observer is None else observer
    return ActSpec(fmt, rule, "tensor", zero_point and fmt.kind == "int", dynamic_above)


def lsq(format: str = "int8", *, zero_point: bool = True) -> ActSpec:
    """Activations quantized by a step size that the optimizer learns (LSQ, arXiv 1902.08153; LSQ+ with zero point)."""
    return ActSpec(_activation_format(format), LearnedStep(), "tensor", zero_point)


def pact(format: str = "int8", *, zero_point: bool = False) -> ActSpec:
    """Activations clipped at a point that the optimizer learns (PACT, arXiv 1805.06085).

    With a zero point the range is [0, clip], for what a ReLU gives; otherwise [-clip, clip].
    """
    return ActSpec(_activation_format(format), LearnedClip(), "tensor", zero_point)


def cache(format: str = "int8", *, zero_point: bool = False, scale_dtype: ScaleDtype = "float32") -> CacheSpec:
    """A key-value cache whose vectors (one token, one head) are stored in a format, each with its own scale.

    Args:
        format: any format by name.
        zero_point: let the range of a vector be asymmetric about 0; only integers can.
        scale_dtype: of the stored scales.
    """
    if format not in FORMATS:
        raise ValueError(f"qjax: no format named {format!r}; there are {', '.join(FORMATS)}.")
    return CacheSpec(FORMATS[format], zero_point, scale_dtype)


def _activation_format(name: str) -> Any:
    if name not in FORMATS:
        raise ValueError(f"qjax: no format named {name!r}; activations take int2 to int8, fp8_e4m3 and fp8_e5m2.")
    return FORMATS[name]


RECIPES: dict[str, tuple[Rule, ...]] = {
    **{name: (Rule("**", make()),) for name, make in _MAKERS.items()},
    **{f"{name}_qat": (Rule("**", _training(name)),) for name in _MAKERS},
    # A zero point halves the error of an input whose tokens have one long tail, as a gated activation has.
    "w8a8": (Rule("**", int8(), dynamic(zero_point=True)),),
    # On the language model of scripts/bench/lm.py gated products are at 7 to 27 and all other inputs below 3.5.
    "w8a8_static": (Rule("**", int8(), static(dynamic_above=5)),),
    "w4a8": (Rule("**", int4(), dynamic(zero_point=True)),),
    "w8a8_fp8": (Rule("**", fp8_e4m3(), dynamic("fp8_e4m3")),),
    "w8a8_qat": (Rule("**", _training("int8"), dynamic(zero_point=True)),),
    "w8a8_static_qat": (Rule("**", _training("int8"), static(observer=MovingAverage())),),
    "w4a8_qat": (Rule("**", _training("int4"), dynamic(zero_point=True)),),
    "w8a8_fp8_qat": (Rule("**", _training("fp8_e4m3"), dynamic("fp8_e4m3")),),
}
"""Recipes by name: every format for all weights; `w8a8` and `w4a8` with activations quantized per token, `w8a8_fp8`
too, with 8-bit floats for both, `w8a8_static` by calibrated ranges, but for inputs that one range does not serve; and
each with `_qat`: with a scale rule cheap enough for training."""


def as_recipe(recipe: Any, *, strict: Strict = True) -> Recipe:
    """A recipe given as a name, a format, a rule or a sequence of rules."""
    if not (isinstance(strict, bool) or strict == "kernels"):
        raise ValueError(f"qjax: strict={strict!r} is True, False or 'kernels'.")
    if isinstance(recipe, Recipe):
        return dataclasses.replace(recipe, strict=strict)
    if isinstance(recipe, str):
        if recipe not in RECIPES:
            raise ValueError(f"qjax: no recipe named {recipe!r}; there are {', '.join(RECIPES)}.")
        return Recipe(RECIPES[recipe], strict)
    if isinstance(recipe, QuantSpec):
        return Recipe((Rule("**", recipe),), strict)
    rules = (recipe,) if isinstance(recipe, Rule) else tuple(recipe) if isinstance(recipe, Sequence) else ()
    if not rules or not all(isinstance(rule, Rule) for rule in rules):
        raise TypeError(
            "qjax: a recipe is a name such as 'int4', a format such as qjax.int4(group=64), or a sequence of "
            f"qjax.Rule; got {recipe!r}."
        )
    return Recipe(rules, strict)

"""The table of number formats, and `QuantSpec`: format, granularity and scale rule of one quantized parameter.

A format says what one stored code means before it is scaled; adding a format is adding a row to `FORMATS`.
Everything here is plain data: no arrays, hashable, usable as a static argument of `jax.jit`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import ml_dtypes
import numpy as np

Kind = Literal["int", "codebook", "float"]

# Appendix E of QLoRA (arXiv 2305.14314): quantiles of N(0, 1) with an exact zero, scaled to [-1, 1]; the float32
# constants that bitsandbytes ships.
NF4_VALUES = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)

# OCP Microscaling Formats (MX) 1.0, section 5.3.3: sign, two exponent bits, one mantissa bit, indexed by the code.
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


@dataclasses.dataclass(frozen=True)
class Format:
    """What one stored code means: a row of `FORMATS`.

    Attributes:
        name: key in `FORMATS`.
        bits: stored bits per value.
        kind: "int": two's complement integer, all of `-2**(bits-1) .. 2**(bits-1) - 1`;
            "codebook": index into `values`; "float": the bit pattern of `dtype`.
        values: of a codebook, the value of each code.
        ties: how a codebook rounds a number halfway between two values: to the smaller value, or to the even code.
        dtype: of a float format, its dtype (`ml_dtypes`).
    """

    name: str
    bits: int
    kind: Kind
    values: tuple[float, ...] = ()
    ties: Literal["down", "even"] = "down"
    dtype: np.dtype | None = None

    @property
    def qmin(self) -> int:
        """Smallest integer of an int format."""
        return -(2 ** (self.bits - 1))

    @property
    def qmax(self) -> int:
        """Largest integer of an int format."""
        return 2 ** (self.bits - 1) - 1

    @property
    def largest(self) -> float:
        """Largest magnitude that both signs of a codebook or float format reach."""
        if self.kind == "int":
            return float(self.qmax)
        return max(self.values) if self.kind == "codebook" else float(ml_dtypes.finfo(self.dtype).max)

    @property
    def bounds(self) -> tuple[float, float]:
        """Smallest and largest unscaled number that is rounded, not clipped: half a step beyond the end codes."""
        if self.kind == "int":
            return self.qmin - 0.5, self.qmax + 0.5
        if self.kind == "codebook":
            v = sorted(self.values)
            return v[0] - (v[1] - v[0]) / 2, v[-1] + (v[-1] - v[-2]) / 2
        info = ml_dtypes.finfo(self.dtype)
        step = 2.0 ** (math.floor(math.log2(float(info.max))) - info.nmant)
        return -float(info.max) - step / 2, float(info.max) + step / 2

    def __str__(self) -> str:
        """The name."""
        return self.name


FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        *(Format(f"int{bits}", bits, "int") for bits in range(2, 9)),
        Format("nf4", 4, "codebook", values=NF4_VALUES),
        Format("fp4_e2m1", 4, "codebook", values=E2M1_VALUES, ties="even"),
        Format("fp8_e4m3", 8, "float", dtype=np.dtype(ml_dtypes.float8_e4m3fn)),
        Format("fp8_e5m2", 8, "float", dtype=np.dtype(ml_dtypes.float8_e5m2)),
    )
}


@dataclasses.dataclass(frozen=True)
class PerTensor:
    """One scale for each matrix. A `(K, N) = (512, 256)` matrix has scales of shape `(1, 1)`."""

    def __str__(self) -> str:
        """As it appears in a spec: `tensor`."""
        return "tensor"


@dataclasses.dataclass(frozen=True)
class PerChannel:
    """One scale for each of the N output channels. A `(512, 256)` matrix has scales of shape `(1, 256)`."""

    def __str__(self) -> str:
        """As it appears in a spec: `channel`."""
        return "channel"


@dataclasses.dataclass(frozen=True)
class PerGroup:
    """One scale for each `size` consecutive values along K, in each output channel.

    A `(512, 256)` matrix with `size=128` has scales of shape `(4, 256)`; K = 500 also gives four groups, the last
    of 116 values.
    """

    size: int

    def __post_init__(self) -> None:
        """Checks the size."""
        if isinstance(self.size, bool) or not isinstance(self.size, int) or self.size < 1:
            raise ValueError(
                f"qjax: PerGroup(size={self.size!r}): a group is a whole number of values along K, at least 1. "
                "Use PerChannel() for one group over all of K."
            )

    def __str__(self) -> str:
        """As it appears in a spec: `g64`."""
        return f"g{self.size}"


Granularity = PerTensor | PerChannel | PerGroup


@dataclasses.dataclass(frozen=True)
class AbsMax:
    """The extreme values of a group decide its scale; one pass.

    Symmetric integers: `absmax / ((2**bits - 1) / 2)`, the rule of compressed-tensors. With zero point:
    `(max - min) / (2**bits - 1)` over the range widened to hold 0, `zero = round(qmin - min / scale)`. Codebooks and
    floats: absmax over the largest value of the format.
    """


@dataclasses.dataclass(frozen=True)
class SignedMax:
    """The value of largest magnitude becomes the lowest code, sign included; one pass, symmetric integers only.

    The scale is negative where that value is positive, so the one extra level of two's complement always serves
    the longer tail (the rule of GGUF's Q4_0).
    """


@dataclasses.dataclass(frozen=True)
class MseSearch:
    """Least squared error of each group over a grid of scales; data-free, about twenty passes over the weight.

    The grid runs from where clipping outliers stops paying off to the largest magnitude of the group (beyond it for
    codebooks and floats, whose steps are uneven), for both signs of a symmetric integer's scale, for both roundings of
    a zero point. A candidate is judged by the error that its own least-squares scale `<w, q> / <q, q>` leaves. The
    best one, and scales up to 2 % beside it, are taken only where they beat `AbsMax`: no group is ever worse than that.

    Attributes:
        points: grid points; each is tried for both signs or both zero points, or there are twice as many.
    """

    points: int = 6

    def __post_init__(self) -> None:
        """Checks the number of points."""
        _check_points(self)


@dataclasses.dataclass(frozen=True)
class QuickSearch:
    """`MseSearch` reduced to a few candidates, for training, where scales are chosen at every step; six passes.

    One candidate for each grid point: the sign of `SignedMax`, the nearest zero point; no comparison with `AbsMax`.
    At 2 to 4 bits the error of integers is within 2 % of that of `MseSearch`, at a third of its time.

    Attributes:
        points: grid points; the one at the largest magnitude is always among them.
    """

    points: int = 3

    def __post_init__(self) -> None:
        """Checks the number of points."""
        _check_points(self)


def _check_points(rule: MseSearch | QuickSearch) -> None:
    if isinstance(rule.points, bool) or not isinstance(rule.points, int) or rule.points < 1:
        raise ValueError(f"qjax: {rule!r}: a search needs a whole number of points, at least 1.")


ScaleRule = AbsMax | SignedMax | MseSearch | QuickSearch

SCALE_RULES: dict[str, type] = {
    "abs_max": AbsMax,
    "signed_max": SignedMax,
    "mse_search": MseSearch,
    "quick_search": QuickSearch,
}

GRANULARITIES: dict[str, type] = {"per_tensor": PerTensor, "per_channel": PerChannel, "per_group": PerGroup}

SCALE_DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class QuantSpec:
    """How one parameter is quantized; hashable, so it can be static data of a pytree.

    Attributes:
        format: a row of `FORMATS`.
        granularity: which values share a scale.
        zero_point: integers only: the range of a group need not be symmetric about 0.
        scale_dtype: stored dtype of the scales; they are rounded to it before codes are chosen.
        scale_rule: how a group's scale follows from its values.
        double_quant: scales are quantized to 8 bits in blocks of 256 themselves (section 3 of QLoRA,
            arXiv 2305.14314).

    Raises:
        ValueError: a combination that has no meaning, with what was found and how to fix it.
    """

    format: Format
    granularity: Granularity
    zero_point: bool = False
    scale_dtype: str = "float32"
    scale_rule: ScaleRule = MseSearch()
    double_quant: bool = False

    def __post_init__(self) -> None:
        """Checks the combination."""
        fmt = self.format
        if not isinstance(fmt, Format):
            raise ValueError(f"qjax: QuantSpec(format={fmt!r}): give a row of FORMATS, as FORMATS['int4'].")
        if not isinstance(self.granularity, Granularity):
            raise ValueError(
                f"qjax: QuantSpec(granularity={self.granularity!r}): give PerTensor(), PerChannel() or PerGroup(n)."
            )
        if not isinstance(self.scale_rule, ScaleRule):
            raise ValueError(
                f"qjax: QuantSpec(scale_rule={self.scale_rule!r}): give AbsMax(), SignedMax(), "
                "QuickSearch() or MseSearch()."
            )
        if self.scale_dtype not in SCALE_DTYPES:
            raise ValueError(
                f"qjax: QuantSpec(scale_dtype={self.scale_dtype!r}): scales are stored as one of {SCALE_DTYPES}."
            )
        if self.zero_point and fmt.kind != "int":
            raise ValueError(
                f"qjax: {fmt} has no zero point: its values are fixed. Drop zero_point=True, or use an int format."
            )
        if isinstance(self.scale_rule, SignedMax):
            if fmt.kind != "int" or self.zero_point:
                raise ValueError(
                    f"qjax: SignedMax is a rule for symmetric integers, not for {fmt}"
                    f"{' with a zero point' if self.zero_point else ''}. Use AbsMax() or MseSearch()."
                )
            if self.double_quant:
                raise ValueError(
                    "qjax: SignedMax gives negative scales, which double_quant cannot hold. Use MseSearch()."
                )
        if self.double_quant and self.scale_dtype != "float32":
            raise ValueError(
                f"qjax: double_quant stores 8-bit scales, so scale_dtype={self.scale_dtype!r} would have no effect. "
                "Leave scale_dtype='float32'."
            )

    def group_size(self, k: int) -> int:
        """How many values along K = `k` share a scale, at least 1."""
        return max(1, min(self.granularity.size, k) if isinstance(self.granularity, PerGroup) else k)

    def __str__(self) -> str:
        """Short form for tables: `int4/g64`, `int4z/g64` with a zero point, `nf4/g64/dq` double-quantized."""
        zero, double = "z" if self.zero_point else "", "/dq" if self.double_quant else ""
        return f"{self.format}{zero}/{self.granularity}{double}"

    def to_json(self) -> dict[str, Any]:
        """A plain dict that `from_json` reads back."""
        return {
            "format": self.format.name,
            "granularity": _row_to_json(self.granularity, GRANULARITIES),
            "zero_point": self.zero_point,
            "scale_dtype": self.scale_dtype,
            "scale_rule": _row_to_json(self.scale_rule, SCALE_RULES),
            "double_quant": self.double_quant,
        }

    @staticmethod
    def from_json(data: dict[str, Any]) -> QuantSpec:
        """Reads what `to_json` wrote.

        Raises:
            ValueError: an unknown format, granularity or scale rule.
        """
        if data["format"] not in FORMATS:
            raise ValueError(f"qjax: unknown format {data['format']!r}; this version has {sorted(FORMATS)}.")
        return QuantSpec(
            format=FORMATS[data["format"]],
            granularity=_row_from_json(data["granularity"], GRANULARITIES),
            zero_point=bool(data["zero_point"]),
            scale_dtype=data["scale_dtype"],
            scale_rule=_row_from_json(data["scale_rule"], SCALE_RULES),
            double_quant=bool(data["double_quant"]),
        )


def _row_to_json(row: Any, table: dict[str, type]) -> dict[str, Any]:
    name = next(name for name, cls in table.items() if cls is type(row))
    return {"name": name, **dataclasses.asdict(row)}


def _row_from_json(data: dict[str, Any], table: dict[str, type]) -> Any:
    fields = dict(data)
    name = fields.pop("name")
    if name not in table:
        raise ValueError(f"qjax: unknown {name!r}; this version has {sorted(table)}.")
    return table[name](**fields)

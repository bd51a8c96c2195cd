"""How the range of an activation is found: observers, learned steps, and the spec that names one."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from qjax.pallas_kernels.numbers.formats import FORMATS, Format

# --- What to do ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Dynamic:
    """The range is that of the values at hand, found anew in each call."""


@dataclasses.dataclass(frozen=True)
class MinMax:
    """The extremes seen in calibration."""


@dataclasses.dataclass(frozen=True)
class MovingAverage:
    """The average of each batch's extremes, later batches weighing more; training goes on updating it.

    After a batch with extremes e the sum is `decay * sum + (1 - decay) * e` (arXiv 1712.05877, section 3.1), and the
    average is the sum over the weights that went into it, `1 - decay**n` after n batches: the bias correction of Adam,
    so that the first batches do not count for ever.
    """

    decay: float = 0.99

    def __post_init__(self) -> None:
        """Checks the decay."""
        if not 0 <= self.decay < 1:
            raise ValueError(f"qjax: MovingAverage(decay={self.decay}): a decay is in [0, 1).")


@dataclasses.dataclass(frozen=True)
class Percentile:
    """The range that holds `percent` of the values seen in calibration, the rest cut off evenly at both ends."""

    percent: float | int = 99.99

    def __post_init__(self) -> None:
        """Checks the percentage."""
        if not 50 < self.percent <= 100:
            raise ValueError(f"qjax: Percentile({self.percent}): give a percentage above 50, such as 99.99.")


@dataclasses.dataclass(frozen=True)
class MseRange:
    """The range of least squared error over the histogram of the values seen in calibration."""


@dataclasses.dataclass(frozen=True)
class EntropyRange:
    """The range of least KL divergence between the histogram and its quantized form, as in TensorRT (GTC 2017)."""


@dataclasses.dataclass(frozen=True)
class LearnedStep:
    """Learned step size, LSQ (arXiv 1902.08153), with a learned offset where there is a zero point (arXiv 2004.09576).

    Calibration initialises it, by `MseRange`.
    """


@dataclasses.dataclass(frozen=True)
class LearnedClip:
    """Learned clipping point, PACT (arXiv 1805.06085): [-clip, clip], or [0, clip] where there is a zero point.

    Calibration initialises it, by `MinMax`. The paper regularises the clipping point: use weight decay on it.
    """


Observer = MinMax | MovingAverage | Percentile | MseRange | EntropyRange

Range = Dynamic | MinMax | MovingAverage | Percentile | MseRange | EntropyRange | LearnedStep | LearnedClip

_RANGES: dict[str, type] = {
    "dynamic": Dynamic,
    "min_max": MinMax,
    "moving_average": MovingAverage,
    "percentile": Percentile,
    "mse": MseRange,
    "entropy": EntropyRange,
    "lsq": LearnedStep,
    "pact": LearnedClip,
}


@dataclasses.dataclass(frozen=True)
class ActSpec:
    """How the input of a matmul is quantized; hashable plain data.

    Attributes:
        format: an integer or float row of `FORMATS`.
        range: where the range comes from.
        per: "token": one scale for each element that the product does not contract (a row of a matrix, an example of
            an image batch); only a dynamic range can have it. "tensor": one scale.
        zero_point: integers only: the range need not be symmetric about 0.
        dynamic_above: calibrated ranges only: an input whose squared error, in the values that calibration saw, is
            more than this many times that of a scale for each token has such scales instead. None for never.

    Raises:
        ValueError: a combination that has no meaning.
    """

    format: Format
    range: Range = Dynamic()
    per: Literal["token", "tensor"] = "token"
    zero_point: bool = False
    dynamic_above: float | int | None = None

    def __post_init__(self) -> None:
        """Checks the combination."""
        if not isinstance(self.format, Format) or self.format.kind == "codebook":
            raise ValueError(f"qjax: activations are quantized to integers or fp8, not to {self.format}.")
        if not isinstance(self.range, Range):
            raise ValueError(f"qjax: {self.range!r} is no range of activations: {', '.join(_RANGES)}.")
        if self.per not in ("token", "tensor"):
            raise ValueError(f"qjax: activations have a scale per 'token' or per 'tensor', not {self.per!r}.")
        if self.per == "token" and not self.is_dynamic:
            raise ValueError("qjax: a range known before the call is one for the tensor: per='tensor'.")
        if self.zero_point and self.format.kind != "int":
            raise ValueError(f"qjax: {self.format} has no zero point: its values are fixed.")
        if isinstance(self.range, LearnedStep | LearnedClip) and self.format.kind != "int":
            raise ValueError(f"qjax: learned ranges are for integer formats, not for {self.format}.")
        if self.dynamic_above is not None and (self.is_dynamic or self.is_learned):
            raise ValueError(
                "qjax: dynamic_above is for ranges that calibration finds, not for dynamic or learned ones."
            )
        if self.dynamic_above is not None and not self.dynamic_above > 0:
            raise ValueError(f"qjax: dynamic_above={self.dynamic_above} is a ratio of errors: give a number above 0.")

    @property
    def is_dynamic(self) -> bool:
        """Whether the range is found in each call."""
        return isinstance(self.range, Dynamic)

    @property
    def is_learned(self) -> bool:
        """Whether the range is a trainable parameter."""
        return isinstance(self.range, LearnedStep | LearnedClip)

    @property
    def by_token(self) -> ActSpec:
        """The same format with a dynamic scale for each token."""
        return ActSpec(self.format, Dynamic(), "token", self.zero_point)

    def __str__(self) -> str:
        """Short form for tables: `int8/token`, `int8z/tensor mse`."""
        name = next(name for name, cls in _RANGES.items() if cls is type(self.range))
        zero = "z" if self.zero_point else ""
        return f"{self.format}{zero}/{self.per}" + ("" if self.is_dynamic else f" {name}")

    def to_json(self) -> dict[str, Any]:
        """A plain dict that `from_json` reads back."""
        name = next(name for name, cls in _RANGES.items() if cls is type(self.range))
        return {
            "format": self.format.name,
            "range": {"name": name, **dataclasses.asdict(self.range)},
            "per": self.per,
            "zero_point": self.zero_point,
            **({} if self.dynamic_above is None else {"dynamic_above": self.dynamic_above}),
        }

    @staticmethod
    def from_json(data: dict[str, Any]) -> ActSpec:
        """Reads what `to_json` wrote.

        Raises:
            ValueError: an unknown format or range.
        """
        fields = dict(data["range"])
        name = fields.pop("name")
        if data["format"] not in FORMATS or name not in _RANGES:
            raise ValueError(f"qjax: this version does not know activations of {data['format']!r} with range {name!r}.")
        return ActSpec(
            FORMATS[data["format"]],
            _RANGES[name](**fields),
            data["per"],
            bool(data["zero_point"]),
            data.get("dynamic_above"),
        )

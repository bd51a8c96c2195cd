"""The table of products, and what each of them means: float64 in NumPy, written from the documentation of the formats.

Words are packed and decoded here with NumPy alone, as the docstrings of `packing`, `formats` and `stored_scales` say;
of our code there are only names, the constants of a codebook and the classes that carry arrays. A row has two sets of
operands:

* **exact**: small numbers and scales that are powers of two. Every product and every sum of them is a float32 number,
  and every weight a bfloat16 one. So whatever an implementation rounds, and in whatever order it adds, there is one
  right result, and a single wrong term shows.
* **any**: every code, scales of several magnitudes. A result lies within what the implementation says of its rounding:
  so many terms of a float32 sum, and so many roundings of each operand (`Rounding`).

Products of integers have one right result for any operands, because their sums are exact and what follows has an order.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from qjax.pallas_kernels.numbers.formats import FORMATS, AbsMax, PerChannel, PerGroup, PerTensor, QuantSpec
from qjax.pallas_kernels.numbers.stored_scales import Scales, dynamic_map
from qjax.pallas_kernels.packed.layout import Layout
from qjax.pallas_kernels.packed.qtensor import QTensor

# Widths of the planes that the codes of a format are split into, low bits first.
PLANES = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1)}
CHANNEL, TENSOR = PerChannel(), PerTensor()
BF16, F16, F32 = "bfloat16", "float16", "float32"
FLOAT8 = {"fp8_e4m3": ml_dtypes.float8_e4m3fn, "fp8_e5m2": ml_dtypes.float8_e5m2}


def half_ulp(dtype: Any) -> float:
    """What one rounding to this dtype may change, as part of the number."""
    return float(jnp.finfo(dtype).eps) / 2


# --- Words ---------------------------------------------------------------------------------------------------------


def pack_words(patterns: np.ndarray, bits: int) -> np.ndarray:
    """Words of these codes along the last axis but one; of a code only the low bits count."""
    if bits == 8:
        return patterns.astype(np.uint8).view(np.int8)
    *stack, k, n = patterns.shape
    planes, low = [], 0
    for width in PLANES[bits]:
        per_word = 32 // width
        fields = np.zeros((*stack, -(-k // per_word) * per_word, n), np.uint32)
        fields[..., :k, :] = (patterns >> low) & (2**width - 1)
        fields = fields.reshape(*stack, -1, per_word, n) << (np.arange(per_word, dtype=np.uint32) * width)[:, None]
        planes.append(np.bitwise_or.reduce(fields, axis=-2))
        low += width
    return np.concatenate(planes, axis=-2).view(np.int32)


def unpack_words(words: np.ndarray, bits: int, k: int) -> np.ndarray:
    """The codes, `0 .. 2**bits - 1`, of words that `pack_words` made."""
    if bits == 8:
        return words.view(np.uint8).astype(np.int64)
    patterns, low, row = np.zeros((*words.shape[:-2], k, words.shape[-1]), np.int64), 0, 0
    for width in PLANES[bits]:
        per_word = 32 // width
        rows = -(-k // per_word)
        plane = words[..., row : row + rows, None, :].view(np.uint32).astype(np.int64)
        fields = (plane >> (np.arange(per_word) * width)[:, None]) & (2**width - 1)
        patterns |= fields.reshape(*words.shape[:-2], -1, words.shape[-1])[..., :k, :] << low
        low, row = low + width, row + rows
    return patterns


@functools.cache
def values_of(format: str) -> np.ndarray:
    """What each pattern of bits stands for."""
    row = FORMATS[format]
    patterns = np.arange(2**row.bits)
    if row.kind == "int":
        return np.where(patterns < 2 ** (row.bits - 1), patterns, patterns - 2**row.bits).astype(np.float64)
    if row.kind == "codebook":
        return np.asarray(row.values, np.float64)
    return patterns.astype(np.uint8).view(FLOAT8[format]).astype(np.float64)


def usable_patterns(format: str, *, exact: bool) -> np.ndarray:
    """The codes that are numbers; if `exact`, those in eighths up to 16, or integers."""
    values = values_of(format)
    usable = np.isfinite(values)
    if exact and FORMATS[format].kind != "int":
        scaled = 8 * np.where(usable, values, 0.5 / 8)
        usable &= (scaled == np.round(scaled)) & (np.abs(scaled) <= 128)
    return np.flatnonzero(usable)


# --- Operands ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Weight:
    """A packed weight and the numbers that it stands for.

    Attributes:
        packed: what an implementation gets.
        unscaled: the value of each code less its zero point, `(*lead, K, N)`, integers of an integer format.
        scales: `(*lead, G, N or 1)`, the stored numbers.
        group: values along K that share a scale.
    """

    packed: QTensor
    unscaled: np.ndarray
    scales: np.ndarray
    group: int

    @property
    def matrix(self) -> np.ndarray:
        """`(*lead, K, N)`."""
        k = self.unscaled.shape[-2]
        return self.unscaled * np.repeat(self.scales, self.group, axis=-2)[..., :k, :]


@dataclasses.dataclass(frozen=True)
class Rounding:
    """How far an implementation may be from the exact product.

    Attributes:
        terms: of a float32 sum, in any order.
        operands: the roundings of x and of the weight together, as part of each product of two of them.
    """

    terms: int
    operands: float

    @property
    def of_a_term(self) -> float:
        """As part of the sum of magnitudes: each term is rounded once, and passes through at most `terms` sums."""
        return (self.terms + 1) * half_ulp(F32) + self.operands


@dataclasses.dataclass(frozen=True, kw_only=True)
class Product:
    """One product.

    Attributes:
        format, granularity, zero_point, scale_dtype, double_quant, order: how the weight is stored.
        weight_dtype, casts: the dtype of the parameter, and those that the program casts it to.
        x: the dtype of x; or of its codes "int8", "int8z" with zero points, or a format of 8-bit floats.
        m, k, n: sizes.
        stack: of x and the weight.
        layers: how many of them the weight has beside that.
        sizes: in a product of rows sorted by expert, how many rows each has; several tuples, to be tried in turn.
        transpose: multiplies by the transposed matrix.
        preferred: dtype of the result, if not as usual.
        precision: as `lax.dot_general` takes it.
        on: kernels that take it; the reference and the CPU take everything.
        smallest: every code is the lowest, so that sums are as large as they get.
    """

    format: str = "int4"
    granularity: Any = CHANNEL
    zero_point: bool = False
    scale_dtype: str = F32
    double_quant: bool = False
    order: Any = "kn"
    weight_dtype: str = F32
    casts: tuple[str, ...] = ()
    x: str = F32
    m: int = 3
    k: int = 200
    n: int = 33
    stack: tuple[int, ...] = ()
    layers: int | None = None
    sizes: tuple[tuple[int, ...], ...] = ()
    transpose: bool = False
    preferred: str | None = None
    precision: str | None = None
    on: tuple[str, ...] = ()
    smallest: bool = False

    @property
    def kind(self) -> str:
        """Which operation it is."""
        if self.sizes:
            return "ragged"
        return "integer" if self.x.startswith("int8") else "fp8" if self.x in FLOAT8 else "matmul"

    def __str__(self) -> str:
        """What makes it differ from the others, for the name of a test."""
        where = f"{self.m}x{self.k}x{self.n}{self.order}{'T' if self.transpose else ''}"
        stack = "".join(f"[{size}]" for size in self.stack) + (f"l{self.layers}" if self.layers else "")
        lead = f"{self.kind}-{self.spec}-{self.scale_dtype[:1]}{self.scale_dtype[-2:]}"
        types = "-".join([self.x, self.weight_dtype, *self.casts, *([self.preferred] if self.preferred else [])])
        extra = ("-precise" if self.precision else "") + ("-smallest" if self.smallest else "")
        return f"{lead}-{where}{stack}-{types}{extra}"

    @property
    def spec(self) -> QuantSpec:
        """Of the weight."""
        return QuantSpec(
            FORMATS[self.format],
            self.granularity,
            zero_point=self.zero_point,
            scale_dtype=self.scale_dtype,
            scale_rule=AbsMax(),
            double_quant=self.double_quant,
        )

    @property
    def experts(self) -> tuple[int, ...]:
        """The stack of the weight."""
        return (len(self.sizes[0]),) if self.sizes else self.stack

    @property
    def contracted(self) -> int:
        """How many terms a sum has."""
        return self.n if self.transpose else self.k

    @property
    def out_dtype(self) -> str:
        """Of the result: as `lax.dot_general` gives it; float32 of codes."""
        if self.preferred is not None or self.kind in ("integer", "fp8"):
            return self.preferred or F32
        return jnp.promote_types(self.x, (self.weight_dtype, *self.casts)[-1]).name

    @property
    def picks(self) -> list[Pick]:
        """What is tried in turn: indices beyond either end are those of the nearest layer."""
        layers = [None] if self.layers is None else [0, self.layers + 4, -1, -self.layers - 6]
        return [Pick(layer, sizes) for layer in layers for sizes in self.sizes or [None]]

    def _generator(self, seed: int) -> np.random.Generator:
        return np.random.default_rng([seed, self.m, self.k, self.n, len(self.format)])

    def weight(self, *, exact: bool, seed: int = 0) -> Weight:
        """Random codes and scales."""
        generator, format = self._generator(seed), FORMATS[self.format]
        lead = (*(() if self.layers is None else (self.layers,)), *self.experts)
        group = min(self.granularity.size, self.k) if isinstance(self.granularity, PerGroup) else self.k
        shape = (*lead, -(-self.k // max(1, group)), 1 if self.granularity == TENSOR else self.n)
        patterns = generator.choice(usable_patterns(self.format, exact=exact), (*lead, self.k, self.n))
        if self.smallest:
            patterns = np.full_like(patterns, 2 ** (format.bits - 1))
        unscaled, zero = values_of(self.format)[patterns], None
        if self.zero_point:
            zero = generator.integers(-(2 ** (format.bits - 1)), 2 ** (format.bits - 1), shape)
            unscaled = unscaled - np.repeat(zero, max(1, group), axis=-2)[..., : self.k, :]
        stored, scales = self._scales(generator, shape, exact=exact)
        arrays = (pack_words(patterns, format.bits), stored["values"], None if zero is None else zero.astype(np.int8))
        swapped = [a if a is None or self.order == "kn" else np.swapaxes(a, -1, -2) for a in arrays]
        words, stored["values"], stored["zero"] = (None if a is None else jnp.asarray(a) for a in swapped)
        if self.double_quant:
            for name in ("absmax", "offset"):
                a = stored[name]
                stored[name] = jnp.asarray(a if self.order == "kn" else np.swapaxes(a, -1, -2))
        layout = Layout((((self.k, "k"),), ((self.n, "n"),)))
        packed = QTensor(words, Scales(**stored), self.spec, layout, jnp.dtype(self.weight_dtype), self.order)
        return Weight(packed, unscaled, scales, max(1, group))

    def _scales(
        self, generator: np.random.Generator, shape: tuple[int, ...], *, exact: bool
    ) -> tuple[dict[str, Any], np.ndarray]:
        """The arrays as they are stored, and the numbers."""
        *lead, groups, columns = shape
        if self.double_quant:
            table = dynamic_map().astype(np.float64)
            blocks = -(-groups * columns // 256)
            some = np.flatnonzero(np.isin(table, (0.0, 1.0))) if exact else np.arange(256)
            codes = generator.choice(some, shape)
            absmax = np.float32(generator.uniform(0.02, 0.05, (*lead, blocks, 1)) if not exact else 1)
            absmax = np.broadcast_to(absmax, (*lead, blocks, 1))
            offset = np.full((*lead, 1, 1), 1.0 if exact else 0.1, np.float32)
            block = (np.arange(columns) * groups + np.arange(groups)[:, None]) // 256  # (G, N)
            scales = table[codes] * absmax[..., block, 0].astype(np.float64) + offset
            return {"values": codes.astype(np.uint8), "absmax": absmax, "offset": offset}, scales
        if exact:
            scales = 2.0 ** generator.integers(-1, 2, shape)
        else:  # of several magnitudes, so that the order of a sum shows; some negative, as `SignedMax` makes them
            scales = generator.uniform(0.5, 2, shape) * 10.0 ** generator.integers(-3, 0, shape)
            scales = scales * generator.choice([-1, 1], shape)
        stored = scales.astype(self.scale_dtype)
        return {"values": stored}, stored.astype(np.float64)

    def rows(self, *, exact: bool) -> Rows:
        """Random x."""
        generator = self._generator(1)
        shape = (*self.stack, self.m, self.contracted)
        if self.kind == "matmul" or self.kind == "ragged":
            values = generator.integers(-4, 5, shape) / 4 if exact else generator.standard_normal(shape)
            x = values.astype(self.x)
            return Rows(jnp.asarray(x), None, None, x.astype(np.float64))
        each = (*self.stack, self.m, 1)
        scale = np.float32(2.0 ** generator.integers(-1, 2, each) if exact else generator.uniform(0.1, 1.1, each))
        if self.kind == "fp8":
            patterns = generator.choice(usable_patterns(self.x, exact=exact), shape)
            codes = patterns.astype(np.uint8).view(FLOAT8[self.x])
            return Rows(jnp.asarray(codes), jnp.asarray(scale), None, codes.astype(np.float64))
        codes = np.full(shape, -128) if self.smallest else generator.integers(-128, 128, shape)
        zero = generator.integers(-128, 128, each) if self.x == "int8z" else None
        return Rows(
            jnp.asarray(codes, jnp.int8),
            jnp.asarray(scale),
            None if zero is None else jnp.asarray(zero, jnp.float32),
            (codes if zero is None else codes - zero).astype(np.float64),
        )

    # --- What it means ---------------------------------------------------------------------------------------------

    def meaning(self, rows: Rows, weight: Weight, pick: Pick) -> tuple[np.ndarray, np.ndarray]:
        """The product in float64, and the sum of the magnitudes of its terms."""
        matrix = self._picked(weight.matrix, pick)
        matrix = np.swapaxes(matrix, -1, -2) if self.transpose else matrix
        factor = 1.0 if rows.scale is None else np.asarray(rows.scale, np.float64)
        if pick.sizes is None:
            return rows.values @ matrix * factor, np.abs(rows.values) @ np.abs(matrix) * factor
        value = np.zeros((self.m, matrix.shape[-1]))
        size = np.zeros_like(value)
        for row, expert in enumerate(np.repeat(np.arange(len(pick.sizes)), pick.sizes)[: self.m]):
            value[row] = rows.values[row] @ matrix[expert]
            size[row] = np.abs(rows.values[row]) @ np.abs(matrix[expert])
        return value, size

    def integer_meaning(self, rows: Rows, weight: Weight, pick: Pick) -> np.ndarray:
        """Exact sums of groups, each rounded to float32 once, scaled and added in float32 in ascending order."""
        codes = self._picked(weight.unscaled, pick).astype(np.int64)
        scales, x = self._picked(weight.scales, pick).astype(np.float32), rows.values.astype(np.int64)
        out = np.zeros((*x.shape[:-1], self.n), np.float32)
        for group, start in enumerate(range(0, self.k, weight.group)):
            part = slice(start, start + weight.group)
            sums = x[..., part] @ codes[..., part, :]
            assert np.abs(sums).max(initial=0) < 2**31
            out = out + sums.astype(np.float32) * scales[..., group : group + 1, :]
        with np.errstate(over="ignore"):
            return (out * np.asarray(rows.scale)).astype(self.out_dtype)

    def _picked(self, a: np.ndarray, pick: Pick) -> np.ndarray:
        if pick.layer is None or self.layers is None:
            return a
        return a[min(max(pick.layer + self.layers if pick.layer < 0 else pick.layer, 0), self.layers - 1)]

    def assert_is(self, got: Any, rows: Rows, weight: Weight, pick: Pick, rounding: Rounding | None) -> None:
        """Whether an implementation got it right: to the last bit, or within the rounding if there is one."""
        assert got.dtype == self.out_dtype
        out = np.asarray(got)
        if self.kind == "integer":
            want = self.integer_meaning(rows, weight, pick)
            assert out.shape == want.shape
            unsigned = f"u{out.itemsize}"
            np.testing.assert_array_equal(out.view(unsigned), want.view(unsigned))
            return
        value, size = self.meaning(rows, weight, pick)
        assert out.shape == value.shape
        if rounding is None:
            np.testing.assert_array_equal(out.astype(np.float64), value.astype(self.out_dtype).astype(np.float64))
            return
        bound = rounding.of_a_term * size + half_ulp(self.out_dtype) * (np.abs(value) + rounding.of_a_term * size)
        error = np.abs(out.astype(np.float64) - value)
        assert (error <= bound).all(), f"{np.max(error / np.maximum(bound, 1e-300)):.2f} of the stated bound"


@dataclasses.dataclass(frozen=True)
class Pick:
    """What a product may be asked for with the same operands: a layer of the weight, and rows of each expert."""

    layer: int | None
    sizes: tuple[int, ...] | None


@dataclasses.dataclass(frozen=True)
class Rows:
    """x: what an implementation gets, and the numbers before they are scaled."""

    x: Any
    scale: Any
    zero: Any
    values: np.ndarray


# --- The table -----------------------------------------------------------------------------------------------------

GPU = ("triton",)
HALF: dict[str, Any] = {"x": BF16, "casts": (BF16,), "preferred": F32}
TILED: dict[str, Any] = {"m": 19, "k": 300, "n": 130}  # two tiles along each axis, the second of each cut short


def _read_by_gpu(format: str, granularity: Any) -> bool:
    bits = FORMATS[format].bits
    return bits in (4, 8) and not (isinstance(granularity, PerGroup) and granularity.size % 32)


def _kernels(format: str, granularity: Any) -> tuple[str, ...]:
    return ("tpu", *(GPU if _read_by_gpu(format, granularity) else ()))


def _rows() -> Iterator[Product]:
    """Products with float activations."""
    for name in FORMATS:
        for granularity in (CHANNEL, PerGroup(24)):
            yield Product(format=name, granularity=granularity)
        yield Product(format=name, granularity=PerGroup(128), on=_kernels(name, PerGroup(128)), **HALF, **TILED)
    for name in ("int4", "int8", "nf4"):
        for granularity in (TENSOR, PerGroup(32), PerGroup(160)):
            yield Product(format=name, granularity=granularity, order="nk", m=8)
    for name in ("int3", "int4", "int8"):
        for granularity in (CHANNEL, PerGroup(32)):
            zeros: dict[str, Any] = {"zero_point": True, "scale_dtype": BF16, "granularity": granularity}
            yield Product(format=name, **zeros)
            yield Product(format=name, on=_kernels(name, granularity), **zeros, **HALF, **TILED)
    for name in ("int4", "nf4"):
        yield Product(format=name, granularity=PerGroup(32), double_quant=True, order="nk")
        yield Product(format=name, granularity=PerGroup(64), double_quant=True, on=("tpu",), **HALF, **TILED)
    # Where scales change, and how they are stored, on kernels.
    for name, granularity, options in (
        ("int4", TENSOR, {}),
        ("int4", PerGroup(256), {}),
        ("int5", CHANNEL, {}),
        ("int8", PerGroup(128), {"zero_point": True, "scale_dtype": F16}),
        ("int8", TENSOR, {"zero_point": True, "scale_dtype": BF16}),
        ("fp8_e4m3", CHANNEL, {}),
    ):
        yield Product(format=name, granularity=granularity, on=_kernels(name, granularity), **options, **HALF, **TILED)
    # Rows of x, orders, transposed products.
    for name, granularity, options in (
        ("int4", PerGroup(32), {"scale_dtype": BF16}),
        ("int8", CHANNEL, {}),
        ("int3", PerGroup(160), {"zero_point": True}),
        ("nf4", PerGroup(64), {"double_quant": True}),
    ):
        for order in ("kn", "nk"):
            for transpose, m in ((False, 33), (True, 8)):
                yield Product(format=name, granularity=granularity, order=order, transpose=transpose, m=m, **options)
    for name, granularity, options in (
        ("int4", PerGroup(64), {"zero_point": True}),
        ("int5", CHANNEL, {}),
        ("nf4", PerGroup(32), {}),
        ("fp8_e4m3", TENSOR, {"scale_dtype": BF16}),
    ):
        on = _kernels(name, granularity)
        yield Product(format=name, granularity=granularity, transpose=True, on=on, **options, **HALF, **TILED)
    # Dtypes.
    for x, weight_dtype, casts, preferred in (
        (BF16, F32, (BF16,), None),
        (BF16, BF16, (), None),
        (F32, BF16, (F32,), None),
        (F16, F32, (F16,), None),
        (F16, F16, (), None),
        (F32, F32, (), BF16),
        (F32, F32, (), None),
    ):
        types: dict[str, Any] = {"x": x, "weight_dtype": weight_dtype, "casts": casts, "preferred": preferred}
        gpu = () if weight_dtype == BF16 and x == F32 else GPU
        yield Product(granularity=PerGroup(64), on=("tpu", *gpu), **types, **TILED)
    yield Product(granularity=PerGroup(128), precision="highest", on=("tpu",), **TILED)
    yield Product(format="nf4", granularity=PerGroup(64), precision="highest", on=("tpu",), **TILED)
    # Stacks and layers.
    for name, granularity, order, options in (
        ("int4", PerGroup(32), "kn", {"scale_dtype": BF16}),
        ("int8", CHANNEL, "kn", {}),
        ("int3", PerGroup(160), "nk", {"zero_point": True}),
        ("nf4", PerGroup(64), "kn", {"double_quant": True}),
    ):
        yield Product(format=name, granularity=granularity, order=order, stack=(2,), layers=3, **options)
    yield Product(granularity=PerGroup(256), stack=(2, 3), m=5, n=20, k=300, on=("tpu",), **HALF)
    yield Product(granularity=PerGroup(128), scale_dtype=F16, layers=3, m=5, n=20, k=300, on=("tpu", *GPU), **HALF)
    stacked: dict[str, Any] = {"stack": (2,), "layers": 3, "m": 5, **HALF}
    yield Product(format="int8", zero_point=True, granularity=PerGroup(32), n=40, k=96, on=("tpu", *GPU), **stacked)
    yield Product(format="int3", zero_point=True, granularity=PerGroup(256), n=20, k=300, on=("tpu",), **stacked)
    nested: dict[str, Any] = {"double_quant": True, "order": "nk"}
    yield Product(format="nf4", granularity=PerGroup(256), n=20, k=1024, on=("tpu",), **nested, **stacked)
    yield Product(
        format="nf4", granularity=PerGroup(32), transpose=True, stack=(2,), layers=3, m=5, k=96, n=130, on=GPU, **HALF
    )  # fmt: skip


def _mosaic_rows() -> Iterator[Product]:
    """What a Hopper GPU reads: columns in rows, N in multiples of 64."""
    everywhere: dict[str, Any] = {"order": "nk", "on": ("mosaic", "triton", "tpu")}
    shared: dict[str, Any] = {"x": BF16, "weight_dtype": BF16, "preferred": F32, **everywhere}
    yield Product(granularity=PerGroup(128), m=1, k=256, n=128, **shared)
    yield Product(granularity=PerGroup(64), zero_point=True, scale_dtype=BF16, m=9, k=512, n=192, **shared)
    yield Product(granularity=PerGroup(96), m=3, k=384, n=64, layers=3, **{**shared, "on": ("mosaic", "triton")})
    yield Product(format="int8", m=70, k=256, n=128, **shared)
    stacked: dict[str, Any] = {"stack": (2,), "layers": 3}
    yield Product(format="int8", granularity=PerGroup(64), zero_point=True, m=4, k=256, n=128, **stacked, **shared)
    yield Product(format="int8", granularity=TENSOR, m=5, k=192, n=64, **shared)
    half: dict[str, Any] = {"x": F16, "weight_dtype": F16, "order": "nk", "on": ("mosaic", "triton", "tpu")}
    yield Product(granularity=PerGroup(128), scale_dtype=F16, zero_point=True, m=6, k=256, n=64, **half)
    yield Product(format="int8", granularity=PerGroup(32), m=4, k=256, n=64, **everywhere)
    yield Product(format="nf4", granularity=PerGroup(64), m=3, k=128, n=64, **shared)
    yield Product(format="fp4_e2m1", granularity=PerGroup(32), layers=2, m=3, k=128, n=64, **shared)
    yield Product(format="fp8_e4m3", granularity=PerGroup(64), m=3, k=128, n=64, **shared)
    yield Product(format="fp8_e5m2", m=3, k=128, n=64, **shared)


def _integer_rows() -> Iterator[Product]:
    """Products of codes with codes: zero points on either side, both and none come with some of the bits."""
    for bits in range(2, 9):
        zeros: dict[str, Any] = {"zero_point": bits % 2 == 0, "x": "int8z" if bits // 2 % 2 == 0 else "int8"}
        gpu = GPU if bits in (4, 8) else ()
        yield Product(format=f"int{bits}", granularity=PerGroup(32), on=("tpu", *gpu), **zeros)
        yield Product(format=f"int{bits}", order="nk", on=(*(("tpu",) if bits == 8 else ()), *gpu), **zeros)
        yield Product(format=f"int{bits}", on=("tpu", *gpu), x="int8", m=19, k=600, n=130)
    for bits, granularity, order in (
        (3, PerGroup(24), "kn"),
        (8, PerGroup(24), "kn"),
        (4, PerGroup(24), "nk"),
        (4, PerGroup(160), "kn"),
        (6, PerGroup(160), "kn"),
    ):
        gpu = GPU if bits in (4, 8) and granularity.size % 32 == 0 else ()
        yield Product(format=f"int{bits}", granularity=granularity, order=order, x="int8", on=gpu)
    for bits, granularity, order, k in (
        (4, TENSOR, "kn", 513),
        (8, TENSOR, "nk", 100),
        (8, PerGroup(128), "kn", 600),
        (5, PerGroup(64), "kn", 512),
        (2, PerGroup(16), "kn", 300),
    ):
        gpu = GPU if bits in (4, 8) else ()
        yield Product(
            format=f"int{bits}", granularity=granularity, order=order, x="int8z", m=33, k=k, n=130, on=("tpu", *gpu)
        )
    for x in ("int8", "int8z"):
        for zero_point in (False, True):
            yield Product(granularity=PerGroup(32), x=x, zero_point=zero_point, m=8, on=("tpu", *GPU))
    for dtype in (BF16, F16):
        yield Product(granularity=PerGroup(32), scale_dtype=dtype, x="int8", preferred=dtype, on=("tpu", *GPU))
    stacked: dict[str, Any] = {"x": "int8z", "zero_point": True, "stack": (2,), "layers": 3}
    yield Product(granularity=PerGroup(32), on=("tpu", *GPU), **stacked)
    yield Product(format="int8", order="nk", on=("tpu", *GPU), **stacked)
    yield Product(order="nk", on=GPU, **stacked)
    yield Product(granularity=PerGroup(64), scale_dtype=F16, on=("tpu", *GPU), **stacked)
    yield Product(format="int8", x="int8", smallest=True, order="nk", m=8, k=4099, n=3, on=("tpu", *GPU))


def _integer_mosaic_rows() -> Iterator[Product]:
    both: dict[str, Any] = {"order": "nk", "on": ("mosaic", "triton")}
    yield Product(format="int8", x="int8", m=1, k=256, n=64, **both)
    yield Product(format="int8", x="int8z", zero_point=True, m=17, k=192, n=192, **both)
    yield Product(format="int8", granularity=PerGroup(192), x="int8z", m=5, k=448, n=64, preferred=BF16, **both)
    yield Product(format="int8", x="int8", smallest=True, m=2, k=1024, n=64, **both)
    yield Product(x="int8z", zero_point=True, stack=(2,), layers=3, m=5, k=320, n=128, **both)
    yield Product(granularity=PerGroup(64), x="int8z", zero_point=True, layers=2, m=9, k=320, n=64, **both)
    yield Product(granularity=PerGroup(128), x="int8z", m=26, k=256, n=128, **both)
    yield Product(format="int8", granularity=PerGroup(64), x="int8", zero_point=True, m=3, k=576, n=64, **both)
    yield Product(x="int8", m=3, k=128, n=64, preferred=F16, **both)


def _fp8_rows() -> Iterator[Product]:
    """Products of 8-bit floats."""
    e4m3, e5m2 = FLOAT8
    yield Product(format=e4m3, x=e4m3, order="nk", k=40, n=17)
    yield Product(format=e5m2, x=e4m3, granularity=TENSOR, m=1, k=33, n=5)
    yield Product(format=e4m3, x=e5m2, m=5, k=7, n=1)
    yield Product(format=e5m2, x=e5m2, granularity=PerGroup(64), order="nk", m=2, k=64, n=3)
    yield Product(format=e4m3, x=e4m3, stack=(2, 2), k=40, n=17)
    yield Product(format=e4m3, x=e4m3, granularity=TENSOR, order="nk", stack=(2,), layers=3, k=40, n=17)


# Experts without rows, one with all of them, rows of no expert, more rows than there are.
SIZES = ((3, 0, 6, 2), (0, 0, 0, 0), (11, 0, 0, 0), (0, 0, 0, 11), (1, 2, 0, 4), (5, 9, 1, 1), (0, 20, 0, 3))


def _ragged_rows() -> Iterator[Product]:
    """Rows sorted by expert."""
    yield Product(granularity=PerGroup(16), sizes=SIZES, m=11, k=40, n=9)
    some = SIZES[:1]
    for name, granularity, options in (
        ("int3", CHANNEL, {"zero_point": True}),
        ("int8", CHANNEL, {"scale_dtype": BF16}),
        ("nf4", PerGroup(8), {"double_quant": True}),
        ("fp8_e4m3", PerGroup(16), {}),
    ):
        for order, transpose in (("kn", False), ("nk", True)):
            yield Product(
                format=name, granularity=granularity, sizes=some, order=order, transpose=transpose, m=11, k=40, n=9,
                **options,
            )  # fmt: skip
    yield Product(granularity=PerGroup(16), sizes=some, layers=3, m=11, k=40, n=9)
    tiled: dict[str, Any] = {"sizes": ((10, 0, 13, 9),), "m": 37, "k": 300, "n": 130, **HALF}
    for name in FORMATS:
        yield Product(format=name, granularity=PerGroup(128), on=_kernels(name, PerGroup(128)), **tiled)
    for name, granularity, options in (
        ("int4", TENSOR, {}),
        ("int4", PerGroup(32), {}),
        ("int3", CHANNEL, {"zero_point": True}),
        ("int4", PerGroup(64), {"zero_point": True, "scale_dtype": BF16}),
        ("int8", PerGroup(128), {"zero_point": True, "scale_dtype": F16}),
    ):
        yield Product(format=name, granularity=granularity, on=_kernels(name, granularity), **options, **tiled)
    yield Product(format="nf4", granularity=PerGroup(64), double_quant=True, on=("tpu",), **tiled)
    for name, granularity, options in (
        ("int4", PerGroup(64), {"zero_point": True}),
        ("int5", CHANNEL, {}),
        ("fp8_e4m3", TENSOR, {"scale_dtype": BF16}),
    ):
        on = _kernels(name, granularity)
        yield Product(format=name, granularity=granularity, transpose=True, on=on, **options, **tiled)
    layered = {**tiled, "n": 20}
    yield Product(granularity=PerGroup(128), scale_dtype=F16, layers=3, on=("tpu", *GPU), **layered)
    for x, weight_dtype, casts, preferred in (
        (F32, BF16, (F32,), None),
        (F32, F32, (), BF16),
        (F16, F32, (F16,), None),
        (BF16, BF16, (), F32),
    ):
        types: dict[str, Any] = {"x": x, "weight_dtype": weight_dtype, "casts": casts, "preferred": preferred}
        gpu = () if weight_dtype == BF16 and x == F32 else GPU
        yield Product(granularity=PerGroup(128), on=("tpu", *gpu), **{**layered, **types})


PRODUCTS = tuple(
    row
    for rows in (_rows, _mosaic_rows, _integer_rows, _integer_mosaic_rows, _fp8_rows, _ragged_rows)
    for row in rows()
)

"""`integer_matmul` against NumPy: exact sums in int64, then float32 in the stated order; both lowerings, bit for bit.

Weights are random codes that NumPy packs, so that neither `numerics` nor `packing` is compared with itself. The CPU
lowering chooses among its formulations by size; small blocks let matrices of a few thousand codes take all of them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.extend.core import primitives as prims

from qjax.pallas_kernels.backends.epilogue import Constant, Epilogue, Step
from qjax.pallas_kernels.numbers.activation_ranges import ActSpec
from qjax.pallas_kernels.numbers.activations import Activation
from qjax.pallas_kernels.numbers.formats import FORMATS, AbsMax, PerChannel, PerGroup, PerTensor, QuantSpec
from qjax.pallas_kernels.numbers.packing import PLANES
from qjax.pallas_kernels.numbers.stored_scales import Scales
from qjax.pallas_kernels.ops.integer_matmul import cpu as integer_matmul_cpu
from qjax.pallas_kernels.ops.integer_matmul import reference as integer_matmul_reference
from qjax.pallas_kernels.ops.integer_matmul.api import integer_matmul, integer_matmul_p
from qjax.pallas_kernels.packed.layout import Layout
from qjax.pallas_kernels.packed.qtensor import QTensor, quantize

K, N = 200, 33  # no group of 24, 32 or 160 divides K, N is odd
# Bits, granularity, order and rows of x: every format without a dot, every format in blocks of N, and the rest mixed.
ORDERS = ("kn", "nk")


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of about 32 of K, or of 5 of N: several and a short last one."""
    monkeypatch.setattr(integer_matmul_cpu, "BLOCK_VALUES", 32 * N)


# --- Operands and what is expected of them ---------------------------------------------------------------------


def _pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Words as the docstring of `packing` draws them."""
    if bits == 8:
        return codes.astype(np.int8)
    *stack, k, n = codes.shape
    planes, low = [], 0
    for width in PLANES[bits]:
        per_word = 32 // width
        fields = np.zeros((*stack, -(-k // per_word) * per_word, n), np.uint32)
        fields[..., :k, :] = (codes >> low) & (2**width - 1)
        fields = fields.reshape(*stack, -1, per_word, n) << (np.arange(per_word, dtype=np.uint32) * width)[:, None]
        planes.append(np.bitwise_or.reduce(fields, axis=-2))
        low += width
    return np.concatenate(planes, axis=-2).view(np.int32)


class Case:
    """Random operands of one product: `w`, `x`, `scale`, `zero`, and the codes and scales that made them."""

    def __init__(
        self,
        bits: int,
        granularity: Any,
        *,
        rows: int = 3,
        stack: tuple[int, ...] = (),
        layers: int | None = None,
        weight_zero: bool = False,
        zero: bool = False,
        order: Any = "kn",
        k: int = K,
        n: int = N,
        extreme: bool = False,
    ) -> None:
        rng = np.random.default_rng([bits, rows, k, n, weight_zero, zero])
        spec = QuantSpec(FORMATS[f"int{bits}"], granularity, zero_point=weight_zero, scale_rule=AbsMax())
        lead = stack if layers is None else (layers, *stack)
        self.size = min(granularity.size, k) if isinstance(granularity, PerGroup) else k
        groups = -(-k // max(1, self.size))
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)

        def integers(low: int, high: int, shape: tuple[int, ...]) -> np.ndarray:
            return np.full(shape, low) if extreme else rng.integers(low, high, shape)

        self.codes = integers(low, high, (*lead, k, n))
        shape = (*lead, groups, 1 if isinstance(granularity, PerTensor) else n)
        # negative scales, as `SignedMax` makes; of several magnitudes, so that the order of the sum shows
        self.scales = (rng.standard_normal(shape) * 10.0 ** rng.integers(-3, 3, shape)).astype(np.float32)
        self.weight_zero = rng.integers(low, high, shape) if weight_zero else None
        arrays = [_pack(self.codes, bits), self.scales]
        if weight_zero:
            arrays.append(np.asarray(self.weight_zero, np.int8))
        words, *scales = (jnp.asarray(a if order == "kn" else np.swapaxes(a, -1, -2)) for a in arrays)
        layout = Layout((((k, "k"),), ((n, "n"),)))
        self.w = QTensor(words, Scales(*scales), spec, layout, jnp.dtype("float32"), order)
        self.x = jnp.asarray(integers(-128, 128, (*stack, rows, k)), jnp.int8)
        self.scale = jnp.asarray(rng.random((*stack, rows, 1)) + 0.1, jnp.float32)
        self.zero = jnp.asarray(rng.integers(-128, 128, (*stack, rows, 1)), jnp.float32) if zero else None

    @property
    def operands(self) -> Any:
        return self.x, self.scale, self.zero, self.w

    def expected(self, layer: int | None = None) -> np.ndarray:
        """Exact group sums, each rounded to float32 once, added in float32 in ascending order."""
        codes, scales, zero = (
            a if a is None or layer is None else a[layer] for a in (self.codes, self.scales, self.weight_zero)
        )
        x = np.asarray(self.x, np.int64) - (0 if self.zero is None else np.asarray(self.zero, np.int64))
        out = np.zeros((*x.shape[:-1], codes.shape[-1]), np.float32)
        for g, start in enumerate(range(0, x.shape[-1], max(1, self.size))):
            part = slice(start, start + self.size)
            weight = codes[..., part, :] - (0 if zero is None else zero[..., g : g + 1, :])
            acc = x[..., part] @ weight
            assert np.abs(acc).max(initial=0) < 2**31
            out = out + acc.astype(np.float32) * scales[..., g : g + 1, :]
        return out * np.asarray(self.scale)


@dataclasses.dataclass(frozen=True)
class Fused:
    """Products with an epilogue, and what it means: scaled, with bias, relu and residual; or a gated pair with bias.

    Attributes:
        pair: whether there are two weights.
        dtype: of the products and of all steps.
        codes: how the result is quantized, if it is.
        form: of `Case`.
        layers: of each weight, the index; the weight has two of them.
    """

    pair: bool
    dtype: Any
    codes: ActSpec | None
    form: dict[str, Any]
    layers: tuple[int, ...] = ()

    def __str__(self) -> str:
        kind = f"{'pair' if self.pair else 'bias'}-{jnp.dtype(self.dtype).name}-{self.codes}"
        return "-".join([kind, *(f"{value}" for value in self.form.values())])

    @functools.cached_property
    def cases(self) -> list[Case]:
        """The first one's x is that of both."""
        form = {**self.form, **({"layers": 2} if self.layers else {})}
        rows = form.pop("rows")
        cases = [Case(rows=rows + i, **form) for i in range(2 if self.pair else 1)]
        for case in cases[1:]:
            case.x, case.scale, case.zero = cases[0].operands[:3]
        return cases

    @property
    def epilogue(self) -> Epilogue:
        """Its steps."""

        def step(primitive: Any, *operands: Any, **params: Any) -> Step:
            return Step(primitive, operands, tuple(params.items()), jnp.dtype(self.dtype))

        others = 3 + (0 if self.codes is None else 2 if self.codes.zero_point else 1)
        products = len(self.cases)
        first = products + others
        if self.pair:
            steps = (
                step(prims.mul_p, 0, products),
                step(prims.mul_p, 1, products),
                step(prims.logistic_p, first, accuracy=None),
                step(prims.mul_p, first, first + 2),
                step(prims.mul_p, first + 3, first + 1),
                step(prims.add_p, first + 4, products + 1),
                step(prims.add_p, first + 5, products + 2),
            )
        else:
            steps = (
                step(prims.mul_p, 0, products),
                step(prims.add_p, first, products + 1),
                step(prims.max_p, first + 1, Constant(0.0, jnp.dtype(self.dtype))),
                step(prims.add_p, first + 2, products + 2),
            )
        return Epilogue(jnp.dtype(self.dtype), products, others, steps, first + len(steps) - 1, self.codes)

    @functools.cached_property
    def others(self) -> list[jax.Array]:
        """A scalar, a bias, a residual, and scale and zero point of the codes."""
        rng, case = np.random.default_rng(1), self.cases[0]
        *stack, m, _ = case.x.shape
        n, batch = case.w.layout.n, math.prod(stack)
        scalar = 1 / np.std(self.products[0].astype(np.float64))
        arrays = [np.full((1, 1, 1), scalar), rng.standard_normal((batch, 1, n)), rng.standard_normal((1, m, n))]
        found = [jnp.asarray(a, self.dtype) for a in arrays]
        if self.codes is not None:
            code = [7.7 / 2**self.codes.format.bits, *([-7.0] if self.codes.zero_point else [])]
            found += [jnp.full((1, 1, 1), value, jnp.float32) for value in code]
        return found

    @functools.cached_property
    def products(self) -> list[np.ndarray]:
        layers = self.layers or (None,) * len(self.cases)
        return [case.expected(layer) for case, layer in zip(self.cases, layers, strict=True)]

    def check(self, fused: Callable[..., jax.Array], **options: Any) -> None:
        """Whether `fused(x, weights, others, layers=, epilogue=, **options)` means that.

        Each step in bfloat16 is one rounding of a sum or product of such numbers: to the last bit. Codes may be the
        neighbour where rounding errors of float32 lie between them.
        """
        case = self.cases[0]
        weights, layers = [case.w for case in self.cases], list(self.layers) or [None] * len(self.cases)
        how = {"layers": layers, "epilogue": self.epilogue, **options}
        run = jax.jit(functools.partial(fused, **how), compiler_options={"xla_allow_excess_precision": False})
        got = np.asarray(run(Activation(case.x, case.scale, case.zero), weights, self.others))
        exact = self.dtype == jnp.bfloat16
        kind = jnp.bfloat16 if exact else np.float64
        shape = (-1, *case.x.shape[-2:-1], case.w.layout.n)
        scalar, bias, residual, *code = (np.asarray(a).astype(kind) for a in self.others)
        scaled = [p.astype(self.dtype).astype(kind).reshape(shape) * scalar for p in self.products]
        if self.pair:
            gate, up = scaled
            want = gate * (1 / (1 + np.exp(-gate))) * up + bias + residual
        else:
            want = np.maximum(scaled[0] + bias, kind(0)) + residual
        want = want.reshape(*case.x.shape[:-1], -1)
        if self.codes is None:
            assert got.dtype == self.dtype
            tolerance = 0 if exact else 1e-5
            np.testing.assert_allclose(got.astype(np.float64), want.astype(np.float64), rtol=tolerance, atol=tolerance)
            return
        assert got.dtype == np.int8
        scale, *zero = (float(np.asarray(a).item()) for a in self.others[3:])
        unrounded = want.astype(np.float64) / scale + (zero[0] if zero else 0)
        low, high = self.codes.format.qmin, self.codes.format.qmax
        near = np.abs(np.abs(unrounded - np.floor(unrounded)) - 0.5) < 1e-3
        wrong = np.abs(got - np.clip(np.round(unrounded), low, high))
        assert (wrong <= near).all()
        assert near.mean() < 0.02 and np.ptp(got.astype(int)) > (high - low) / 2


def assert_same_bits(actual: Any, expected: Any) -> None:
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.dtype == expected.dtype
    np.testing.assert_array_equal(actual, expected)
    np.testing.assert_array_equal(np.signbit(actual), np.signbit(expected))


def cpu(x: Any, scale: Any, zero: Any, w: QTensor, **options: Any) -> jax.Array:
    return integer_matmul(x, scale, zero, w, **options)


def reference(x: Any, scale: Any, zero: Any, w: QTensor, layer: Any = None) -> jax.Array:
    return integer_matmul_reference.matmul(x, scale, zero, w, layer=layer, out_dtype=jnp.float32)


def _run(cases: list[Case], function: Any) -> None:
    """All cases in one compiled program."""
    outs = jax.jit(lambda all_operands: [function(*o) for o in all_operands])([c.operands for c in cases])
    for case, out in zip(cases, outs, strict=True):
        assert_same_bits(out, case.expected())


# --- The product -----------------------------------------------------------------------------------------------


def test_a_matrix_of_several_blocks():
    """No patch: sizes at which the lowering itself leaves the single block."""
    shape: dict[str, Any] = {"k": 1536, "n": 1400}
    cases = [
        Case(bits, granularity, rows=rows, order=order, **shape)
        for bits, granularity, order in ((4, PerChannel(), "nk"), (4, PerGroup(64), "kn"), (8, PerChannel(), "nk"))
        for rows in (1, 9)
    ]
    assert shape["k"] * shape["n"] > integer_matmul_cpu.BLOCK_VALUES
    _run(cases, cpu)


_SIZES = st.sampled_from([1, 2, 31, 32, 33, 64, 100])


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    st.sampled_from([2, 3, 4, 7, 8]),
    st.sampled_from([0, 1, 2, 3, 129]),
    _SIZES,
    _SIZES,
    st.sampled_from([None, 1, 32]),
    st.sampled_from(ORDERS),
)
@example(8, 1, 1, 1, None, "nk")
@example(4, 129, 33, 1, 32, "kn")
@example(3, 0, 33, 5, None, "kn")
def test_awkward_shapes(bits: int, rows: int, k: int, n: int, group: int | None, order: str):
    granularity = PerGroup(group) if group else PerChannel()
    _run([Case(bits, granularity, rows=rows, k=k, n=n, order=order, zero=k % 2 == 0)], cpu)


def test_no_values_to_contract_give_zeros():
    w = Case(8, PerChannel(), k=1)
    empty = QTensor(w.w.words[:0], w.w.scales, w.w.spec, Layout((((0, "k"),), ((N, "n"),))), w.w.dtype)
    for function in (cpu, reference):
        out = jax.jit(function)(w.x[:, :0], w.scale, None, empty)
        assert_same_bits(out, np.zeros((3, N), np.float32))


@pytest.mark.parametrize("order", ORDERS)
def test_double_quantized_scales(order: Any):
    """The scales are those that the weight is dequantized with."""
    spec = QuantSpec(FORMATS["int4"], PerGroup(32), scale_rule=AbsMax(), double_quant=True)
    w = jnp.asarray(np.random.default_rng(0).standard_normal((K, N)), jnp.float32)
    packed = quantize(w, spec, Layout((((K, "k"),), ((N, "n"),))), order)
    case = Case(8, PerChannel())
    out, known, exact = jax.jit(
        lambda x, w: (cpu(x, case.scale, None, w), reference(x, case.scale, None, w), w.matrix())
    )(case.x, packed)
    assert_same_bits(out, known)
    expected = np.asarray(case.x, np.float64) @ np.asarray(exact, np.float64) * np.asarray(case.scale)
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.usefixtures("small_blocks")
def test_a_scale_of_nan_makes_its_row_nan():
    case = Case(8, PerChannel())
    scale = case.scale.at[1].set(jnp.nan)
    out = np.asarray(jax.jit(cpu)(case.x, scale, None, case.w))
    assert np.isnan(out[1]).all() and np.isfinite(out[[0, 2]]).all()


# --- Stacks, layers, transforms --------------------------------------------------------------------------------

STACKED = [(8, PerChannel(), "nk"), (4, PerGroup(32), "kn"), (4, PerChannel(), "nk")]


@pytest.mark.parametrize(("bits", "granularity", "order"), STACKED[1:2], ids=str)
@pytest.mark.usefixtures("small_blocks")
def test_vmap(bits: int, granularity: Any, order: Any):
    """Over x, the weight, both, the layer, and twice; x mapped along another axis."""
    many = Case(bits, granularity, stack=(3,), rows=2, zero=True, order=order)
    index = jnp.asarray([2, 0, 1])

    @jax.jit
    def run(x: Any, scale: Any, zero: Any, w: QTensor, index: Any) -> dict[str, Any]:
        one = jax.tree.map(lambda a: a[0], w)
        x0 = (x[0], scale[0], zero[0])

        def layer(x: Any, scale: Any, zero: Any, i: Any) -> jax.Array:
            return cpu(x, scale, zero, w, layer=i)

        return {
            "x": jax.vmap(lambda *x: cpu(*x, one))(x, scale, zero),
            "x axis": jax.vmap(lambda x, s, z: cpu(x, s, z, one), in_axes=(1, 1, 1))(x, scale, zero),
            "w": jax.vmap(lambda w: cpu(*x0, w))(w),
            "both": jax.vmap(cpu)(x, scale, zero, w),
            "layer": jax.vmap(layer)(x, scale, zero, index),
            "layer only": jax.vmap(lambda i: layer(*x0, i))(index),
            "x of a layer": jax.vmap(lambda *x: layer(*x, index[0]))(x, scale, zero),
            "scale only": jax.vmap(lambda s: cpu(x[0], s, zero[0], one))(scale),
            "twice": jax.vmap(lambda x: jax.vmap(cpu, in_axes=(0, 0, 0, 0))(x, scale, zero, w))(jnp.stack([x, -x - 1])),
        }

    out = run(*many.operands, index)

    def expected(x: Any, scale: Any, zero: Any, w: Any) -> np.ndarray:
        case = Case(bits, granularity, stack=(3,), rows=2, zero=True, order=order)
        case.x, case.scale, case.zero = x, scale, zero
        case.codes, case.scales = case.codes[w], case.scales[w]
        return case.expected()

    x = tuple(np.asarray(a) for a in (many.x, many.scale, many.zero))
    first = tuple(np.broadcast_to(a[:1], a.shape) for a in x)
    one, every = [0, 0, 0], [0, 1, 2]
    assert_same_bits(out["x"], expected(*x, one))
    assert_same_bits(out["x axis"], np.swapaxes(expected(*x, one), 0, 1))
    assert_same_bits(out["w"], expected(*first, every))
    assert_same_bits(out["both"], expected(*x, every))
    assert_same_bits(out["layer"], expected(*x, np.asarray(index)))
    assert_same_bits(out["layer only"], expected(*first, np.asarray(index)))
    assert_same_bits(out["x of a layer"], expected(*x, [2, 2, 2]))
    assert_same_bits(out["scale only"], expected(first[0], x[1], first[2], one))
    assert_same_bits(out["twice"], np.stack([expected(v, *x[1:], every) for v in (x[0], -x[0] - 1)]))


def test_eager_equals_jit():
    case = Case(4, PerGroup(32), zero=True)
    assert_same_bits(cpu(*case.operands), case.expected())
    assert_same_bits(jax.jit(cpu)(*case.operands), case.expected())


def test_export_for_two_platforms():
    case = Case(4, PerGroup(32))
    leaves, tree = jax.tree.flatten(case.w)
    fn = jax.jit(lambda x, s, *leaves: cpu(x, s, None, jax.tree.unflatten(tree, leaves)))
    exported = jax.export.export(fn, platforms=("cpu", "tpu"))(case.x, case.scale, *leaves)
    assert_same_bits(exported.call(case.x, case.scale, *leaves), case.expected())


# --- Errors ----------------------------------------------------------------------------------------------------


def test_it_has_no_derivative_of_its_own():
    case = Case(8, PerChannel())
    with pytest.raises(TypeError, match="no derivative of its own"):
        jax.grad(lambda scale: cpu(case.x, scale, None, case.w).sum())(case.scale)


@pytest.mark.parametrize(
    ("shape", "scales", "options"),
    [
        ((3, K + 1), (3, 1), {}),
        ((3, K), (3,), {}),
        ((3, K), (4, 1), {}),
        ((2, 3, K), (2, 3, 1), {}),
        ((K,), (1,), {}),
        ((3, K), (3, 1), {"layer": 0}),
    ],
    ids=str,
)
def test_shapes_that_do_not_fit_are_a_type_error(shape: Any, scales: Any, options: Any):
    w = Case(8, PerChannel()).w
    if options:
        w = Case(8, PerChannel(), layers=2, stack=(2,)).w
    with pytest.raises(TypeError):
        integer_matmul(jnp.zeros(shape, jnp.int8), jnp.ones(scales), None, w, **options)


def test_a_weight_without_integers_is_a_type_error():
    w = quantize(
        jnp.ones((K, N)), QuantSpec(FORMATS["nf4"], PerChannel(), scale_rule=AbsMax()), Case(8, PerChannel()).w.layout
    )
    with pytest.raises(TypeError, match="integer weight, not nf4"):
        integer_matmul(jnp.zeros((3, K), jnp.int8), jnp.ones((3, 1)), None, w)


def test_sums_that_may_not_fit_into_32_bits_are_a_type_error():
    k = 2**17
    case = Case(8, PerChannel(), k=k, n=1, rows=1)
    with pytest.raises(TypeError, match="does not fit into 32 bits"):
        cpu(*case.operands)
    fits = Case(8, PerGroup(k // 2), k=k, n=1, rows=1)
    assert_same_bits(cpu(*fits.operands), fits.expected())


def test_the_primitive_is_one_equation():
    case = Case(8, PerChannel())
    jaxpr = jax.make_jaxpr(cpu)(*case.operands)
    assert [eqn.primitive for eqn in jaxpr.eqns] == [integer_matmul_p]

"""The table of tiles for TPU: what it holds is valid and is used; programs with it are right, and compile."""

from __future__ import annotations

import functools
import importlib.resources
import json
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tpu_compile

from qjax.pallas_kernels.chips import tpu as tpu_chips
from qjax.pallas_kernels.chips.tpu import CHIPS, KEY, ROWS, target_chip
from qjax.pallas_kernels.numbers import packing
from qjax.pallas_kernels.numbers.formats import FORMATS, AbsMax, PerChannel, PerGroup, QuantSpec
from qjax.pallas_kernels.ops.integer_matmul import tpu as integer_matmul_tpu
from qjax.pallas_kernels.ops.integer_matmul.api import integer_matmul
from qjax.pallas_kernels.ops.matmul import tpu as matmul_tpu
from qjax.pallas_kernels.ops.matmul import tpu_tiles as matmul_tpu_tiles
from qjax.pallas_kernels.ops.matmul.api import quantized_matmul
from qjax.pallas_kernels.packed.layout import Layout
from qjax.pallas_kernels.packed.qtensor import QTensor, quantize

BF16 = jnp.bfloat16
TEXT = importlib.resources.files("qjax.pallas_kernels.chips").joinpath("tpu.json").read_text()
TABLE: list[dict[str, Any]] = json.loads(TEXT)["rows"]
Shape = jax.ShapeDtypeStruct


def spec(weight: str, **options: Any) -> QuantSpec:
    """That of what a row calls its weight."""
    format, granularity = weight.split("/")
    each = PerChannel() if granularity == "channel" else PerGroup(int(granularity.removeprefix("g")))
    return QuantSpec(FORMATS[format], each, scale_rule=AbsMax(), **options)


@functools.cache
def packed(weight: str, k: int, n: int, order: Any, **options: Any) -> QTensor:
    layout = Layout((((k, "k"),), ((n, "n"),)))
    return jax.eval_shape(lambda w: quantize(w, spec(weight, **options), layout, order), Shape((k, n), BF16))


def blocks(row: dict[str, Any], m: int, k: int, n: int, **options: Any) -> Any:
    """What the kernel of a row chooses for such a weight."""
    if row["kernel"] == "quantized_matmul":
        return matmul_tpu_tiles.default_blocks(m, k, n, spec(row["weight"], **options), row["x"], row["order"])
    return integer_matmul_tpu.default_blocks(m, packed(row["weight"], k, n, row["order"], **options))


def named(row: dict[str, Any]) -> str:
    return "-".join(str(row[column]) for column in KEY)


def the(chip: str, kernel: str, weight: str, m: int) -> dict[str, Any]:
    """This row of the table."""
    wanted = {"chip": chip, "kernel": kernel, "weight": weight, "m": m}
    (row,) = (row for row in TABLE if wanted.items() <= row.items())
    return row


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), BF16)


def scaled(w: QTensor) -> np.ndarray:
    """The matrix of integers times their scales, nothing rounded."""
    words, scales = w.matrix_arrays()
    codes = np.asarray(packing.unpack(words, w.spec.format, w.layout.k), np.float64)
    return codes * np.repeat(np.asarray(scales.values, np.float64), w.group_size, axis=0)


# --- The table -------------------------------------------------------------------------------------------------


def test_the_table_is_complete():
    """A row for each chip and number of rows of x of each kind of weight, and no row twice."""
    keys = [tuple(row[column] for column in KEY) for row in TABLE]
    kinds = {key[1:-1] for key in keys}
    assert len(keys) == len(set(keys))
    assert set(keys) == {(chip, *kind, m) for chip in CHIPS for kind in kinds for m in ROWS}
    assert {kind[0] for kind in kinds} == {"quantized_matmul", "integer_matmul"}


@pytest.mark.parametrize("chip", CHIPS)
def test_every_row_is_used_as_it_is(chip: str):
    """A large matrix gets the tiles of the row: they are multiples of what they must be, and fit into VMEM."""
    for row in (row for row in TABLE if row["chip"] == chip):
        with target_chip(chip):
            chosen = blocks(row, row["m"], 8192, 2048)
        of_row = row["n"], row["k"], row.get("scale")
        assert (chosen.n, chosen.k, getattr(chosen, "scale", None)) == of_row, named(row)
        group = spec(row["weight"]).group_size(8192)
        assert chosen.n % 128 == 0 and chosen.k % 256 == 0 and (group == 8192 or chosen.k % group == 0), named(row)
        # twice the words and x, the sums and the result
        size = 2 if row["x"] == "bfloat16" else 1
        held = 2 * chosen.k * chosen.n * spec(row["weight"]).format.bits / 8 + 2 * chosen.m * chosen.k * size
        assert held + 8 * chosen.m * chosen.n < 16 * 2**20, named(row)


@pytest.mark.parametrize("chip", CHIPS)
def test_tiles_of_any_size_of_matrix(chip: str):
    """Rows are cut to the matrix, by the rules of the kernel."""
    for row in (row for row in TABLE if row["chip"] == chip and row["m"] in (16, 512)):
        for k, n in (100, 1), (11008, 130):
            with target_chip(chip):
                chosen = blocks(row, 3 * row["m"] - 40, k, n)
            group = spec(row["weight"]).group_size(k)
            assert chosen.n % 128 == 0 and chosen.n < n + 128 and chosen.k % 256 == 0 and chosen.k < k + 256
            assert group == k or chosen.k % group == 0 or group % chosen.k == 0


# --- The choice ------------------------------------------------------------------------------------------------


def test_what_has_no_row_is_chosen_by_shape(monkeypatch: pytest.MonkeyPatch):
    row = the("v5e", "quantized_matmul", "int4/g64", 16)
    by_shape = blocks(row, 16, 8192, 2048)
    assert tpu_chips.chip() is None  # tests run on CPU
    with target_chip("v5e"):
        assert tpu_chips.chip() == "v5e"
        assert blocks(row, 16, 8192, 2048) != by_shape
        with_zero = blocks(row, 16, 8192, 2048, zero_point=True)
        float32 = matmul_tpu_tiles.default_blocks(16, 8192, 2048, spec("int4/g64"), jnp.float32)
    assert with_zero == blocks(row, 16, 8192, 2048, zero_point=True)
    assert float32 == matmul_tpu_tiles.default_blocks(16, 8192, 2048, spec("int4/g64"), jnp.float32)
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(device_kind="TPU v9")])
    assert tpu_chips.chip() is None and blocks(row, 16, 8192, 2048) == by_shape
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(device_kind="TPU v5 lite")])
    assert tpu_chips.chip() == "v5e" and blocks(row, 16, 8192, 2048) != by_shape


def test_an_unknown_target_is_an_error():
    with pytest.raises(ValueError, match=r"target_chip\('v4'\): the table has v5e, v5p, v6e, 7x"), target_chip("v4"):
        pass


def test_chips_call_themselves_so():
    """As libtpu has it."""
    for chip, kind in CHIPS.items():
        compiled = tpu_compile.compile(jnp.negative, Shape((8, 128), jnp.float32), chip=chip)
        ((sharding,), _) = compiled.input_shardings
        assert {device.device_kind for device in sharding.device_set} == {kind}


# --- Programs --------------------------------------------------------------------------------------------------

OPTIONS = {"layer": None, "casts": (), "precision": None, "preferred_element_type": None, "transpose": False}


@pytest.mark.parametrize("m", [16, 256])
def test_products_with_tiles_from_the_table(m: int):
    """Few rows have scales after the product, many before it."""
    row, k, n = the("v5e", "quantized_matmul", "int4/g64", m), 512, 1024
    x, w = normal(0, m, k), quantize(normal(1, k, n), spec(row["weight"]), Layout((((k, "k"),), ((n, "n"),))))
    with target_chip("v5e"):
        assert blocks(row, m, k, n) == matmul_tpu_tiles.Blocks(m, row["n"], k, "after" if m == 16 else "before")
        out = jax.jit(functools.partial(matmul_tpu.matmul, **OPTIONS, interpret=True))(x, w)
    x64, w64 = np.asarray(x, np.float64), scaled(w)
    # each weight and the result are rounded to bfloat16 at most once
    bound = float(jnp.finfo(BF16).eps) * (np.abs(x64) @ np.abs(w64))
    np.testing.assert_array_less(np.abs(np.asarray(out, np.float64) - x64 @ w64), bound)


def test_an_integer_product_with_tiles_from_the_table():
    row, k, n = the("v5e", "integer_matmul", "int4/g128", 16), 1024, 1024
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.integers(-127, 128, (16, k)), jnp.int8)
    scale = jnp.asarray(rng.uniform(0.5, 2, (16, 1)), jnp.float32)
    w = quantize(normal(1, k, n), spec(row["weight"]), Layout((((k, "k"),), ((n, "n"),))))
    with target_chip("v5e"):
        assert blocks(row, 16, k, n) == integer_matmul_tpu.Blocks(32, row["n"], k)
        run = functools.partial(integer_matmul_tpu.matmul, layer=None, out_dtype=jnp.float32, interpret=True)
        out = jax.jit(run)(x, scale, None, w)
    x64, w64 = np.asarray(x, np.float64) * np.asarray(scale, np.float64), scaled(w)
    groups = k // w.group_size  # each is rounded once, and so is each sum of them
    bound = (groups + 2) * float(jnp.finfo(jnp.float32).eps) * (np.abs(x64) @ np.abs(w64))
    np.testing.assert_array_less(np.abs(np.asarray(out, np.float64) - x64 @ w64), bound)


def lowered(function: Any, *operands: Any, chip: str) -> str:
    with target_chip(chip):
        return function.trace(*operands).lower(lowering_platforms=("tpu",)).as_text()


def test_each_chip_has_a_program_of_its_own():
    """A function that was lowered for one chip is lowered again for another."""
    m, k, n = 256, 8192, 2048
    v5e, v6e = (the(chip, "quantized_matmul", "int4/g64", m) for chip in ("v5e", "v6e"))
    assert v5e["k"] != v6e["k"]
    product, operands = jax.jit(quantized_matmul), (Shape((m, k), BF16), packed("int4/g64", k, n, "kn"))
    texts = [lowered(product, *operands, chip=chip) for chip in ("v5e", "v6e", "v5e")]
    assert texts[0] == texts[2] != texts[1]


@pytest.mark.parametrize(
    ("kernel", "weight", "m"),
    [("quantized_matmul", "int4/g32", 64), ("integer_matmul", "int8/channel", 512)],
)
def test_rows_compile(kernel: str, weight: str, m: int):
    """The script compiled all of them."""
    row, k, n = the("v6e", kernel, weight, m), 4096, 1024
    w = packed(weight, k, n, row["order"])
    with target_chip("v6e"):
        if kernel == "quantized_matmul":
            compiled = tpu_compile.compile(quantized_matmul, Shape((m, k), BF16), w, chip="v6e")
        else:
            operands = Shape((m, k), jnp.int8), Shape((m, 1), jnp.float32), None, w
            run = functools.partial(integer_matmul, out_dtype=BF16)
            compiled = tpu_compile.compile(run, *operands, chip="v6e")
    assert "tpu_custom_call" in compiled.as_text()

"""The table of formats and `QuantSpec`: constants, validation, printing, JSON."""

from __future__ import annotations

import dataclasses
import itertools
import json
from statistics import NormalDist

import ml_dtypes
import numpy as np
import pytest

from qjax.pallas_kernels.numbers.formats import (
    FORMATS,
    AbsMax,
    Format,
    MseSearch,
    PerChannel,
    PerGroup,
    PerTensor,
    QuantSpec,
    QuickSearch,
    SignedMax,
)

INT4, NF4 = FORMATS["int4"], FORMATS["nf4"]


def test_table_holds_the_promised_formats_under_their_names():
    promised = [f"int{bits}" for bits in range(2, 9)] + ["nf4", "fp4_e2m1", "fp8_e4m3", "fp8_e5m2"]
    assert sorted(FORMATS) == sorted(promised)
    assert all(name == row.name for name, row in FORMATS.items())


@pytest.mark.parametrize("bits", range(2, 9))
def test_integers_use_the_full_range_of_twos_complement(bits):
    row = FORMATS[f"int{bits}"]
    assert row.bits == bits
    assert row.qmax - row.qmin + 1 == 2**bits
    assert row.qmin == -row.qmax - 1
    assert row.bounds == (row.qmin - 0.5, row.qmax + 0.5)


def test_nf4_values_are_the_normal_quantiles_of_the_qlora_paper():
    offset, ppf = 0.9677083, NormalDist().inv_cdf
    positive = [ppf(p) for p in np.linspace(offset, 0.5, 9)[:-1]]
    negative = [-ppf(p) for p in np.linspace(offset, 0.5, 8)[:-1]]
    expected = np.sort([*positive, 0.0, *negative]) / max(positive)
    np.testing.assert_allclose(NF4.values, expected, atol=2e-7)
    assert all(float(np.float32(v)) == v for v in NF4.values)
    assert [NF4.values[code] for code in (0, 7, 15)] == [-1, 0, 1]


def test_fp4_values_are_indexed_by_the_code_of_ml_dtypes():
    codes = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn)
    values = np.asarray(FORMATS["fp4_e2m1"].values)
    np.testing.assert_array_equal(values, codes.astype(np.float64))
    np.testing.assert_array_equal(np.signbit(values), np.signbit(codes.astype(np.float64)))


@pytest.mark.parametrize(
    ("name", "largest", "bounds"),
    [
        ("nf4", 1.0, (-1 - 0.15190359950065613, 1 + 0.13852158188819885)),
        ("fp4_e2m1", 6.0, (-7.0, 7.0)),
        ("fp8_e4m3", 448.0, (-464.0, 464.0)),
        ("fp8_e5m2", 57344.0, (-61440.0, 61440.0)),
    ],
)
def test_clipping_begins_half_a_step_beyond_the_last_value(name, largest, bounds):
    assert FORMATS[name].largest == largest
    np.testing.assert_allclose(FORMATS[name].bounds, bounds, rtol=1e-12)


GRANULARITIES = (PerTensor(), PerChannel(), PerGroup(1), PerGroup(128))
RULES = (AbsMax(), SignedMax(), MseSearch(), MseSearch(points=3), QuickSearch())


def every_valid_spec():
    flags = (False, True)
    dtypes = ("float32", "bfloat16", "float16")
    for row, g, zero, dtype, rule, double in itertools.product(
        FORMATS.values(), GRANULARITIES, flags, dtypes, RULES, flags
    ):
        try:
            yield QuantSpec(row, g, zero, dtype, rule, double)
        except ValueError:
            continue


def test_every_valid_spec_survives_json_and_hashing():
    specs = list(every_valid_spec())
    assert len(specs) == len(set(specs)) > 400
    for spec in specs:
        assert QuantSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


def test_specs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        QuantSpec(INT4, PerChannel()).zero_point = True  # type: ignore[misc]


def test_search_is_on_by_default():
    assert QuantSpec(INT4, PerGroup(64)).scale_rule == MseSearch()


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        (QuantSpec(INT4, PerGroup(64)), "int4/g64"),
        (QuantSpec(INT4, PerGroup(64), zero_point=True), "int4z/g64"),
        (QuantSpec(FORMATS["int8"], PerChannel()), "int8/channel"),
        (QuantSpec(FORMATS["fp8_e4m3"], PerTensor()), "fp8_e4m3/tensor"),
        (QuantSpec(NF4, PerGroup(64), double_quant=True), "nf4/g64/dq"),
    ],
)
def test_spec_prints_in_short_form(spec, text):
    assert str(spec) == text


# what is wrong -> (how to make it, what the message must say: found, and what to do)
INVALID = {
    "zero point of a codebook": (lambda: QuantSpec(NF4, PerGroup(64), zero_point=True), ["nf4", "zero_point=True"]),
    "zero point of a float": (lambda: QuantSpec(FORMATS["fp8_e4m3"], PerTensor(), zero_point=True), ["fp8_e4m3"]),
    "unknown scale dtype": (lambda: QuantSpec(INT4, PerGroup(64), scale_dtype="int8"), ["int8", "bfloat16"]),
    "signed max with zero point": (
        lambda: QuantSpec(INT4, PerGroup(64), zero_point=True, scale_rule=SignedMax()),
        ["SignedMax", "AbsMax"],
    ),
    "signed max of a codebook": (lambda: QuantSpec(NF4, PerGroup(64), scale_rule=SignedMax()), ["nf4", "AbsMax"]),
    "signed max, double quant": (
        lambda: QuantSpec(INT4, PerGroup(64), scale_rule=SignedMax(), double_quant=True),
        ["negative scales", "MseSearch"],
    ),
    "scale dtype, double quant": (
        lambda: QuantSpec(NF4, PerGroup(64), scale_dtype="bfloat16", double_quant=True),
        ["bfloat16", "float32"],
    ),
    "group of none": (lambda: PerGroup(0), ["size=0", "PerChannel"]),
    "a flag for a group": (lambda: PerGroup(True), ["size=True"]),
    "search without points": (lambda: MseSearch(points=0), ["points=0", "at least 1"]),
    "quick search without points": (lambda: QuickSearch(points=-1), ["points=-1"]),
    "format from a newer version": (
        lambda: QuantSpec.from_json({**QuantSpec(INT4, PerGroup(64)).to_json(), "format": "int1"}),
        ["int1", "int4"],
    ),
    "rule from a newer version": (
        lambda: QuantSpec.from_json({**QuantSpec(INT4, PerGroup(64)).to_json(), "scale_rule": {"name": "oracle"}}),
        ["oracle", "mse_search"],
    ),
}


@pytest.mark.parametrize("case", INVALID)
def test_invalid_spec_is_refused_with_what_was_found_and_what_to_do(case):
    make, words = INVALID[case]
    with pytest.raises(ValueError, match="qjax: ") as error:
        make()
    for word in words:
        assert word in str(error.value)


def test_a_format_outside_the_table_still_makes_a_spec():
    row = Format("int4_copy", 4, "int")
    assert str(QuantSpec(row, PerGroup(32))) == "int4_copy/g32"

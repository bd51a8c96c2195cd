"""Packed products on meshes: eight virtual CPU devices, and TPUs that only the compiler knows; in processes apart.

What is communicated is read from the compiled program. Results are compared with NumPy: products of floats with
float64, products of integers with the formula of `integer_matmul`, in float32, bit for bit where that is promised.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax
from jax.experimental import topologies
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from qjax.pallas_kernels.numbers import packing, stored_scales
from qjax.pallas_kernels.numbers.formats import AbsMax
from qjax.pallas_kernels.ops import partition
from qjax.pallas_kernels.ops.fp8_matmul.api import fp8_matmul
from qjax.pallas_kernels.ops.integer_matmul.api import integer_matmul
from qjax.pallas_kernels.ops.matmul.api import quantized_matmul
from qjax.pallas_kernels.packed.layout import Layout
from qjax.pallas_kernels.packed.qtensor import QTensor, quantize
from qjax.recipes import fp8_e4m3, int3, int4, int8, nf4

L, E, M, K, N = 3, 4, 8, 256, 128
FORMATS = {
    "int4": int4(group=32, scale=AbsMax()),
    "int4 zero": int4(group=32, zero_point=True, scale=AbsMax()),
    "int8": int8(scale=AbsMax()),
    "nf4": nf4(group=32, double_quant=True, scale=AbsMax()),
    "fp8": fp8_e4m3(scale=AbsMax()),
}
COLLECTIVES = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter|collective-broadcast"


def weight(spec: Any, order: Any = "kn", lead: tuple[int, ...] = (), stack: tuple[int, ...] = ()) -> QTensor:
    layout = Layout((*(((e, "stack"),) for e in stack), ((K, "k"),), ((N, "n"),)))
    values = np.random.default_rng(0).standard_normal((*lead, *layout.shape)).astype(np.float32)
    return quantize(jnp.asarray(values), spec, layout, order)


def rows(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


def integer_rows(m: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes, scales and zero points."""
    rng = np.random.default_rng(2)
    codes = rng.integers(-128, 128, (m, K)).astype(np.int8)
    scale = rng.uniform(0.01, 0.02, (m, 1)).astype(np.float32)
    return codes, scale, rng.integers(-128, 128, (m, 1)).astype(np.float32)


def integer_product(x: np.ndarray, scale: np.ndarray, zero: np.ndarray, w: QTensor) -> np.ndarray:
    """The docstring of `integer_matmul`, group by group."""
    words, scales = w.matrix_arrays()
    codes = np.asarray(packing.unpack(words, w.spec.format, K), np.int64)
    values = np.asarray(stored_scales.resolve_scales(scales))
    zeros = np.zeros(values.shape, np.int64) if scales.zero is None else np.asarray(scales.zero, np.int64)
    out = np.zeros((len(x), N), np.float32)
    for g, part in enumerate(np.split(np.arange(K), len(values))):
        acc = (x[:, part].astype(np.int64) - zero.astype(np.int64)) @ (codes[part] - zeros[g])
        out = out + acc.astype(np.float32) * values[g]
    return out * scale


@dataclasses.dataclass(frozen=True)
class On:
    """A mesh of two axes, "data" and "model"."""

    mesh: Any

    @property
    def explicit(self) -> bool:
        return self.mesh.axis_types[0] == AxisType.Explicit

    def place(self, a: Any, *spec: Any) -> Any:
        """On the devices of the mesh; where they cannot hold anything, what would be there."""
        sharding = NamedSharding(self.mesh, P(*spec))
        if self.mesh.devices.flat[0].platform == "cpu":
            return jax.device_put(a, sharding)
        return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)

    def weight(self, w: QTensor, k: Any = None, n: Any = None, lead: Any = ()) -> QTensor:
        """Words and scales alike; what all rows or columns share is on all devices."""

        def put(a: Any) -> Any:
            nested = w.scales.absmax is not None and a.dtype == jnp.float32
            axes = (k, n) if w.order == "kn" else (n, k)
            last = [None if size == 1 or nested else names for names, size in zip(axes, a.shape[-2:], strict=True)]
            return self.place(a, *[None] * (a.ndim - 2 - len(lead)), *lead, *last)

        return jax.tree.map(put, w)

    def compile(self, function: Any, *args: Any, communicates: str = "") -> Any:
        """The compiled program, after a look at how its devices talk: "" or "all-reduce"."""
        platforms = (self.mesh.devices.flat[0].platform,)
        compiled = jax.jit(function).trace(*args).lower(lowering_platforms=platforms).compile()
        found = Counter(re.findall(rf" ({COLLECTIVES})(?:-start)?\(", compiled.as_text() or ""))
        assert found == Counter(communicates.split()), (self.mesh, found, communicates)
        return compiled

    def run(self, function: Any, *args: Any, communicates: str = "") -> np.ndarray:
        return np.asarray(self.compile(function, *args, communicates=communicates)(*args))


def _chosen() -> Primitive:
    """A primitive that says by its result what it was lowered to: 1 for the kernel, 2 for the plain formulation."""
    p = Primitive("chosen")
    p.def_abstract_eval(lambda x: x)
    rule = partition.lowering(lambda x: jnp.zeros_like(x) + 1, plain=lambda x: jnp.zeros_like(x) + 2)
    mlir.register_lowering(p, rule)
    return p


# --- What each process does --------------------------------------------------------------------------------------


def check_choice(on: On) -> None:
    """Which formulation a lowering takes; what it reads of JAX for that is promised nowhere."""
    chosen, x = _chosen(), jnp.zeros((8, 8))
    split = on.place(x, "data")
    everywhere = jax.shard_map(chosen.bind, mesh=on.mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False)
    somewhere = jax.shard_map(
        chosen.bind, mesh=on.mesh, in_specs=P("data"), out_specs=P("data"), axis_names={"data"}, check_vma=False
    )
    for function, argument, expected in [
        (chosen.bind, x, 1),  # one device
        (chosen.bind, split, 1 if on.explicit else 2),
        (everywhere, split, 1),
        (somewhere, split, 2),
    ]:
        np.testing.assert_array_equal(jax.jit(function)(argument), jnp.full(x.shape, expected))


def check_products(on: On) -> None:
    for name, split, order in [
        ("int4", "n", "kn"),
        ("int4", "k", "nk"),
        ("int8", "k", "kn"),
        ("nf4", "n", "nk"),
        ("nf4", "k", "kn"),
    ]:
        w, x = weight(FORMATS[name], order), rows(M, K)
        args = on.place(x, "data", "model" if split == "k" else None), on.weight(w, **{split: "model"})
        out = on.run(quantized_matmul, *args, communicates="all-reduce" if split == "k" else "")
        np.testing.assert_allclose(out, x @ np.asarray(w.matrix(), np.float64), rtol=1e-5, atol=1e-4, err_msg=name)
    for name, split, exact in [
        ("int4 zero", "n", on.explicit),
        ("int4 zero", "k", False),
        ("int8", "n", True),
        ("int8", "k", True),
    ]:
        w = weight(FORMATS[name])
        codes, scale, zero = integer_rows(M)
        args = (
            on.place(codes, "data"),
            on.place(scale, "data"),
            on.place(zero, "data"),
            on.weight(w, **{split: "model"}),
        )
        out = on.run(integer_matmul, *args, communicates="all-reduce" if split == "k" else "")
        tolerance: Any = {"rtol": 0} if exact else {"rtol": 1e-5, "atol": 1e-3}
        np.testing.assert_allclose(out, integer_product(codes, scale, zero, w), **tolerance, err_msg=name)
    for split, order in [("n", "nk"), ("k", "nk"), ("k", "kn")]:
        w, (_, scale, _) = weight(FORMATS["fp8"], order), integer_rows(M)
        codes = rows(M, K).astype(jnp.float8_e4m3fn)
        args = on.place(codes, "data", "model" if split == "k" else None), on.place(scale, "data")
        args = *args, on.weight(w, **{split: "model"})
        out = on.run(fp8_matmul, *args, communicates="all-reduce" if split == "k" else "")
        expected = codes.astype(np.float64) @ np.asarray(w.matrix(), np.float64) * scale
        np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5, err_msg=f"fp8 {split} {order}")
    # a whole weight: only rows are split, and both mesh axes along one axis
    w = weight(FORMATS["int4"])
    x = rows(M, K)
    expected = x @ np.asarray(w.matrix(), np.float64)
    out = on.run(quantized_matmul, on.place(x, ("data", "model")), on.weight(w))
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-4)
    out = on.run(quantized_matmul, on.place(x), on.weight(w, k=("data", "model")), communicates="all-reduce")
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-4)


def check_stacks(on: On) -> None:
    """Layers that a scan indexes, experts, and both."""
    spec, x = FORMATS["nf4"], rows(M, N)
    w = weight(spec, lead=(L,))
    matrices = np.asarray(w.matrix(), np.float64)

    def scanned(x: Any, w: QTensor) -> Any:
        def layer(x: Any, i: Any) -> tuple[Any, None]:
            return quantized_matmul(quantized_matmul(x, w, layer=i, transpose=True), w, layer=i) / 64, None

        return lax.scan(layer, x, jnp.arange(L))[0]

    expected = x
    for matrix in matrices:
        expected = expected @ matrix.T @ matrix / 64
    # (M, N) @ (N, K) leaves K split, and (M, K) @ (K, N) adds it up
    out = on.run(scanned, on.place(x, "data"), on.weight(w, k="model"), communicates="all-reduce")
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)

    w = weight(spec, lead=(L,), stack=(E,))
    x = rows(E, M, K)
    expected = np.einsum("emk,ekn->emn", x, np.asarray(w.matrix()[1], np.float64))
    args = on.place(x, "model", "data"), on.weight(w, lead=("model",))
    out = on.run(lambda x, w: quantized_matmul(x, w, layer=jnp.int32(1)), *args)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-4)
    args = on.place(x), on.weight(w, lead=("model",), k="data")
    out = on.run(lambda x, w: quantized_matmul(x, w, layer=jnp.int32(1)), *args, communicates="all-reduce")
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-4)


def check_transformations(on: On) -> None:
    """Gradients in x, `vmap`, bfloat16 and a product inside `shard_map`."""
    w, x = weight(FORMATS["int4"]), rows(M, K)
    matrix = np.asarray(w.matrix(), np.float64)

    def gradient(x: Any, w: QTensor) -> Any:
        return jax.grad(lambda x: jnp.sum(jnp.sin(quantized_matmul(x, w) / 16)))(x)

    expected = np.cos(x @ matrix / 16) @ matrix.T / 16
    out = on.run(gradient, on.place(x, "data"), on.weight(w, n="model"), communicates="all-reduce")
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)
    out = on.run(gradient, on.place(x, "data", "model"), on.weight(w, k="model"), communicates="all-reduce")
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)

    several = np.stack([x, 2 * x])
    args = on.place(several, "data"), on.weight(w, n="model")
    out = on.run(jax.vmap(quantized_matmul, in_axes=(0, None)), *args)
    np.testing.assert_allclose(out, several @ matrix, rtol=1e-5, atol=1e-4)

    def narrow(x: Any, w: QTensor) -> Any:
        out = quantized_matmul(x.astype(jnp.bfloat16), w, casts=(jnp.bfloat16,))
        assert out.dtype == jnp.bfloat16
        return out.astype(jnp.float32)

    out = on.run(narrow, on.place(x, "data", "model"), on.weight(w, k="model"), communicates="all-reduce")
    np.testing.assert_allclose(out, x @ matrix, rtol=2e-2, atol=0.3)

    def manual(x: Any, w: QTensor) -> Any:
        part = dataclasses.replace(w, layout=Layout((((K, "k"),), ((N // 4, "n"),))))
        return quantized_matmul(x, part)

    mapped = jax.shard_map(manual, mesh=on.mesh, in_specs=(P("data"), P(None, "model")), out_specs=P("data", "model"))
    out = on.run(mapped, on.place(x, "data"), on.weight(w, n="model"))
    np.testing.assert_allclose(out, x @ matrix, rtol=1e-5, atol=1e-4)
    if not on.explicit:  # a shard_map that leaves "model" to XLA
        partly = jax.shard_map(
            quantized_matmul, mesh=on.mesh, in_specs=(P("data"), P()), out_specs=P("data"), axis_names={"data"}
        )
        out = on.run(partly, on.place(x, "data"), on.weight(w, n="model"))
        np.testing.assert_allclose(out, x @ matrix, rtol=1e-5, atol=1e-4)


def check_export(on: On) -> None:
    w, x = weight(FORMATS["int4"]), rows(M, K)
    leaves, tree = jax.tree.flatten(on.weight(w, k="model"))
    args = on.place(x, "data", "model"), *leaves
    program = export.export(
        jax.jit(lambda x, *leaves: quantized_matmul(x, jax.tree.unflatten(tree, leaves))), platforms=("cpu", "cuda")
    )(*args)
    out = export.deserialize(program.serialize()).call(*args)
    np.testing.assert_allclose(out, x @ np.asarray(w.matrix(), np.float64), rtol=1e-5, atol=1e-4)


def check_errors(on: On) -> None:
    x, everywhere = rows(M, K), ("data", "model")

    def multiply(x: Any, w: QTensor, **options: Any) -> None:
        jax.jit(functools.partial(quantized_matmul, **options))(x, w)

    coarse = weight(int4(group=64, scale=AbsMax()))  # four groups
    with pytest.raises(
        ValueError, match=r"K=256 .* over 8 devices, 32 values each.* multiple of 64 .* K over 4 devices"
    ):
        multiply(on.place(x), dataclasses.replace(coarse, words=on.place(coarse.words, everywhere)))
    short = quantize(jnp.ones((60, N)), int4(group=64, scale=AbsMax()), Layout((((60, "k"),), ((N, "n"),))))
    with pytest.raises(ValueError, match=r"K=60 .* 7\.5 values each.* multiple of 8 values"):  # eight words
        multiply(on.place(x[:, :60]), on.weight(short, k=everywhere))
    with pytest.raises(ValueError, match="int3 is stored as bit planes"):
        multiply(on.place(x), on.weight(weight(int3(group=32)), k="model"))
    with pytest.raises(ValueError, match=r"the layers of a packed int8.* are split over devices"):
        multiply(on.place(x), on.weight(weight(FORMATS["int8"], lead=(4,)), lead=("model",)), layer=1)
    whole = weight(FORMATS["int8"])
    with pytest.raises(ValueError, match="along K over mesh axes model; the words are split over no mesh axis"):
        multiply(on.place(x, None, "model"), on.weight(whole))
    with pytest.raises(ValueError, match="mesh axis 'model' splits two axes of one product"):
        multiply(on.place(x, "model"), on.weight(whole, n="model"))


def check_tpu(on: On) -> None:
    """The same communication in what the TPU compiler makes; with explicit axes, around the kernel."""
    for split, summed in [("n", ""), ("k", "all-reduce")]:
        x = on.place(rows(M, K), "data", "model" if split == "k" else None)
        w = on.weight(weight(FORMATS["int4"]), **{split: "model"})
        program = on.compile(quantized_matmul, x, w, communicates=summed)
        assert ("tpu_custom_call" in program.as_text()) == on.explicit
        codes, scale, zero = integer_rows(M)
        w = on.weight(weight(FORMATS["int8"]), **{split: "model"})
        args = on.place(codes, "data"), on.place(scale, "data"), on.place(zero, "data"), w
        on.compile(integer_matmul, *args, communicates=summed)
        codes = on.place(rows(M, K).astype(jnp.float8_e4m3fn), "data", "model" if split == "k" else None)
        w = on.weight(weight(FORMATS["fp8"], "nk"), **{split: "model"})
        on.compile(fp8_matmul, codes, on.place(scale, "data"), w, communicates=summed)


def mesh(devices: Any, kind: AxisType) -> On:
    return On(Mesh(np.asarray(devices).reshape(2, -1), ("data", "model"), axis_types=(kind, kind)))


def main(platform: str) -> None:
    for kind in (AxisType.Explicit, AxisType.Auto):
        if platform == "tpu":
            for name in ("v5e:2x2", "v6e:2x4"):
                topology = topologies.get_topology_desc(platform="tpu", topology_name=name)
                check_tpu(mesh(topology.devices, kind))
            continue
        on = mesh(jax.devices(), kind)
        check_choice(on)
        check_products(on)
        check_stacks(on)
        check_transformations(on)
        check_export(on)
        if on.explicit:
            check_errors(on)


# --- The tests -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_mesh(platform: str):
    env = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_LOG_DIR": "disabled",
    }
    out = subprocess.run([sys.executable, __file__, platform], capture_output=True, text=True, env=env)
    assert out.returncode == 0, out.stderr[-4000:]


if __name__ == "__main__":
    main(sys.argv[1])

"""Compiles programs for an NVIDIA GPU on a machine that has none, and counts what the compiler made of its kernels.

JAX's CUDA plugin holds XLA for GPUs and `ptxas`. It needs the description of a chip, not the chip, and neither driver
nor CUDA toolkit:

    compiled = compile(f, jax.ShapeDtypeStruct((16, 4096), jnp.bfloat16), ..., chip="h100")
    compiled.as_text()  # optimized HLO
    compiled, kernels = compile_counted(f, ..., chip="h100")  # registers, spills, instructions of Mosaic GPU kernels
    compiled, kernels = compile_triton_counted(f, ..., chip="h100")  # the same of Triton's

Instructions are counted where `nvdisasm` is installed (pip install nvidia-cuda-nvdisasm). Nothing runs, so nothing here
says how long a program takes. XLA chooses its own kernels by timing them, so what it makes of ordinary operations here
is not what it makes of them on a GPU. Tests import this file. As a program it writes `benchmarks/gpu_compile.md`, a
table of all variants of the kernels:

    python scripts/gpu/gpu_compile.py
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import functools
import importlib.metadata
import importlib.util
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.extend.core import primitives as prims
from jax.sharding import SingleDeviceSharding

from qjax.pallas_kernels.backends.epilogue import Epilogue, Step
from qjax.pallas_kernels.backends.mosaic import whole_rows
from qjax.pallas_kernels.chips import gpu as gpu_chips
from qjax.pallas_kernels.numbers.activation_ranges import ActSpec, MinMax
from qjax.pallas_kernels.numbers.activations import Activation
from qjax.pallas_kernels.numbers.formats import FORMATS, AbsMax, PerChannel, PerGroup, QuantSpec
from qjax.pallas_kernels.ops.cache_attention.api import cache_attention
from qjax.pallas_kernels.ops.cache_attention.reference import AttentionSpec, CacheDot
from qjax.pallas_kernels.ops.integer_matmul import mosaic as integer_matmul_mosaic
from qjax.pallas_kernels.ops.integer_matmul import triton as integer_matmul_triton
from qjax.pallas_kernels.ops.matmul import mosaic as matmul_mosaic
from qjax.pallas_kernels.ops.matmul import triton as matmul_triton
from qjax.pallas_kernels.ops.ragged_matmul.api import quantized_ragged_matmul
from qjax.pallas_kernels.packed import qcache
from qjax.pallas_kernels.packed.layout import Layout
from qjax.pallas_kernels.packed.qcache import CacheSpec
from qjax.pallas_kernels.packed.qtensor import QTensor, quantize

PAGE = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu_compile.md"

# With the plugin installed JAX would look for a GPU, and fail where there is none.
jax.config.update("jax_platforms", "cpu")

# GpuTargetConfigProto, from the public numbers of each chip.
_TARGET = """
gpu_device_info {{
  name: "{name}"
  cuda_compute_capability {{ major: {major} minor: {minor} {features} }}
  platform_version: "Compute Capability {major}.{minor}"
  core_count: {processors}
  clock_rate_ghz: {clock}
  memory_bandwidth: {bandwidth}
  device_memory_size: {memory}
  l2_cache_size: {cache}
  shared_memory_per_core: {shared}
  shared_memory_per_block_optin: {shared_optin}
  shared_memory_per_block: 49152
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  threads_per_warp: 32
  fpus_per_core: {fpus}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  device_address_bits: 64
  device_vendor: "NVIDIA Corporation"
  driver_version: "13.0.0"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{name}"
"""

CHIPS = {
    "h100": _TARGET.format(
        name="NVIDIA H100 80GB HBM3",
        major=9,
        minor=0,
        features="feature_extension: ACCELERATED_FEATURES",
        processors=132,
        clock=1.98,
        bandwidth=3352320000000,
        memory=84942979072,
        cache=52428800,
        shared=233472,
        shared_optin=232448,
        fpus=128,
    ),
    "a100": _TARGET.format(
        name="NVIDIA A100-SXM4-80GB",
        major=8,
        minor=0,
        features="",
        processors=108,
        clock=1.41,
        bandwidth=2039000000000,
        memory=84986691584,
        cache=41943040,
        shared=167936,
        shared_optin=166912,
        fpus=64,
    ),
}
"""By name, what the compiler is told of a chip."""

_PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin")


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What a kernel was compiled to.

    Attributes:
        name: of the function in the machine code.
        registers: of a thread, when it starts; warpgroups may change theirs.
        spilled: bytes of registers that are stored to memory.
        serialized: whether the compiler waits after each `wgmma`, for want of registers or because it was misled.
        loop: instructions of the innermost loop that multiplies; None without `nvdisasm`.
        products: those that multiply among them, such as `wgmma`.
    """

    name: str
    registers: int
    spilled: int
    serialized: bool
    loop: int | None = None
    products: int | None = None


def available() -> bool:
    """Whether the compiler is installed."""
    assembler = _tools("ptxas") is not None or jax.__version_info__ < (0, 11)  # the plugin had one of its own
    return assembler and any(importlib.util.find_spec(name) for name in _PLUGINS)


def compile(function: Callable[..., Any], *args: Any, chip: str, **kwargs: Any) -> jax.stages.Compiled:
    """Compiles `function`, jitted or not, for one GPU.

    Args:
        function: what to compile.
        args, kwargs: its arguments, arrays or anything with a shape and a dtype (`jax.ShapeDtypeStruct`).
        chip: a key of `CHIPS`.

    Raises:
        ValueError: there is no such chip.
        ModuleNotFoundError: the CUDA plugin is not installed.
        Exception: whatever Pallas or the compiler says about the program.
    """
    return _compile(function, args, kwargs, chip, {})


def _compile(function: Any, args: Any, kwargs: Any, chip: str, options: dict[str, Any]) -> jax.stages.Compiled:
    sharding = SingleDeviceSharding(_topology(chip).devices[0])
    args, kwargs = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), (args, kwargs))
    jitted = function if hasattr(function, "trace") else jax.jit(function)
    with _abstract(chip):
        return jitted.trace(*args, **kwargs).lower(lowering_platforms=("cuda",)).compile(options)


def _abstract(chip: str) -> contextlib.AbstractContextManager[Any]:
    """Says which GPU it is to Triton's lowering, which asks for a device from jax 0.11 on."""
    device: Any = getattr(jax.sharding, "AbstractDevice", None)
    if device is None or jax.__version_info__ < (0, 11):
        return contextlib.nullcontext()
    known = gpu_chips.CHIPS[chip]
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=device(known.kind, known.processors, "gpu"))
    return jax.sharding.use_abstract_mesh(mesh)


@functools.cache
def _topology(chip: str) -> topologies.TopologyDescription:
    if chip not in CHIPS:
        raise ValueError(f"chip={chip!r}: one of {', '.join(CHIPS)}.")
    if not available():
        raise ModuleNotFoundError(
            "JAX's CUDA plugin is not installed: pip install jax-cuda13-plugin jax-cuda13-pjrt, both of the version of "
            "jax, and from jax 0.11 on nvidia-cuda-nvcc (Linux on x86-64; no GPU is needed).",
            name=_PLUGINS[0],
        )
    if root := _tools("ptxas"):
        os.environ["PATH"] = os.pathsep.join((str(root / "bin"), os.environ["PATH"]))
    return topologies.get_topology_desc(platform="cuda", topology="1x1x1", target_config=CHIPS[chip])


def compile_counted(
    function: Callable[..., Any], *args: Any, chip: str, **kwargs: Any
) -> tuple[jax.stages.Compiled, list[Kernel]]:
    """As `compile`, with what `ptxas` says of each Mosaic GPU kernel of the program."""
    wanted = {"MOSAIC_GPU_DUMP_PTXAS": "1"}
    if root := _tools("nvdisasm"):
        wanted |= {"MOSAIC_GPU_DUMP_SASS": "1", "MOSAIC_GPU_CUDA_ROOT": str(root), "CUDA_ROOT": str(root)}
    _topology(chip)
    with tempfile.TemporaryFile("w+") as file:
        with _environment(wanted), _output(file.fileno()):
            compiled = compile(function, *args, chip=chip, **kwargs)
        file.seek(0)
        text = file.read()
    reports = re.split(r"(?=^ptxas info +: 0 bytes gmem)", text, flags=re.MULTILINE)
    serialized = ["serialized" in before for before in reports[:-1]]  # it is said before
    return compiled, [
        _counted(_read(report, waits), report) for report, waits in zip(reports[1:], serialized, strict=True)
    ]


def compile_triton_counted(
    function: Callable[..., Any], *args: Any, chip: str, **kwargs: Any
) -> tuple[jax.stages.Compiled, list[Kernel]]:
    """As `compile`, with what `ptxas` says of Triton's kernels and XLA's own; of none where it is not installed."""
    found: dict[str, Kernel] = {}
    with tempfile.TemporaryDirectory() as folder:
        compiled = _compile(function, args, kwargs, chip, {"xla_dump_to": folder})
        if (root := _tools("ptxas")) is None:
            return compiled, []
        for file in Path(folder).glob("*.ptx"):
            target = re.search(r"^\.target (\w+)", file.read_text(), re.MULTILINE)
            if target is None:  # nothing is in it
                continue
            command = [root / "bin" / "ptxas", f"-arch={target[1]}", "-v", file, "-o", file.with_suffix(".cubin")]
            report = subprocess.run(command, check=True, capture_output=True, text=True).stderr
            code = _disassembled(file.with_suffix(".cubin"))
            for part in re.split(r"(?=^ptxas info +: Compiling entry function)", report, flags=re.MULTILINE)[1:]:
                kernel = _read(part, False)
                found[kernel.name] = _counted(kernel, code.get(kernel.name, ""))
    return compiled, [*found.values()]


def _disassembled(cubin: Path) -> dict[str, str]:
    """The machine code of each function; of none without `nvdisasm`."""
    if (root := _tools("nvdisasm")) is None:
        return {}
    text = subprocess.run([root / "bin" / "nvdisasm", "-c", cubin], check=True, capture_output=True, text=True).stdout
    _, *parts = re.split(r"^\s*\.section\s+\.text\.(\w+)", text, flags=re.MULTILINE)
    return dict(zip(parts[::2], parts[1::2], strict=True))


def _counted(kernel: Kernel, code: str) -> Kernel:
    """With the instructions of its innermost loop."""
    loop = _loop(code)
    products = sum("MMA" in instruction for instruction in loop) if loop else None
    return dataclasses.replace(kernel, loop=len(loop) if loop else None, products=products)


def _read(report: str, serialized: bool) -> Kernel:
    def number(pattern: str) -> int:
        found = re.search(pattern, report)
        assert found is not None, report[:500]
        return int(found[1])

    name = re.search(r"entry function '(\w+)'", report)
    assert name is not None, report[:500]
    return Kernel(
        name=name[1],
        registers=number(r"Used (\d+) registers"),
        spilled=number(r"(\d+) bytes spill stores"),
        serialized=serialized,
    )


def _loop(report: str) -> list[str] | None:
    """The shortest stretch of machine code between a label and a jump back to it that multiplies."""
    code, labels, found = [], {}, None
    for line in report.splitlines():
        if label := re.match(r"\s*\.(L_\w+):", line):
            labels[label[1]] = len(code)
        if instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.+?)\s*$", line):
            code.append(instruction[1])
    for end, instruction in enumerate(code):
        jump = re.search(r"BRA.*\.(L_\w+)", instruction)
        if jump and labels.get(jump[1], end + 1) <= end:
            body = code[labels[jump[1]] : end + 1]
            if any("MMA" in one for one in body) and (found is None or len(body) < len(found)):
                found = body
    return found


def _tools(program: str) -> Path | None:
    """Where `bin` with this program is."""
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations or () if spec else ():
        for file in Path(folder).glob(f"*/bin/{program}"):
            return file.parent.parent
    found = shutil.which(program)
    return Path(found).parent.parent if found else None


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _output(descriptor: int) -> Iterator[None]:
    """Sends what this process prints to a file: the compiler prints, and knows nothing of `sys.stdout`."""
    sys.stdout.flush()
    saved = os.dup(1)
    os.dup2(descriptor, 1)
    try:
        yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)


# --- The kernels ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Variant:
    """A product that is compiled: its weight, and sizes.

    Attributes:
        format: of the weight, a key of `FORMATS`.
        group: values that share a scale; None for a scale for each channel.
        zero_point: whether the weight has zero points.
        dtype: of x and of the float weight.
        m, k, n: sizes.
    """

    format: str
    group: int | None
    zero_point: bool
    dtype: str
    m: int
    k: int
    n: int

    def __str__(self) -> str:
        """Short, unique and the same in every process."""
        weight = f"{self.format}{'z' if self.zero_point else ''}-{f'g{self.group}' if self.group else 'channel'}"
        return f"{weight}-{self.dtype}-{self.m}x{self.k}x{self.n}"

    def weight(self, order: Any, lead: tuple[int, ...] = ()) -> QTensor:
        """The packed weight, shapes only, with these axes in front."""
        scale = "bfloat16" if self.group else "float32"
        granularity = PerGroup(self.group) if self.group else PerChannel()
        spec = QuantSpec(
            FORMATS[self.format], granularity, scale_dtype=scale, scale_rule=AbsMax(), zero_point=self.zero_point
        )
        layout = Layout((((self.k, "k"),), ((self.n, "n"),)))
        shape = jax.ShapeDtypeStruct((*lead, self.k, self.n), jnp.dtype(self.dtype))
        return jax.eval_shape(lambda w: quantize(w, spec, layout, order), shape)

    def x(self) -> jax.ShapeDtypeStruct:
        """The other operand, shape only."""
        return jax.ShapeDtypeStruct((self.m, self.k), jnp.dtype(self.dtype))

    def codes(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """The other operand of an integer product, shapes only: codes, scales and zero points."""
        row = jax.ShapeDtypeStruct((self.m, 1), jnp.float32)
        return jax.ShapeDtypeStruct((self.m, self.k), jnp.int8), row, row


VARIANTS = (
    *(Variant("int4", 128, False, "bfloat16", m, 4096, 4096) for m in (1, 16, 64, 256, 2048)),
    *(Variant("int4", group, False, "bfloat16", m, 8192, 8192) for group in (32, 64, None) for m in (16, 2048)),
    *(Variant("int8", group, False, "bfloat16", m, 4096, 14336) for group in (None, 128) for m in (1, 64, 2048)),
    *(Variant(format, 128, True, "bfloat16", 16, 4096, 4096) for format in ("int4", "int8")),
    Variant("int4", 128, False, "float32", 16, 4096, 4096),
    Variant("int4", 128, False, "float16", 16, 4096, 4096),
    Variant("int8", None, False, "float16", 256, 4096, 4096),
    Variant("int4", 96, True, "bfloat16", 5, 4032, 960),
    Variant("int8", None, False, "float32", 50, 960, 64),
)
INTEGER = (
    *(Variant("int8", None, False, "bfloat16", m, 4096, 4096) for m in (1, 16, 256, 2048)),
    *(Variant("int4", None, False, "bfloat16", m, 4096, 4096) for m in (16, 2048)),
    *(Variant("int4", 128, False, "bfloat16", m, 4096, 14336) for m in (1, 64, 2048)),
    Variant("int8", 64, True, "float32", 256, 4096, 4096),
    Variant("int4", 64, True, "float16", 100, 4032, 960),
)
"""Of the kernels of `integer_matmul`; the dtype is that of the result."""

CODES = (
    *(Variant("nf4", 64, False, "bfloat16", m, 4096, 4096) for m in (16, 2048)),
    Variant("fp4_e2m1", 32, False, "float16", 16, 4096, 4096),
    Variant("fp8_e4m3", 128, False, "bfloat16", 16, 4096, 4096),
    Variant("fp8_e5m2", None, False, "float32", 16, 4096, 960),
)
"""Formats other than integers."""

TRANSPOSED = tuple(Variant("int4", 64, True, "bfloat16", m, 4096, 4096) for m in (16, 2048))
"""With N contracted."""

BF16 = jnp.dtype(jnp.bfloat16)
_ADDED = tuple(Step(prims.add_p, operands, (), BF16) for operands in ((0, 1), (3, 2)))
_GATED = (
    Step(prims.logistic_p, (0,), (("accuracy", None),), BF16),
    *(Step(prims.mul_p, operands, (), BF16) for operands in ((0, 2), (3, 1))),
)
EPILOGUES = {"bias, residual": Epilogue(BF16, 1, 2, _ADDED, 4), "gated pair": Epilogue(BF16, 2, 0, _GATED, 4)}
FUSED = (
    *(("bias, residual", Variant("int4", 128, False, "bfloat16", m, 4096, 4096)) for m in (256, 2048)),
    *(("gated pair", Variant("int4", 128, False, "bfloat16", m, 4096, 14336)) for m in (1, 16, 64, 2048)),
    ("gated pair", Variant("int8", None, True, "bfloat16", 256, 4096, 14336)),
    ("gated pair", Variant("int4", 32, True, "bfloat16", 16, 4096, 14336)),
)
"""Products with what follows them."""

_QUANTIZED = ActSpec(FORMATS["int8"], MinMax(), "tensor", zero_point=True)
INTEGER_EPILOGUES = {
    **EPILOGUES,
    "bias, codes": Epilogue(BF16, 1, 3, (Step(prims.add_p, (0, 1), (), BF16),), 4, _QUANTIZED),
    "gated codes": Epilogue(BF16, 2, 2, (*_GATED[:1], *(
        Step(prims.mul_p, operands, (), BF16) for operands in ((0, 4), (5, 1)))), 6, _QUANTIZED),
}  # fmt: skip
INTEGER_FUSED = (
    *(("gated pair", Variant("int8", None, False, "bfloat16", m, 4096, 14336)) for m in (16, 2048)),
    *(("gated codes", Variant("int8", None, False, "bfloat16", m, 4096, 14336)) for m in (16, 2048)),
    ("gated codes", Variant("int4", 128, False, "bfloat16", 64, 4096, 14336)),
    ("bias, codes", Variant("int8", None, False, "bfloat16", 256, 4096, 4096)),
    ("bias, residual", Variant("int4", 128, True, "bfloat16", 64, 4096, 4096)),
)
"""Integer products with what follows them; codes of the next product's x."""

JOINT = tuple((Variant("int4", 128, False, "bfloat16", m, 4096, 4096), (4096, 1024, 1024)) for m in (1, 16, 2048))
"""Products of one x with weights of several widths."""


@dataclasses.dataclass(frozen=True)
class Attention:
    """Attention on packed caches that is compiled.

    Attributes:
        format, zero_point: of keys and values.
        dtype: of queries and results.
        queries: that read the same head of the caches.
        t: positions.
        d: values of a vector.
        mask: how many queries have a mask of their own, 1 if all share one; 0 if there is none.
        layers: in a stack of caches, of which one is read; 0 if there is no stack.
    """

    format: str
    zero_point: bool
    dtype: str
    queries: int
    t: int
    d: int
    mask: int = 1
    layers: int = 0

    def __str__(self) -> str:
        """Short, unique and the same in every process."""
        form = f"{self.format}{'z' if self.zero_point else ''}-{self.dtype}"
        return f"{form}-{self.queries}x{self.t}x{self.d}-mask{self.mask}-layers{self.layers}"

    def program(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """`cache_attention`, of 8 sequences with caches `(8, T, 8, D)`, and its operands, shapes only."""
        dtype, lead = jnp.dtype(self.dtype), (self.layers,) if self.layers else ()
        spec = CacheSpec(FORMATS[self.format], self.zero_point)
        cache = jax.eval_shape(lambda: qcache.zeros((*lead, 8, self.t, 8, self.d), dtype, spec, -1))
        heads = ((0, 1), (0, 2))
        scores, result = (CacheDot((((3,), (axis,)), heads), 1, None, dtype) for axis in (3, 1))
        steps: Any = (("multiply", 0.125), *([("mask", -math.inf)] if self.mask else []))
        attend = AttentionSpec(scores, (0, 1, 2, 3), steps, dtype, result)
        q = jax.ShapeDtypeStruct((8, 8, self.queries, self.d), dtype)
        mask = jax.ShapeDtypeStruct((8, 1, self.mask, self.t), jnp.bool_) if self.mask else None
        layer = jax.ShapeDtypeStruct((), jnp.int32) if self.layers else None

        def run(q: Any, keys: Any, values: Any, mask: Any, layer: Any) -> Any:
            return cache_attention(q, keys, values, mask, attend, None if layer is None else (layer, layer))

        return run, (q, cache, cache, mask, layer)


ATTENTION = (
    *(Attention(format, False, "bfloat16", 4, 8192, 128) for format in ("int8", "int4")),
    Attention("int8", True, "bfloat16", 1, 1000, 64, mask=0),
    Attention("int4", True, "float32", 3, 1000, 80, layers=4),
    Attention("int4", False, "bfloat16", 2048, 4096, 128, mask=2048),
    Attention("int8", False, "float16", 200, 4096, 256, mask=200),
    Attention("int2", True, "bfloat16", 8, 4096, 128),
)


def ragged(variant: Variant, order: Any, experts: int = 8, layers: int = 4) -> tuple[Callable[..., Any], Any]:
    """`quantized_ragged_matmul` of one layer, and its operands, shapes only."""
    w = variant.weight(order, (layers, experts))
    w = dataclasses.replace(w, layout=Layout((((experts, "stack"),), *w.layout.axes)))
    sizes, layer = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((experts,), ()))
    return lambda x, w, sizes, i: quantized_ragged_matmul(x, w, sizes, layer=i), (variant.x(), w, sizes, layer)


RAGGED = (
    *(Variant("int4", 128, False, "bfloat16", m, 4096, 14336) for m in (16, 256, 4096)),
    Variant("int8", None, True, "bfloat16", 16, 4096, 14336),
    Variant("int4", 32, True, "float32", 100, 960, 200),
)
"""Of `quantized_ragged_matmul`, with rows of all experts."""

OPTIONS: dict[str, Any] = {"casts": (), "precision": None, "preferred_element_type": None, "transpose": False}


def product(kernel: Any, layer: int | None = None, **options: Any) -> Callable[..., Any]:
    """`matmul` of the module of a kernel, as a function of x and the weight."""
    return lambda x, w: kernel.matmul(x, w, layer=layer, **OPTIONS, **options)


def integer_product(kernel: Any, dtype: str, layer: int | None = None, **options: Any) -> Callable[..., Any]:
    """`matmul` of the module of a kernel of `integer_matmul`, as a function of `Variant.codes` and the weight."""
    return lambda x, scale, zero, w: kernel.matmul(
        x, scale, zero, w, layer=layer, out_dtype=jnp.dtype(dtype), **options
    )


def fused(kernel: Any, name: str, variant: Variant, order: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """`fused_matmul` of the module of a kernel, with one of `EPILOGUES`, and its operands."""
    epilogue, how = EPILOGUES[name], {key: OPTIONS[key] for key in OPTIONS if key != "transpose"}
    shapes = ((1, 1, variant.n), (1, variant.m, variant.n))[: epilogue.others]

    def run(x: Any, weights: Any, others: Any) -> Any:
        return kernel.fused_matmul(x, weights, others, layers=[None] * len(weights), epilogue=epilogue, **how)

    others = [jax.ShapeDtypeStruct(shape, BF16) for shape in shapes]
    return run, (variant.x(), [variant.weight(order)] * epilogue.products, others)


def fused_integers(kernel: Any, name: str, variant: Variant, order: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """`fused_matmul` of a module for integers, with one of `INTEGER_EPILOGUES`, and its operands."""
    epilogue = INTEGER_EPILOGUES[name]
    shapes = [(1, 1, variant.n), (1, variant.m, variant.n)] if name == "bias, residual" else [(1, 1, variant.n)]
    others = [jax.ShapeDtypeStruct(shape, BF16) for shape in (shapes if epilogue.products == 1 else [])]
    others += [jax.ShapeDtypeStruct((1, 1, 1), jnp.float32)] * (epilogue.others - len(others))

    def run(codes: Any, scale: Any, zero: Any, weights: Any, others: Any) -> Any:
        x, layers = Activation(codes, scale, zero), [None] * len(weights)
        return kernel.fused_matmul(x, weights, others, layers=layers, epilogue=epilogue)

    return run, (*variant.codes(), [variant.weight(order)] * epilogue.products, others)


def joint(variant: Variant, widths: tuple[int, ...]) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """`ops.matmul.mosaic.joint_matmul`, and its operands: weights of these widths."""
    how = {key: OPTIONS[key] for key in OPTIONS if key != "transpose"}

    def run(x: Any, weights: Any) -> Any:
        return matmul_mosaic.joint_matmul(x, weights, layers=[None] * len(weights), **how)

    return run, (variant.x(), [dataclasses.replace(variant, n=n).weight("nk") for n in widths])


def transposed(variant: Variant, order: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """`matmul_triton.matmul` with N contracted, and its operands."""
    options = {**OPTIONS, "transpose": True}
    x = jax.ShapeDtypeStruct((variant.m, variant.n), jnp.dtype(variant.dtype))
    return lambda x, w: matmul_triton.matmul(x, w, layer=None, **options), (x, variant.weight(order))


TRITON = ("quantized_matmul", "integer_matmul", "fused_integer_matmul", "cache_attention", "quantized_ragged_matmul")
"""Names of kernels in machine code; what XLA compiles by Triton has others."""


def triton_programs() -> Iterator[tuple[str, tuple[Callable[..., Any], Any]]]:
    """Names and programs, with their operands, each of one kernel for Triton on any chip."""
    for variant in (*VARIANTS, *(variant for variant in CODES if FORMATS[variant.format].bits == 4)):
        yield str(variant), (product(matmul_triton), (variant.x(), variant.weight("kn")))
    for variant in TRANSPOSED:
        yield f"{variant} transposed", transposed(variant, "kn")
    for variant in INTEGER:
        function = integer_product(integer_matmul_triton, variant.dtype)
        yield f"{variant} integers", (function, (*variant.codes(), variant.weight("kn")))
    for epilogue, variant in INTEGER_FUSED:
        yield f"{variant} {epilogue}", fused_integers(integer_matmul_triton, epilogue, variant, "kn")
    for row in ATTENTION:
        yield str(row), row.program()
    for variant in RAGGED:
        yield f"{variant} experts", ragged(variant, "kn")


# --- The table -----------------------------------------------------------------------------------------------------

Row = tuple[str, Kernel, str, str]
"""A program, its kernel, the tiles, and instructions as text."""


def _tiles(blocks: Any) -> str:
    return f"{blocks.m} x {blocks.n} x {blocks.k} / {blocks.ways}, {blocks.stages} stages, {blocks.splits} splits"


def mosaic_rows() -> Iterator[Row]:
    """Kernels of weight-only products for Hopper."""
    for variant in VARIANTS + CODES:
        _, (kernel,) = compile_counted(product(matmul_mosaic), variant.x(), variant.weight("nk"), chip="h100")
        rows, form = variant.m * (2 if variant.dtype == "float32" else 1), FORMATS[variant.format]
        how: dict[str, Any] = {"kind": form.kind, "out_dtype": jnp.dtype(variant.dtype)}
        blocks = matmul_mosaic.default_blocks(rows, variant.k, variant.n, form.bits, **how)
        weights = 64 * blocks.k // blocks.ways
        each = f"{kernel.loop * 8192 / weights:.0f} for 64 x 128 weights" if kernel.loop else ""
        yield str(variant), kernel, _tiles(blocks), each
    for name, variant in FUSED:
        function, operands = fused(matmul_mosaic, name, variant, "nk")
        _, (kernel,) = compile_counted(function, *operands, chip="h100")
        yield f"{variant} {name}", kernel, "", ""
    for variant, widths in JOINT:
        function, operands = joint(variant, widths)
        _, (kernel,) = compile_counted(function, *operands, chip="h100")
        yield f"{variant} {widths}", kernel, "", ""


def integer_mosaic_rows() -> Iterator[Row]:
    """Kernels of products of integers for Hopper, with zero points of x."""
    for variant in INTEGER:
        w, function = variant.weight("nk"), integer_product(integer_matmul_mosaic, variant.dtype)
        _, (kernel,) = compile_counted(function, *variant.codes(), w, chip="h100")
        blocks = integer_matmul_mosaic.default_blocks(whole_rows(variant.m), w, ones=8)
        each = f"{kernel.loop / kernel.products:.0f} for each of {kernel.products} wgmma" if kernel.products else ""
        yield str(variant), kernel, _tiles(blocks), each if kernel.loop else ""
    for name, variant in INTEGER_FUSED:
        if integer_matmul_mosaic.unsupported_epilogue(INTEGER_EPILOGUES[name], variant.weight("nk")) is None:
            function, operands = fused_integers(integer_matmul_mosaic, name, variant, "nk")
            _, (kernel,) = compile_counted(function, *operands, chip="h100")
            yield f"{variant} {name}", kernel, "", ""


def triton_rows(chip: str) -> Iterator[Row]:
    """Triton kernels of all kinds; none where `ptxas` is missing."""
    for name, (function, operands) in triton_programs():
        with gpu_chips.target_chip(chip):
            _, kernels = compile_triton_counted(function, *operands, chip=chip)
        for kernel in kernels:
            if kernel.name in TRITON:
                yield name, kernel, "", f"{kernel.loop} in the loop" if kernel.loop else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.parse_args()
    sections = [
        ("Mosaic GPU, sm_90a", mosaic_rows()),
        ("Mosaic GPU, sm_90a: integers", integer_mosaic_rows()),
        *((f"Triton, {chip}", triton_rows(chip)) for chip in CHIPS),
    ]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "jax-cuda13-plugin"))
    lines = [
        "<!-- Written by scripts/gpu/gpu_compile.py; run it again instead of editing. -->",
        "# Kernels for NVIDIA GPUs, compiled",
        "",
        "**Nothing here ran on a GPU.** Registers of a thread and bytes that it spills, as the assembler says; "
        '"waits" is yes where it made tensor core products wait for each other. Instructions are those of a warp, '
        "with what is beside them. A name has the format of the weight, the dtype of the result, and M x K x N.",
        "",
        f"{versions}, {datetime.date.today().isoformat()}.",
    ]
    for title, rows in sections:
        print(title, flush=True)
        lines += ["", f"## {title}", "", "| program | registers | spilled | waits | tiles | instructions |"]
        lines.append("|---|--:|--:|---|---|---|")
        for name, kernel, tiles, instructions in rows:
            waits = "yes" if kernel.serialized else ""
            cells = (name, str(kernel.registers), str(kernel.spilled), waits, tiles, instructions)
            print(*cells, sep="  ", flush=True)
            lines.append(f"| {' | '.join(cells)} |")
    PAGE.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

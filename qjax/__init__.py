"""qjax: the quantization compiler for JAX.

Wrap a Flax model (Linen, NNX or a plain function), read what is quantized and why the rest is not, train it or pack it:

    import jax, jax.numpy as jnp, qjax
    from flax import linen as nn

    model, x = nn.Dense(64), jnp.ones((2, 128))
    variables = model.init(jax.random.key(0), x)
    q = qjax.quantize(model, qjax.int4(group=64))
    print(q.plan(variables, x))  # every parameter: its format, or the reason why it has none
    y = q.apply(variables, x)  # float variables: fake-quant nodes, for training
    packed = q.convert(variables, x)  # int32 words and scales
    y = jax.jit(q.apply)(packed, x)  # packed variables: packed kernels, for serving
    qjax.save("model", q, packed)

Models
    quantize        wraps a model; it has plan, show, convert, apply (or a call), observe, calibrate and init
    lora            low-rank adapters on a wrapped model with packed weights
    arrange         packed matrices in the order that the kernels of a chip read
    compare         KL, top-1 agreement, SQNR and bytes of a wrapped model against the float one

Recipes: a name, a format, or rules of which the first match wins
    RECIPES         the recipes that have names, "int4" and "w8a8_static" among them
    Rule            a pattern of parameters, a format for them, and one for the inputs of their products
    Schedule        when training begins to quantize and stops to move ranges
    int2 ... int8, nf4, fp4_e2m1, fp8_e4m3, fp8_e5m2      formats of weights
    dynamic, static, lsq, pact                            formats of activations
    cache                                                 formats of key-value caches

Folders
    save, restore               checkpoints of packed models
    export, load_exported       folders that serve without the model's code and without Flax

Elsewhere
    target_chip     a context in which programs are made for a chip that this machine does not have
    QTensor         a packed array; QCache a packed key-value cache; Plan what was decided
"""

import importlib
from typing import TYPE_CHECKING, Any

# What `import qjax` takes is what this file takes: a name is imported when it is first used, so that serving needs no
# Flax, and nothing waits for Orbax or for kernels of another platform.
_NAMES = {
    "qjax.artifact.export": ("export",),
    "qjax.artifact.exported": ("ExportedModel", "load_exported"),
    "qjax.checkpoint.folder": ("CheckpointError",),
    "qjax.checkpoint.orbax": ("restore", "save"),
    "qjax.compile.calibration": ("Calibration",),
    "qjax.models.arrange": ("arrange",),
    "qjax.models.function": ("QuantizedFunction",),
    "qjax.models.linen": ("QuantizedLinen",),
    "qjax.models.lora": ("LoraFunction", "LoraLinen", "LoraNNX", "lora"),
    "qjax.models.nnx": ("QuantizedNNX",),
    "qjax.models.quantize": ("quantize",),
    "qjax.pallas_kernels.chips.target": ("target_chip",),
    "qjax.pallas_kernels.numbers.activation_ranges": (
        "ActSpec",
        "EntropyRange",
        "MinMax",
        "MovingAverage",
        "MseRange",
        "Percentile",
    ),
    "qjax.pallas_kernels.numbers.formats": (
        "FORMATS",
        "AbsMax",
        "MseSearch",
        "PerChannel",
        "PerGroup",
        "PerTensor",
        "QuantSpec",
        "QuickSearch",
        "SignedMax",
    ),
    "qjax.pallas_kernels.packed.qcache": ("CacheSpec", "QCache"),
    "qjax.pallas_kernels.packed.qtensor": ("QTensor",),
    "qjax.passes.plan.decisions": ("Plan",),
    "qjax.passes.plan.rules": ("PlanError", "Rule"),
    "qjax.recipes": (
        "RECIPES",
        "Recipe",
        "Schedule",
        "cache",
        "dynamic",
        "fp4_e2m1",
        "fp8_e4m3",
        "fp8_e5m2",
        "int2",
        "int3",
        "int4",
        "int5",
        "int6",
        "int7",
        "int8",
        "lsq",
        "nf4",
        "pact",
        "static",
    ),
    "qjax.report.compare": ("Comparison", "compare"),
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names}

__all__ = ["__version__", *sorted(_MODULE_OF)]  # pyright: ignore[reportUnsupportedDunderAll]

if TYPE_CHECKING:  # the same names, for editors and type checkers
    from qjax.artifact.export import export as export
    from qjax.artifact.exported import ExportedModel as ExportedModel, load_exported as load_exported
    from qjax.checkpoint.folder import CheckpointError as CheckpointError
    from qjax.checkpoint.orbax import restore as restore, save as save
    from qjax.compile.calibration import Calibration as Calibration
    from qjax.models.arrange import arrange as arrange
    from qjax.models.function import QuantizedFunction as QuantizedFunction
    from qjax.models.linen import QuantizedLinen as QuantizedLinen
    from qjax.models.lora import (
        LoraFunction as LoraFunction,
        LoraLinen as LoraLinen,
        LoraNNX as LoraNNX,
        lora as lora,
    )
    from qjax.models.nnx import QuantizedNNX as QuantizedNNX
    from qjax.models.quantize import quantize as quantize
    from qjax.pallas_kernels.chips.target import target_chip as target_chip
    from qjax.pallas_kernels.numbers.activation_ranges import (
        ActSpec as ActSpec,
        EntropyRange as EntropyRange,
        MinMax as MinMax,
        MovingAverage as MovingAverage,
        MseRange as MseRange,
        Percentile as Percentile,
    )
    from qjax.pallas_kernels.numbers.formats import (
        FORMATS as FORMATS,
        AbsMax as AbsMax,
        MseSearch as MseSearch,
        PerChannel as PerChannel,
        PerGroup as PerGroup,
        PerTensor as PerTensor,
        QuantSpec as QuantSpec,
        QuickSearch as QuickSearch,
        SignedMax as SignedMax,
    )
    from qjax.pallas_kernels.packed.qcache import CacheSpec as CacheSpec, QCache as QCache
    from qjax.pallas_kernels.packed.qtensor import QTensor as QTensor
    from qjax.passes.plan.decisions import Plan as Plan
    from qjax.passes.plan.rules import PlanError as PlanError, Rule as Rule
    from qjax.recipes import (
        RECIPES as RECIPES,
        Recipe as Recipe,
        Schedule as Schedule,
        cache as cache,
        dynamic as dynamic,
        fp4_e2m1 as fp4_e2m1,
        fp8_e4m3 as fp8_e4m3,
        fp8_e5m2 as fp8_e5m2,
        int2 as int2,
        int3 as int3,
        int4 as int4,
        int5 as int5,
        int6 as int6,
        int7 as int7,
        int8 as int8,
        lsq as lsq,
        nf4 as nf4,
        pact as pact,
        static as static,
    )
    from qjax.report.compare import Comparison as Comparison, compare as compare

    __version__: str


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value = _version()
    elif name not in _MODULE_OF:
        raise AttributeError(f"module 'qjax' has no attribute {name!r}")
    else:
        try:
            value = getattr(importlib.import_module(_MODULE_OF[name]), name)
        except ModuleNotFoundError as error:
            if (error.name or "").split(".")[0] != "flax":
                raise
            raise AttributeError(
                f"qjax.{name} does not exist, or needs Flax, which is not installed: pip install flax."
            ) from error
    globals()[name] = value  # found at once from now on
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _version() -> str:
    """The version that is installed; that of pyproject.toml where the sources run without an installation."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("qjax-compiler")
    except PackageNotFoundError:
        import tomllib
        from pathlib import Path

        return tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]["version"]

"""qjax: the quantization compiler for JAX."""

import importlib.util
from typing import TYPE_CHECKING

from qjax.artifact.exported import ExportedModel as ExportedModel
from qjax.artifact.exported import load_exported as load_exported
from qjax.checkpoint.folder import CheckpointError as CheckpointError
from qjax.compile.calibration import Calibration as Calibration
from qjax.pallas_kernels.chips.target import target_chip as target_chip
from qjax.pallas_kernels.numbers.activation_ranges import ActSpec as ActSpec
from qjax.pallas_kernels.numbers.activation_ranges import EntropyRange as EntropyRange
from qjax.pallas_kernels.numbers.activation_ranges import MinMax as MinMax
from qjax.pallas_kernels.numbers.activation_ranges import MovingAverage as MovingAverage
from qjax.pallas_kernels.numbers.activation_ranges import MseRange as MseRange
from qjax.pallas_kernels.numbers.activation_ranges import Percentile as Percentile
from qjax.pallas_kernels.numbers.formats import (
    FORMATS as FORMATS,
)
from qjax.pallas_kernels.numbers.formats import (
    AbsMax as AbsMax,
)
from qjax.pallas_kernels.numbers.formats import (
    MseSearch as MseSearch,
)
from qjax.pallas_kernels.numbers.formats import (
    PerChannel as PerChannel,
)
from qjax.pallas_kernels.numbers.formats import (
    PerGroup as PerGroup,
)
from qjax.pallas_kernels.numbers.formats import (
    PerTensor as PerTensor,
)
from qjax.pallas_kernels.numbers.formats import (
    QuantSpec as QuantSpec,
)
from qjax.pallas_kernels.numbers.formats import (
    QuickSearch as QuickSearch,
)
from qjax.pallas_kernels.numbers.formats import (
    SignedMax as SignedMax,
)
from qjax.pallas_kernels.packed.qcache import CacheSpec as CacheSpec
from qjax.pallas_kernels.packed.qcache import QCache as QCache
from qjax.pallas_kernels.packed.qtensor import QTensor as QTensor
from qjax.passes.plan.decisions import Plan as Plan
from qjax.passes.plan.rules import PlanError as PlanError
from qjax.passes.plan.rules import Rule as Rule
from qjax.recipes import (
    RECIPES as RECIPES,
)
from qjax.recipes import (
    Recipe as Recipe,
)
from qjax.recipes import Schedule as Schedule
from qjax.recipes import cache as cache
from qjax.recipes import dynamic as dynamic
from qjax.recipes import (
    fp4_e2m1 as fp4_e2m1,
)
from qjax.recipes import (
    fp8_e4m3 as fp8_e4m3,
)
from qjax.recipes import (
    fp8_e5m2 as fp8_e5m2,
)
from qjax.recipes import (
    int2 as int2,
)
from qjax.recipes import (
    int3 as int3,
)
from qjax.recipes import (
    int4 as int4,
)
from qjax.recipes import (
    int5 as int5,
)
from qjax.recipes import (
    int6 as int6,
)
from qjax.recipes import (
    int7 as int7,
)
from qjax.recipes import (
    int8 as int8,
)
from qjax.recipes import lsq as lsq
from qjax.recipes import (
    nf4 as nf4,
)
from qjax.recipes import pact as pact
from qjax.recipes import static as static

# A machine that serves an exported model needs no Flax.
if TYPE_CHECKING or importlib.util.find_spec("flax"):
    from qjax.artifact.export import export as export
    from qjax.checkpoint.orbax import restore as restore
    from qjax.checkpoint.orbax import save as save
    from qjax.models.arrange import arrange as arrange
    from qjax.models.function import QuantizedFunction as QuantizedFunction
    from qjax.models.linen import QuantizedLinen as QuantizedLinen
    from qjax.models.lora import LoraFunction as LoraFunction
    from qjax.models.lora import LoraLinen as LoraLinen
    from qjax.models.lora import LoraNNX as LoraNNX
    from qjax.models.lora import lora as lora
    from qjax.models.nnx import QuantizedNNX as QuantizedNNX
    from qjax.models.quantize import quantize as quantize
    from qjax.report.compare import Comparison as Comparison
    from qjax.report.compare import compare as compare
else:

    def __getattr__(name: str):
        raise AttributeError(f"qjax.{name} does not exist, or needs Flax, which is not installed: pip install flax.")

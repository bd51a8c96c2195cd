"""qjax: the quantization compiler for JAX."""

import importlib.util
from typing import TYPE_CHECKING

from pallas_kernels.activations import ActSpec as ActSpec
from pallas_kernels.activations import EntropyRange as EntropyRange
from pallas_kernels.activations import MinMax as MinMax
from pallas_kernels.activations import MovingAverage as MovingAverage
from pallas_kernels.activations import MseRange as MseRange
from pallas_kernels.activations import Percentile as Percentile
from pallas_kernels.chips import target_chip as target_chip
from pallas_kernels.formats import (
    FORMATS as FORMATS,
)
from pallas_kernels.formats import (
    AbsMax as AbsMax,
)
from pallas_kernels.formats import (
    MseSearch as MseSearch,
)
from pallas_kernels.formats import (
    PerChannel as PerChannel,
)
from pallas_kernels.formats import (
    PerGroup as PerGroup,
)
from pallas_kernels.formats import (
    PerTensor as PerTensor,
)
from pallas_kernels.formats import (
    QuantSpec as QuantSpec,
)
from pallas_kernels.formats import (
    QuickSearch as QuickSearch,
)
from pallas_kernels.formats import (
    SignedMax as SignedMax,
)
from pallas_kernels.kv_cache import CacheSpec as CacheSpec
from pallas_kernels.kv_cache import QCache as QCache
from pallas_kernels.qtensor import QTensor as QTensor
from passes.plan import Plan as Plan
from passes.plan import PlanError as PlanError
from passes.plan import Rule as Rule
from qjax.exported import ExportedModel as ExportedModel
from qjax.exported import load_exported as load_exported
from qjax.ranges import Calibration as Calibration
from qjax.ranges import Schedule as Schedule
from qjax.recipes import (
    RECIPES as RECIPES,
)
from qjax.recipes import (
    Recipe as Recipe,
)
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
from qjax.storage import CheckpointError as CheckpointError

# A machine that serves an exported model needs no Flax.
if TYPE_CHECKING or importlib.util.find_spec("flax"):
    from qjax.arrange import arrange as arrange
    from qjax.checkpoint import restore as restore
    from qjax.checkpoint import save as save
    from qjax.export import export as export
    from qjax.lora import LoraFunction as LoraFunction
    from qjax.lora import LoraLinen as LoraLinen
    from qjax.lora import LoraNNX as LoraNNX
    from qjax.lora import lora as lora
    from qjax.model import (
        QuantizedFunction as QuantizedFunction,
    )
    from qjax.model import (
        QuantizedLinen as QuantizedLinen,
    )
    from qjax.model import (
        QuantizedNNX as QuantizedNNX,
    )
    from qjax.model import (
        quantize as quantize,
    )
    from qjax.report import Comparison as Comparison
    from qjax.report import compare as compare
else:

    def __getattr__(name: str):
        raise AttributeError(f"qjax.{name} does not exist, or needs Flax, which is not installed: pip install flax.")

"""qjax: the quantization compiler for JAX."""

from pallas_kernels.formats import (
    FORMATS as FORMATS,
    AbsMax as AbsMax,
    MseSearch as MseSearch,
    PerChannel as PerChannel,
    PerGroup as PerGroup,
    PerTensor as PerTensor,
    QuantSpec as QuantSpec,
    SignedMax as SignedMax,
)
from pallas_kernels.qtensor import QTensor as QTensor
from passes.plan import Plan as Plan, PlanError as PlanError, Rule as Rule
from qjax.checkpoint import CheckpointError as CheckpointError, restore as restore, save as save
from qjax.model import (
    QuantizedFunction as QuantizedFunction,
    QuantizedLinen as QuantizedLinen,
    QuantizedNNX as QuantizedNNX,
    quantize as quantize,
)
from qjax.recipes import (
    RECIPES as RECIPES,
    Recipe as Recipe,
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
    nf4 as nf4,
)

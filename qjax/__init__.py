"""qjax: the quantization compiler for JAX."""

from pallas_kernels.qtensor import QTensor as QTensor
from passes.plan import Plan as Plan, PlanError as PlanError, Rule as Rule
from qjax.model import (
    QuantizedFunction as QuantizedFunction,
    QuantizedLinen as QuantizedLinen,
    QuantizedNNX as QuantizedNNX,
    quantize as quantize,
)
from qjax.recipes import RECIPES as RECIPES, Recipe as Recipe, int4 as int4, int8 as int8

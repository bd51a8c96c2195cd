"""Arrays that hold codes: packed parameters and packed key-value caches."""

from qjax.pallas_kernels.packed.qcache import QCache as QCache
from qjax.pallas_kernels.packed.qtensor import QTensor as QTensor

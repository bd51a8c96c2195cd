"""Settings of the whole suite: shapes in signatures are checked at run time, CPU only, small models."""

from __future__ import annotations

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from jaxtyping import install_import_hook

# before any of the packages is imported
_hook = install_import_hook(["qjax", "passes", "pallas_kernels"], "beartype.beartype")

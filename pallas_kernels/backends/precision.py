"""Precisions of products, as `lax.dot_general` takes them."""

from __future__ import annotations

from typing import Any

import jax


def precision_names(precision: Any) -> set[str]:
    """In capitals, what is asked for each operand, or the algorithm; JAX's default where nothing is asked for."""
    if precision is None:
        precision = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
    each = precision if isinstance(precision, tuple) else (precision,)
    return {str(getattr(p, "name", p)).upper() for p in each}

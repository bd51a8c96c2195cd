"""`lora`: low-rank adapters on a quantized model (QLoRA, arXiv 2305.14314), trained while the packed weights stay.

Adapters travel in a collection "lora" beside "params", nested by the path of their parameter:
`{"params": packed, "lora": {"up": {"kernel": {"a": ..., "b": ...}}}}`. They are float32 and the only leaves that train;
the forward multiplies them in the dtype of its activations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qjax.models.frameworks import binding_of
from qjax.models.function import LoraFunction as LoraFunction
from qjax.models.linen import LoraLinen as LoraLinen
from qjax.models.nnx import LoraNNX as LoraNNX
from qjax.passes.plan.adapters import AdapterSpec


def lora(q: Any, *, rank: int = 16, alpha: float = 32.0, targets: str | Sequence[str] = "**") -> Any:
    """Adds low-rank adapters to a quantized model: `y = x @ W + (x @ a) @ b * (alpha / rank)`.

    Args:
        q: what `qjax.quantize` (for NNX also `convert`) gave.
        rank: columns of `a`, rows of `b`.
        alpha: the adapters' product is multiplied by `alpha / rank`.
        targets: which parameters take adapters: a pattern of paths or several, as those of a `qjax.Rule`. One that ends
            in a wildcard takes what can be adapted, and `plan` says why the rest cannot; one that ends in a name means
            each parameter that it matches, and one of these that cannot be adapted is an error.

    Returns:
        `LoraLinen`, `LoraFunction` or `LoraNNX`, each with `plan`, `init`, `merge` and a call.

    Raises:
        TypeError: `q` is none of these.
        ValueError: a rank or an alpha that is not positive.

    Example:
        >>> q = qjax.quantize(model, "nf4")
        >>> m = qjax.lora(q, rank=16, targets="layers/**")
        >>> variables = m.init(jax.random.key(0), q.convert(variables, tokens), tokens)
        >>> gradient = jax.grad(lambda lora: loss(m.apply({**variables, "lora": lora}, tokens)))(variables["lora"])
    """
    patterns = (targets,) if isinstance(targets, str) else tuple(targets)
    spec = AdapterSpec(rank, float(alpha), patterns)
    binding = binding_of(q)
    if binding is None:
        raise TypeError(f"qjax: lora takes what qjax.quantize gives, not {type(q).__name__}. Quantize the model first.")
    if isinstance(q, binding.adapted):
        raise TypeError("qjax: this model has adapters already.")
    return binding.adapt(q, spec)

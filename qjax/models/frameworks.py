"""`FRAMEWORKS`: the frameworks that qjax knows, a row each."""

from __future__ import annotations

from typing import Any

from qjax.models.binding import Binding
from qjax.models.function import FUNCTION
from qjax.models.linen import LINEN
from qjax.models.nnx import NNX

FRAMEWORKS: tuple[Binding, ...] = (LINEN, NNX, FUNCTION)
"""The first that recognises a model has it: modules may be callable, so functions come last."""


def binding_of_float(model: Any) -> Binding | None:
    """The binding of a float model; None for what is no model."""
    return next((binding for binding in FRAMEWORKS if binding.recognises(model)), None)


def binding_of(q: Any) -> Binding | None:
    """The binding of what `qjax.quantize` or `qjax.lora` gave; None for anything else."""
    return next((b for b in FRAMEWORKS if isinstance(q, (b.wrapped, b.adapted))), None)


def titles(plural: bool = False) -> str:
    """All kinds of models for a message: "a Linen module, an NNX module or a function"."""
    names = [b.plural if plural else b.title for b in FRAMEWORKS]
    return f"{', '.join(names[:-1])} or {names[-1]}"


def holders() -> str:
    """The kinds of models that hold their variables, for a message: "NNX modules"."""
    return " and ".join(b.plural for b in FRAMEWORKS if b.holds_variables)

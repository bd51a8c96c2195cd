"""`Binding`: what a framework says of itself, once, so that each verb is written once.

A framework is a file of this folder with its binding, its wrapped model and its model with adapters, and a row of
`FRAMEWORKS` (`qjax.models.frameworks`). The verbs (`qjax.models.verbs`, `save`, `restore`, `export`, `arrange`,
`compare`) know bindings and no framework. There are two kinds: a model whose variables travel beside it, as those of a
Linen module do, and a model that holds them, as an NNX module does.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from qjax.compile.call import Call
from qjax.compile.ranges import CallRanges, Flat, take_ranges
from qjax.pallas_kernels.packed.qcache import QCache
from qjax.pallas_kernels.packed.qtensor import is_packed
from qjax.passes.plan.adapters import AdapterSpec
from qjax.recipes import Recipe

RANGES = "ranges:"
"""Begins the name of a range in the tree of a model that holds its variables: it is no variable of the float model."""


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What a model is called with, variables aside.

    Attributes:
        args, kwargs: the arguments of the model.
        options: those of its framework's own call, such as `method`.
    """

    args: tuple = ()
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Parts:
    """The variables of a wrapped model, of any framework.

    Attributes:
        own: what the float model takes, float or packed.
        ranges: the collections "quant_stats" and "quant".
        adapters: path of a parameter -> its arrays; None where there are none.
    """

    own: Any
    ranges: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    adapters: Flat | None = None

    def known(self, update: bool = False) -> CallRanges:
        """The ranges as a call takes them."""
        return take_ranges(self.ranges, update)[1]


@dataclasses.dataclass(frozen=True)
class Invocation:
    """One call of a wrapped model.

    Attributes:
        call: the call as a flat function; the first of its inputs is `Parts.own`.
        finish: `(results of the call, "quant_stats" after it or None) -> what the user gets`; a model that holds its
            variables takes over the new ones here.
        updates_ranges: whether the call moves averages and counts steps.
        has_caches: whether state of the variables may be key-value caches, which `convert` packs.
    """

    call: Call
    finish: Callable[[Any, dict[str, Any] | None], Any]
    updates_ranges: bool = False
    has_caches: bool = True


def is_leaf(value: Any) -> bool:
    """Whether a node of a tree of variables is one variable."""
    return is_packed(value) or isinstance(value, QCache)


@dataclasses.dataclass(frozen=True, eq=False)
class Binding(abc.ABC):
    """A framework, as the verbs see it.

    In what follows, a model is a float or a wrapped one, `q` a wrapped one (`wrapped` or `adapted`), and `variables`
    is what the user holds beside it, None if the model holds its own.

    Attributes:
        title: what a model is called in messages, with its article.
        holds_variables: whether variables are in the model, and not beside it.
        wrapped: the class of wrapped models, made of a float model and a recipe.
        adapted: the class of wrapped models with adapters.
        refused: options that other frameworks have, with the message for each; "{options}" in it are those of the verb.
    """

    title: str
    holds_variables: bool
    wrapped: type
    adapted: type
    refused: Mapping[str, str]

    @property
    def plural(self) -> str:
        """What several models are called in messages."""
        return self.title.partition(" ")[2] + "s"

    # --- Wrapping ------------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def recognises(self, model: Any) -> bool:
        """Whether something is a float model of this framework."""

    def wrap(self, model: Any, recipe: Recipe) -> Any:
        """The wrapped model."""
        return self.wrapped(model, recipe)

    @abc.abstractmethod
    def adapt(self, q: Any, spec: AdapterSpec) -> Any:
        """The wrapped model with adapters."""

    # --- A call --------------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def split(self, q: Any, variables: Any) -> Parts:
        """The variables in parts.

        Raises:
            TypeError: these are no variables.
        """

    @abc.abstractmethod
    def join(self, q: Any, parts: Parts) -> Any:
        """The inverse of `split`: variables, or a new wrapped model that holds them."""

    @abc.abstractmethod
    def invocation(self, q: Any, own: Any, inputs: Inputs) -> Invocation:
        """A call of the float model inside `q` on its own variables; ranges and adapters are left to the verbs."""

    # --- A model as a function of one tree -------------------------------------------------------------------------

    @abc.abstractmethod
    def tree(self, model: Any, variables: Any) -> Any:
        """All variables, ranges and adapters included, as a tree of arrays.

        Of a model that holds its variables it is a dict by path name; ranges begin with `RANGES`.
        """

    def key_paths(self, model: Any, tree: Any) -> list[tuple[tuple, Any]]:
        """The leaves of a tree, in the order of JAX, each with its key path in the model."""
        return jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)[0]

    def with_tree(self, model: Any, tree: Any) -> Any:
        """What the user holds, with the values of a tree: the tree itself, or a copy of the model that holds them."""
        return tree

    @abc.abstractmethod
    def run(self, model: Any, tree: Any, inputs: Inputs, carried: Sequence[str] = ()) -> tuple[Any, dict[str, Any]]:
        """The results of a call, and the entries `carried` of the tree after it; nothing else is kept."""

    @abc.abstractmethod
    def changing(self, tree: Any, inputs: Inputs) -> list[str] | None:
        """The entries of a tree that a call may change; None where only its program says which."""

    @abc.abstractmethod
    def callee(self, q: Any, inputs: Inputs) -> Callable[..., Any]:
        """The function that a call runs; its first parameter is the module, or the params."""

    @abc.abstractmethod
    def parameters(self, model: Any, variables: Any) -> Any:
        """The trainable part of the variables."""

    # --- Arguments of verbs --------------------------------------------------------------------------------------

    def options(self, **given: Any) -> dict[str, Any]:
        """The options of a call; None and False are those that were not given.

        Raises:
            TypeError: a call of this framework has no such option.
        """
        options = {name: value for name, value in given.items() if value is not None and value is not False}
        for name in options:
            if name in self.refused:
                raise TypeError(f"qjax: {self.refused[name].format(options=' nor '.join(given))}")
        return options

    def check_held(self, variables: Any, usage: str) -> None:
        """Refuses variables beside a model that holds its own; `usage` is the call that is meant."""
        if self.holds_variables and variables is not None:
            raise TypeError(f"qjax: {self.title} holds its own variables: {usage}.")

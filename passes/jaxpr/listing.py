"""`listing`: a program as text in a normal form, small enough to read, and to compare before and after a pass.

    x: f32[4,8]
    params/dense/kernel: f32[8,16]
    fake_quant.1: f32[8,16] = fake_quant[int4,g128] params/dense/kernel
    dot_general.1: f32[4,16] = dot_general[contract=1x0] x, fake_quant.1
    -> dot_general.1

Values are named after the operation that gives them and counted for each operation, so that a pass which adds an
operation renames no other. What a pass adds for one value stands in a scope (`scope`) and is one line, whatever it
takes. Calls of small functions are one line with the function's name; control flow, and calls in which there is a
matmul, are shown with what they contain. Parameters of an operation that say nothing to a reader (shardings, layouts,
callables) are left out.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import difflib
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import Literal
from jax.extend.core import primitives as prims

from qjax.passes.jaxpr import control_flow

_SCOPE = re.compile(r"qjax\.([^/()]*\([^/()]*\))")


@contextlib.contextmanager
def scope(operation: str, value: str) -> Iterator[None]:
    """What is traced in it is one line of a listing: `operation` (such as "fake_quant[int4/g64]") done to `value`.

    A name in the program's metadata; it changes nothing that is computed.
    """
    label, of = (re.sub(r"[/()]", lambda m: {"/": ",", "(": "<", ")": ">"}[m[0]], text) for text in (operation, value))
    with jax.named_scope(f"qjax.{label}({of})"):
        yield


@dataclasses.dataclass(frozen=True)
class Listing:
    """A program as text; see `listing`."""

    lines: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join(self.lines)

    __repr__ = __str__

    def diff(self, before: Listing) -> str:
        """What is new here (+) and what is gone (-) since another listing, as a unified diff without its head."""
        changes = difflib.unified_diff(before.lines, self.lines, lineterm="", n=1)
        return "\n".join(line for line in changes if not line.startswith(("---", "+++")))


def listing(jaxpr: Any, names: Sequence[str]) -> Listing:
    """A closed jaxpr as text.

    Args:
        jaxpr: of the program.
        names: of its inputs. Several in a row may have one name: the arrays of a packed parameter or cache.
    """
    writer = _Writer()
    env: dict[Any, str] = dict(zip(_open(jaxpr).invars, names, strict=True))
    arrays: dict[str, list[str]] = {}
    for name, var in zip(names, env, strict=True):
        arrays.setdefault(name, []).append(_type(var.aval))
    writer.lines += [f"{name}: {', '.join(types)}" for name, types in arrays.items()]
    results = writer.body(jaxpr, env, "")
    writer.lines.append(f"-> {', '.join(_once(results))}")
    return Listing(tuple(writer.lines))


class _Writer:
    def __init__(self):
        self.lines: list[str] = []
        self.counts: collections.Counter[str] = collections.Counter()

    def name(self, operation: str) -> str:
        self.counts[operation] += 1
        return f"{operation}.{self.counts[operation]}"

    def body(self, jaxpr: Any, env: dict[Any, str], indent: str) -> list[str]:
        """Writes the equations of a body; gives the names of its results."""
        consts = control_flow.consts_of(jaxpr)
        jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
        env.update((var, _constant(value)) for var, value in zip(jaxpr.constvars, consts, strict=False))

        def read(atom: Any) -> str:
            return _constant(atom.val) if isinstance(atom, Literal) else env[atom]

        for label, eqns in _grouped(jaxpr.eqns):
            made = {var for eqn in eqns for var in eqn.outvars}
            if label is None:
                (eqn,) = eqns
                self.equation(eqn, [read(atom) for atom in eqn.invars], env, indent)
                continue
            used = {v for eqn in _rest(jaxpr.eqns, eqns) for v in eqn.invars if not isinstance(v, Literal)}
            used.update(v for v in jaxpr.outvars if not isinstance(v, Literal))
            outs = [var for eqn in eqns for var in eqn.outvars if var in used]
            inputs = [a for eqn in eqns for a in eqn.invars if not isinstance(a, Literal) and a not in made]
            operation, operands = label.partition("(")[0], [env[a] for a in dict.fromkeys(inputs)]
            self.write(operation.partition("[")[0], operation, outs, operands, env, indent)
        return [read(atom) for atom in jaxpr.outvars]

    def write(
        self, base: str, operation: str, outs: Sequence[Any], operands: Sequence[str], env: dict[Any, str], indent: str
    ) -> None:
        """One line; gives its results their names."""
        if not outs:
            return
        name = self.name(base)
        env.update((var, name if len(outs) == 1 else f"{name}:{i}") for i, var in enumerate(outs))
        types = ", ".join(_type(var.aval) for var in outs)
        self.lines.append(f"{indent}{name}: {types} = {operation} {', '.join(_once(operands))}".rstrip())

    def equation(self, eqn: Any, operands: list[str], env: dict[Any, str], indent: str) -> None:
        inner = control_flow.bodies(eqn)
        if eqn.primitive is prims.broadcast_in_dim_p:  # the same values: its type is seen where they are used
            env[eqn.outvars[0]] = operands[0]
            return
        if not inner or (eqn.primitive in _FUNCTIONS and not _is_large(eqn)):
            only = _single(eqn)
            name = str(only.params.get("name", only.primitive.name))
            self.write(name, name + _params(only), eqn.outvars, operands, env, indent)
            return
        if eqn.primitive is prims.jit_p:  # in place
            (only,) = inner
            results = self.body(only.jaxpr, dict(zip(_open(only.jaxpr).invars, operands, strict=True)), indent)
            env.update(zip(eqn.outvars, results, strict=True))
            return
        self.write(eqn.primitive.name, eqn.primitive.name + _params(eqn), eqn.outvars, operands, env, indent)
        for body in inner:
            given = []
            for i, feed in enumerate(body.feeds):
                outer = operands[feed.operand]
                given.append({"whole": outer, "scanned": f"{outer}[i]", "carried": f"carry{i}"}[feed.how])
            self.lines.append(f"{indent}  {body.name}:")
            results = self.body(body.jaxpr, dict(zip(_open(body.jaxpr).invars, given, strict=True)), indent + "    ")
            self.lines.append(f"{indent}    -> {', '.join(_once(results))}")


# A call of a function, of which the name says enough where the function is small.
_FUNCTIONS = {prims.jit_p, prims.custom_jvp_call_p, prims.custom_vjp_call_p}
_MATMULS = {prims.dot_general_p, prims.conv_general_dilated_p, control_flow.ragged_dot_general_p}
# Parameters that the types of operands and results say, or that say nothing about what is computed.
_SILENT = {"axis_size", "dimension_numbers", "dtype", "linear", "name", "new_dtype", "new_sizes"} | {
    *("num_carry", "num_consts", "out_dtype", "preferred_element_type", "shape", "shapes", "unroll", "weak_type")
}


def _open(jaxpr: Any) -> Any:
    return getattr(jaxpr, "jaxpr", jaxpr)


def _is_large(eqn: Any) -> bool:
    """Whether a call contains what a reader looks for: a matmul, control flow, a line of a pass, a packed operation."""
    for body in control_flow.bodies(_single(eqn)):
        for step in _open(body.jaxpr).eqns:
            if step.primitive in _MATMULS or _scope_of(step) is not None or _packed_in(step):
                return True
            if control_flow.bodies(step) and (step.primitive not in _FUNCTIONS or _is_large(step)):
                return True
    return False


def _single(eqn: Any) -> Any:
    """The one operation of a function that does nothing else; else the equation itself."""
    if eqn.primitive not in _FUNCTIONS or isinstance(eqn.params.get("name"), str):
        return eqn
    steps = [step for body in control_flow.bodies(eqn) for step in _open(body.jaxpr).eqns]
    steps = [step for step in steps if step.primitive is not prims.stop_gradient_p]
    return _single(steps[0]) if len(steps) == 1 else eqn


def _packed_in(eqn: Any) -> list[str]:
    """The formats of the packed arrays that an operation reads: it has their structure among its parameters."""
    found = []
    for value in eqn.params.values():
        if isinstance(value, jax.tree_util.PyTreeDef):
            tree = jax.tree.unflatten(value, [None] * value.num_leaves)
            found += [str(node.spec) for node in jax.tree.leaves(tree, is_leaf=_has_spec) if _has_spec(node)]
    return found


def _has_spec(node: Any) -> bool:
    return hasattr(node, "spec")


def _scope_of(eqn: Any) -> str | None:
    found = _SCOPE.search(str(eqn.source_info.name_stack))
    return found[1] if found else None


def _grouped(eqns: Sequence[Any]) -> Iterator[tuple[str | None, list[Any]]]:
    """The equations in order; those of one scope together, where the last of them stands."""
    labels = [_scope_of(eqn) for eqn in eqns]
    scopes: dict[str, list[Any]] = {}
    for label, eqn in zip(labels, eqns, strict=True):
        if label is not None:
            scopes.setdefault(label, []).append(eqn)
    for label, eqn in zip(labels, eqns, strict=True):
        if label is None:
            yield None, [eqn]
        elif eqn is scopes[label][-1]:
            yield label, scopes[label]


def _rest(eqns: Sequence[Any], group: Sequence[Any]) -> Iterator[Any]:
    ids = {id(eqn) for eqn in group}
    return (eqn for eqn in eqns if id(eqn) not in ids)


def _once(names: Sequence[str]) -> list[str]:
    """Names without repeats in a row: a packed parameter is several arrays."""
    return [name for i, name in enumerate(names) if i == 0 or name != names[i - 1]]


def _type(aval: Any) -> str:
    if not hasattr(aval, "dtype"):
        return str(aval)
    short = re.sub(
        r"^(u?)(b?)(?:float|int)(?=\d)", lambda m: m[0].replace("float", "f").replace("int", "i"), str(aval.dtype)
    )
    return f"{short}[{','.join(map(str, aval.shape))}]"


def _constant(value: Any) -> str:
    shape = tuple(getattr(value, "shape", ()))
    if math.prod(shape) != 1:
        return f"constant[{','.join(map(str, shape))}]"
    try:
        return f"{np.asarray(value).item():.6g}"
    except (TypeError, ValueError):  # no number: a key
        return "constant"


def _params(eqn: Any) -> str:
    """What an equation says beside its operands, as far as that means something to a reader."""
    if control_flow.bodies(eqn) and eqn.primitive in _FUNCTIONS:
        return ""
    text = _packed_in(eqn)
    if eqn.primitive is prims.dot_general_p:
        contract, batch = eqn.params["dimension_numbers"]
        text += [f"{what}={_plain(a)}x{_plain(b)}" for what, (a, b) in (("contract", contract), ("batch", batch)) if a]
    plain = {name: value for name, value in eqn.params.items() if name not in _SILENT and _is_plain(value)}
    text += [f"{name}={_plain(value)}" for name, value in sorted(plain.items())]
    return f"[{', '.join(text)}]" if text else ""


def _is_plain(value: Any) -> bool:
    """Whether a parameter is a number or a word that says something, or a sequence of such."""
    if isinstance(value, tuple):
        return bool(value) and all(isinstance(v, int | float | str) for v in value)
    return isinstance(value, int | float | str | np.dtype) and value not in (False, "")


def _plain(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)

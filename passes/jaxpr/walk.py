"""`ForwardWalk`: the one forward walk over a jaxpr, and `Environment`, what the variables of one stand for.

An analysis says what it knows of a constant and what an equation makes of what it knows of the operands; the walk does
the rest: literals, constants, addresses, and the bodies of calls, branches and loops, as `control_flow.bodies` lists
them. `passes.jaxpr.replay` runs a program instead of analysing it and rebuilds what has bodies: it shares the
environment alone.

What is known of the carries of a loop has to hold before and after every step. The walk begins with what goes in, and
goes through the loop again, knowing less, until it does.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic, TypeVar

from jax.extend.core import Literal

from qjax.passes.jaxpr import control_flow
from qjax.passes.jaxpr.control_flow import Body, Feed
from qjax.passes.jaxpr.trace import Address

Known = TypeVar("Known")


class Environment(Generic[Known]):
    """What the variables of a jaxpr, open or closed, stand for.

    Args:
        jaxpr: the jaxpr.
        values: of its inputs.
        constant: (value, aval) -> what stands for a literal or a constant of the jaxpr.
    """

    def __init__(self, jaxpr: Any, values: Sequence[Known], constant: Callable[[Any, Any], Known]):
        self.constant = constant
        self.values: dict[Any, Known] = dict(zip(jaxpr.invars, values, strict=True))
        for var, value in zip(jaxpr.constvars, control_flow.consts_of(jaxpr), strict=False):
            self.values[var] = constant(value, var.aval)
        self.jaxpr = getattr(jaxpr, "jaxpr", jaxpr)

    def read(self, atom: Any) -> Known:
        """What an operand of an equation stands for."""
        return self.constant(atom.val, atom.aval) if isinstance(atom, Literal) else self.values[atom]

    def bind(self, variables: Iterable[Any], values: Iterable[Known]) -> None:
        """Lets the results of an equation stand for these."""
        self.values.update(zip(variables, values, strict=True))

    def results(self) -> list[Known]:
        """What the results of the jaxpr stand for."""
        return [self.read(atom) for atom in self.jaxpr.outvars]


class ForwardWalk(abc.ABC, Generic[Known]):
    """A forward analysis: what is known of each value, from what is known of the inputs.

    Two methods have to be given, `constant` and `equation`. The others say what a value is on the other side of a wall:
    as they stand here, the same; and of a value that may be one of several, `join` has to be given where an analysis
    goes into branches or loops.
    """

    @abc.abstractmethod
    def constant(self, value: Any, aval: Any) -> Known:
        """What is known of a literal or of a constant of a jaxpr."""

    @abc.abstractmethod
    def equation(self, eqn: Any, operands: list[Known], address: Address) -> Sequence[Known] | None:
        """What is known of the results of an equation; None to find out in its bodies."""

    def enter(self, eqn: Any, body: Body, feed: Feed, aval: Any, value: Known, address: Address) -> Known:
        """An operand as an input, of type `aval`, of a body: whole, one slice of it a step, or before any step."""
        return value

    def leave(self, eqn: Any, body: Body, results: list[Known], address: Address) -> list[Known]:
        """Results of a body as results of the equation."""
        return results

    def join(self, eqn: Any, values: Sequence[Known], address: Address) -> Known:
        """A value that is one of several."""
        raise NotImplementedError(f"{type(self).__name__} goes into no branches or loops")

    def carry(self, eqn: Any, before: Known, after: Known, address: Address) -> Known:
        """What holds of a carry before a step and after it; `before`, once no more can be given up."""
        return self.join(eqn, (before, after), address)

    def mark(self) -> Any:
        """What the analysis has noted so far, for `again`."""
        return None

    def again(self, eqn: Any, before: list[Known], after: list[Known], mark: Any, address: Address) -> None:
        """A loop begins anew, its carries from `before` to `after`: what was noted since `mark` is void."""

    def walk(self, jaxpr: Any, values: Sequence[Known], address: Address) -> list[Known]:
        """What is known of the results of a jaxpr, from what is known of its inputs."""
        environment = Environment(jaxpr, values, self.constant)
        for i, eqn in enumerate(environment.jaxpr.eqns):
            operands = [environment.read(atom) for atom in eqn.invars]
            results = self.equation(eqn, operands, (*address, i))
            if results is None:
                results = self.descend(eqn, operands, (*address, i))
            environment.bind(eqn.outvars, results)
        return environment.results()

    def descend(self, eqn: Any, operands: Sequence[Known], address: Address) -> list[Known]:
        """What is known of the results of an equation with bodies."""
        bodies = control_flow.bodies(eqn)
        if eqn.primitive in control_flow.LOOPS:
            return self._loop(eqn, bodies, operands, address)
        ways = [self._through(eqn, body, operands, address) for body in bodies]
        return ways[0] if len(ways) == 1 else [self.join(eqn, values, address) for values in zip(*ways, strict=True)]

    def _inputs(self, eqn: Any, body: Body, operands: Sequence[Known], address: Address) -> list[Known]:
        return [
            self.enter(eqn, body, feed, var.aval, operands[feed.operand], address)
            for feed, var in zip(body.feeds, body.jaxpr.invars, strict=True)
        ]

    def _through(self, eqn: Any, body: Body, operands: Sequence[Known], address: Address) -> list[Known]:
        values = self._inputs(eqn, body, operands, address)
        return self.leave(eqn, body, self.walk(body.jaxpr, values, (*address, body.name)), address)

    def _loop(self, eqn: Any, bodies: list[Body], operands: Sequence[Known], address: Address) -> list[Known]:
        """The condition of a while loop and the step of any, again until what is known of the carries holds."""
        *conditions, step = bodies
        values, operands = self._inputs(eqn, step, operands, address), list(operands)
        moving = [i for i, feed in enumerate(step.feeds) if feed.how == "carried"]
        while True:
            mark = self.mark()
            for i in moving:
                operands[step.feeds[i].operand] = values[i]
            for condition in conditions:
                self._through(eqn, condition, operands, address)
            results = self.walk(step.jaxpr, values, (*address, step.name))
            before = [values[i] for i in moving]
            after = [self.carry(eqn, values[i], results[i - step.first_carry], address) for i in moving]
            if after == before:
                break
            self.again(eqn, before, after, mark, address)
            for i, value in zip(moving, after, strict=True):
                values[i] = value
        for i in moving:
            results[i - step.first_carry] = values[i]
        return self.leave(eqn, step, results, address)

"""Decisions: what a recipe says of a program, as data that the rewrites carry out."""

from qjax.passes.plan.decisions import Plan as Plan
from qjax.passes.plan.rules import PlanError as PlanError
from qjax.passes.plan.rules import Rule as Rule

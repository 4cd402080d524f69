"""All rules, registered: what :mod:`mpcompile.certify.steps` encloses a network with."""

from mpcompile.certify import rules_linear, rules_nonlinear
from mpcompile.certify.functions import Unbounded
from mpcompile.certify.registry import RULES, NoRule, enclose, operator_name

__all__ = ["RULES", "NoRule", "Unbounded", "enclose", "operator_name", "rules_linear", "rules_nonlinear"]

"""All rules, registered by import; :mod:`mpcompile.certificates.steps` encloses networks through this module."""

from mpcompile.certificates.enclosures import rules_linear, rules_nonlinear
from mpcompile.certificates.enclosures.functions import Unbounded
from mpcompile.certificates.enclosures.registry import RULES, NoRule, enclose, operator_name

__all__ = ["RULES", "NoRule", "Unbounded", "enclose", "operator_name", "rules_linear", "rules_nonlinear"]

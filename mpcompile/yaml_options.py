"""Options in YAML, read as people mean them."""

from __future__ import annotations

import re
from typing import Any

import yaml

from mpcompile.errors import ConfigError

_NUMBER = "tag:yaml.org,2002:"


class _Loader(yaml.SafeLoader):
    """YAML in which 2:4 is text, not minutes and seconds (124), and 1e-5 is a number."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, rule) for tag, rule in rules if tag not in (f"{_NUMBER}int", f"{_NUMBER}float")]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(f"{_NUMBER}int", re.compile(r"^[-+]?\d+$"), list("-+0123456789"))
_Loader.add_constructor(f"{_NUMBER}int", lambda loader, node: int(loader.construct_scalar(node)))  # 010 is ten
_FLOAT = re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$")
_Loader.add_implicit_resolver(f"{_NUMBER}float", _FLOAT, list("-+.0123456789"))


def parse(text: str, where: object) -> Any:
    """The value that a YAML text holds.

    Args:
        text: the document, or a single value such as ``"[2:4, 8:16]"``.
        where: what the text is, for the error.

    Raises:
        ConfigError: it isn't YAML.

    Example:
        >>> parse("{pattern: 8:16, lr: 1e-4}", "a recipe")
        {'pattern': '8:16', 'lr': 0.0001}
    """
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{where} is not YAML", found=" ".join(str(error).split())) from error

"""Options in YAML, read as people mean them: plain values of limited size, 2:4 as text, 1e-5 as a number."""

from __future__ import annotations

import math
import re
from collections.abc import Hashable
from typing import Any

import yaml

from mpcompile.errors import ConfigError

LARGEST = 1 << 20  # bytes of the largest options file that is read
_MAX_VALUES, _MAX_NESTING = 10_000, 20  # limits of a document, with aliases expanded
_TAG = "tag:yaml.org,2002:"


class _Loader(yaml.SafeLoader):
    """YAML in which 2:4 is text, not minutes and seconds (124), 1e-5 is a number, and nothing constructs an object.

    It has lists, mappings, strings, finite numbers, booleans and null, and nothing else. A date is a string.
    """

    _level = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self._level += 1
        if self._level > _MAX_NESTING:
            raise yaml.YAMLError(f"more than {_MAX_NESTING} levels of nesting")
        node = super().compose_node(parent, index)
        self._level -= 1
        return node

    def get_single_node(self) -> Any:
        node = super().get_single_node()
        if node is not None:
            _measure(node, {})
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        names = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != f"{_TAG}merge"]
        for name in names:
            if not isinstance(name, (str, int, float, type(None))) or names.count(name) > 1:
                problem = "is given twice" if isinstance(name, str) else "is not the name of an option"
                raise yaml.constructor.ConstructorError(None, None, f"{name!r:.60} {problem}", node.start_mark)
        return super().construct_mapping(node, deep)


def _measure(node: Any, known: dict[int, int]) -> int:
    """Return the number of values in a node, with every alias expanded.

    ``known`` holds the sizes of nodes by identity; 0 marks one that is being counted.
    """
    size = known.get(id(node))
    if size == 0:
        raise yaml.YAMLError("an alias is inside the value that it refers to")
    if size is None:
        known[id(node)] = 0
        parts = node.value if isinstance(node.value, list) else []
        nodes = [inner for part in parts for inner in (part if isinstance(part, tuple) else (part,))]
        size = known[id(node)] = 1 + sum(_measure(inner, known) for inner in nodes)
    if size > _MAX_VALUES:
        raise yaml.YAMLError(f"more than {_MAX_VALUES} values, with aliases expanded")
    return size


def _integer(loader: Any, node: Any) -> int:
    text = loader.construct_scalar(node)
    if len(text) > 20 or abs(int(text)) >= 1 << 63:
        raise ValueError(f"{text[:24]} is too large an integer")
    return int(text)  # 010 is ten


def _finite(loader: Any, node: Any) -> float:
    value = float(loader.construct_scalar(node))
    if not math.isfinite(value):
        raise ValueError(f"{node.value[:24]} is too large a number")
    return value


_Loader.yaml_implicit_resolvers = {
    first: [(tag, rule) for tag, rule in rules if tag.removeprefix(_TAG) not in ("int", "float", "timestamp")]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(f"{_TAG}int", re.compile(r"^[-+]?\d+$"), list("-+0123456789"))
_Loader.add_constructor(f"{_TAG}int", _integer)
_Loader.add_constructor(f"{_TAG}float", _finite)
for _tag in ("binary", "timestamp", "omap", "pairs", "set"):
    _Loader.add_constructor(f"{_TAG}{_tag}", yaml.SafeLoader.construct_undefined)
_FLOAT = re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$")
_Loader.add_implicit_resolver(f"{_TAG}float", _FLOAT, list("-+.0123456789"))


def parse(text: str, where: object) -> Any:
    """Return the value of a YAML text.

    Args:
        text: the document, or a single value such as ``"[2:4, 8:16]"``.
        where: a name for the text, for the error.

    Raises:
        ConfigError: the text is not YAML, holds anything other than plain values, or is too large.

    Example:
        >>> parse("{pattern: 8:16, lr: 1e-4}", "a recipe")
        {'pattern': '8:16', 'lr': 0.0001}
    """
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise ConfigError(f"{where} is not YAML", found=" ".join(str(error).split())) from error

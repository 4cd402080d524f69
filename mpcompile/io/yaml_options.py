"""Options in YAML, read as people mean them."""

from __future__ import annotations

import math
import re
from collections.abc import Hashable
from typing import Any

import yaml

from mpcompile.errors import ConfigError

_NUMBER = "tag:yaml.org,2002:"


LARGEST = 1 << 20  # bytes of a file of options
_MOST, _DEEPEST = 10_000, 20  # values in a document, aliases written out; nesting


class _Loader(yaml.SafeLoader):
    """YAML in which 2:4 is text, not minutes and seconds (124), 1e-5 is a number, and nothing stands for an object.

    Lists, mappings, texts, finite numbers, truth values and null are all there is. A date is a text.
    """

    _level = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self._level += 1
        if self._level > _DEEPEST:
            raise yaml.YAMLError(f"more than {_DEEPEST} levels of nesting")
        node = super().compose_node(parent, index)
        self._level -= 1
        return node

    def get_single_node(self) -> Any:
        node = super().get_single_node()
        if node is not None:
            _measure(node, {})
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        names = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != f"{_NUMBER}merge"]
        for name in names:
            if not isinstance(name, (str, int, float, type(None))) or names.count(name) > 1:
                problem = "stands there twice" if isinstance(name, str) else "is no name of an option"
                raise yaml.constructor.ConstructorError(None, None, f"{name!r:.60} {problem}", node.start_mark)
        return super().construct_mapping(node, deep)


def _measure(node: Any, known: dict[int, int]) -> int:
    """How many values a node stands for, once every alias is written out; known ones are measured once."""
    size = known.get(id(node))
    if size == 0:
        raise yaml.YAMLError("an alias stands within what it stands for")
    if size is None:
        known[id(node)] = 0
        parts = node.value if isinstance(node.value, list) else []
        nodes = [inner for part in parts for inner in (part if isinstance(part, tuple) else (part,))]
        size = known[id(node)] = 1 + sum(_measure(inner, known) for inner in nodes)
    if size > _MOST:
        raise yaml.YAMLError(f"more than {_MOST} values, aliases written out")
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
    first: [(tag, rule) for tag, rule in rules if tag.removeprefix(_NUMBER) not in ("int", "float", "timestamp")]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(f"{_NUMBER}int", re.compile(r"^[-+]?\d+$"), list("-+0123456789"))
_Loader.add_constructor(f"{_NUMBER}int", _integer)
_Loader.add_constructor(f"{_NUMBER}float", _finite)
for _tag in ("binary", "timestamp", "omap", "pairs", "set"):
    _Loader.add_constructor(f"{_NUMBER}{_tag}", yaml.SafeLoader.construct_undefined)
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
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise ConfigError(f"{where} is not YAML", found=" ".join(str(error).split())) from error

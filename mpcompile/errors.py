"""The errors that users see. Each names the place, what was expected, what was found, and the next step."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = [
    "ArtifactError",
    "ConfigError",
    "GraphError",
    "InputError",
    "MPCompileError",
    "NotEligibleError",
    "TraceError",
    "first_line",
    "printable",
    "printable_lines",
]

LONGEST = 580  # characters of a message: fewer than 600 with the program's name in front
_SHORTEST = 60  # no part of a message is cut below this length


def printable(value: object, longest: int | None = None) -> str:
    """Return a value as one line that is safe to print, with control characters, line ends and bidi marks escaped.

    Args:
        value: anything; names and messages may come from an untrusted file.
        longest: maximum number of characters; a longer text is cut in the middle.

    Example:
        >>> print(printable("a\\x1b[31m\\nb"))
        a\\x1b[31m\\nb
    """
    try:
        text = str(value)
    except ValueError:  # an integer beyond sys.get_int_max_str_digits()
        text = f"a very large {type(value).__name__}"
    if not text.isprintable():
        text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
    return text if longest is None or len(text) <= longest else _cut(text, longest)


def printable_lines(text: object) -> str:
    """Return the text as :func:`printable` does, but keep its line ends: for tables of several lines."""
    return "\n".join(map(printable, str(text).split("\n")))


def _cut(text: str, length: int) -> str:
    tail = (length - 1) // 2
    return f"{text[: length - 1 - tail]}…{text[len(text) - tail :]}"


def _fitted(parts: list[str], separators: int) -> list[str]:
    """Return the parts of a message, with the longest ones cut until the message is short enough."""
    while (excess := sum(map(len, parts)) + separators - LONGEST) > 0:
        place = max(range(len(parts)), key=lambda i: len(parts[i]))
        if len(parts[place]) <= _SHORTEST:
            break
        parts[place] = _cut(parts[place], max(_SHORTEST, len(parts[place]) - excess))
    return parts


class MPCompileError(Exception):
    """Base of every error that mpcompile raises for something that the user can change.

    Args:
        message: What went wrong, in one sentence.
        layer: Path of the layer concerned, e.g. ``"blocks.0.attn.qkv"``.
        expected: What was expected there.
        found: What was found instead.
        hint: The next step.

    Example:
        >>> print(MPCompileError("weight is not finite", layer="head", expected="finite values", found="3 NaN"))
        head: weight is not finite; expected finite values, found 3 NaN
    """

    def __init__(
        self,
        message: str,
        *,
        layer: str | None = None,
        expected: object = None,
        found: object = None,
        hint: str | None = None,
    ) -> None:
        self.message = message  # as given; str() of the error is one printable line
        self.layer, self.expected, self.found, self.hint = layer, expected, found, hint
        parts: list[tuple[str, object, str]] = [("", layer, ": ")] if layer else []
        parts.append(("", message, ""))
        if expected is not None:
            parts.append(("; expected ", expected, ""))
        if found is not None:
            parts.append((", found " if expected is not None else "; found ", found, ""))
        if hint:
            parts.append((". ", hint[0].upper() + hint[1:], ""))
        around = sum(len(before) + len(after) for before, _, after in parts)
        texts = _fitted([printable(text) for _, text, _ in parts], around)
        super().__init__("".join(b + text + a for (b, _, a), text in zip(parts, texts, strict=True)))


class ConfigError(MPCompileError):
    """An unknown option, or a value that an option does not accept."""


class InputError(MPCompileError):
    """Wrong data: example inputs or calibration batches that do not fit, weights that are not finite."""


class TraceError(MPCompileError):
    """The module cannot be brought into the IR.

    Args:
        message: what went wrong; this and the next four are as for every error.
        layer: the path of the layer concerned.
        expected: what was expected there.
        found: what was found instead.
        hint: the next step.
        attempts: the reason of each capture that was tried, as ``"capture: reason"``. Each gets a line of its own
            behind the first.
        final: no other capture can help.

    Example:
        >>> print(TraceError("Net cannot be traced", attempts=["symbolic tracing: a branch", "dynamo: a branch"]))
        Net cannot be traced
          symbolic tracing: a branch
          dynamo: a branch
    """

    def __init__(
        self,
        message: str,
        *,
        layer: str | None = None,
        expected: object = None,
        found: object = None,
        hint: str | None = None,
        attempts: Sequence[str] = (),
        final: bool = False,
    ) -> None:
        super().__init__(message, layer=layer, expected=expected, found=found, hint=hint)
        self.attempts, self.final = tuple(printable(text, LONGEST) for text in attempts), final

    def __str__(self) -> str:
        return "\n  ".join([super().__str__(), *self.attempts])


class GraphError(MPCompileError):
    """A pass cannot carry out the options on this graph, or has left it inconsistent."""


class NotEligibleError(MPCompileError):
    """No layer can be masked, or a layer that the user named cannot be."""


class ArtifactError(MPCompileError):
    """A file that cannot be read, written, or trusted."""


def message_lines(error: BaseException) -> list[str]:
    """Return the lines of an error's message that are not empty, without the spaces around them."""
    return [line.strip() for line in str(error).splitlines() if line.strip()]


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message in printable characters, or the name of its class if that is empty.

    Example:
        >>> first_line(ValueError("no such size\\nmore")), first_line(KeyboardInterrupt())
        ('no such size', 'KeyboardInterrupt')
    """
    lines = message_lines(error)
    return printable(lines[0]) if lines else type(error).__name__


def summary(error: BaseException, most: int = 200) -> str:
    """Return the class of an error from other code, and the first line of its message if any, as one printable line.

    Example:
        >>> summary(ValueError("no such size\\nmore"))
        'ValueError: no such size'
    """
    lines = message_lines(error)
    text = ": ".join([type(error).__name__, *lines[:1]])
    text = "".join(c if c.isprintable() else " " for c in text)
    return text if len(text) <= most else f"{text[: most - 3]}..."

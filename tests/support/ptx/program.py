"""The parser: a PTX entry function as a list of instructions."""

from __future__ import annotations

import re
from dataclasses import dataclass, field


@dataclass
class Instruction:
    op: str
    args: list[str]
    predicate: str | None = None
    negated: bool = False
    parts: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self.parts = self.op.replace("::", ".").split(".")

    def __str__(self) -> str:
        return f"{self.op} {', '.join(self.args)}"


def _split(text: str) -> list[str]:
    """Split operands at commas, except those inside brackets."""
    found, depth, start = [], 0, 0
    for place, char in enumerate(text + ","):
        depth += (char in "{[") - (char in "}]")
        if char == "," and depth == 0:
            found.append(text[start:place].strip())
            start = place + 1
    return [a for a in found if a]


class Program:
    """The first entry function of a PTX module.

    Attributes:
        parameters: their names, in order.
        threads: threads per block.
    """

    def __init__(self, ptx: str) -> None:
        text = re.sub(r"//[^\n]*|/\*.*?\*/", "", ptx[ptx.index(".entry") :], flags=re.S)
        signature, body = text[: text.index(")")], text[text.index(")") + 1 :]
        self.parameters = re.findall(r"\.param[^,\n]*?(\w+_param_\d+)", signature)
        self.threads = int(re.search(r"\.reqntid (\d+)", body)[1])  # type: ignore[index]
        self.code: list[Instruction] = []
        self.labels: dict[str, int] = {}
        scopes: list[dict[str, str]] = []  # names declared in each open block -> their unique names
        pending: list[tuple[Instruction, list[dict[str, str]]]] = []
        for statement in self._statements(body[body.index("{") :]):
            if statement == "{":
                scopes.append({})
            elif statement == "}":
                scopes.pop()
                if not scopes:
                    break
            elif statement.endswith(":"):
                name = statement[:-1]
                if len(scopes) > 1:
                    name = scopes[-1].setdefault(name, f"{name}@{len(self.code)}")
                self.labels[name] = len(self.code)
            elif statement.startswith(".reg") and len(scopes) > 1:
                for name in statement.split(None, 2)[2].split(","):
                    stem, _, count = name.strip().rstrip(">").partition("<")
                    for each in [f"{stem}{i}" for i in range(int(count))] if count else [stem]:
                        scopes[-1][each] = f"{each}@{len(self.code)}"
            elif not statement.startswith("."):
                instruction = self._instruction(statement)
                self.code.append(instruction)
                pending.append((instruction, list(scopes[1:])))
        for instruction, chain in pending:
            names = {name: unique for scope in chain for name, unique in scope.items()}
            if names:
                pattern = re.compile(r"(?<![\w%$])(" + "|".join(map(re.escape, names)) + r")(?![\w@])")
                replace = lambda match, names=names: names[match[1]]  # noqa: E731
                instruction.args = [pattern.sub(replace, a) for a in instruction.args]
                instruction.predicate = instruction.predicate and names.get(
                    instruction.predicate, instruction.predicate
                )

    @staticmethod
    def _statements(body: str) -> list[str]:
        """Braces of blocks, labels with their colon, statements up to a semicolon, directives up to a line's end."""
        found: list[str] = []
        body = re.sub(r"^\s*\.(loc|file|pragma|section)[^\n]*$", "", body, flags=re.M)
        place = 0
        while place < len(body):
            if body[place].isspace() or body[place] == ";":
                place += 1
            elif body[place] in "{}":
                found.append(body[place])
                place += 1
                if body[place - 1] == "}" and found.count("{") == found.count("}"):
                    break
            elif label := re.compile(r"([\w$]+):(?!:)").match(body, place):
                found.append(label[0])
                place = label.end()
            else:
                end = body.index(";", place)
                found.append(" ".join(body[place:end].split()))
                place = end + 1
        return found

    @staticmethod
    def _instruction(statement: str) -> Instruction:
        match = re.match(r"@(!?)([%\w]+)\s+(.*)$", statement)
        guard = (match[2], match[1] == "!") if match else (None, False)
        op, _, args = (match[3] if match else statement).partition(" ")
        return Instruction(op, _split(args), *guard)

"""Artifacts with a valid checksum over a tampered graph: other operators, arguments, integers, buffers.

``Forger`` changes one of three valid files (masked, lowered to the reference engine, lowered to native kernels), and
``outcomes`` loads and runs the results in child processes, so that crashes are counted and the caller survives.
"""

from __future__ import annotations

import copy
import json
import os
import random
import resource
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mpcompile import Config, load, lower, save, transform
from mpcompile.artifact import opset
from mpcompile.errors import ArtifactError, MPCompileError
from tests.support.forging import forge, parts

NUMBERS = (
    0,
    1,
    2,
    3,
    -1,
    -3,
    4,
    7,
    16,
    33,
    100,
    2**31 - 1,
    2**31,
    -(2**31),
    2**32 + 1,
    2**40,
    2**62,
    2**63 - 1,
    -(2**63),
)
VALUES: tuple[Any, ...] = (
    None,
    True,
    0.5,
    1e30,
    {"float": "nan"},
    "",
    "none",
    "gelu",
    "trunc",
    "x",
    {"dtype": "int64"},
    {"dtype": "uint8"},
)
NATIVE = ("mpcompile.nm_gemm.default", "mpcompile.nm_conv.default", "mpcompile.nm_mlp.default")
ENDED = (
    "refused",
    "loaded: ran",
    "loaded: an error in one line",
    "loaded: another error",
    "loaded: out of time or memory",
)
MEMORY = 2 << 30  # bytes that a child may use beyond those already in use


class Net(nn.Module):
    """A small image classifier with a convolution and two linear layers to lower."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.up, self.head = nn.BatchNorm2d(8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.norm(self.conv(torch.relu(self.stem(x)))))
        return self.head(torch.nn.functional.gelu(self.up(y.mean((2, 3)))))


def example() -> torch.Tensor:
    """An input for :class:`Net`."""
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def honest(folder: Path) -> list[Path]:
    """Return the paths of the valid files that are changed."""
    torch.manual_seed(0)
    config = {"pattern": "2:4", "exclude": ["stem"]}
    gm = transform(Net().eval(), example(), Config(**config)).eval()
    save(gm, folder / "masked.mpc")
    for engine in ("reference", "cpu"):
        save(lower(gm, example(), Config(engine=engine)), folder / f"{engine}.mpc")
    return [folder / f"{name}.mpc" for name in ("masked", "reference", "cpu", "cpu")]


def _operators() -> list[tuple[str, str]]:
    """Return (op of a node, target) for every listed operator and method; native operators are repeated 40 times."""
    targets = [("call_function", name) for name in opset.functions()]
    for packet in sorted(opset.ATEN | {f"{name}_" for name in opset.ATEN}):
        for overload in getattr(getattr(torch.ops.aten, packet, None), "overloads", list)():
            targets.append(("call_function", f"aten.{packet}.{overload}"))
    targets += [("call_function", name) for name in NATIVE * 40]
    return targets + [("call_method", name) for name in sorted(opset.METHODS | {f"{n}_" for n in opset.METHODS})]


class Forger:
    """Makes numbered forged artifacts from a seed."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.files = [parts(path) for path in honest(folder)]
        self.folder, self.seed, self.operators = folder, seed, _operators()

    def __call__(self, number: int) -> Path:
        draw = random.Random(f"{self.seed} {number}")
        header, data = copy.deepcopy(draw.choice(self.files))
        graph = json.loads(header["__metadata__"]["graph"])
        for _ in range(draw.randint(1, 3)):
            draw.choice(
                (self.number, self.number, self.argument, self.insert, self.insert, self.retarget, self.rewire)
            )(draw, graph["nodes"])
        header["__metadata__"]["graph"] = json.dumps(graph)
        if draw.random() < 0.3:
            data = self.bytes(draw, data)
        return forge(self.folder / "forged.mpc", header, data)

    def value(self, draw: random.Random, nodes: list[dict[str, Any]], before: int) -> Any:
        """Return an argument: an earlier node, a number, a list of numbers, or another value."""
        kind = draw.random()
        if kind < 0.45 and before:
            return {"node": nodes[draw.randrange(before)]["name"]}
        if kind < 0.7:
            return draw.choice(NUMBERS)
        if kind < 0.85:
            return [draw.choice(NUMBERS) for _ in range(draw.choice((1, 2, 2, 3, 4)))]
        return draw.choice(VALUES)

    def number(self, draw: random.Random, nodes: list[dict[str, Any]]) -> None:
        """Replace an integer among the arguments of a node."""
        places = []
        for node in nodes:
            stack: list[Any] = [node["args"], node["kwargs"]]
            while stack:
                owner = stack.pop()
                for key in owner if isinstance(owner, dict) else range(len(owner)):
                    if isinstance(owner[key], (dict, list)):
                        stack.append(owner[key])
                    elif type(owner[key]) is int:
                        places.append((owner, key))
        if places:
            owner, key = draw.choice(places)
            owner[key] = draw.choice(NUMBERS)

    def argument(self, draw: random.Random, nodes: list[dict[str, Any]]) -> None:
        """Replace, add or remove an argument of a node."""
        place = draw.randrange(len(nodes) - 1)
        args = nodes[place]["args"]
        if not args or draw.random() < 0.2:
            args.append(self.value(draw, nodes, place))
        elif draw.random() < 0.2:
            args.pop()
        else:
            args[draw.randrange(len(args))] = self.value(draw, nodes, place)

    def insert(self, draw: random.Random, nodes: list[dict[str, Any]]) -> None:
        """Insert a call of a listed operator; half of the time a later node reads its result."""
        place = draw.randrange(1, len(nodes))
        op, target = draw.choice(self.operators)
        args = [self.value(draw, nodes, place) for _ in range(draw.choice((1, 2, 2, 3, 4, 5, 8)))]
        args[0] = {"node": nodes[draw.randrange(place)]["name"]}
        if target in NATIVE:
            like = [node for node in nodes if node["target"] == target]
            args = copy.deepcopy(draw.choice(like)["args"]) if like else args
            args[draw.randrange(len(args))] = self.value(draw, nodes, place)
        name = f"forged_{len(nodes)}"
        nodes.insert(place, {"op": op, "name": name, "target": target, "args": args, "kwargs": {}})
        reader = nodes[draw.randrange(place + 1, len(nodes))]
        if draw.random() < 0.5 and reader["args"]:
            reader["args"][0] = {"node": name}

    def retarget(self, draw: random.Random, nodes: list[dict[str, Any]]) -> None:
        """Give a node another operator, tensor or layer."""
        node = draw.choice(nodes)
        same = [other["target"] for other in nodes if other["op"] == node["op"]]
        node["target"] = draw.choice(same) if draw.random() < 0.5 else draw.choice(self.operators)[1]

    def rewire(self, draw: random.Random, nodes: list[dict[str, Any]]) -> None:
        """Make a node read the result of another one."""
        place = draw.randrange(1, len(nodes))
        args = nodes[place]["args"]
        if args:
            args[draw.randrange(min(3, len(args)))] = {"node": nodes[draw.randrange(place)]["name"]}

    def bytes(self, draw: random.Random, data: bytes) -> bytes:
        """Overwrite a run of bytes in the tensors."""
        changed = bytearray(data)
        start, length = draw.randrange(len(changed)), draw.choice((1, 4, 16, 256))
        for place in range(start, min(len(changed), start + length)):
            changed[place] = draw.choice((255, 0, draw.randrange(256)))
        return bytes(changed)


class OutOfTime(BaseException):
    """The time limit; derived from BaseException, so that no ``except Exception`` catches it."""


def _expired(*_: Any) -> None:
    raise OutOfTime


def outcome(path: Path, seconds: float) -> str:
    """Load and run a file in this process; return one of :data:`ENDED`."""
    signal.signal(signal.SIGALRM, _expired)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        gm = load(path)
        with torch.no_grad():
            gm(example())
        return ENDED[1]
    except ArtifactError:
        return ENDED[0]
    except MPCompileError:
        return ENDED[2]
    except (OutOfTime, MemoryError):
        return ENDED[4]
    except Exception:
        return ENDED[3]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _child(forger: Forger, numbers: range, file: int, seconds: float) -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    if "libasan" not in os.environ.get("LD_PRELOAD", ""):  # the sanitizer reserves more address space than any limit
        resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, held + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for place, number in enumerate(numbers):
        result = outcome(forger(number), seconds)
        os.pwrite(file, bytes([1 + ENDED.index(result)]), place)


def outcomes(forger: Forger, rounds: int, *, seconds: float = 20, batch: int = 100) -> Iterator[tuple[int, str]]:
    """Yield the number and result of each forged file: one of :data:`ENDED`, or "crashed: SIGNAL"."""
    start = 0
    while start < rounds:
        numbers = range(start, min(rounds, start + batch))
        with tempfile.TemporaryFile() as file:
            child = os.fork()
            if child == 0:
                try:
                    _child(forger, numbers, file.fileno(), seconds)
                finally:
                    os._exit(0)
            _, status = os.waitpid(child, 0)
            done = os.pread(file.fileno(), len(numbers), 0)
        yield from ((numbers[place], ENDED[code - 1]) for place, code in enumerate(done))
        start += len(done)
        if len(done) < len(numbers):
            how = (
                signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else f"exit {os.WEXITSTATUS(status)}"
            )
            yield start, f"crashed: {how}"
            start += 1

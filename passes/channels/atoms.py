"""Atoms: the pieces of tensor axes, and which of them hold the same channels.

An axis of a tensor is a list of atoms, outermost first: the axis of length 192 that an attention layer writes is
(3 parts, 3 heads, 64 places) once later reshapes have split it. Two atoms that hold the same channels in the same order
are unified; an atom whose order must not change is frozen.
"""

from __future__ import annotations

from collections.abc import Iterable

Axis = list[int]
Dims = list[Axis]  # the axes of one tensor


class Atoms:
    """Union-find over atoms, each an integer.

    Attributes:
        size: atom -> its length.
        frozen: atom -> True if its order must stay as it is.
        parts: atom -> the (outer, inner) atoms that it was split into.
        slices: atom -> its selector and its children. A tensor that is taken apart along a small axis, the selector (q,
            k and v), gives every part an atom of its own: the children, one per place of the selector.

    Example:
        >>> atoms = Atoms()
        >>> channels, heads, places = atoms.new(12), atoms.new(3), atoms.new(4)
        >>> atoms.unify([channels], [heads, places])
        >>> atoms.expand([channels]) == [atoms.find(heads), atoms.find(places)]
        True
    """

    def __init__(self) -> None:
        self.parent: list[int] = []
        self.size: list[int] = []
        self.frozen: list[bool] = []
        self.parts: dict[int, tuple[int, int]] = {}
        self.slices: dict[int, tuple[int, list[int]]] = {}

    def new(self, size: int, frozen: bool = False) -> int:
        """Add an atom."""
        self.parent.append(len(self.parent))
        self.size.append(size)
        self.frozen.append(frozen)
        return len(self.parent) - 1

    def find(self, a: int) -> int:
        """Return the representative of an atom."""
        while self.parent[a] != a:
            self.parent[a] = self.parent[self.parent[a]]
            a = self.parent[a]
        return a

    def expand(self, axis: Iterable[int]) -> Axis:
        """Return the representatives of an axis, split atoms replaced by their parts and atoms of size 1 left out."""
        representatives: Axis = []
        for a in axis:
            a = self.find(a)
            if a in self.parts:
                representatives += self.expand(self.parts[a])
            elif self.size[a] != 1:
                representatives.append(a)
        return representatives

    def freeze(self, axis: Iterable[int]) -> None:
        """Freeze every atom of an axis, and the children of sliced ones."""
        stack, seen = self.expand(axis), set()
        while stack:
            a = stack.pop()
            if a not in seen:
                seen.add(a)
                self.frozen[a] = True
                stack += self._children(a)

    def _children(self, a: int) -> list[int]:
        return self.expand(self.slices[a][1]) if a in self.slices else []

    def _descendants(self, a: int) -> set[int]:
        """Return all atoms that are slices of an atom, at any depth."""
        stack, seen = [a], set()
        while stack:
            for child in self._children(stack.pop()):
                if child not in seen:
                    seen.add(child)
                    stack.append(child)
        return seen

    def _merge(self, a: int, b: int) -> None:
        for whole, part in ((a, b), (b, a)):
            if part in self._descendants(whole):  # a slice cannot be the whole: neither may be reordered
                _, children = self.slices.pop(whole)
                self.freeze([whole, *children])
                for child in children:
                    self.unify([child], [whole])
                return
        self.parent[a] = b
        frozen = self.frozen[a] or self.frozen[b]
        left, right = self.slices.pop(a, None), self.slices.get(b)
        if left is not None and right is None:
            self.slices[b] = left
        elif left is not None and right is not None:
            if self.find(left[0]) == self.find(right[0]):
                for x, y in zip(left[1], right[1], strict=True):
                    self.unify([x], [y])
            else:
                frozen = True
                self.freeze([*left[1], *right[1]])
        self.frozen[b] = frozen
        if frozen:
            self.freeze([b])

    def unify(self, left: Axis, right: Axis) -> None:
        """Unify two axes of the same length; freeze those of their atoms whose sizes do not tile each other."""
        a, b = self.expand(left), self.expand(right)
        while a and b:
            x, y = a[0], b[0]
            if x == y:
                a, b = a[1:], b[1:]
            elif self.size[x] == self.size[y]:
                self._merge(x, y)
                a, b = self.expand(a[1:]), self.expand(b[1:])
            elif self.size[y] % self.size[x] == 0 and y not in self.slices:
                self._split(y, self.size[x])
                b = self.expand(b)
            elif self.size[x] % self.size[y] == 0 and x not in self.slices:
                self._split(x, self.size[y])
                a = self.expand(a)
            else:
                self.freeze([*a, *b])
                return
        self.freeze([*a, *b])

    def _split(self, a: int, outer: int) -> None:
        """Split an atom into (outer, inner)."""
        self.parts[a] = (self.new(outer, self.frozen[a]), self.new(self.size[a] // outer, self.frozen[a]))

    def slice(self, a: int, selector: int) -> list[int] | None:
        """Return the children of an atom, one per place of ``selector``; None if another selector slices it already."""
        if a not in self.slices:
            children = [self.new(self.size[a], self.frozen[a]) for _ in range(self.size[selector])]
            self.slices[a] = (selector, children)
        owner, children = self.slices[a]
        return children if self.find(owner) == selector else None

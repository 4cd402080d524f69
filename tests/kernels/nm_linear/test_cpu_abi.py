"""The parameter structs in abi.py match those in abi.h, as the compiler lays them out."""

import ctypes
import re
import subprocess

import pytest

from mpcompile.kernels.cpu import abi, build

TYPES = {
    ctypes.c_void_p: "void*",
    ctypes.c_int32: "int32_t",
    ctypes.c_int64: "int64_t",
    ctypes.c_float: "float",
    abi.Weight: "NmWeight",
    abi.Heads: "NmHeads",
}


def assertions(name, struct):
    """C++ that compiles only if ``name`` has the fields of ``struct``: their number, names, types and offsets."""
    fields = struct._fields_
    yield f"static_assert(sizeof({name}) == {ctypes.sizeof(struct)});"
    for field, kind in fields:
        place = getattr(struct, field).offset
        yield f"static_assert(offsetof({name}, {field}) == {place});"
        yield f"static_assert(std::is_same_v<plain<decltype({name}::{field})>, {TYPES[kind]}>);"
    names = ", ".join(field for field, _ in fields)
    uses = " ".join(f"(void){field};" for field, _ in fields)
    yield f"void fields_of(const {name}& s) {{ auto [{names}] = s; {uses} }}"  # exactly as many names as fields


def compiled(tmp_path, structs):
    source = tmp_path / "abi.cpp"
    plain = "template <class T> struct Plain { using type = T; };\n"
    plain += "template <> struct Plain<const void*> { using type = void*; };\n"
    plain += "template <class T> using plain = typename Plain<T>::type;\n"
    lines = [line for name, struct in structs.items() for line in assertions(name, struct)]
    included = '#include <cstddef>\n#include <type_traits>\n#include "abi.h"\n'
    source.write_text(included + plain + "\n".join(lines) + "\n")
    command = [*build.compiler(), "-std=c++17", "-fsyntax-only", "-I", str(build.NATIVE), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, done.stderr


def test_structs_match_the_header(tmp_path):
    declared = {line.split()[1] for line in header().splitlines() if line.startswith("struct ")}
    assert declared == set(abi.STRUCTS)
    assert compiled(tmp_path, abi.STRUCTS) == (0, "")


def header():
    return (build.NATIVE / "abi.h").read_text()


def changed(change):
    """abi.Linear with a mistake in its fields."""
    fields = dict(abi.Linear._fields_)
    if change == "swapped":  # fields of the same type, so that sizes do not give it away
        fields = {"residual": ctypes.c_void_p, "x": ctypes.c_void_p} | fields
    elif change == "missing":  # at the end
        del fields["threads"]
    elif change == "more":
        fields["extra"] = ctypes.c_int32
    elif change == "type":
        fields["threads"] = ctypes.c_int64
    return type("Changed", (ctypes.Structure,), {"_fields_": list(fields.items())})


REASONS = {  # as g++ and clang++ word it
    "swapped": "static.assertion failed",
    "missing": "only 9 names provided|decomposes into 10 elements, but only 9",
    "more": "no member named .*extra|has no member .*extra",
    "type": "static.assertion failed",
}


@pytest.mark.parametrize("change", REASONS)
def test_a_struct_that_differs_is_detected(tmp_path, change):
    status, output = compiled(tmp_path, {"NmLinear": changed(change)})
    assert status != 0 and re.search(REASONS[change], output)


def test_a_field_in_place_of_padding_is_detected(tmp_path):
    assert ctypes.sizeof(abi.Weight) > sum(ctypes.sizeof(kind) for _, kind in abi.Weight._fields_)
    padded = type("Padded", (ctypes.Structure,), {"_fields_": [*abi.Weight._fields_, ("extra", ctypes.c_int32)]})
    assert ctypes.sizeof(padded) == ctypes.sizeof(abi.Weight)
    assert compiled(tmp_path, {"NmWeight": padded})[0] != 0
    short = type("Short", (ctypes.Structure,), {"_fields_": abi.Weight._fields_[:-1]})  # layout in its padding
    assert ctypes.sizeof(short) < ctypes.sizeof(abi.Weight) and compiled(tmp_path, {"NmWeight": short})[0] != 0


def test_formats_have_the_numbers_of_the_header():
    from mpcompile.kernels.nm_linear import operators as native

    assert f"FORMAT_TOKENS = {native._TOKENS}, FORMAT_PLANES = {native._PLANES}," in header()

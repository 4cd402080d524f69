"""Error messages: one printable line of limited length, whatever they quote."""

import pytest
import torch

from mpcompile import cli
from mpcompile.artifact.verify import verify
from mpcompile.errors import MPCompileError, first_line, printable
from mpcompile.measure.report import Report, Row
from mpcompile.plan import LayerPlan, PassRecord, Plan


def test_messages_are_one_printable_line():
    nasty = "\x1b]0;owned\x07\n\r\u202e\u2028\udcff\x9b31m" + "x" * 3000
    for error in (
        MPCompileError(nasty, layer=nasty, expected=nasty, found=nasty, hint=nasty),
        MPCompileError("short", found=nasty),
        MPCompileError("number", found=10**5000),
    ):
        assert str(error).isprintable() and len(str(error)) < 590
    assert str(MPCompileError("short", found=nasty)).startswith("short; found \\x1b]0;owned\\x07\\n")
    assert printable("a\tb") == "a\\tb" and printable("x" * 50, 11) == "xxxxx…xxxxx" and printable("—ü漢") == "—ü漢"


def test_tables_and_the_command_line_escape_names(tmp_path, capsys):
    nasty = "\x1b[31m\u202ea\nb"
    plan = Plan(notes=[nasty], passes=[PassRecord(nasty, {}, nasty)])
    plan.layers[nasty] = LayerPlan("linear", (4, 4), reason=nasty, notes={"analyze": {"verdict": nasty}})
    texts = [plan, Report([Row(nasty)], {nasty: nasty}, notes=[nasty]), verify({nasty: torch.ones(2, 4)})]
    for text in map(str, texts):
        assert all(line.isprintable() for line in text.split("\n")) and "a\\nb" in text
    torch.save({nasty: torch.ones(2, 4)}, tmp_path / "a.pt")
    assert cli.main(["verify", str(tmp_path / "a.pt")]) == 0
    assert cli.main(["verify", f"{nasty}.mpc", "--verbose"]) == 2
    with pytest.raises(SystemExit):
        cli.main(["verify", "x", nasty])
    shown = capsys.readouterr()
    assert all(line.isprintable() for line in (shown.out + shown.err).split("\n"))


@pytest.mark.parametrize("message", ["", " \n", "\n"])
def test_an_error_without_a_message_is_its_class(message):
    assert first_line(ValueError(message)) == "ValueError"
    assert first_line(ValueError(f"{message}\n no such size \nmore")) == "no such size"

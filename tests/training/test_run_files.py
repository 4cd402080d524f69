"""Damaged files of a run: checkpoints, logs and marks are refused with the place of the damage."""

import numpy as np
import pytest
import torch

from mpcompile.errors import ArtifactError
from mpcompile.training import checkpoint
from mpcompile.training import events as logs


def test_a_flipped_bit_in_a_checkpoint_is_found(tmp_path):
    path = tmp_path / checkpoint.NAME
    checkpoint.write(path, {"student": {"w": torch.randn(40, 50)}, "step": 3})
    assert checkpoint.read(path)["step"] == 3 and torch.load(path, weights_only=True)["step"] == 3
    whole = path.read_bytes()
    draw = np.random.default_rng(0)
    for place in [*draw.integers(0, len(whole), 150).tolist(), *range(len(whole) - 110, len(whole))]:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(draw.integers(8))
        path.write_bytes(damaged)
        with pytest.raises(ArtifactError, match="cannot be read as a checkpoint"):
            checkpoint.read(path)
    for other in (whole[:-1], whole + b"x", whole[:100], b"", whole[1:]):
        path.write_bytes(other)
        with pytest.raises(ArtifactError, match="cannot be read as a checkpoint"):
            checkpoint.read(path)


LINES = [b'{"event": 3}', b'{"step": "x"}', b'{"step": -1}', b'{"time": []}', b"[1]", b"\xff", b"[" * 5000]


@pytest.mark.parametrize("line", LINES)
def test_lines_of_a_log_have_a_schema(line, tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"event": "start", "time": 1.5}\n' + line + b"\n")
    with pytest.raises(ArtifactError, match=r"line 2 of .* is damaged"):
        list(logs.read(path))
    with pytest.raises(ArtifactError, match=r"line 2 of .* is damaged"):
        logs.EventLog(path, resume_at=1)


def test_the_name_of_a_wandb_run_is_one(tmp_path):
    for text in (b"../../x", b"a b", b"\xff", b"x" * 5000, b""):
        (tmp_path / "wandb.id").write_bytes(text)
        with pytest.raises(ArtifactError, match=r"wandb\.id"):
            logs._run_name(tmp_path / "wandb.id")

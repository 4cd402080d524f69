"""Locks: one run at a time in a folder, across processes and threads; a killed process leaves none."""

import errno
import fcntl
import os
import signal
import threading
import time

import pytest

from mpcompile.errors import ArtifactError
from mpcompile.io.lock import NAME, locked


def test_one_run_in_a_folder(tmp_path):
    """This holds within one process, too, unless it is the same run; the kernel frees the lock of a killed process."""
    with locked(tmp_path), locked(tmp_path):
        failed = []

        def other():
            try:
                with locked(tmp_path):
                    pass
            except ArtifactError as error:
                failed.append(str(error))

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert f"process {os.getpid()} on " in failed[0] and str(tmp_path) in failed[0]
    assert not list(tmp_path.iterdir())
    pid = os.fork()
    if pid == 0:
        with locked(tmp_path):
            worker = os.fork()  # like a loader's, which outlives the run for a while
            if worker == 0:
                time.sleep(30)
                os._exit(0)
            (tmp_path / "worker").write_text(str(worker))
            time.sleep(30)
        os._exit(0)
    while not (tmp_path / "worker").exists() or not (tmp_path / "worker").read_text():
        time.sleep(0.01)
    with pytest.raises(ArtifactError, match=f"process {pid} "), locked(tmp_path):
        pass
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    with locked(tmp_path):
        pass
    os.kill(int((tmp_path / "worker").read_text()), signal.SIGKILL)
    assert not (tmp_path / NAME).exists()


def test_a_file_system_without_locks_is_reported(tmp_path, monkeypatch, caplog):
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    with locked(tmp_path):
        assert "has no locks" in caplog.text
    (tmp_path / "file").touch()
    with pytest.raises(ArtifactError, match="cannot lock"), locked(tmp_path / "file"):
        pass

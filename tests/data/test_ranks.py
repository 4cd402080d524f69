"""The checksum with which ranks, and a resumed run, compare their code covers every source file."""

import mpcompile
from mpcompile.data import ranks


def test_the_sources_of_all_folders_count(tmp_path, monkeypatch):
    """Links are followed, too: ``passes`` and ``kernels`` are links in a checkout."""
    found = ranks.source_files()
    folders = {name.rpartition("/")[0] for name in found}
    assert {"", "passes", "kernels", "kernels/cpu", "kernels/token_merge", "training", "cli"} <= folders
    assert any(name.endswith(".cpp") for name in found) and "kernels/cpu/native/gemm.h" in found
    (tmp_path / "package").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "package/linked").symlink_to("../elsewhere")
    (tmp_path / "elsewhere/a.py").write_text("1")
    monkeypatch.setattr(mpcompile, "__path__", [str(tmp_path / "package")])
    digests = []
    for text in ("1", "2"):
        (tmp_path / "elsewhere/a.py").write_text(text)
        ranks._sources.cache_clear()
        digests.append(ranks._sources())
    ranks._sources.cache_clear()
    assert digests[0] != digests[1]

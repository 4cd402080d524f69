"""The HTML page: every section with and without data, hostile texts, and a screenshot in a real browser."""

import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from mpcompile import Config, cli, page, rmt, save, transform
from mpcompile.errors import ArtifactError, InputError
from mpcompile.page.sections import SECTIONS, _tiles, waterfall
from mpcompile.page.sources import Sources, number, read_json, records
from mpcompile.page.spectra import draw, spectra
from tests.support.helpers import images, mlp, tiny_vit

BROWSER = os.environ.get("MPCOMPILE_BROWSER") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None
)
DATA = {"input_size": [3, 32, 32], "interpolation": "bicubic", "mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 1.0}
AUDIT = {
    "rows": [
        {"name": "dense eager", "top1": 0.9, "interval": [0.85, 0.94], "agree": 1.0, "macs": 4_000_000,
         "weight_bytes": 2**20, "latency_ms": 10.0, "quartiles_ms": [9.0, 11.0], "speedup": 0.8},
        {"name": "dense compiled", "top1": 0.9, "macs": 4_000_000, "weight_bytes": 2**20, "latency_ms": 8.0,
         "quartiles_ms": [7.9, 8.1], "speedup": 1.0},
        {"name": "compiled sparse", "top1": 0.88, "interval": [0.82, 0.92], "agree": 0.95, "lost": 7, "won": 3,
         "macs": 1_500_000, "weight_bytes": 600_000, "latency_ms": 5.0, "quartiles_ms": [4.9, 5.2], "speedup": 1.6},
    ],
    "environment": {"device": "a processor", "threads": 2},
    "notes": ["random weights"],
}  # fmt: skip
EXPLAIN = {
    "machine": "a processor, AVX2, 2 threads",
    "layers": [
        {"name": "blocks.0.attn.qkv", "engine": "cpu", "us": 600.0, "dense_us": 1000.0},
        {"name": "blocks.1.attn.qkv", "engine": "dense", "us": 900.0, "dense_us": 900.0},
        {"name": "blocks.0.mlp.fc1", "engine": "cpu", "us": 1100.0, "dense_us": 2000.0},
        {"name": "blocks.0.mlp.fc2", "engine": "cpu", "us": None, "dense_us": 5.0},
    ],
}
OPTIMIZE = {
    "max_drop": 0.01,
    "confidence": 0.8,
    "entries": [
        {"name": "dense, torch", "dense": True, "latency_ms": 4.0, "speedup": 1.0, "verdict": "slower"},
        {"name": "8 tokens <merged>", "latency_ms": 2.0, "speedup": 2.0, "drop": 0.004, "interval": [-0.01, 0.02],
         "upper": 0.009, "outcome": {"samples": 500}, "macs": 1000000, "verdict": "chosen"},
    ],
}  # fmt: skip
CERTIFY = {
    "samples": 50,
    "tiers": [{"name": "0 as run", "samples": 50, "certified": 45, "median": 0.1}, {"name": "1", "certified": 20}],
    "statements": [{"kind": "deterministic", "text": "45 labels stay."}],
    "violations": 0,
}


class Reader(HTMLParser):
    """Collects everything that a browser would load or run, and checks that tags close."""

    def __init__(self, text):
        super().__init__()
        self.loads, self.tags, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)
        for key, value in attributes:
            if key in ("src", "href", "xlink:href", "action", "data", "poster", "srcset") or key.startswith("on"):
                self.loads.append(value)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def analyze(seed=0):
    weight = torch.randn(96, 80, generator=torch.Generator().manual_seed(seed))
    weight[:, 0] *= 6
    fit = rmt.fit(weight)
    layer = {"shape": [96, 80], "sigma": fit.sigma, "edge": fit.edge, "spikes": fit.n_spikes, "verdict": fit.verdict}
    return {"layers": {"blocks.0.mlp.fc1": {**layer, "singular_values": torch.linalg.svdvals(weight).tolist()}}}


@pytest.fixture(scope="module")
def artifact():
    gm = transform(tiny_vit(), images(2), Config(pattern="4:8", tome_r=2))
    gm.plan.provenance = {"model": "tiny_vit", "data": DATA, "versions": {"torch": torch.__version__}}
    return gm


@pytest.fixture(scope="module")
def whole(artifact, tmp_path_factory):
    """A page with every section."""
    path = tmp_path_factory.mktemp("images") / "cat <1>.png"
    pixels = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    pictures = {path.name: page.pictures(artifact, path)}
    sources = Sources(AUDIT, EXPLAIN, analyze(), CERTIFY, artifact, "tiny.mpc", 12345, 20000, pictures, OPTIMIZE)
    return page.render(sources)


def test_every_section_is_there(whole):
    assert 'class="none"' not in whole
    for section in SECTIONS:
        assert (
            f'<section id="{section.anchor}"><h2>{section.title}</h2>' in whole and f'href="#{section.anchor}"' in whole
        )
    for text in ("−62.5%", "88.0%", "-2.0 points", "1.60x", "4:8", "after merge 1", "random weights", "tiny_vit",
                 "90.0%: 45 of 50", "45 labels stay.", "AVX2"):  # fmt: skip
        assert text in whole, text


def test_it_fetches_and_runs_nothing(whole):
    reader = Reader(whole)
    assert not reader.open
    assert "script" not in reader.tags and "iframe" not in reader.tags and "link" not in reader.tags
    assert all(value.startswith(("#", "data:image/")) for value in reader.loads)
    assert "default-src 'none'" in whole and "url(" not in whole and "@import" not in whole


def test_without_data_every_section_names_the_command_that_provides_it():
    text = page.render(Sources())
    assert text.count('class="none"') == len(SECTIONS)
    for command in ("audit", "analyze", "report", "certify", "explain", "optimize"):
        assert f"mpcompile {command}" in text


@pytest.mark.parametrize("junk", [{}, {"rows": 3}, {"rows": [1, None]}, {"layers": [[]], "tiers": "x"}, {"rows": {}}])
def test_json_of_another_shape_counts_as_missing(junk):
    assert page.render(Sources(junk, junk, junk, junk)).count('class="none"') >= len(SECTIONS) - 1


def test_rows_with_gaps_are_shown_as_they_are():
    rows = [
        {"name": "dense eager", "latency_ms": None, "macs": "?", "interval": [1]},
        {"name": "x", "top1": float("nan")},
    ]
    text = page.render(Sources(audit={"rows": rows}))
    assert "<td>dense eager</td>" in text and "nan" not in text


def test_texts_cannot_break_out(artifact):
    evil = '"><script>alert(1)</script><img src=x onerror=alert(1)>'
    audit = {"rows": [{"name": evil, "macs": 1}], "environment": {evil: evil}, "notes": [evil]}
    certify = {"tiers": [{"name": evil, "certified": 1, "samples": 2}], "statements": [{"kind": evil, "text": evil}]}
    explain = {"machine": evil, "layers": [{"name": evil, "engine": evil, "us": 1, "dense_us": 2}]}
    found = analyze()
    found["layers"] = [{**next(iter(found["layers"].values())), "name": evil, "verdict": evil}]
    text = page.render(Sources(audit, explain, found, certify, artifact, evil), evil)
    reader = Reader(text)
    assert "script" not in reader.tags and all(value.startswith(("#", "data:image/")) for value in reader.loads)


def test_the_law_is_drawn_over_the_noise():
    (spectrum,), where = spectra(Sources(analyze=analyze()))
    assert spectrum.spikes == 1 and "dense" in where
    picture = draw(spectrum)
    assert picture.count('class="spike"') == 1
    points = re.search(r'points="([^"]+)"', picture)[1].split()
    columns = [float(x) + float(w) for x, w in re.findall(r'<rect x="([\d.]+)" y="[\d.]+" width="([\d.]+)"', picture)]
    assert float(points[-1].split(",")[0]) == pytest.approx(max(columns), rel=0.1)  # the law ends where the bulk does


def test_spectra_of_an_artifact_without_an_analysis(artifact):
    found, where = spectra(Sources(artifact=artifact))
    assert [s.name for s in found] == list(artifact.plan.masked) and "stored" in where
    weight = artifact.get_submodule(found[0].name).weight.detach()
    assert np.allclose(np.sort(found[0].values), np.sort(torch.linalg.svdvals(weight).numpy()), rtol=1e-4, atol=1e-5)
    fits = {found[0].name: {"edge": 1.5, "spikes": 4, "verdict": "not_mp"}}
    for analysis in ({"layers": fits}, {**fits, "head": {"reason": "head"}}):
        assert [(s.name, s.spikes) for s in spectra(Sources(analyze=analysis))[0]] == [(found[0].name, 4)]
    joined, _ = spectra(Sources(analyze=fits, artifact=artifact))
    assert joined[0].spikes == 4 and len(joined[0].values) and joined[1].spikes == found[1].spikes


def test_density_maps_show_single_inputs():
    kept = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0]] * 24).bool().float().repeat(1, 3)
    shares = _tiles(kept, 4)
    assert shares.shape == (24, 12) and shares[0].tolist() == [1.0, 0.5, 0.5, 0.0] * 3
    assert _tiles(torch.ones(3, 4096), 8).shape[1] <= 384


def test_the_waterfall_ends_where_the_picked_layers_do():
    text = waterfall(Sources(explain=EXPLAIN))
    assert (
        "3.90 ms" in text and "2.60 ms" in text
    )  # 1.0 + 0.9 + 2.0, and 0.6 + 0.9 + 1.1; the untimed layer is left out
    assert "attn.qkv" in text and "-0.90 ms" in text


def test_figures_saved_in_an_artifact_are_shown(artifact):
    artifact.plan.figures = AUDIT
    try:
        assert "1.60x" in page.render(Sources(artifact=artifact))
    finally:
        artifact.plan.figures = {}
    assert "not measured" in page.render(Sources(artifact=artifact))


def test_lenient_readers():
    assert number(True) is None and number("1") is None and number(float("inf")) is None and number(2) == 2.0
    assert [name for name, _ in records({"a": {"x": 1}, "b": 3})] == ["a"]
    assert [name for name, _ in records([{"name": "a"}, 3, {}])] == ["a", ""]


def test_command(artifact, tmp_path, capsys):
    save(artifact, tmp_path / "tiny.mpc")
    given = {"audit": AUDIT, "explain": EXPLAIN, "certify": CERTIFY, "optimize": OPTIMIZE}
    for name, data in given.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(data))
    Image.new("RGB", (40, 40), "red").save(tmp_path / "red.png")
    options = [part for name in given for part in (f"--{name}", str(tmp_path / f"{name}.json"))]
    out = str(tmp_path / "page.html")
    image = ["--image", str(tmp_path / "red.png")]
    assert cli.main(["report", str(tmp_path / "tiny.mpc"), *options, *image, "--out", out, "--title", "T & T"]) == 0
    text = (tmp_path / "page.html").read_text()
    assert "<h1>T &amp; T</h1>" in text and "red.png" in text and 'class="none"' not in text
    assert capsys.readouterr().out.strip() == out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to report"),
        (["--image", "cat.jpg", "--audit", "good.json"], "--image needs an artifact"),
        (["--audit", "none.json"], "cannot read none.json"),
        (["--audit", "bad.json"], "bad.json is not JSON"),
        (["--audit", "list.json"], "list.json is not the JSON of mpcompile audit"),
        (["--explain", "good.json"], "good.json is not the JSON of mpcompile explain"),
        (["--analyze", "good.json"], "good.json is not the JSON of mpcompile analyze"),
        (["none.mpc"], "cannot be loaded"),
    ],
)
def test_bad_calls(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, text in {"bad": "{", "list": "[]", "good": '{"rows": []}'}.items():
        (tmp_path / f"{name}.json").write_text(text)
    assert cli.main(["report", *arguments]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "report.html").exists()


def test_errors_of_sources(tmp_path):
    assert read_json(None, "audit") is None
    with pytest.raises(ArtifactError):
        read_json(tmp_path, "audit")
    gm = transform(mlp(), torch.ones(1, 32))
    gm.plan.provenance["data"] = DATA
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(InputError, match="merges no tokens"):
        page.pictures(gm, tmp_path / "a.png")


@pytest.mark.skipif(
    BROWSER is None, reason="no browser found: put chromium on the PATH, or its path into MPCOMPILE_BROWSER"
)
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_it_looks_right_in_a_browser(whole, theme, tmp_path):
    """A screenshot: the right background, everything inside the page's width, and every kind of mark visible."""
    (tmp_path / "page.html").write_text(whole)
    scheme = f"--blink-settings=preferredColorScheme={0 if theme == 'dark' else 1}"
    shot = tmp_path / "shot.png"
    subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run", scheme,
         f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={shot}", "--window-size=1100,4200",
         (tmp_path / "page.html").as_uri()],
        check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    pixels = np.asarray(Image.open(shot).convert("RGB")).astype(int)
    paper, dense, sparse, law = {
        "light": ((255, 255, 255), (140, 149, 159), (11, 98, 196), (194, 65, 12)),
        "dark": ((13, 17, 23), (110, 118, 129), (88, 166, 255), (251, 146, 60)),
    }[theme]
    assert tuple(pixels[5, 5]) == paper and tuple(pixels[-5, -5]) == paper

    def count(colour):
        return int((np.abs(pixels - colour).max(-1) <= 2).sum())

    assert count(dense) > 5000 and count(sparse) > 5000 and count(law) > 50
    assert count(paper) / pixels[..., 0].size < 0.98
    used = np.nonzero((np.abs(pixels - paper).max(-1) > 40).any(0))[0]
    assert used.min() > 20 and used.max() < 1080  # margins are free: nothing runs out of the page

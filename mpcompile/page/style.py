"""The style sheet of the page: light or dark, as the reader prefers, and for print."""

CSS = """
:root { color-scheme: light dark;
  --paper: #ffffff; --ink: #1b1f24; --soft: #57606a; --rule: #d0d7de; --panel: #f6f8fa;
  --dense: #8c959f; --sparse: #0b62c4; --other: #9cc4ef; --law: #c2410c; --mark: #1b1f24; }
@media (prefers-color-scheme: dark) { :root {
  --paper: #0d1117; --ink: #e6edf3; --soft: #9da7b3; --rule: #30363d; --panel: #161b22;
  --dense: #6e7681; --sparse: #58a6ff; --other: #2f5f97; --law: #fb923c; --mark: #e6edf3; } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 62rem; padding: 2rem 1.2rem 4rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", "Helvetica Neue", Arial, sans-serif }
h1 { font-size: 1.7rem; margin: 0 0 .2rem } h2 { font-size: 1.2rem; margin: 2.6rem 0 .5rem;
  border-bottom: 1px solid var(--rule); padding-bottom: .2rem } h3 { font-size: 1rem; margin: 1.4rem 0 .4rem }
p { margin: .4rem 0 } p, li, figcaption, .soft { color: var(--soft) } .soft { font-size: .92em }
code { font: .9em ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; color: var(--ink) }
nav { margin: .8rem 0 0; font-size: .92em } nav a { margin-right: .9rem } a { color: var(--sparse) }
.cards { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1rem 0 }
.card { flex: 1 1 11rem; background: var(--panel); border: 1px solid var(--rule); border-radius: 8px;
  padding: .7rem .9rem }
.card b { display: block; font-size: 1.5rem; color: var(--ink); font-variant-numeric: tabular-nums }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-size: .9em; font-variant-numeric: tabular-nums }
th, td { padding: .28rem .7rem; text-align: right; border-bottom: 1px solid var(--rule); white-space: nowrap }
th:first-child, td:first-child { text-align: left; padding-left: 0 } th { color: var(--soft); font-weight: 600 }
.words td, .words th { text-align: left; white-space: normal }
tr.best td { font-weight: 600 }
.none { background: var(--panel); border: 1px dashed var(--rule); border-radius: 8px; padding: .7rem .9rem }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(264px, 1fr)); gap: 1rem }
figure { margin: 0; min-width: 0 } figcaption { font-size: .85em; overflow-wrap: anywhere }
svg { max-width: 100%; height: auto; overflow: visible; display: block }
svg text { fill: var(--ink); font-size: 12px; font-family: inherit }
svg text.value { paint-order: stroke; stroke: var(--paper); stroke-width: 4px }
svg text.small { font-size: 10px; fill: var(--soft) }
.bar.dense { fill: var(--dense) } .bar.sparse { fill: var(--sparse) } .bar.other { fill: var(--other) }
.bar.chosen { fill: var(--law) }
.whisker { stroke: var(--ink); stroke-width: 1.5 } .mark { stroke: var(--mark); stroke-dasharray: 3 3 }
.axis { stroke: var(--rule) } .law { fill: none; stroke: var(--law); stroke-width: 1.6 }
.spike { stroke: var(--law); stroke-width: 1.2 }
img { max-width: 100%; display: block } img.map { width: 100%; height: 72px; image-rendering: pixelated;
  border: 1px solid var(--rule) }
.ramp { display: inline-block; width: 8rem; height: .7rem; vertical-align: middle; border: 1px solid var(--rule);
  background: linear-gradient(90deg, #f7fbff, #9ecae1, #3182bd, #08306b) }
.strip { display: flex; flex-wrap: wrap; gap: .6rem; margin: .6rem 0 } .strip figure { width: 11.5rem }
.strip img { width: 100% }
details > summary { cursor: pointer; color: var(--sparse); margin: .8rem 0 }
@media print { body { max-width: none } details { display: block } nav { display: none } }
"""

"""Colours and style sheet of the report: light and dark mode, from the width of a phone upward."""

# Charts are drawn in the light colours; in the page each becomes its CSS variable. All differ.
LIGHT = {
    "paper": "#ffffff",
    "ink": "#1c2128",
    "dim": "#59636e",
    "line": "#d8dee4",
    "card": "#f4f6f8",
    "c0": "#2364b0",
    "c1": "#c24f00",
    "c2": "#24803c",
    "warn": "#fff4d6",
    "flag": "#cf222e",
}
DARK = {
    "paper": "#12161c",
    "ink": "#e4e9ef",
    "dim": "#9aa5b1",
    "line": "#333c47",
    "card": "#1c222b",
    "c0": "#6cb0ff",
    "c1": "#ff9a52",
    "c2": "#5fce7c",
    "warn": "#3a2f10",
    "flag": "#ff7b72",
}


def _variables(colours: dict[str, str]) -> str:
    return "; ".join(f"--{name}: {colour}" for name, colour in colours.items())


_COLOURS = f"""
:root {{ color-scheme: light dark; {_variables(LIGHT)};
  --blue: 35 100 176; --orange: 194 79 0 }}
@media (prefers-color-scheme: dark) {{ :root {{ {_variables(DARK)} }} }}
"""

_RULES = """
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 1400px; padding: 0 16px 48px; background: var(--paper);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
h1 { margin: 24px 0 0; font-size: 28px; line-height: 1.2 } header p { margin: 4px 0 12px }
h2 { margin: 40px 0 8px; font-size: 21px } h3 { margin: 0; font-size: 15px }
header p, small, dt, th { color: var(--dim) }
nav { position: sticky; top: 0; z-index: 3; display: flex; flex-wrap: wrap; gap: 2px 16px;
  padding: 8px 0; background: var(--paper); border-bottom: 1px solid var(--line) }
a { color: var(--c0) } section { scroll-margin-top: 72px }
aside { margin-top: 16px; padding: 4px 16px; background: var(--warn); border-radius: 8px }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(165px, 1fr)); gap: 10px;
  margin: 0 }
dl div { padding: 8px 12px; background: var(--card); border-radius: 8px }
dt { font-size: 13px } dd { margin: 0; font-weight: 600 }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr));
  gap: 24px 32px }
figure { margin: 0; min-width: 0 }
figcaption { font-size: 13px; color: var(--dim) }
.chart svg { display: block; width: 100%; height: auto; overflow: visible }
.chart { max-width: 600px } .chart text { font-family: system-ui, sans-serif }
.timeline svg { min-width: 600px; max-width: 840px }
.scroll { overflow-x: auto; max-width: 100% }
table { border-collapse: collapse; font-size: 14px }
th { text-align: left; font-weight: 500; white-space: nowrap }
th, td { padding: 3px 14px 3px 0; vertical-align: top; border-bottom: 1px solid var(--line);
  overflow-wrap: break-word }
.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
code { font: 13px/1.5 ui-monospace, monospace; white-space: pre-wrap }
#history td { min-width: 3em } #history td:nth-child(2) { white-space: nowrap }
#history td:last-child { min-width: 16em } #environment td:first-child { white-space: nowrap }
.matrix th, .matrix td { padding: 0; min-width: 32px; white-space: nowrap;
  height: 30px; text-align: center;
  vertical-align: middle; border: 1px solid var(--line); font-variant-numeric: tabular-nums }
.matrix tbody th { position: sticky; left: 0; z-index: 1; padding: 0 8px; text-align: right;
  max-width: 180px; overflow: hidden; text-overflow: ellipsis; background: var(--paper) }
.matrix thead th { vertical-align: bottom; padding: 6px 0 } .matrix thead td { border: 0 }
.matrix thead span { writing-mode: vertical-rl; transform: rotate(180deg); max-height: 180px;
  overflow: hidden; text-overflow: ellipsis }
.right { background: rgb(var(--blue) / var(--p)) }
.wrong { background: rgb(var(--orange) / var(--p)) }
.deep { color: #fff }
#confusion h3, #worst h3 { margin: 4px 0 }
.pair { display: flex; flex-wrap: wrap; gap: 8px 56px; align-items: start }
.pair > * { min-width: 0; max-width: 100% }
meter { width: 60px; vertical-align: middle }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 16px }
.tiles img { display: block; width: 100%; aspect-ratio: 1; border-radius: 6px;
  background: var(--card) } .coarse { image-rendering: pixelated }
.tiles figcaption { color: var(--ink); margin-top: 4px; font-size: 13px; line-height: 1.35 }
summary { cursor: pointer; padding: 4px 0; color: var(--c0) }
.recipe td { border: 0; padding-top: 0; padding-bottom: 0; vertical-align: baseline }
.recipe td:last-child { color: var(--dim); font-size: 13px }
pre.recipe { columns: 260px; white-space: pre-wrap }
@media (max-width: 700px) {
  #history thead { display: none } #history table, #history tbody { display: block }
  #history tr { display: flex; flex-wrap: wrap; gap: 0 10px; padding: 4px 0;
    border-bottom: 1px solid var(--line) }
  #history td { padding: 0; border: 0; min-width: 0 } #history td:last-child { flex-basis: 100% }
  #history td:nth-child(4)::before { content: "step " }
  #history td:nth-child(5):not(:empty)::before { content: "after " }
  th { white-space: normal } meter { display: none } th, td { padding-right: 10px }
  .matrix tbody th { max-width: 110px } .matrix thead span { max-height: 120px }
  .recipe td:first-child { min-width: 190px }
}
@media print { nav { position: static } details > * { display: block } }
"""

STYLE = _COLOURS + _RULES

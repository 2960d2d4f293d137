"""The looks of the report: light and dark, from a telephone's width on."""

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1c2128; --dim: #59636e; --line: #d8dee4;
  --card: #f4f6f8; --c0: #2364b0; --c1: #c24f00; --c2: #24803c; --warn: #fff4d6; --flag: #cf222e;
  --blue: 35 100 176; --orange: 194 79 0 }
@media (prefers-color-scheme: dark) { :root { --paper: #12161c; --ink: #e4e9ef; --dim: #9aa5b1;
  --line: #333c47; --card: #1c222b; --c0: #6cb0ff; --c1: #ff9a52; --c2: #5fce7c; --warn: #3a2f10;
  --flag: #ff7b72 } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 1400px; padding: 0 16px 48px; background: var(--paper);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
h1 { margin: 24px 0 0; font-size: 28px; line-height: 1.2 } header p { margin: 4px 0 12px }
h2 { margin: 40px 0 8px; font-size: 21px } h3 { margin: 0; font-size: 15px }
figcaption h3 { flex-basis: 100% }
header p, small, figure > small, dt, th { color: var(--dim) }
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
figcaption { display: flex; flex-wrap: wrap; align-items: baseline; gap: 0 14px }
.key::before { content: ""; display: inline-block; width: 14px; height: 4px; margin-right: 6px;
  vertical-align: middle; border-radius: 2px; background: var(--k) }
.key { font-size: 13px } .legend { display: flex; flex-wrap: wrap; gap: 2px 18px; margin: 4px 0 }
.c0 { --k: var(--c0) } .c1 { --k: var(--c1) } .c2 { --k: var(--c2) }
.plot { display: grid; grid-template: 210px 24px / 52px 1fr; margin: 6px 10px 0 0; font-size: 12px;
  color: var(--dim) }
.plot svg { width: 100%; height: 100%; min-width: 0; overflow: visible; grid-area: 1 / 2;
  border-left: 1px solid var(--line); border-bottom: 1px solid var(--line) }
.rows, .columns { position: relative } .plot .columns { grid-area: 2 / 2 }
.rows span { position: absolute; right: 6px; transform: translateY(50%); white-space: nowrap }
.columns span { position: absolute; top: 3px; transform: translateX(-50%); white-space: nowrap }
path { fill: none; stroke: var(--k); stroke-width: 1.8; vector-effect: non-scaling-stroke;
  stroke-linejoin: round; stroke-linecap: round }
.grid { stroke: var(--line); stroke-width: 1 } .faint { stroke-width: 1; opacity: .4 }
.stop { stroke: var(--dim); stroke-width: 1; stroke-dasharray: 2 4 } .dot { stroke-width: 6 }
.dots.key::before { width: 8px; height: 8px; border-radius: 4px }
.time { padding: 0 24px; font-size: 12px; color: var(--dim) }
.lane { position: relative; height: 22px; background: var(--card); border-radius: 4px }
.lane i { position: absolute; top: 0; bottom: 0; min-width: 3px; background: var(--k) }
.run { --k: var(--c0) } .open { --k: var(--c2) }
.lane .lost { background: repeating-linear-gradient(135deg, var(--dim) 0 3px, transparent 3px 7px) }
.lost { --k: var(--dim) } .flag { --k: var(--flag) }
.flags { position: relative; height: 20px }
.flags b { position: absolute; bottom: 0; padding: 0 3px; border-left: 2px solid var(--flag);
  color: var(--flag); line-height: 18px; height: 42px; margin-bottom: -22px; z-index: 1 }
.time .columns { height: 24px }
.scroll { overflow-x: auto; max-width: 100% }
table { border-collapse: collapse; font-size: 14px }
th { text-align: left; font-weight: 500; white-space: nowrap }
th, td { padding: 3px 14px 3px 0; vertical-align: top; border-bottom: 1px solid var(--line);
  overflow-wrap: break-word }
.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
code { font: 13px/1.5 ui-monospace, monospace; white-space: pre-wrap }
#time td { min-width: 3em } #time td:nth-child(2) { white-space: nowrap }
#time td:last-child { min-width: 16em } #environment td:first-child { white-space: nowrap }
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
.tiles figcaption { display: block; margin-top: 4px; font-size: 13px; line-height: 1.35 }
summary { cursor: pointer; padding: 4px 0; color: var(--c0) }
.recipe td { border: 0; padding-top: 0; padding-bottom: 0; vertical-align: baseline }
.recipe td:last-child { color: var(--dim); font-size: 13px }
pre.recipe { columns: 260px; white-space: pre-wrap }
@media (max-width: 700px) {
  #time thead { display: none } #time table, #time tbody { display: block }
  #time tr { display: flex; flex-wrap: wrap; gap: 0 10px; padding: 4px 0;
    border-bottom: 1px solid var(--line) }
  #time td { padding: 0; border: 0; min-width: 0 } #time td:last-child { flex-basis: 100% }
  #time td:nth-child(4)::before { content: "step " }
  #time td:nth-child(5):not(:empty)::before { content: "after " }
  th { white-space: normal } meter { display: none } th, td { padding-right: 10px }
  .matrix tbody th { max-width: 110px } .matrix thead span { max-height: 120px }
  .recipe td:first-child { min-width: 190px }
}
@media print { nav { position: static } details > * { display: block } }
"""

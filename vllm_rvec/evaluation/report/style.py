"""The page's style sheet: light and dark, on paper too. Colours are told apart by the colour-blind.

The palette is Okabe and Ito's (Color Universal Design, 2008), darker or lighter for contrast.
"""

from __future__ import annotations

from typing import Final

__all__ = ["STYLE"]

STYLE: Final = """
:root {
  --page: #ffffff; --text: #1c2024; --faint: #5b6670; --rule: #d8dee4; --soft: #f4f6f8;
  --vector: #0061a4; --prompted: #b3470a; --random: #5b6670; --minus: #8d3b78;
  --gain: #0061a4; --loss: #b3470a; --good: #00684d; --bad: #a32c00;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #15191d; --text: #e6eaee; --faint: #a3afba; --rule: #363e46; --soft: #1e2429;
    --vector: #6cb8f5; --prompted: #f0a05a; --random: #a3afba; --minus: #dd9cc9;
    --gain: #6cb8f5; --loss: #f0a05a; --good: #4fc9a4; --bad: #ff9a70;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 24px 20px 64px; }
h1 { font-size: 24px; margin: 0 0 16px; }
h2 { font-size: 18px; margin: 40px 0 12px; }
h3 { font-size: 14px; margin: 16px 0 4px; overflow-wrap: anywhere; }
.verdict { background: var(--soft); border-left: 6px solid var(--faint); padding: 8px 18px;
  font-size: 17px; overflow-wrap: anywhere; }
.verdict.use_alpha { border-color: var(--good); }
.verdict.loss { border-color: var(--bad); }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr));
  gap: 20px; }
figure { margin: 0 0 16px; max-width: 640px; }
figcaption { color: var(--faint); font-size: 13px; overflow-wrap: anywhere; }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--text); font: 12px system-ui, sans-serif; }
.grid { stroke: var(--rule); stroke-width: 1; }
.axis { stroke: var(--faint); stroke-width: 1; }
.line { fill: none; stroke-width: 2; }
.bar { stroke-width: 1.5; }
.level { stroke-width: 1.5; stroke-dasharray: 6 4; }
.band { opacity: 0.12; }
.vector { stroke: var(--vector); } .mark.vector { fill: var(--vector); }
.prompted { stroke: var(--prompted); } .mark.prompted { fill: var(--prompted); }
.random { stroke: var(--random); } .mark.random { fill: var(--random); }
.minus { stroke: var(--minus); } .mark.minus { fill: var(--minus); }
.mark.loss { fill: var(--loss); }
.fill.gain { fill: var(--gain); } .fill.loss { fill: var(--loss); }
.band.prompted { fill: var(--prompted); stroke: none; }
.table { overflow-x: auto; margin: 12px 0 20px; }
table { border-collapse: collapse; font-size: 13.5px; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--faint); padding-bottom: 6px; }
th, td { padding: 4px 14px 4px 0; text-align: left; border-bottom: 1px solid var(--rule);
  vertical-align: top; font-weight: normal; }
td { white-space: nowrap; }
thead th { color: var(--faint); }
.number { text-align: right; }
pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; background: var(--soft);
  padding: 6px 10px; font: 13px/1.45 ui-monospace, monospace; }
dt { color: var(--faint); font-size: 13px; margin-top: 8px; }
dd { margin: 0; }
details { border-bottom: 1px solid var(--rule); padding: 6px 0; }
summary { cursor: pointer; }
article { border-left: 4px solid var(--loss); padding-left: 14px; margin: 16px 0; }
article.gained { border-color: var(--gain); }
@media print { details > * { display: block; } section { break-inside: avoid-page; } }
"""

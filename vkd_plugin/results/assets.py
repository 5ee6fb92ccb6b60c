"""How the report page looks, and the script that draws its charts."""

STYLE = """
:root { --ink: #1c2430; --soft: #5b6675; --line: #dfe3e8; --ground: #f6f7f9; --mark: #fff4d6; }
* { box-sizing: border-box; }
body { margin: 0; color: var(--ink); background: var(--ground);
       font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
header, main { max-width: 1360px; margin: 0 auto; padding: 0 24px; }
header { padding-top: 28px; }
h1 { font-size: 24px; margin: 0 0 4px; }
h2 { font-size: 19px; margin: 36px 0 10px; padding-bottom: 4px; border-bottom: 2px solid var(--line); }
h3 { font-size: 15px; margin: 22px 0 8px; }
h4 { font-size: 13px; margin: 0; font-weight: 600; overflow-wrap: anywhere; }
p { margin: 6px 0; max-width: 76em; }
code { font: 0.92em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-wrap: anywhere; }
.soft, .caption { color: var(--soft); }
.caption { font-size: 12px; margin: 0; overflow-wrap: anywhere; }
.runs { position: sticky; top: 0; z-index: 5; background: var(--ground); border-bottom: 1px solid var(--line); }
.runs ul { max-width: 1360px; margin: 0 auto; padding: 8px 24px; list-style: none;
           display: flex; flex-wrap: wrap; gap: 4px 20px; max-height: 30vh; overflow: auto; }
.runs label { cursor: pointer; overflow-wrap: anywhere; }
.dot { display: inline-block; width: 11px; height: 11px; border-radius: 50%; margin: 0 4px 0 2px; }
.grid + .grid { margin-top: 14px; }
.picture { max-width: 100%; display: block; }
.classes { font-size: 13px; display: flex; flex-wrap: wrap; gap: 2px 14px; margin: 4px 0 10px; }
.scroll { overflow-x: auto; width: fit-content; max-width: 100%;
          background: white; border: 1px solid var(--line); border-radius: 6px; }
table { border-collapse: collapse; font-size: 13px; }
th, td { padding: 4px 12px; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
tr:last-child > * { border-bottom: 0; }
thead th { background: var(--ground); max-width: 26em; overflow-wrap: anywhere; }
tbody th { font-weight: 400; white-space: nowrap; }
td { font-variant-numeric: tabular-nums; max-width: 40em; overflow-wrap: anywhere; min-width: 6em; }
tr.differs > * { background: var(--mark); }
.grid { display: grid; gap: 14px; grid-template-columns: repeat(auto-fill, minmax(min(310px, 100%), 1fr)); }
.wide { grid-template-columns: repeat(auto-fill, minmax(min(560px, 100%), 1fr)); }
.card { background: white; border: 1px solid var(--line); border-radius: 6px; padding: 10px 12px 8px; min-width: 0; }
.chart { width: 100%; }
.note { background: var(--mark); border: 1px solid #ecd9a0; border-radius: 6px; padding: 6px 12px; max-width: 76em;
        overflow-wrap: anywhere; }
footer { max-width: 1360px; margin: 40px auto 24px; padding: 0 24px; font-size: 12px; color: var(--soft); }
"""

SCRIPT = """
"use strict";
const charts = [...document.querySelectorAll(".chart")];
const options = {responsive: true, displaylogo: false, modeBarButtons: [["toImage", "resetScale2d"]]};
const drawn = charts.map(chart => {
  const {data, layout} = JSON.parse(chart.nextElementSibling.textContent);
  return Plotly.newPlot(chart, data, layout, options);
});
Promise.all(drawn).then(() => { document.body.dataset.drawn = charts.length; });
for (const box of document.querySelectorAll("input[data-run]")) {
  box.addEventListener("change", () => {
    for (const chart of charts) {
      const traces = chart.data.flatMap((trace, i) => trace.meta === Number(box.dataset.run) ? [i] : []);
      if (traces.length) Plotly.restyle(chart, {visible: box.checked}, traces);
    }
  });
}
"""
"""Reads each chart's description from the element after it. A trace's ``meta`` is the number of its run."""

"""The style of a page: one column on a telephone, three on a desk, dark where the reader's system is."""

STYLE = """
:root { --ink: #1f2328; --soft: #59636e; --line: #d8dee4; --paper: #ffffff; --page: #f6f8fa; --accent: #0072b2;
  --first: #0072b2; --faint: #56b4e9; --warn: #d55e00;
  --font: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  color-scheme: light dark; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --soft: #9aa4af; --line: #30363d; --paper: #161b22; --page: #0d1117; --accent: #56b4e9;
    --first: #58b4f0; --faint: #2c6b94; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 var(--font); }
main { max-width: 84rem; margin: 0 auto; padding: 1.5rem clamp(0.75rem, 3vw, 2.5rem) 3rem; }
header { display: flex; flex-wrap: wrap; align-items: baseline; gap: 0.25rem 1rem; }
h1 { font-size: clamp(1.4rem, 4vw, 2rem); line-height: 1.2; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.25rem 0 0.75rem; }
h3 { font-size: 0.95rem; font-weight: 600; margin: 0 0 0.35rem; }
section > h3 { margin-top: 1.5rem; }
p { margin: 0 0 0.75rem; }
.state { margin: 0; padding: 0 0.6rem; border: 1px solid var(--line); border-radius: 1rem; font-size: 0.9rem;
  background: var(--paper); }
.state.finished { color: #009e73; }
.state.going { color: var(--accent); }
.state.stopped { color: var(--warn); }
.cards { display: grid; gap: 0.75rem; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr));
  margin: 1.25rem 0; }
@media (min-width: 60rem) { .cards { grid-template-columns: repeat(5, 1fr); } }
.card, figure, dl, details, .scroll { background: var(--paper); border: 1px solid var(--line); border-radius: 0.5rem; }
.card { padding: 0.7rem 0.9rem; min-width: 0; }
.card h3 { color: var(--soft); font-weight: 500; font-size: 0.85rem; margin: 0; }
.card .value { font-size: 1.45rem; line-height: 1.3; margin: 0; font-variant-numeric: tabular-nums; }
.card .note { color: var(--soft); font-size: 0.8rem; line-height: 1.35; margin: 0; overflow-wrap: anywhere; }
.figures { display: grid; gap: 0.75rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)); }
figure { margin: 0; padding: 0.8rem 0.8rem 0.7rem; min-width: 0; }
figure svg { display: block; width: 100%; height: auto; }
svg * { stroke-linejoin: round; stroke-linecap: butt; }
svg text { font-family: var(--font); }
figcaption { color: var(--soft); font-size: 0.82rem; line-height: 1.4; margin-top: 0.4rem; }
dl { margin: 0 0 0.75rem; padding: 0.4rem 0.9rem; }
dl div { display: grid; grid-template-columns: 6rem 1fr; gap: 0.25rem 1rem; padding: 0.3rem 0;
  border-top: 1px solid var(--line); }
dl div:first-child { border-top: 0; }
dt { color: var(--soft); }
dd { margin: 0; min-width: 0; overflow-wrap: anywhere; }
@media (max-width: 30rem) { dl div { grid-template-columns: 1fr; gap: 0; } }
details { padding: 0.5rem 0.9rem; }
summary { cursor: pointer; }
pre { font-size: 0.82rem; overflow-x: auto; margin: 0.5rem 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.88rem; font-variant-numeric: tabular-nums; width: 100%; }
th, td { padding: 0.35rem 0.7rem; text-align: right; white-space: nowrap; border-top: 1px solid var(--line); }
th { color: var(--soft); font-weight: 500; border-top: 0; }
th:first-child, td:first-child { text-align: left; }
.problems, .findings { margin: 1rem 0; padding: 0.6rem 0.9rem 0.6rem 2rem; border-radius: 0.5rem;
  border: 1px solid var(--line); border-left: 0.25rem solid var(--warn); background: var(--paper);
  overflow-wrap: anywhere; }
.findings { border-left-color: var(--accent); }
footer { color: var(--soft); font-size: 0.82rem; margin-top: 2.5rem; }
@media print { body { background: none; } figure, .card { break-inside: avoid; } }
"""

"""The report's style sheet. Colours are variables, so that charts and text follow light and dark alike."""

from __future__ import annotations

LIGHT = {
    "page": "#f7f7f5",
    "card": "#ffffff",
    "ink": "#1d2126",
    "muted": "#575f68",
    "line": "#d9dce0",
    "grid": "#e4e6e9",
    "teacher": "#3f464e",
    "base": "#626a73",
    "control": "#a84800",
    "student": "#0a5fa5",
    "int8": "#006e58",
    "int4": "#86398c",
}
"""Colours by role on a light page; every one that is written in has a contrast of 4.5 or more to page and card."""

DARK = {
    "page": "#131619",
    "card": "#1b1f24",
    "ink": "#e7eaed",
    "muted": "#a5adb6",
    "line": "#363d45",
    "grid": "#2c3239",
    "teacher": "#ced4da",
    "base": "#98a1ab",
    "control": "#f0a262",
    "student": "#70b6f3",
    "int8": "#52c6a5",
    "int4": "#d99bdc",
}
"""The same roles on a dark page."""

_RULES = """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;text-size-adjust:100%}
body{margin:0;background:var(--page);color:var(--ink);
  font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main,header,footer{max-width:1080px;margin:0 auto;padding:0 24px}
header{padding-top:48px}
h1{font-size:1.05rem;font-weight:600;margin:0;color:var(--muted);overflow-wrap:anywhere}
h2{font-size:1.3rem;line-height:1.3;margin:0 0 12px;font-weight:650}
h3{font-size:1rem;margin:0 0 12px;font-weight:650}
p{margin:0 0 12px;max-width:46rem}
.lead{font-size:1.55rem;line-height:1.35;font-weight:600;margin:8px 0 16px;max-width:none;text-wrap:pretty}
.verdict{font-size:1.05rem;max-width:none}
p.small{max-width:none}
a{color:var(--student)}
.small,.note{color:var(--muted);font-size:.875rem}
.notice{border:1px solid var(--line);border-left:4px solid var(--control);background:var(--card);
  padding:12px 16px;border-radius:6px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(190px,1fr));gap:12px;margin:24px 0 0}
.tiles div{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:14px 16px;
  display:flex;flex-direction:column}
.tiles dt{font-size:.875rem;color:var(--muted)}
.tiles dd{margin:0;font-size:1.5rem;font-weight:650;line-height:1.3;font-variant-numeric:tabular-nums}
.tiles dd small{display:block;font-size:.875rem;font-weight:400;line-height:1.4;color:var(--muted);margin-top:2px}
.part{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:28px 28px 20px;margin:24px 0}
figure{margin:20px 0 24px}
figcaption{margin:0 0 10px}
figcaption strong{display:block;font-weight:650}
figcaption .note{display:block}
svg{display:block;width:100%;height:auto}
svg text{font-family:inherit}
.narrow{display:none}
.box{margin:16px 0;border:1px solid var(--line);border-radius:8px;overflow:hidden}
.scroll{overflow-x:auto}
.scroll:focus-visible,pre:focus-visible,summary:focus-visible{outline:2px solid var(--student);outline-offset:-2px}
table{border-collapse:collapse;width:100%;font-size:.9rem;font-variant-numeric:tabular-nums}
.caption{margin:0;padding:10px 12px;max-width:none;color:var(--muted);font-size:.875rem}
th,td{padding:8px 9px;text-align:right;vertical-align:top;border-top:1px solid var(--line);white-space:nowrap}
th:first-child{text-align:left;white-space:normal;min-width:9.5rem}
thead th{color:var(--muted);font-weight:600;vertical-align:bottom}
tbody th{font-weight:500}
tfoot th,tfoot td{font-weight:650}
td small,th small{display:block;color:var(--muted);font-weight:400;font-size:.8rem}
.bar{display:block;height:4px;border-radius:2px;background:var(--student);margin:5px 0 2px auto}
.facts{margin:0 0 16px}
.facts>div{display:grid;grid-template-columns:13rem minmax(0,1fr);gap:2px 16px;padding:7px 0;
  border-top:1px solid var(--line)}
.facts>div:first-child{border-top:0}
.facts dt{color:var(--muted)}
.facts dd{margin:0;overflow-wrap:anywhere}
code,pre{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,"Liberation Mono",monospace;font-size:.85rem}
pre{margin:0;white-space:pre-wrap;overflow-wrap:anywhere;max-height:15rem;overflow:auto;line-height:1.5}
.sample{border-top:1px solid var(--line);padding:18px 0 8px}
.asked{display:grid;grid-template-columns:7rem minmax(0,1fr);gap:6px 16px;margin:0 0 14px}
.asked dt{color:var(--muted)}
.asked dd{margin:0}
.outputs{display:grid;grid-template-columns:repeat(auto-fill,minmax(250px,1fr));gap:12px;
  list-style:none;margin:0 0 12px;padding:0}
.pairs{grid-template-columns:repeat(auto-fill,minmax(min(100%,400px),1fr))}
.pairs p.note{margin:6px 0 0}
.outputs li{border:1px solid var(--line);border-radius:8px;padding:10px 12px;min-width:0}
.who{display:flex;justify-content:space-between;gap:8px;flex-wrap:wrap;margin:0 0 6px;font-size:.875rem}
.who b{font-weight:600}
.right{color:var(--int8);font-weight:600}
.wrong{color:var(--control);font-weight:600}
.empty{color:var(--muted);font-style:italic}
details{margin:0 0 14px}
summary{cursor:pointer;padding:6px 0}
footer{padding-bottom:48px;color:var(--muted);font-size:.875rem}
@media (max-width:820px){
 main,header,footer{padding-left:14px;padding-right:14px}
 header{padding-top:28px}
 .lead{font-size:1.25rem}
 .part{padding:20px 16px 12px;margin:16px 0;border-radius:8px}
 .tiles{grid-template-columns:repeat(2,minmax(0,1fr))}
 .tiles div{padding:12px}
 .tiles dd{font-size:1.25rem}
 .wide{display:none}
 .narrow{display:block;max-width:440px}
 th,td{padding:8px 10px}
 th:first-child{min-width:7.5rem;max-width:9rem;position:sticky;left:0;background:var(--card)}
 .facts>div,.asked{grid-template-columns:minmax(0,1fr)}
}
@media print{
 body{background:none}
 .part,.tiles div{break-inside:avoid;border-color:#bbb}
 pre{max-height:none}
}
"""


def _variables(colours: dict[str, str]) -> str:
    return "".join(f"--{role}:{colour};" for role, colour in colours.items())


def sheet() -> str:
    """CSS of the whole page."""
    return (
        f":root{{color-scheme:light dark;{_variables(LIGHT)}}}"
        f"@media (prefers-color-scheme:dark){{:root{{{_variables(DARK)}}}}}{_RULES}"
    )

"""The look of the page: one column of text, figures that fit it, and what scrolls, alone."""

from __future__ import annotations

from qconvert.comparing.svg import FONT

CSS = f"""
*{{box-sizing:border-box}}
html{{-webkit-text-size-adjust:100%;text-size-adjust:100%}}
body{{margin:0;background:var(--surface);color:var(--ink);font:16px/1.55 {FONT};
overflow-wrap:anywhere}}
main{{max-width:68rem;margin:0 auto;padding:2.5rem 1.5rem 3rem}}
h1{{font-size:clamp(1.7rem,5vw,2.4rem);line-height:1.15;margin:0 0 .5rem;letter-spacing:-.02em}}
h2{{font-size:1.15rem;margin:0 0 .75rem;letter-spacing:-.01em}}
p{{margin:0 0 .6rem;max-width:46rem}}
section{{margin-top:3rem}}
.over,.small,.detail,footer{{color:var(--muted);font-size:.875rem}}
.over{{margin:0}}
.answer{{max-width:50rem;margin-top:1.5rem;padding:1rem 1.25rem;border-left:3px solid var(--accent);
background:var(--kept)}}
.answer p:last-child{{margin:0}}
.first{{font-size:1.125rem;font-weight:600}}
.scroll{{position:relative;overflow-x:auto;border:solid var(--axis);border-width:1px 0;
background:linear-gradient(to left,var(--surface) 35%,transparent) right/3rem 100% local no-repeat,
linear-gradient(to left,var(--grid),transparent) right/1.1rem 100% no-repeat}}
.scroll:focus-visible,summary:focus-visible{{outline:2px solid var(--accent);outline-offset:2px}}
table{{border-collapse:collapse;width:100%;font-size:.9rem;font-variant-numeric:tabular-nums}}
th,td{{padding:.55rem .7rem;text-align:right;vertical-align:top;white-space:nowrap;
overflow-wrap:normal}}
thead th{{color:var(--muted);font-weight:500;font-size:.8125rem;line-height:1.3;
vertical-align:bottom;white-space:normal;min-width:4.2rem;border-bottom:1px solid var(--grid)}}
tbody tr+tr>*{{border-top:1px solid var(--grid)}}
th:first-child{{text-align:left;padding-left:0;position:sticky;left:0;
background:var(--surface)}}
th[scope=row]{{font-weight:400;white-space:normal;min-width:11rem;max-width:18rem}}
.detail{{display:block;font-size:.78rem;line-height:1.35;font-weight:400}}
.source td,.source th{{color:var(--muted)}}
.failed td{{white-space:normal;min-width:16rem;text-align:left;color:var(--bound)}}
.error{{color:var(--muted);font-size:.8em}}
.marks{{display:inline-flex;flex-wrap:wrap;gap:.3rem;margin:0 0 .1rem .5rem;vertical-align:.08rem}}
.marks+.marks{{margin-left:0}}
.mark{{padding:0 .4rem;border:1px solid var(--accent);
border-radius:1rem;color:var(--accent);font-size:.7rem;line-height:1.5;white-space:nowrap}}
.best{{background:var(--accent);color:var(--surface)}}
details{{margin-top:.75rem;font-size:.875rem}}
summary{{cursor:pointer;color:var(--muted)}}
dl{{margin:.5rem 0 0}}
dl>div{{display:grid;grid-template-columns:11rem 1fr;gap:.25rem 1.25rem;padding:.45rem 0}}
dt{{font-weight:600}}
dd{{margin:0;min-width:0}}
details dt{{font-weight:500}}
figure{{margin:0}}
svg{{display:block;max-width:100%;height:auto;font-family:{FONT}}}
.narrow{{display:none}}
.dot{{display:inline-block;width:.7rem;height:.7rem;border-radius:50%;
border:2px solid var(--accent);background:var(--accent);vertical-align:-.08rem}}
.hollow{{border-color:var(--other);background:none}}
.legend{{margin:.75rem 0 1.25rem}}
.maps{{display:flex;flex-wrap:wrap;gap:2rem 2.5rem}}
article{{margin-top:1.25rem;border-top:1px solid var(--axis)}}
article dl{{margin:0}}
article dl>div+div{{border-top:1px solid var(--grid)}}
.prompt,article dd{{white-space:pre-wrap;font:.84rem/1.5 ui-monospace,SFMono-Regular,Menlo,
Consolas,'DejaVu Sans Mono',monospace}}
.prompt{{margin:.6rem 0 .35rem;padding-left:.75rem;border-left:3px solid var(--grid);max-width:none;
color:var(--muted)}}
mark{{background:var(--differs);color:inherit;border-radius:2px;
-webkit-box-decoration-break:clone;box-decoration-break:clone}}
.notes{{font-size:.875rem}}
.notes ul{{margin:0;padding-left:1.1rem}}
footer{{margin-top:3rem}}
.hidden{{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%);
white-space:nowrap}}
@media(max-width:40rem){{
main{{padding:1.5rem 1rem 2rem}}
section{{margin-top:2.25rem}}
dl>div{{grid-template-columns:1fr}}
.wide{{display:none}}
.narrow{{display:block}}
.maps{{gap:1.75rem}}
th[scope=row]{{min-width:6.5rem;max-width:8.5rem}}
}}
@media print{{.scroll{{overflow:visible}}details{{display:none}}}}
""".replace("\n", "")

"""HTML text: escaping, tables, and the frame of a self-contained page.

Pages are also well-formed XML, so that tests can parse them strictly.
"""

import html
import re
from collections.abc import Sequence

# Characters that HTML and XML cannot contain, even escaped: most control characters, lone surrogates.
_IMPOSSIBLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")

# The page must never fetch or run anything, whatever the log contains.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"

_STYLE = """
:root {
  color-scheme: light dark;
  --page: #fbfbfa; --card: #ffffff; --text: #1d1f21; --quiet: #63676b; --rule: #e1e2e4;
  --first: #1f66d1; --second: #c2570c; --third: #4f7d1f; --fourth: #7d3fb8;
  --mark: #fff0b8;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #15171a; --card: #1e2125; --text: #e8e9ea; --quiet: #a0a5aa; --rule: #34383d;
    --first: #75a9ff; --second: #ff9d5c; --third: #a3d060; --fourth: #c9a3f7;
    --mark: #54470f;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; max-width: 82rem; padding: 1rem; background: var(--page); color: var(--text);
  font: 1rem/1.45 system-ui, sans-serif; overflow-wrap: anywhere;
}
h1 { font-size: 1.5rem; margin: 0.5rem 0; }
h2 { font-size: 1.2rem; margin: 2rem 0 0.75rem; }
h3 { font-size: 1rem; margin: 1.25rem 0 0.5rem; }
p { margin: 0.5rem 0; }
.quiet { color: var(--quiet); font-size: 0.875rem; }
.cards, .charts, .users, .sides { display: grid; gap: 0.75rem; }
.cards { grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); }
.charts { grid-template-columns: repeat(auto-fill, minmax(min(100%, 24rem), 1fr)); }
.users { grid-template-columns: repeat(auto-fit, minmax(min(100%, 34rem), 1fr)); margin-top: 0.75rem; }
.sides { grid-template-columns: repeat(auto-fit, minmax(min(100%, 15rem), 1fr)); }
.card, figure, .user, details {
  margin: 0; padding: 0.75rem; background: var(--card); border: 1px solid var(--rule);
  border-radius: 0.5rem;
}
.user h3, .sides h4 { margin: 0 0 0.25rem; }
.sides h4 { font-size: 0.875rem; font-weight: 600; color: var(--quiet); }
.card b { display: block; font-size: 1.4rem; font-variant-numeric: tabular-nums; }
figcaption { margin-bottom: 0.25rem; font-weight: 600; }
.key { display: inline-block; margin-left: 0.75rem; font-weight: 400; font-size: 0.875rem; }
.key::before {
  content: ""; display: inline-block; width: 1.25rem; margin-right: 0.3rem; vertical-align: middle;
  border-top: 2px solid var(--first);
}
.key.s1::before { border-top: 2px dashed var(--second); }
.key.s2::before { border-top: 2px dotted var(--third); }
.key.s3::before { border-top: 2px dashed var(--fourth); }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--quiet); font: 12px system-ui, sans-serif; }
.grid { stroke: var(--rule); }
.s0 { stroke: var(--first); fill: var(--first); }
.s1 { stroke: var(--second); fill: var(--second); }
.s2 { stroke: var(--third); fill: var(--third); }
.s3 { stroke: var(--fourth); fill: var(--fourth); }
polyline { fill: none !important; stroke-width: 1.75; stroke-linejoin: round; }
polyline.s1 { stroke-dasharray: 5 3; }
polyline.s2 { stroke-dasharray: 2 3; }
polyline.s3 { stroke-dasharray: 8 3 2 3; }
.point rect { fill: transparent; }
.point circle { opacity: 0; }
.few .point circle, .point:hover circle { opacity: 1; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
th, td {
  padding: 0.25rem 0.7rem 0.25rem 0; border-bottom: 1px solid var(--rule); text-align: right;
  vertical-align: top;
}
th:first-child, td:first-child { text-align: left; }
th { color: var(--quiet); font-weight: 600; }
.numbers td { white-space: nowrap; }
.numbers th, .numbers td { overflow-wrap: normal; }
@media (max-width: 30rem) {
  table { font-size: 0.8rem; }
  th, td { padding-right: 0.4rem; }
}
.words th, .words td { text-align: left; }
summary { cursor: pointer; }
ol { margin: 0; padding-left: 2.75rem; }
li { padding: 0.1rem 0.25rem; }
li .quiet { margin-left: 0.4rem; }
.held { background: var(--mark); border-radius: 0.25rem; }
"""


def escaped(value: object) -> str:
    """The text of `value`, escaped for HTML, between tags or in a quoted attribute."""
    return html.escape(_IMPOSSIBLE.sub("\ufffd", str(value)))


def data(value: object) -> str:
    """Text from a log, isolated so that right-to-left text cannot reorder its surroundings."""
    return f"<bdi>{escaped(value)}</bdi>"


def table(headers: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "numbers") -> str:
    """A table that gets its own scroll bar if it is wider than the page.

    Args:
      headers: text, which is escaped here.
      rows: cells, which must already be HTML.
      kind: CSS class; "words" aligns all cells to the left.
    """
    head = "".join(f"<th>{escaped(header)}</th>" for header in headers)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>\n" for row in rows)
    return (
        f'<div class="scroll"><table class="{kind}"><thead><tr>{head}</tr></thead>\n'
        f"<tbody>{body}</tbody></table></div>\n"
    )


def document(title: str, body: str) -> str:
    """A complete page.

    Args:
      title: text, which is escaped here.
      body: HTML.
    """
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8"/>
<meta name="viewport" content="width=device-width, initial-scale=1"/>
<meta http-equiv="Content-Security-Policy" content="{_POLICY}"/>
<title>{escaped(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
{body}</body>
</html>
"""

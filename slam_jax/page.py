"""A page of HTML that needs no other file and can be read on a phone."""

import html
from collections.abc import Mapping, Sequence

_STYLE = """
body{font:16px/1.4 system-ui,sans-serif;max-width:60rem;margin:0 auto;padding:1rem;color:#222}
h1{font-size:1.4rem;overflow-wrap:anywhere}h2{font-size:1.1rem;margin:1.6rem 0 .4rem}
table{border-collapse:collapse;width:100%}
td,th{padding:.1rem .5rem .1rem 0;vertical-align:top;overflow-wrap:anywhere;text-align:left}
.number{text-align:right;font-variant-numeric:tabular-nums}
.bar{width:55%}.bar div{background:#3b7dd8;height:1rem;min-width:1px}
.sheet{display:flex;flex-wrap:wrap;gap:2px}.sheet img{width:64px;height:64px;object-fit:cover}
.wide{overflow-x:auto}.wide table{width:auto}.wide td,.wide th{white-space:nowrap}
.facts td:first-child{min-width:45%}figure{margin:.5rem 0}figure img{max-width:100%}
pre{background:#f4f4f4;padding:.5rem;overflow-x:auto}
"""


def whole(title: str, parts: Sequence[str]) -> bytes:
    """The file; `parts` are HTML, the title is not."""
    page = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(title)}</title><style>{_STYLE}</style></head>\n"
        f"<body><h1>{text(title)}</h1>\n{''.join(parts)}</body></html>\n"
    )
    return page.encode("utf-8", "replace")


def text(value: object) -> str:
    """As HTML shows it."""
    return html.escape(str(value))


def heading(value: object) -> str:
    """Of a part."""
    return f"<h2>{text(value)}</h2>\n"


def facts(values: Mapping[str, object]) -> str:
    """A table of two columns, the second to the right."""
    rows = (
        f"<tr><td>{text(name)}</td><td class='number'>{text(value)}</td></tr>\n"
        for name, value in values.items()
    )
    return f"<table class='facts'>{''.join(rows)}</table>\n"


def folded(name: object, content: str) -> str:
    """Content, which is HTML, that is shown when its name is pressed."""
    return f"<details><summary>{text(name)}</summary>{content}</details>\n"


def table(head: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    """A table that scrolls sideways where it is too wide."""
    names = "".join(f"<th>{text(name)}</th>" for name in head)
    lines = ("".join(f"<td>{text(cell)}</td>" for cell in row) for row in rows)
    body = "".join(f"<tr>{line}</tr>\n" for line in lines)
    return f"<div class='wide'><table><tr>{names}</tr>\n{body}</table></div>\n"

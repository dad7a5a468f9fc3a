"""A cache's statistics for people and programs: report.html, which needs no other file, and
report.json.
"""

import html
import json
from collections.abc import Mapping
from typing import Any

from slam_jax.data import summary as summaries
from slam_jax.data.manifest import Manifest
from slam_jax.data.summary import Summary

JSON, HTML = "report.json", "report.html"
MOST_THUMBNAILS = 96

_STYLE = """
body{font:16px/1.4 system-ui,sans-serif;max-width:60rem;margin:0 auto;padding:1rem;color:#222}
h1{font-size:1.4rem;overflow-wrap:anywhere}h2{font-size:1.1rem;margin:1.6rem 0 .4rem}
table{border-collapse:collapse;width:100%}
td{padding:.1rem .5rem .1rem 0;vertical-align:top;overflow-wrap:anywhere}
.count{text-align:right;font-variant-numeric:tabular-nums}
.bar{width:55%}.bar div{background:#3b7dd8;height:1rem;min-width:1px}
.sheet{display:flex;flex-wrap:wrap;gap:2px}.sheet img{width:64px;height:64px;object-fit:cover}
"""


def numbers(manifest: Manifest, total: Summary) -> dict[str, Any]:
    """What report.json holds."""
    filtered, bad = (summaries.reasons(total, filtered=which) for which in (True, False))
    return {
        "source": manifest.plan.source,
        "size": manifest.plan.size,
        "samples": manifest.plan.num_samples,
        "kept": total.kept,
        "records": sum(shard.records for shard in manifest.shards),
        "bytes": manifest.num_bytes,
        "filtered": filtered,
        "bad": bad,
        "captions_cut": total.cut,
        "short_side": total.short_side,
        "aspect": total.aspect,
        "tokens": total.tokens,
        "examples_of_dropped": [list(each) for each in total.examples],
    }


def as_json(found: Mapping[str, Any]) -> bytes:
    return (json.dumps(found, indent=1) + "\n").encode()


def as_html(found: Mapping[str, Any], total: Summary) -> bytes:
    """The same as a page, with bars and a sheet of thumbnails."""
    title = f"{found['source']} at {found['size']} pixels"
    dropped = {**found["filtered"], **found["bad"]}
    facts = {
        "samples": f"{found['samples']:,}",
        "kept": f"{found['kept']:,}",
        "left out by filters": f"{sum(found['filtered'].values()):,}",
        "cannot be used": f"{sum(found['bad'].values()):,}",
        "captions cut": f"{found['captions_cut']:,}",
        "records": f"{found['records']:,}",
        "size of the shards": f"{found['bytes'] / 1e6:,.1f} MB",
    }
    parts = [
        _table(facts),
        _bars("Left out, by reason", dropped),
        _bars("Short side of the originals, pixels", found["short_side"]),
        _bars("Long side over short side", found["aspect"]),
        _bars("Tokens of a caption, start and end counted", found["tokens"]),
        _examples(found["examples_of_dropped"]),
        _sheet(total.thumbnails),
    ]
    page = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(title)}</title><style>{_STYLE}</style></head>\n"
        f"<body><h1>{_text(title)}</h1>\n{''.join(parts)}</body></html>\n"
    )
    return page.encode("utf-8", "replace")


def _text(value: object) -> str:
    return html.escape(str(value))


def _table(facts: Mapping[str, str]) -> str:
    rows = (
        f"<tr><td>{_text(name)}</td><td class='count'>{_text(value)}</td></tr>\n"
        for name, value in facts.items()
    )
    return f"<table>{''.join(rows)}</table>\n"


def _bars(heading: str, counts: Mapping[str, int]) -> str:
    """A histogram as a table, a row with a bar for each label."""
    most = max(counts.values(), default=0) or 1
    rows = (
        f"<tr><td class='label'>{_text(label)}</td><td class='count'>{count:,}</td>"
        f"<td class='bar'><div style='width:{100 * count / most:.1f}%'></div></td></tr>\n"
        for label, count in counts.items()
    )
    table = f"<table>{''.join(rows)}</table>" if counts else "<p>none</p>"
    return f"<h2>{_text(heading)}</h2>\n{table}\n"


def _examples(examples: list[list[str]]) -> str:
    rows = (
        f"<tr><td>{_text(reason)}</td><td>{_text(shard)}</td><td>{_text(key)}</td></tr>\n"
        for reason, shard, key in examples
    )
    if not examples:
        return ""
    return f"<h2>Some of what was left out</h2>\n<table>{''.join(rows)}</table>\n"


def _sheet(thumbnails: list[str]) -> str:
    images = (f"<img alt='' src='data:image/jpeg;base64,{each}'>" for each in thumbnails)
    return f"<h2>Some of what was kept</h2>\n<div class='sheet'>{''.join(images)}</div>\n"

"""A cache's statistics for people and programs: report.html, which needs no other file, and
report.json.
"""

import json
from collections.abc import Mapping
from typing import Any

from slam_jax import page
from slam_jax.data import summary as summaries
from slam_jax.data.manifest import Manifest
from slam_jax.data.summary import Summary

JSON, HTML = "report.json", "report.html"
MOST_THUMBNAILS = 96


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
        page.facts(facts),
        _bars("Left out, by reason", dropped),
        _bars("Short side of the originals, pixels", found["short_side"]),
        _bars("Long side over short side", found["aspect"]),
        _bars("Tokens of a caption, start and end counted", found["tokens"]),
        _examples(found["examples_of_dropped"]),
        _sheet(total.thumbnails),
    ]
    return page.whole(title, parts)


def _bars(heading: str, counts: Mapping[str, int]) -> str:
    """A histogram as a table, a row with a bar for each label."""
    most = max(counts.values(), default=0) or 1
    rows = (
        f"<tr><td class='label'>{page.text(label)}</td><td class='number'>{count:,}</td>"
        f"<td class='bar'><div style='width:{100 * count / most:.1f}%'></div></td></tr>\n"
        for label, count in counts.items()
    )
    table = f"<table>{''.join(rows)}</table>" if counts else "<p>none</p>"
    return f"{page.heading(heading)}{table}\n"


def _examples(examples: list[list[str]]) -> str:
    if not examples:
        return ""
    return page.heading("Some of what was left out") + page.table(
        ("reason", "shard", "sample"), examples
    )


def _sheet(thumbnails: list[str]) -> str:
    images = (f"<img alt='' src='data:image/jpeg;base64,{each}'>" for each in thumbnails)
    return f"{page.heading('Some of what was kept')}<div class='sheet'>{''.join(images)}</div>\n"

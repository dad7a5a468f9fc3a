"""What MkDocs calls for every page: fills in what is read from the code, and turns LaTeX to MathML.

MathML needs no script and no font of others, so pages can be read without a network.
"""

import html
import re

import reference
from latex2mathml import converter

# As pymdownx.arithmatex leaves it: \(inline\) or \[a block\].
_LATEX = re.compile(
    r'(<(?:span|div) class="arithmatex">)\\[(\[](.+?)\\[)\]](</(?:span|div)>)', re.S
)


def on_page_markdown(markdown: str, **_context: object) -> str:
    """The page with what reference.py knows in the places that ask for it."""
    return reference.fill(markdown)


def on_page_content(content: str, **_context: object) -> str:
    """The page with its equations as MathML."""
    return _LATEX.sub(_mathml, content)


def _mathml(match: re.Match) -> str:
    before, latex, after = match.groups()
    display = "block" if before.startswith("<div") else "inline"
    return f"{before}{converter.convert(html.unescape(latex), display=display)}{after}"

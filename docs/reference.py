"""What the documentation says of the code, read from the code: flags, configs, the map.

Each function gives Markdown. The pages ask for it by `<!-- generated: NAME -->` (hooks.py).
"""

import ast
import functools
import importlib
import io
import json
import pathlib
import re
import runpy
import tokenize
import types

from absl import flags

from slam_jax import settings

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "slam_jax"
PROGRAMS = ("main", "sample", "prepare", "evaluate", "export", "serve", "report", "env")
# Whose values are shown.
_CONFIGS = ("tiny", "sd15", "sdxl_lora")


@functools.cache
def programs() -> str:
    """Every flag of every program, as it is defined."""
    return "\n\n".join(_program(name) for name in PROGRAMS)


def _program(name: str) -> str:
    module, defined = define(name)
    rows = [(f"`--{flag.name}`", _kind(flag), _default(flag), _help(flag)) for flag in defined]
    for flag in defined:  # another program may have one of that name
        delattr(flags.FLAGS, flag.name)
    heading = [f"## {name}", "", _first(module.__doc__), "", "```", *_example(module.__doc__)]
    return "\n".join([*heading, "```", "", table(("flag", "type", "default", "meaning"), rows)])


def define(name: str) -> tuple[types.ModuleType, list[flags.Flag]]:
    """Imports a program for the first time in this process; the flags that it defines."""
    before = {id(flag) for flag in _flags()}
    module = importlib.import_module(f"slam_jax.{name}")
    defined = sorted((f for f in _flags() if id(f) not in before), key=lambda flag: flag.name)
    if not defined:
        raise RuntimeError(f"slam_jax.{name} was imported before: its flags cannot be told apart")
    return module, defined


def _flags() -> list[flags.Flag]:
    """Those that slam_jax defines; libraries have some too."""
    by_module = flags.FLAGS.flags_by_module_dict()
    return [f for module, found in by_module.items() if "slam_jax" in module for f in found]


def _kind(flag: flags.Flag) -> str:
    if isinstance(flag, flags.EnumFlag):
        return "one of " + ", ".join(flag.parser.enum_values)
    return "Python file" if flag.name in ("config", "protocol") else flag.flag_type()


def _default(flag: flags.Flag) -> str:
    return "" if flag.default in (None, "", []) else f"`{flag.default}`"


def _help(flag: flags.Flag) -> str:
    """Without what absl adds to it: the choices before, how to repeat it behind."""
    return re.sub(r"^<[^>]*>: |;\s+repeat this option.*$", "", flag.help, flags=re.S)


def _first(doc: str) -> str:
    """The first paragraph that is no command."""
    paragraphs = (part.replace("\n", " ").strip() for part in doc.strip().split("\n\n"))
    return next((part for part in paragraphs if not part.startswith("python ")), "")


def _example(doc: str) -> list[str]:
    """The commands of a docstring."""
    joined = doc.replace("\\\n", "")
    return [
        " ".join(line.split())
        for line in joined.splitlines()
        if line.strip().startswith("python -m")
    ]


def config() -> str:
    """Every value of a config: its type, what the settings say of it, what configs/ give."""
    given = {
        name: runpy.run_path(str(ROOT / "configs" / f"{name}.py"))["get_config"]().to_dict()
        for name in _CONFIGS
    }
    comments = _comments((PACKAGE / "settings.py").read_text(encoding="utf-8"))
    return "\n\n".join(_group(settings.Settings, "", comments, given))


def _group(group: type, prefix: str, comments: dict, given: dict) -> list[str]:
    rows, below = [], []
    for key, kind in group.__annotations__.items():
        name = f"{prefix}{key}"
        values = {config: values[key] for config, values in given.items()}
        if kind.__module__ == settings.__name__:
            below += _group(kind, f"{name}.", comments, values)
        else:
            shown = [f"`{_short(value)}`" for value in values.values()]
            rows.append((f"`{name}`", kind.__name__, comments[group.__name__][key], *shown))
    title = [f"## {prefix.rstrip('.') or 'The run'}", "", _first(group.__doc__), "", ""]
    head = ("key", "type", "meaning", *(f"{name}.py" for name in _CONFIGS))
    return ["\n".join(title) + table(head, rows), *below]


def _short(value: object) -> str:
    text = json.dumps(value) if isinstance(value, str) else repr(value)
    return text if len(text) <= 40 else f"{text[:36]} …"


def _comments(source: str) -> dict[str, dict[str, str]]:
    """Class -> field -> the comment beside it, "" where there is none."""
    beside = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    return {
        node.name: {
            field.target.id: " ".join(
                beside[line] for line in range(field.lineno, field.end_lineno + 1) if line in beside
            )
            for field in node.body
            if isinstance(field, ast.AnnAssign)
        }
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef)
    }


def code_map() -> str:
    """Every package and module of slam_jax: what it is, and what of slam_jax it imports."""
    parts = {path.stem if path.is_file() else path.name: path for path in sorted(_parts())}
    uses = {name: sorted(_imported(path) - {name}) for name, path in parts.items()}
    rows = []
    for name in sorted(parts, key=lambda name: (_height(name, uses), name)):
        path = parts[name]
        doc = (path if path.is_file() else path / "__init__.py").read_text(encoding="utf-8")
        link = f"`{name}.py`" if path.is_file() else f"`{name}/`"
        what = _first(ast.get_docstring(ast.parse(doc))).split(". ")[0].rstrip(".:")
        rows.append((link, what, str(_lines(path)), ", ".join(uses[name])))
    return table(("part", "what it is", "lines", "imports"), rows)


def _parts() -> list[pathlib.Path]:
    found = [path for path in PACKAGE.iterdir() if not path.name.startswith("_")]
    return [path for path in found if path.suffix == ".py" or (path / "__init__.py").exists()]


def _imported(path: pathlib.Path) -> set[str]:
    """Parts of slam_jax that the files of this one name in an import."""
    found = set()
    for file in _files(path):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            match node:
                case ast.ImportFrom(module="slam_jax", names=names):
                    found |= {alias.name for alias in names}
                case ast.ImportFrom(module=str(module)) if module.startswith("slam_jax."):
                    found.add(module.split(".")[1])
    return found


def _files(path: pathlib.Path) -> list[pathlib.Path]:
    return [path] if path.is_file() else sorted(path.glob("*.py"))


def _lines(path: pathlib.Path) -> int:
    return sum(file.read_text(encoding="utf-8").count("\n") for file in _files(path))


def _height(name: str, uses: dict[str, list[str]]) -> int:
    """How many imports lie above each other below it."""
    return 1 + max((_height(each, uses) for each in uses[name]), default=0)


def readme_table(after: str) -> str:
    """The first table of the README below the line that contains `after`."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(rf"{re.escape(after)}.*?\n((?:\|[^\n]*\n)+)", text, re.S)
    if not found:
        raise RuntimeError(f"README.md has no table after {after!r}; mend the page that asks")
    return found[1].rstrip()


def notebook(name: str) -> str:
    """The cells and pictures of a notebook."""
    cells = json.loads((ROOT / "docs" / name).read_text(encoding="utf-8"))["cells"]
    parts = []
    for cell in cells:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", ()):
            png = output.get("data", {}).get("image/png")
            if png:
                parts.append(f"![](data:image/png;base64,{''.join(png.split())})")
    return "\n\n".join(parts)


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table; a | in a cell is escaped."""
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(
        f"| {' | '.join(c.replace('|', chr(92) + '|') for c in row)} |" for row in lines
    )


GENERATED = {"programs": programs, "config": config, "map": code_map}


def fill(markdown: str) -> str:
    """The page with everything in it that it asks for by a comment."""

    def found(match: re.Match) -> str:
        kind, _, what = match[1].partition(": ")
        if kind == "generated":
            return GENERATED[what]()
        return readme_table(what) if kind == "readme" else notebook(what)

    return re.sub(r"<!-- ((?:generated|readme|notebook): .+?) -->", found, markdown)

"""The commands in README.md, CONTRIBUTING.md and docs/, and whether the programs take them.

    python tests/documented.py

reads a JSON list of commands from stdin, and prints a list of what is wrong with each, "" for
nothing. None is run.
"""

import argparse
import contextlib
import io
import json
import os
import pathlib
import re
import runpy
import shlex
import sys
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).parents[1]
# What a line in a block without a language starts with if it is a command.
_STARTS = ("python", "make", "launch/", "sbatch", "pip", "img2dataset", "kubectl")
_LAUNCHERS = {"local.sh": 1, "slurm.sbatch": 0, "tpu_pod.sh": 0}  # own arguments, then flags


def pages() -> list[pathlib.Path]:
    """The README, CONTRIBUTING and all of docs/."""
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def commands(text: str) -> Iterator[str]:
    """Of the blocks without a language and of code in lines that starts as commands do."""
    blocks = re.findall(r"^( *)```(\w*)\n(.*?)^\1```", text, re.S | re.M)
    for _, language, block in blocks:
        lines = block.replace("\\\n", " ").splitlines() if language in ("", "bash", "sh") else ()
        bare = (re.sub(r"\s+# .*", "", line) for line in lines)
        yield from filter(_is_command, (" ".join(line.split()) for line in bare))
    outside = re.sub(r"^( *)```.*?^\1```", "", text, flags=re.S | re.M)
    spans = (" ".join(span.split()) for span in re.findall(r"`([^`]+)`", outside))
    yield from (span for span in spans if " " in span and _is_command(span))


def _is_command(line: str) -> bool:
    without_variables = re.sub(r"^([A-Z][A-Z_0-9]*=\S+ )+", "", line)
    return without_variables.startswith(_STARTS)


def parts(command: str) -> tuple[dict[str, str], list[str]]:
    """Variables set before it, and its words; a value that is `…` is left out with its flag."""
    words = shlex.split(command)
    while "…" in words:
        at = words.index("…")
        del words[at - 1 : at + 1]
    number = next(i for i, word in enumerate(words) if not re.match(r"[A-Z][A-Z_0-9]*=", word))
    variables = dict(word.split("=", 1) for word in words[:number])
    return variables, [word for word in words[number:] if not word.endswith("=…")]


def asked(command: str) -> tuple[str, list[str]]:
    """What runs, "slam_jax.main" or "benchmarks/data.py" or "", and the arguments it gets."""
    variables, words = parts(command)
    default = variables.get("MODULE", "slam_jax.main")
    launcher = next((n for n, word in enumerate(words) if word.startswith("launch/")), None)
    if launcher is not None:
        name = pathlib.Path(words[launcher]).name
        rest = words[launcher + 1 :]
        if name == "mpi.sh":
            return default, rest[rest.index("--") + 1 :]
        return (default, rest[_LAUNCHERS[name] :]) if name in _LAUNCHERS else ("", [])
    if words[:2] == ["python", "-m"]:
        return words[2], words[3:]
    return (words[1], words[2:]) if words[0] == "python" else ("", [])


def check_all(given: list[str]) -> list[str]:
    """What is wrong with each. Programs are imported once; each command is parsed in a child."""
    sys.path[:0] = [str(ROOT), str(ROOT / "docs")]
    import reference
    from absl import flags

    import slam_jax.command

    wrong = dict.fromkeys(given, "")
    targets = [(command, *asked(command)) for command in given]
    for program in reference.PROGRAMS:
        _, defined = reference.define(program)
        for command, target, arguments in targets:
            if target == f"slam_jax.{program}":
                words = [program, *map(slam_jax.command.underscored, arguments)]
                needed = _required(program)
                wrong[command] = _in_child(lambda w=words, n=needed: _parse(w, n))
        for flag in defined:
            delattr(flags.FLAGS, flag.name)
    for command, target, arguments in targets:
        if target.startswith("benchmarks/"):
            wrong[command] = _in_child(lambda t=target, a=arguments: _parse_options(t, a))
    return list(wrong.values())


def _required(program: str) -> list[str]:
    """Flags without which it does not start."""
    text = (ROOT / "slam_jax" / f"{program}.py").read_text(encoding="utf-8")
    return re.findall(r'"(\w+)"', re.search(r"required=\((.*?)\)", text)[1])


def _parse(words: list[str], needed: list[str]) -> None:
    """As a program does, config and protocol included."""
    from absl import flags

    from slam_jax import settings
    from slam_jax.evaluation import protocol

    sys.argv = words  # where overrides of a config are looked for
    left = flags.FLAGS(words)
    if len(left) > 1:
        raise ValueError(f"{left[1:]} are no flags")
    values = flags.FLAGS.flag_values_dict()
    if missing := [name for name in needed if values[name] is None]:
        raise ValueError(f"--{missing[0]} must be given")
    if values.get("config") is not None:
        settings.from_config(values["config"].to_dict())
    if values.get("protocol") is not None:
        protocol.from_config(values["protocol"].to_dict())


def _parse_options(path: str, arguments: list[str]) -> None:
    """As a benchmark does; it is left right after it has parsed its arguments."""
    parse = argparse.ArgumentParser.parse_args

    def parse_and_leave(*given: object) -> None:
        parse(*given)
        sys.exit(0)

    argparse.ArgumentParser.parse_args = parse_and_leave
    sys.argv = [path, *arguments]
    runpy.run_path(str(ROOT / path), run_name="__main__")


def _in_child(parse) -> str:
    """What it says if it fails, "" if it does not."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said):
                parse()
            message = ""
        except SystemExit as end:
            message = said.getvalue() if end.code else ""
        except BaseException as error:  # whatever is wrong with a command is to be told
            message = f"{type(error).__name__}: {error}"
        os.write(writer, message[:4000].encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, encoding="utf-8") as said_by_child:
        message = said_by_child.read()
    os.waitpid(child, 0)
    return message


if __name__ == "__main__":
    json.dump(check_all(json.load(sys.stdin)), sys.stdout)

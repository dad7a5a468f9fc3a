"""The style rules that a machine can check, numbered as in the style guide they come from.

Each checker takes one parsed file and yields (line, what is wrong); BAD and GOOD at the end
show every checker failing on a few lines and passing on their mended form.
"""

import ast
import functools
import importlib.util
import io
import pathlib
import re
import statistics
import subprocess
import sys
import tokenize
import types
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE, OURS, ALL = (
    ("slam_jax",),
    ("slam_jax", "benchmarks", "examples", "configs"),
    ("slam_jax", "benchmarks", "examples", "configs", "tests"),
)
Found = Iterator[tuple[int, str]]


class Source(NamedTuple):
    """A file: its path from the repository's root, its text and its syntax tree."""

    path: str
    text: str
    tree: ast.Module

    @property
    def part(self) -> str:
        """The package or module right below slam_jax: "diffusion", "train"; "" elsewhere."""
        top, _, rest = self.path.partition("/")
        return rest.partition("/")[0].removesuffix(".py") if top == "slam_jax" else ""


def parse(path: str, text: str) -> Source:
    return Source(path, text, ast.parse(text))


@functools.cache
def sources(folders: tuple[str, ...]) -> list[Source]:
    return [
        parse(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8"))
        for folder in folders
        for path in sorted((ROOT / folder).rglob("*.py"))
    ]


def enforce(rule: str, check: Callable[[Source], Found], folders: tuple[str, ...] = PACKAGE):
    """Fails with file:line of every finding, and the rule, which says the remedy."""
    found = [f"{s.path}:{line}: {what}" for s in sources(folders) for line, what in check(s)]
    assert not found, "\n".join(["", *found, f"Rule {rule}"])


@functools.cache
def nodes(tree: ast.AST) -> tuple[ast.AST, ...]:
    """The tree, walked once for all rules."""
    return tuple(ast.walk(tree))


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef]:
    return (node for node in nodes(tree) if isinstance(node, ast.FunctionDef))


def num_lines(node: ast.FunctionDef) -> int:
    return node.end_lineno - node.lineno + 1


def parameters(function: ast.FunctionDef) -> list[ast.arg]:
    args = function.args
    extra = [arg for arg in (args.vararg, args.kwarg) if arg]
    return [*args.posonlyargs, *args.args, *args.kwonlyargs, *extra]


def words(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Every identifier: names, attributes, parameters, keywords, imported modules and names."""
    for node in nodes(tree):
        match node:
            case ast.Name(id=word) | ast.Attribute(attr=word) | ast.arg(arg=word):
                yield node.lineno, word
            case ast.keyword(arg=str(word)):
                yield node.value.lineno, word
            case ast.Import(names=names) | ast.ImportFrom(names=names):
                for alias in names:
                    yield node.lineno, alias.name


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, dotted module or name), such as "slam_jax.diffusion.solver"."""
    for node in nodes(tree):
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, alias.name) for alias in names)
            case ast.ImportFrom(module=module, names=names, level=0):
                yield from ((node.lineno, f"{module}.{alias.name}") for alias in names)
            case ast.ImportFrom():
                yield node.lineno, "."


def strings(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """String constants, docstrings and other bare ones left out."""
    bare = {id(n.value) for n in nodes(tree) if isinstance(n, ast.Expr)}
    for node in nodes(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in bare:
            yield node.lineno, node.value


def called(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """The last name of whatever is called."""
    for node in nodes(tree):
        match node:
            case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name)):
                yield node.lineno, name


# The maths.


def long_loss(source: Source) -> Found:
    if source.path == "slam_jax/distill/loss.py":
        for function in functions(source.tree):
            if num_lines(function) > 40:
                yield function.lineno, f"{function.name} has {num_lines(function)} lines"


def test_01_the_loss_fits_on_one_screen():
    enforce("1: the loss has at most 40 lines; move a formula to diffusion/", long_loss)


LOSS_IMPORTS = (
    "collections.abc.", "typing.", "functools.", "jax.", "numpy.", "jaxtyping.",
    "slam_jax.diffusion.", "slam_jax.distill.teacher.", "slam_jax.distill.gamma.",
    "slam_jax.errors.", "slam_jax.shapes.",
)  # fmt: skip


def loss_imports(source: Source) -> Found:
    if source.path == "slam_jax/distill/loss.py":
        for line, name in imports(source.tree):
            outside = not f"{name}.".startswith(LOSS_IMPORTS)
            if outside or name.startswith(("jax.sharding", "jax.experimental", "jax.devices")):
                yield line, f"imports {name}"


def test_02_the_loss_names_no_network_optimizer_device_or_file():
    enforce("2: loss.py takes callables and arrays; pass what it needs", loss_imports)


RESHAPERS = {"reshape", "expand_dims", "bcast", "atleast_1d", "atleast_2d", "atleast_3d"}


def inserted_axes(source: Source) -> Found:
    def visit(node: ast.AST) -> Found:
        match node:
            case ast.FunctionDef(returns=ast.expr() as returns) if "Coeff" in ast.unparse(returns):
                return
            case ast.Subscript(slice=ast.Tuple(elts=entries)):
                for entry in entries:
                    if isinstance(entry, ast.Constant) and entry.value is None:
                        yield node.lineno, f"{ast.unparse(node)} inserts an axis"
                        break
            case ast.Subscript(slice=ast.Constant(value=None)) | ast.Attribute(attr="newaxis"):
                yield node.lineno, f"{ast.unparse(node)} inserts an axis"
            case ast.Attribute(attr=name) if name in RESHAPERS:
                yield node.lineno, f"{ast.unparse(node)}"
        for child in ast.iter_child_nodes(node):
            yield from visit(child)

    if source.part in ("diffusion", "distill"):
        yield from visit(source.tree)


def test_05_coefficients_are_born_broadcastable():
    enforce(
        "5: in diffusion/ and distill/ only functions that return a Coeff insert axes; "
        "get [B, 1, 1, 1] from the schedule, or use jnp.outer for a true outer product",
        inserted_axes,
    )


HALF = {"bfloat16", "float16", "half", "bf16"}


def half_precision(source: Source) -> Found:
    if source.part not in ("nets", "pipeline", "weights"):
        for line, word in (*words(source.tree), *strings(source.tree)):
            if word in HALF:
                yield line, word


def test_08_precision_is_decided_at_the_boundary():
    enforce("8: half precision is for nets/, weights/, pipeline.py; pass a dtype", half_precision)


# Randomness.


def untyped_keys(source: Source) -> Found:
    for line, name in called(source.tree):
        if name == "PRNGKey":
            yield line, "PRNGKey(...)"


def test_10_keys_are_typed():
    enforce("10: the key-reuse check sees typed keys only; use jax.random.key", untyped_keys, ALL)


# Names, files, imports.


VAGUE = {"utils", "util", "helpers", "helper", "common", "misc", "lib", "core", "base"}


def vague_modules(source: Source) -> Found:
    for part in pathlib.PurePosixPath(source.path).with_suffix("").parts:
        if part.strip("_") in VAGUE or part.endswith(("_utils", "_helpers")):
            yield 1, f"module {part}"


def test_14_modules_are_named_by_the_field():
    enforce("14: name the module by what it is about: schedule, loss, mesh", vague_modules, ALL)


def long_files(source: Source) -> Found:
    limit = 400 if source.part == "nets" else 300
    if (lines := source.text.count("\n")) > limit:
        yield limit, f"{lines} lines"


def test_15_one_concept_per_file():
    remedy = "a file has at most 300 lines, in nets/ 400; split it by concept"
    enforce(f"15: {remedy}", long_files, ("slam_jax", "benchmarks"))


def long_functions(source: Source) -> Found:
    for function in functions(source.tree):
        limit = 120 if (source.path, function.name) == ("slam_jax/train.py", "train") else 40
        if num_lines(function) > limit:
            yield function.lineno, f"{function.name} has {num_lines(function)} lines"


def test_16_functions_are_short():
    enforce(
        "16: a function has at most 40 lines, train.train 120; name its stages",
        long_functions,
        ("slam_jax", "benchmarks"),
    )
    lengths = [num_lines(f) for source in sources(PACKAGE) for f in functions(source.tree)]
    assert statistics.median(lengths) <= 12, "Rule 16: half of all functions have at most 12 lines"


ZERO = {"errors", "shapes", "page"}
# errors, shapes and page; then what stands alone; then the method, files, numbers.
BELOW = {
    **dict.fromkeys(("errors", "shapes", "page", "__init__"), set()),
    **dict.fromkeys(("diffusion", "nets", "data", "runtime", "metrics"), ZERO),
    **dict.fromkeys(("kept", "settings", "flops", "interrupt", "overrides", "__main__"), ZERO),
    "command": ZERO | {"kept", "interrupt", "overrides"},
    "distill": ZERO | {"diffusion"},
    "weights": ZERO | {"nets", "kept"},
    "pipeline": ZERO | {"diffusion", "nets", "distill", "weights"},
    "students": ZERO | {"diffusion", "nets", "weights"},
}
BELOW["runtime"] = ZERO | {"kept"}
BELOW["drawing_programs"] = ZERO | {"diffusion", "nets", "pipeline", "runtime", "weights"}
BELOW["experiment"] = set(BELOW) - {"__init__", "runtime", "metrics"}
BELOW["evaluation"] = set(BELOW) - {"__init__", "experiment", "distill"}
BELOW["run_report"] = ZERO | {"evaluation", "runtime"}
BELOW["drawing_queue"] = ZERO
BELOW["live"] = ZERO | {"drawing_queue", "runtime"}
BELOW["live_page"] = BELOW["live"] | {"live"}
DRIVERS = ("train", "sample", "evaluate", "export", "prepare", "dry_run", "report", "serve")
BELOW["program"] = BELOW["experiment"] | {"experiment", "runtime"}
BELOW["arguments"] = BELOW["trained"] = BELOW["program"]
BELOW["forecast"] = ZERO | {"runtime"}
BELOW["interactive"] = set(BELOW) - {"__init__", "experiment", "program"}
BELOW["loop"] = set(BELOW) - {"__init__"}
BELOW |= dict.fromkeys(DRIVERS, set(BELOW) - {"__init__"})
BELOW["env"] = ZERO | {"command", "settings", "runtime"}
BELOW["dry_run"] = BELOW["dry_run"] | {"program", "arguments", "forecast"}
BELOW["main"] = set(BELOW) - {"__init__"}


def upward_imports(source: Source) -> Found:
    for line, name in imports(source.tree):
        top, _, rest = name.partition(".")
        target = rest.partition(".")[0]
        if name == ".":
            yield line, "relative import"
        elif top == "slam_jax" and source.part not in BELOW:
            yield line, f"{source.part} has no rank; give it one in BELOW"
        elif top == "slam_jax" and target not in BELOW[source.part] | {source.part}:
            yield line, f"{source.part} imports {target}"


def imported_functions(source: Source) -> Found:
    """From a module of ours come only types and constants; modules come whole.

    But `settings`, which is what drivers call the object itself.
    """
    for line, name in imports(source.tree):
        *module, last = name.split(".")
        packages = {
            "diffusion",
            "nets",
            "data",
            "runtime",
            "distill",
            "weights",
            "metrics",
            "evaluation",
        }
        whole = len(module) == 1 or (len(module) == 2 and module[1] in packages | {"settings"})
        if module[:1] == ["slam_jax"] and not whole and not last.lstrip("_")[:1].isupper():
            yield line, f"from {'.'.join(module)} import {last}"


def test_17_imports_point_down():
    enforce("17: imports point down the ranks, never sideways; pass an argument", upward_imports)
    enforce("17: import modules, not functions, so that calls say where", imported_functions, OURS)


DYNAMIC = {
    "getattr", "setattr", "delattr", "eval", "exec", "globals", "locals", "vars", "__import__",
    "import_module",
}  # fmt: skip


def dynamic_dispatch(source: Source) -> Found:
    for line, name in called(source.tree):
        if name in DYNAMIC:
            yield line, f"{name}(...)"
    for line, word in words(source.tree):
        if "registry" in word.lower():
            yield line, word
    if source.part == "distill":
        for node in nodes(source.tree):
            compared = [node.left, *node.comparators] if isinstance(node, ast.Compare) else []
            if isinstance(node, ast.Match) or any(
                isinstance(side, ast.Constant) and isinstance(side.value, str) for side in compared
            ):
                yield node.lineno, "chooses by a string"


def test_18_nothing_is_dispatched_by_a_string():
    enforce("18: pass the function itself; a driver chooses it once", dynamic_dispatch)


def odd_classes(source: Source) -> Found:
    for node in nodes(source.tree):
        if isinstance(node, ast.ClassDef):
            bases = [ast.unparse(base) for base in node.bases]
            frozen = any(
                text == "struct.dataclass" or text.endswith("dataclass(frozen=True)")
                for text in map(ast.unparse, node.decorator_list)
            )
            error = len(bases) == 1 and bases[0].endswith(("Error", "Exception"))
            if not (error or bases in (["nn.Module"], ["NamedTuple"]) or (frozen and not bases)):
                yield node.lineno, f"class {node.name}({', '.join(bases)})"
    for line, name in called(source.tree):
        if name == "hasattr":
            yield line, "hasattr(...)"


def test_20_classes_are_modules_or_frozen_data():
    enforce(
        "20: a class is an nn.Module, a NamedTuple, a frozen dataclass or an error",
        odd_classes,
    )


# What is not used is deleted.


CODE = (
    ast.Assign, ast.AugAssign, ast.Import, ast.ImportFrom, ast.Return, ast.If, ast.For, ast.With,
    ast.Raise, ast.Assert, ast.FunctionDef, ast.ClassDef, ast.Delete,
)  # fmt: skip


def is_call(node: ast.stmt) -> bool:
    match node:
        case ast.Expr(value=ast.Call(func=ast.Name() | ast.Attribute())):
            return True
    return False


def disabled_code(source: Source) -> Found:
    for token in tokenize.generate_tokens(io.StringIO(source.text).readline):
        if token.type == tokenize.COMMENT:
            text = token.string.lstrip("#").strip()
            for candidate in (text, f"{text} pass" if text.endswith(":") else text):
                try:
                    body = ast.parse(candidate).body
                except (SyntaxError, ValueError):
                    continue
                if any(isinstance(node, CODE) or is_call(node) for node in body):
                    yield token.start[0], f"commented-out code: {token.string}"
                    break
    for node in nodes(source.tree):
        match node:
            case (
                ast.If(test=ast.Constant(value=value))
                | ast.While(test=ast.Constant(value=False | 0 | None as value))
            ):
                yield node.lineno, f"condition is always {value}"


def unused_parameters(source: Source) -> Found:
    for function in functions(source.tree):
        if function.name.startswith("__"):
            continue  # its signature is Python's
        used = {n.id for stmt in function.body for n in ast.walk(stmt) if isinstance(n, ast.Name)}
        for arg in parameters(function):
            if arg.arg not in used | {"self", "cls"} and not arg.arg.startswith("_"):
                yield function.lineno, f"{function.name} never uses {arg.arg}"


def unused_names(all_sources: Iterable[Source]) -> Iterator[str]:
    """Functions, classes and constants of slam_jax's modules that nothing but tests mentions."""
    everywhere = {}
    for source in all_sources:
        for _, word in (*words(source.tree), *strings(source.tree)):
            everywhere[word] = everywhere.get(word, 0) + 1
    for source in all_sources:
        for node in source.tree.body if source.part else ():
            match node:
                case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                    mentions = everywhere.get(name, 0)
                case ast.Assign(targets=[ast.Name(id=name)]):
                    mentions = everywhere.get(name, 0) - 1
                case _:
                    continue
            if mentions < 1:
                yield f"{source.path}:{node.lineno}: nothing uses {name}"


def test_21_nothing_is_kept_that_is_not_used():
    remedy = "delete it; where an interface asks for a parameter, `del` it first thing"
    enforce(f"21: no disabled code: {remedy}", disabled_code, ALL)
    enforce(f"21: no unused parameters: {remedy}", unused_parameters, OURS)
    # The replay of recorded steps is a program of its own, though it lies beside the tests.
    path = "tests/reference_recording.py"
    replay = parse(path, (ROOT / path).read_text(encoding="utf-8"))
    unused = list(unused_names([*sources(OURS), replay]))
    assert not unused, "\n".join(["", *unused, f"Rule 21: no unused names: {remedy}"])


# Configs and programs.


GROUPS = {
    "teacher", "student", "distill", "optimizer", "data", "eval", "checkpoint", "faults", "log",
    "mesh",
}  # fmt: skip
TOP = {"seed", "num_steps", "batch_size", "accumulate", "ema_rate", "attention"}


def all_leaves(config: dict) -> Iterator[object]:
    for value in config.values():
        yield from all_leaves(value) if isinstance(value, dict) else (value,)


def test_23_configs_are_small_and_grouped():
    paths = sorted((ROOT / "configs").glob("*.py"))
    assert paths, "configs/ is empty"
    for path in paths:
        assert path.read_text().count("\n") <= 100, f"{path}: more than 100 lines; cut the prose"
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        config = module.get_config().to_dict()
        groups = {key for key, value in config.items() if isinstance(value, dict)}
        assert groups == GROUPS, f"{path}: groups differ: {sorted(groups ^ GROUPS)}"
        assert config.keys() - groups == TOP, f"{path}: {sorted((config.keys() - groups) ^ TOP)}"
        leaves = list(all_leaves(config))
        assert len(leaves) <= 61, f"{path}: {len(leaves)} leaves, at most 61; drop a knob"
        assert sum(isinstance(leaf, bool) for leaf in leaves) <= 3, f"{path}: over 3 booleans"
        others = [n for _, n in imports(ast.parse(path.read_text())) if "ml_collections" not in n]
        assert not others, f"{path} imports {others}; a config is complete in itself"


def reads_model_files(source: Source) -> bool:
    """Where a `config` is a model folder's json, whose defaults are diffusers'."""
    return source.part in ("nets", "weights") or source.path == "slam_jax/data/tokenizer.py"


def hidden_defaults(source: Source) -> Found:
    for node in nodes(source.tree):
        match node:
            case ast.Call(func=ast.Attribute(value=ast.Name(id="config" | "cfg"), attr="get")):
                if not reads_model_files(source):
                    yield node.lineno, ast.unparse(node)


def unread_settings(settings: Source, others: Iterable[Source]) -> Iterator[str]:
    """Fields of the settings' groups that no other module mentions, not even as a parameter."""
    mentioned = {word for source in others for _, word in words(source.tree)}
    for node in nodes(settings.tree):
        match node:
            case ast.AnnAssign(target=ast.Name(id=name)) if name not in mentioned:
                yield f"{settings.path}:{node.lineno}: nothing reads {name}"


def test_24_every_key_is_given_and_read():
    enforce("24: a config gives every value; read config.key", hidden_defaults)
    settings = next(s for s in sources(PACKAGE) if s.path == "slam_jax/settings.py")
    unread = list(unread_settings(settings, set(sources(PACKAGE)) - {settings}))
    assert not unread, "\n".join(["", *unread, "Rule 24: every key is read; delete it"])


def stray_configs(source: Source) -> Found:
    if source.part in (*DRIVERS, "main", "") or reads_model_files(source):
        return
    for function in functions(source.tree):
        for arg in parameters(function):
            # The pipeline's networks are built from a model folder's json.
            of_model = source.part == "pipeline" and "Mapping" in ast.unparse(arg)
            outside = source.part == "settings" or function.name.endswith("from_config")
            if arg.arg in ("config", "cfg") and not (of_model or outside):
                yield function.lineno, f"{function.name} takes {arg.arg}"


def test_25_configs_stop_at_the_drivers():
    enforce("25: below the drivers take the values themselves, typed", stray_configs)


def entry(source: Source) -> Found:
    if source.path == "slam_jax/main.py" and source.text.count("\n") > 60:
        yield 60, f"{source.text.count(chr(10))} lines"
    for node in nodes(source.tree):
        match node:
            case ast.Call(args=[ast.Constant(value="mode" | "--mode"), *_]):
                yield node.lineno, "a --mode flag"


def test_26_main_only_parses_and_calls():
    assert (ROOT / "slam_jax/main.py").exists()
    enforce("26: main.py has at most 60 lines; one module per verb instead of a mode", entry)


# The training step and devices.


def impure_step(source: Source) -> Found:
    if source.part == "distill":
        for line, word in words(source.tree):
            if word in ("jit", "NamedSharding", "device_put", "devices"):
                yield line, f"{word}: the driver's affair"
    for function in functions(source.tree):
        if function.name == "train_step":
            if num_lines(function) > 30:
                yield function.lineno, f"train_step has {num_lines(function)} lines"
            if [arg.arg for arg in function.args.args] != ["state", "frozen", "batch", "key"]:
                yield function.lineno, "train_step takes other than (state, frozen, batch, key)"


def test_27_the_step_is_a_short_pure_function():
    step = parse("step.py", (ROOT / "slam_jax/distill/step.py").read_text())
    assert any(node.name == "train_step" for node in step.tree.body if hasattr(node, "name"))
    enforce("27: the step has at most 30 lines; the driver applies jit and shardings", impure_step)


def old_parallelism(source: Source) -> Found:
    for line, word in words(source.tree):
        if word in ("pmap", "axis_name", "psum", "pmean", "xmap", "all_gather"):
            yield line, word


def test_29_jit_and_shardings_only():
    enforce("29: use jit with NamedSharding; XLA adds the collectives", old_parallelism, ALL)


MESH_WORDS = re.compile(
    r"Mesh|PartitionSpec|NamedSharding|with_(sharding_constraint|(logical_)?partitioning)|shard_map"
)


def meshes_in_nets(source: Source) -> Found:
    if source.part == "nets":
        yield from ((line, word) for line, word in words(source.tree) if MESH_WORDS.fullmatch(word))
        yield from ((line, n) for line, n in imports(source.tree) if n.startswith("jax.sharding"))


def test_30_nets_know_no_mesh():
    enforce("30: give a (regex, axes) rule in the config instead (runtime/mesh.py)", meshes_in_nets)


def processes(source: Source) -> Found:
    if source.part not in ("runtime", "main"):
        for node in nodes(source.tree):
            match node:
                case ast.Attribute(attr="process_index" | "process_count"):
                    yield node.lineno, ast.unparse(node)
                case ast.Attribute(value=ast.Name(id="jax"), attr="distributed"):
                    yield node.lineno, "jax.distributed"
        for line, name in imports(source.tree):
            if name.startswith(("jax.distributed", "jax.process_")):
                yield line, name


def test_31_processes_are_known_to_runtime_and_main():
    enforce("31: ask in runtime/ or main.py, and pass the answer", processes)


# Types and errors.


def postponed_annotations(source: Source) -> Found:
    for line, name in imports(source.tree):
        if name.startswith("__future__.annotations"):
            yield line, name


def untyped_functions(source: Source) -> Found:
    arrays = ("diffusion", "nets", "distill", "metrics", "pipeline")
    for node in source.tree.body if source.part in arrays else ():
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            bare = [arg.arg for arg in parameters(node) if arg.annotation is None]
            if bare or node.returns is None:
                yield node.lineno, f"{node.name}: {', '.join(bare) or 'its result'} has no type"


def test_33_public_functions_are_typed():
    enforce("33: postponed annotations defeat the shape check; remove", postponed_annotations, ALL)
    enforce("33: give every parameter and the result a type (shapes.py)", untyped_functions)


def broad_excepts(source: Source) -> Found:
    for node in nodes(source.tree):
        if isinstance(node, ast.ExceptHandler):
            caught = ast.unparse(node.type) if node.type else "everything"
            if re.search(r"\b(everything|Exception|BaseException)\b", caught):
                yield node.lineno, f"catches {caught}"


def test_36_no_except_catches_everything():
    enforce("36: name the exceptions that the call can raise", broad_excepts, OURS)


FOREIGN = {"torch", "torchvision", "diffusers", "transformers", "peft", "tensorflow", "keras"}


# The FID's weights are published as torch's pickle alone, which nothing but torch reads safely.
READS_TORCH = "slam_jax/weights/inception.py"
TIMES_TORCH = "benchmarks/torch_"


def foreign_frameworks(source: Source) -> Found:
    lazy = {
        line
        for function in functions(source.tree)
        for line, name in imports(function)
        if source.path == READS_TORCH and name == "torch"
    }
    if source.path.startswith(TIMES_TORCH):
        return
    for line, name in imports(source.tree):
        if name.partition(".")[0] in FOREIGN and line not in lazy:
            yield line, f"imports {name}"


def test_torch_stays_in_the_tests():
    remedy = (
        f"torch and diffusers are oracles of the tests, and timed in {TIMES_TORCH}*.py; in "
        f"{READS_TORCH} a function may ask for torch"
    )
    enforce(f"of the issue: {remedy}", foreign_frameworks, OURS)


def test_ruff_finds_nothing():
    """Unused imports and variables, import order, formatting: see pyproject.toml."""
    for command in (("check",), ("format", "--check")):
        ruff = [sys.executable, "-m", "ruff", *command, "--quiet", str(ROOT)]
        done = subprocess.run(ruff, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, f"{done.stdout}{done.stderr}: ruff check --fix; ruff format"


def test_codespell_finds_nothing():
    tracked = ["git", "ls-files", "-z"]
    listed = subprocess.run(tracked, capture_output=True, text=True, cwd=ROOT, check=True)
    names = [name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]
    codespell = [sys.executable, "-m", "codespell_lib", *names]
    done = subprocess.run(codespell, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"


# The checkers themselves, each on lines that break its rule and on the same lines mended.


LOSS, NET, TRAIN = "slam_jax/distill/loss.py", "slam_jax/nets/unet.py", "slam_jax/train.py"
SOLVER = "slam_jax/diffusion/solver.py"
BAD = [
    (long_loss, LOSS, "def terms():\n" + 40 * "    x = 1\n"),
    (loss_imports, LOSS, "from slam_jax.nets import unet"),
    (loss_imports, LOSS, "from slam_jax.distill import optimizer"),
    (loss_imports, LOSS, "import optax"),
    (inserted_axes, SOLVER, "def f(t) -> Latent:\n    return t[:, None, None, None] * x"),
    (inserted_axes, SOLVER, "def f(t) -> Latent:\n    return jnp.expand_dims(t, 1)"),
    (inserted_axes, LOSS, "x = alpha.reshape(-1, 1, 1, 1)"),
    (inserted_axes, LOSS, "x = alpha[..., jnp.newaxis]"),
    (half_precision, SOLVER, "x = x.astype(jnp.bfloat16)"),
    (half_precision, TRAIN, "dtype = 'float16'"),
    (untyped_keys, TRAIN, "key = jax.random.PRNGKey(0)"),
    (vague_modules, "slam_jax/utils.py", ""),
    (vague_modules, "slam_jax/core/loss.py", ""),
    (vague_modules, "benchmarks/bench_utils.py", ""),
    (long_files, TRAIN, 301 * "\n"),
    (long_files, NET, 401 * "\n"),
    (long_functions, SOLVER, "def f():\n" + 40 * "    x = 1\n"),
    (long_functions, TRAIN, "def train():\n" + 120 * "    x = 1\n"),
    (upward_imports, SOLVER, "from slam_jax.distill import loss"),
    (upward_imports, SOLVER, "from slam_jax.nets import unet"),
    (upward_imports, LOSS, "from slam_jax.nets import unet"),
    (upward_imports, "slam_jax/runtime/log.py", "import slam_jax.data.batches"),
    (upward_imports, "slam_jax/pipeline.py", "from slam_jax import settings"),
    (upward_imports, TRAIN, "from slam_jax import main"),
    (upward_imports, TRAIN, "from slam_jax import sample"),
    (upward_imports, "slam_jax/evaluate.py", "from slam_jax import train"),
    (upward_imports, "slam_jax/novelty.py", "from slam_jax import errors"),
    (upward_imports, SOLVER, "from . import schedule"),
    (imported_functions, TRAIN, "from slam_jax.diffusion.solver import ddim_step"),
    (imported_functions, TRAIN, "from slam_jax.evaluate import report"),
    (dynamic_dispatch, TRAIN, "sigma = getattr(subpath, settings.sigma)"),
    (dynamic_dispatch, TRAIN, "SIGMA_REGISTRY = {}"),
    (dynamic_dispatch, LOSS, "if kind == 'lcm':\n    gamma = 1"),
    (odd_classes, LOSS, "class Huber(Loss):\n    pass"),
    (odd_classes, LOSS, "class Trainer:\n    pass"),
    (odd_classes, LOSS, "@dataclasses.dataclass\nclass State:\n    step: int"),
    (odd_classes, NET, "if hasattr(x, 'shape'):\n    pass"),
    (disabled_code, TRAIN, "# loss = loss + 1"),
    (disabled_code, TRAIN, "# print(loss)"),
    (disabled_code, TRAIN, "# if remat:"),
    (disabled_code, TRAIN, "if False:\n    x = 1"),
    (unused_parameters, SOLVER, "def f(x, sigma):\n    return x"),
    (hidden_defaults, TRAIN, "seed = config.get('seed', 0)"),
    (stray_configs, LOSS, "def slam_loss(config, x_0):\n    pass"),
    (stray_configs, SOLVER, "def grid(config):\n    pass"),
    (entry, "slam_jax/main.py", 61 * "\n"),
    (entry, "slam_jax/sample.py", "flags.DEFINE_string('mode', 'sample', '')"),
    (impure_step, "slam_jax/distill/step.py", "@jax.jit\ndef f():\n    pass"),
    (impure_step, "slam_jax/distill/step.py", "def train_step(state, batch, rng):\n    pass"),
    (
        impure_step,
        "slam_jax/distill/step.py",
        "def train_step(state, frozen, batch, key):\n" + 30 * "    x = 1\n",
    ),
    (old_parallelism, TRAIN, "grads = jax.lax.psum(grads, 'data')"),
    (old_parallelism, TRAIN, "run = jax.pmap(step, axis_name='data')"),
    (meshes_in_nets, NET, "from jax.sharding import PartitionSpec"),
    (meshes_in_nets, NET, "x = jax.lax.with_sharding_constraint(x, rule)"),
    (processes, TRAIN, "if jax.process_index() == 0:\n    pass"),
    (processes, TRAIN, "jax.distributed.initialize()"),
    (postponed_annotations, SOLVER, "from __future__ import annotations"),
    (untyped_functions, SOLVER, "def ddim_step(x, eps: Latent) -> Latent:\n    return x"),
    (untyped_functions, SOLVER, "def ddim_step(x: Latent):\n    return x"),
    (broad_excepts, TRAIN, "try:\n    f()\nexcept Exception:\n    pass"),
    (broad_excepts, TRAIN, "try:\n    f()\nexcept (OSError, Exception) as e:\n    pass"),
    (broad_excepts, TRAIN, "try:\n    f()\nexcept:\n    pass"),
    (foreign_frameworks, NET, "import torch.nn as nn"),
    (foreign_frameworks, NET, "from diffusers import UNet2DConditionModel"),
    (foreign_frameworks, NET, "def read():\n    import torch"),
    (foreign_frameworks, READS_TORCH, "import torch\ndef read():\n    import torchvision"),
]
GOOD = [
    (long_loss, LOSS, "def terms():\n" + 39 * "    x = 1\n"),
    (loss_imports, LOSS, "from slam_jax.diffusion import solver\nimport jax.numpy as jnp"),
    (loss_imports, LOSS, "from slam_jax.distill import teacher as teacher_walk"),
    (inserted_axes, SOLVER, "def f(t) -> tuple[Coeff, Coeff]:\n    return t[:, None, None, None]"),
    (inserted_axes, "slam_jax/nets/layers.py", "x = x + shift[:, None, None, :]"),
    (half_precision, NET, "x = x.astype(jnp.bfloat16)"),
    (half_precision, SOLVER, "'''bfloat16 would turn 999 into 1000.'''\n# float16 overflows"),
    (untyped_keys, TRAIN, "def f(key: PRNGKey):\n    return jax.random.key(0)"),
    (vague_modules, "slam_jax/distill/loss.py", ""),
    (long_files, NET, 400 * "\n"),
    (long_functions, TRAIN, "def train():\n" + 119 * "    x = 1\n"),
    (upward_imports, LOSS, "from slam_jax.diffusion import solver\nfrom slam_jax import errors"),
    (upward_imports, TRAIN, "from slam_jax import loop, pipeline, settings\nimport jax"),
    (imported_functions, TRAIN, "from slam_jax.diffusion import solver"),
    (imported_functions, TRAIN, "from slam_jax.settings import Settings, as_dict"),
    (imported_functions, TRAIN, "from slam_jax.shapes import Text\nfrom slam_jax import sample"),
    (dynamic_dispatch, SOLVER, "match scheduler['prediction_type']:\n    case 'epsilon': pass"),
    (odd_classes, LOSS, "class D(NamedTuple): pass\n@struct.dataclass\nclass S:\n    x: int"),
    (odd_classes, "slam_jax/errors.py", "class UserError(ValueError):\n    pass"),
    (disabled_code, TRAIN, "x = 1  # fmt: skip\n# Never 0: x is noise.\nwhile True: pass"),
    (disabled_code, TRAIN, 'gamma: tuple  # ("ones",) ("mixture", p)'),
    (unused_parameters, SOLVER, "def f(self, x, _y, z):\n    del z\n    return lambda: x"),
    (hidden_defaults, NET, "size = config.get('sample_size')"),
    (stray_configs, SOLVER, "def prediction_from_config(config):\n    pass"),
    (stray_configs, TRAIN, "def train(config):\n    pass"),
    (entry, "slam_jax/main.py", 60 * "\n"),
    (
        impure_step,
        "slam_jax/distill/step.py",
        "def train_step(state, frozen, batch, key, *, nets):\n" + 29 * "    x = 1\n",
    ),
    (old_parallelism, TRAIN, "run = jax.jit(step, out_shardings=layout)"),
    (meshes_in_nets, "slam_jax/runtime/mesh.py", "from jax.sharding import PartitionSpec"),
    (processes, "slam_jax/runtime/log.py", "if jax.process_index() == 0:\n    pass"),
    (postponed_annotations, SOLVER, "from __future__ import division"),
    (untyped_functions, SOLVER, "def f(x: Latent) -> Latent:\n    return x"),
    (untyped_functions, SOLVER, "def _f(x):\n    return x"),
    (broad_excepts, TRAIN, "try:\n    f()\nexcept (OSError, FloatingPointError):\n    pass"),
    (foreign_frameworks, NET, "import flax.linen as nn\nimport transformers_of_ours"),
    (foreign_frameworks, READS_TORCH, "def read():\n    import torch"),
    (foreign_frameworks, "benchmarks/torch_step.py", "import torch"),
]


def _name(value) -> str:
    return value.__name__ if callable(value) else value.replace("\n", " ")[:50]


@pytest.mark.parametrize(("check", "path", "text"), BAD, ids=_name)
def test_checker_sees_what_is_wrong(check, path, text):
    assert list(check(parse(path, text)))


@pytest.mark.parametrize(("check", "path", "text"), GOOD, ids=_name)
def test_checker_lets_pass_what_is_right(check, path, text):
    assert not list(check(parse(path, text)))


def test_every_checker_is_itself_checked():
    takes_a_file = {"source": Source, "return": Found}
    checkers = {
        value
        for value in globals().values()
        if isinstance(value, types.FunctionType) and value.__annotations__ == takes_a_file
    }
    assert checkers == {case[0] for case in BAD} == {case[0] for case in GOOD}


def test_unread_settings_are_found_across_files():
    settings = parse(
        "slam_jax/settings.py", "class Data(NamedTuple):\n    size: int\n    dead: int"
    )
    train = parse("slam_jax/train.py", "def train(settings):\n    return settings.data.size")
    assert list(unread_settings(settings, [train])) == [
        "slam_jax/settings.py:3: nothing reads dead"
    ]


def test_unused_names_are_found_across_files():
    a = parse("slam_jax/a.py", "def used(): pass\ndef unused(): pass\nX = 1\nY = 2\nprint(Y)")
    b = parse("slam_jax/b.py", "from slam_jax import a\na.used()")
    assert [line.split()[-1] for line in unused_names([a, b])] == ["unused", "X"]


def test_every_name_is_defined():
    """F821, which pyproject.toml leaves out for the sake of shapes: those are names in quotes."""
    command = [
        sys.executable, "-m", "ruff", "check", "--isolated", "--select=F821",
        "--output-format=concise", *(str(ROOT / folder) for folder in ALL),
    ]  # fmt: skip
    found = subprocess.run(command, capture_output=True, text=True).stdout
    undefined = []
    for path, line, name in re.findall(r"^(.+?):(\d+):.*Undefined name `(\w+)`", found, re.M):
        text = pathlib.Path(path).read_text(encoding="utf-8").splitlines()[int(line) - 1]
        if not re.search(rf'"[^"]*\b{name}\b[^"]*"', text):
            undefined.append(f"{path}:{line}: {name}")
    assert not undefined, "\n".join(undefined)

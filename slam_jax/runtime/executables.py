"""Programs that are traced and compiled once for all processes on machines of one kind."""

import contextlib
import os
import re
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from jax import export
from jax.experimental.compilation_cache import compilation_cache

from slam_jax import kept
from slam_jax.errors import UserError

# JAX's own cache of executables has one folder for the whole process, which is borrowed.
_LOCK = threading.Lock()
_SUFFIX = "-cache"  # of JAX's files with executables
# Where JAX keeps and tells things, which changes no program.
_ASIDE = re.compile(r"jax_.*(cache|log|dump|profile|traceback).*")
# JAX promises nothing of these for its later versions, which have keys of their own.
_OF_THIS_VERSION = [
    export.DisabledSafetyCheck.custom_call(name)
    for name in ("__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward", "LayoutConstraint")
]
_SETTINGS = {
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
    "jax_compilation_cache_max_size": -1,
    # Of theirs the names would be part of the key.
    "jax_persistent_cache_enable_xla_caches": "none",
}


def load(build: Callable[..., Callable], given: tuple, *arguments: Any) -> jax.stages.Compiled:
    """The program build(*given), a function of arrays, compiled for the shapes of the arguments.

    build: a function of a module, whose result depends on `given` alone. given: values that JSON
    can hold. arguments: trees of arrays on their devices. What is kept of it (kept.py) is found
    again if all that it depends on is the same: build's name, given, arguments' shapes and
    places, this package's code, the versions of JAX, its settings, XLA's flags, and the machine's
    kind. Whatever is absent or damaged is made anew.
    """
    key = _key(f"{build.__module__}.{build.__qualname__}", given, arguments)
    lowered, is_kept = _lowered(key, lambda: build(*given), arguments, {})
    return _compiled(key, lowered) if is_kept else lowered.compile()


def lower(
    function: Callable, name: str, given: tuple, *arguments: Any, **options: Any
) -> jax.stages.Lowered:
    """jax.jit(function, **options).lower(*arguments), traced once for all processes alike.

    name, given: what tells the function from others, as for `load`. arguments: shapes do, with
    their sharding. JAX's own cache may hold its executable. Devices of several hosts are no
    hindrance: hosts that trace and hosts that read get the same program, to the bit.
    """
    return _lowered(_key(name, given, arguments), lambda: function, arguments, options)[0]


def _lowered(
    key: str, make: Callable[[], Callable], arguments: tuple, options: dict[str, Any]
) -> tuple[jax.stages.Lowered, bool]:
    """And whether it is kept."""
    content = kept.read("programs", key)
    if content is None:
        jitted = jax.jit(make(), **options)
        if kept.folder() is None and jax.process_count() == 1:
            return jitted.lower(*arguments), False
        try:
            exported = export.export(jitted, disabled_checks=_OF_THIS_VERSION)(*arguments)
            content = bytes(exported.serialize())
        except UserError:
            raise
        except ValueError:
            # It calls what this accelerator alone knows.
            return jitted.lower(*arguments), False
        kept.write("programs", key, content)
    # Read back even where it was just written: tracing and reading must not differ.
    call = export.deserialize(bytearray(content)).call
    return jax.jit(call, **options).lower(*arguments), True


def _key(name: str, given: tuple, arguments: tuple) -> str:
    leaves, tree = jax.tree.flatten(arguments)
    device = jax.devices()[0]
    settings = {k: v for k, v in jax.config.values.items() if not _ASIDE.fullmatch(k)}
    return kept.key(
        name, given, str(tree),
        [(leaf.shape, leaf.dtype, leaf.sharding) for leaf in leaves],
        [device.platform, device.device_kind, device.client.platform_version, jax.device_count()],
        kept.machine(), settings, [os.environ.get(k) for k in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")],
    )  # fmt: skip


def _compiled(key: str, lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """By XLA, or read from the file that JAX's cache had it in."""
    before = kept.read("executables", key)
    with _LOCK, tempfile.TemporaryDirectory() as folder:
        name = b""
        if before is not None:
            name, _, content = before.partition(b"\n")
            (Path(folder) / name.decode()).write_bytes(content)
        with _cache_in(folder):
            compiled = lowered.compile()
        new = [path for path in Path(folder).glob("*" + _SUFFIX) if path.name != name.decode()]
        if len(new) == 1:
            kept.write("executables", key, new[0].name.encode() + b"\n" + new[0].read_bytes())
    return compiled


@contextlib.contextmanager
def _cache_in(folder: str) -> Iterator[None]:
    """JAX's cache of executables lies there meanwhile, and takes every one."""
    settings = {**_SETTINGS, "jax_compilation_cache_dir": folder}
    before = {name: jax.config.values[name] for name in settings}
    _configure(settings)
    try:
        yield
    finally:
        _configure(before)


def _configure(settings: dict[str, Any]) -> None:
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()

"""Programs that answer a user's mistake with one line on stderr and exit status 2."""

import contextlib
import hashlib
import pathlib
import re
import shlex
import sys
import warnings
from collections.abc import Callable, Iterable
from functools import partial

import jax
from absl import app, flags, logging

from slam_jax import interrupt, kept, overrides
from slam_jax.errors import Preempted, UserError

# Exit status of a program that is to be started again; the launchers know it.
PREEMPTED = 42
STATUSES = f"""
exit status:
  0    done
  1    stopped: a bug, a host that was lost, or losses that stay infinite
  2    a mistake of the user's: one line says which, and the remedy
  {PREEMPTED}   preempted (SIGTERM): saved, to be started again
  {interrupt.STATUS}  Ctrl-C: a training run has saved; the same command goes on
"""
_NOT_SAVED = "nothing is half-written; the same command begins again, or goes on where it can"
# How JAX's warning begins of a file in its cache of executables.
_UNREADABLE = "Error reading persistent compilation cache entry"
# A config file is Python, so reading it may raise anything that Python raises.
_CONFIG_ERRORS = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NameError, OSError,
    RuntimeError, SyntaxError, TypeError, ValueError, flags.Error,
)  # fmt: skip


def run(
    main: Callable[[], None],
    *,
    required: tuple[str, ...],
    leave: Callable[[int], None] | None = None,
) -> None:
    """Parses absl's flags, then calls main; ends with one of STATUSES.

    leave: called with the exit status of a failure, for a program that others may wait for.
    """
    sys.excepthook = _asking_for_a_report(sys.excepthook)
    interrupt.listen()
    app.run(partial(_guarded, main, leave), flags_parser=partial(_parse, required=required))


def hosts_flags() -> Callable[[], tuple[str | None, int | None, int | None]]:
    """Defines the flags of a job of several processes; their values once they are parsed."""
    holders = (
        flags.DEFINE_string(
            "coordinator", None, "HOST:PORT at which process 0 is reached; found out under SLURM, "
            "MPI, Kubernetes and on Cloud TPU.", allow_override=True,
        ),
        flags.DEFINE_integer(
            "num_processes", None, "How many processes the job has.", allow_override=True
        ),
        flags.DEFINE_integer(
            "process_id", None, "Which of them this one is, from 0.", allow_override=True
        ),
    )  # fmt: skip
    return lambda: tuple(holder.value for holder in holders)


def network_flags(kernels: Iterable[str]) -> Callable[[], dict[str, str]]:
    """Defines the flags of how networks draw; once they are parsed, "dtype" and "attention".

    kernels: what may compute attention, the default first.
    """
    kernels = list(kernels)
    holders = (
        flags.DEFINE_string(
            "compute_dtype", "float32", "What networks compute in: in half precision they take "
            "half the memory and, on GPUs and TPUs, less time.", allow_override=True,
        ),
        flags.DEFINE_enum(
            "attention", kernels[0], kernels, "How the UNet's attention is computed: by XLA, by a "
            "kernel for TPUs, or by cuDNN on NVIDIA GPUs, in half precision.", allow_override=True,
        ),
    )  # fmt: skip
    return lambda: dict(zip(("dtype", "attention"), (each.value for each in holders), strict=True))


def _parse(argv: list[str], required: tuple[str, ...]) -> list[str]:
    if {"--help", "-help", "-h"} & set(argv[1:]):
        print(_help())
        sys.exit(0)
    # ml_collections looks for overrides of a config there.
    sys.argv = [underscored(argument) for argument in argv]
    try:
        rest = flags.FLAGS(sys.argv)
    except _CONFIG_ERRORS as error:
        sys.exit(_complain(f"{_explained(error)} (see --help)", 2))
    missing = [f"--{name}" for name in required if flags.FLAGS[name].value is None]
    if missing:
        sys.exit(_complain(f"{', '.join(missing)} must be given (see --help)", 2))
    if len(rest) > 1:
        sys.exit(_complain(f"unknown argument {rest[1]!r}; flags start with -- (see --help)", 2))
    return rest


def _help() -> str:
    """What the program does, with examples; its exit statuses; its flags, and those of hosts."""
    described = [flags.FLAGS.main_module_help()]
    if "coordinator" in flags.FLAGS:
        described.append(flags.FLAGS.module_help(__name__))
    lines = "\n".join(described).splitlines()
    # absl puts the path of each module above its flags.
    shown = "\n".join(line for line in lines if line.startswith(" "))
    return f"{sys.modules['__main__'].__doc__}{STATUSES}\nflags:\n{shown}"


def _explained(error: BaseException) -> str:
    """What the user did to get it, where that is an override; else the message."""
    try:
        return overrides.complaint(sys.argv, flags.FLAGS) or one_line(error)
    except _CONFIG_ERRORS:
        return one_line(error)


def underscored(argument: str) -> str:
    """--init-image=a-b.png -> --init_image=a-b.png, since people type both."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.removeprefix("--").partition("=")
    return "--" + name.replace("-", "_") + equals + value


def _guarded(
    main: Callable[[], None], leave: Callable[[int], None] | None, _argv: list[str]
) -> int:
    # Orbax tells of every file it writes, and of every error with its whole stack, though it
    # raises it too.
    logging.set_verbosity(logging.FATAL)
    # What it had not begun of a failed save, Python would tell of below our own last line.
    warnings.filterwarnings("ignore", r"coroutine .* was never awaited", RuntimeWarning)
    _keep_compiled()
    status = 0
    try:
        main()
    except UserError as error:
        status = _complain(str(error), 2)
    except FloatingPointError as error:
        status = _complain(str(error), 1)
    except Preempted as told:
        print(told, file=sys.stderr)
        return PREEMPTED  # all processes end so, and JAX has them wait for each other
    except KeyboardInterrupt as told:
        print(f"interrupted: {str(told) or _NOT_SAVED}", file=sys.stderr)
        if told.args:
            return interrupt.STATUS  # as above
        status = interrupt.STATUS
    if status and leave is not None:
        leave(status)
    return status


def _keep_compiled() -> None:
    """Has JAX keep what took it over a second to compile, unless the user has set where."""
    root = kept.folder()
    if root is None or jax.config.values["jax_compilation_cache_dir"] is not None:
        return
    place = root / "xla" / hashlib.sha256(kept.machine().encode()).hexdigest()[:16]
    with contextlib.suppress(OSError):
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        jax.config.update("jax_compilation_cache_dir", str(place))
        jax.config.update("jax_compilation_cache_max_size", kept.MOST)
        warnings.showwarning = _replacing_damaged(place, warnings.showwarning)


def _replacing_damaged(place: pathlib.Path, before: Callable) -> Callable:
    """A warnings.showwarning that, where JAX cannot read what it kept, has it kept anew.

    JAX warns before it compiles, and writes what it compiled if no file is in its place.
    """

    def show(message, *rest) -> None:
        if str(message).startswith(_UNREADABLE):
            kept.drop_damaged(place)
            warn(f"a kept program in {place} was damaged; it is compiled and kept anew")
        else:
            before(message, *rest)

    return show


def _asking_for_a_report(before: Callable) -> Callable:
    """An excepthook that says what to report an error with which nobody has reckoned."""

    def hook(kind, error, trace) -> None:
        before(kind, error, trace)
        if not issubclass(kind, KeyboardInterrupt):
            command = shlex.join(["python", "-m", "slam_jax.env", *_about_config(sys.argv)])
            print(
                f"unexpected {kind.__name__}; if it is a bug of slam_jax, report the lines "
                f"above with what this prints: {command}", file=sys.stderr,
            )  # fmt: skip

    return hook


def _about_config(argv: list[str]) -> list[str]:
    """The config file and its overrides, as they were given."""
    found = [each for each in argv if re.match(r"--?(no)?config[.=]", each)]
    if "--config" in argv[:-1]:
        found = argv[argv.index("--config") :][:2] + found
    return found


def warn_of_cut(prompts: list[str], cut: list[str], length: int) -> None:
    """One line on stderr for every prompt of which the end `cut` did not fit in `length` tokens."""
    for prompt, lost in zip(prompts, cut, strict=True):
        if lost:
            warn(f"prompt {prompt[:40]!r}... has more than {length} tokens; left out: {lost!r}")


def warn(message: str) -> None:
    """A line on stderr."""
    print(f"warning: {message}", file=sys.stderr)


def _complain(message: str, status: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return status


def one_line(error: BaseException) -> str:
    """The message without line breaks; where Python's message alone says little, its type too."""
    message = " ".join(str(error).split())
    return message if isinstance(error, flags.Error) else f"{type(error).__name__}: {message}"

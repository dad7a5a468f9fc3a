"""A run as one page that needs no other file: curves, samples, evaluation, faults, config.

    python -m slam_jax.report --workdir runs/tiny

Writes report.html into the run folder; training does so itself at its end.
"""

from pathlib import Path

from absl import flags

from slam_jax import command, run_report
from slam_jax.runtime import folder

_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Run folder, finished or not.",
    allow_override=True,  # other programs have a flag of that name
)  # fmt: skip


def main() -> None:
    workdir = Path(_WORKDIR.value)
    if workdir.is_dir():
        folder.check_writable(workdir)
    print(run_report.write(workdir))


if __name__ == "__main__":
    command.run(main, required=("workdir",))

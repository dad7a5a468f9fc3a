"""Distils a teacher into a student that draws in a few steps; the same command resumes.

    python -m slam_jax.main --config configs/tiny.py --workdir runs/tiny

Any value of the config can be overridden: --config.distill.w=7
What a run would take, without starting it: --dry_run; on devices that are not here: --dry_run
--topology v5e:16x16 (TPUs), --topology rtx4090, --topology h200:8 (GPUs)
"""

from absl import flags
from ml_collections import config_flags

from slam_jax import command, dry_run, settings, train
from slam_jax.errors import UserError
from slam_jax.runtime import bucket, hosts

_CONFIG = config_flags.DEFINE_config_file("config", None, "Python file with get_config().")
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Run folder, here or gs://BUCKET/FOLDER; the same again resumes the run."
)
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Only say what the run would take.")
_TOPOLOGY = flags.DEFINE_string(
    "topology",
    None,
    "With --dry_run: devices that need not be here: a slice of TPUs such as "
    "v5e:16x16, or GPUs: h200, rtx4090:2, h100:4x8 (four hosts of eight).",
)
_HOSTS = command.hosts_flags()


def main() -> None:
    if not (_DRY_RUN.value or _WORKDIR.value):
        raise UserError("--workdir must be given, or --dry_run (see --help)")
    if _TOPOLOGY.value and not _DRY_RUN.value:
        raise UserError(f"--topology {_TOPOLOGY.value} is for --dry_run; give both or neither")
    # absl calls --config parsed even where the file is missing; touching the value tells.
    try:
        config = _CONFIG.value.to_dict()
    except (OSError, AttributeError) as error:
        raise UserError(f"--config: {command.one_line(error)}") from None
    chosen = settings.from_config(config)
    if _DRY_RUN.value:
        dry_run.dry_run(chosen, _TOPOLOGY.value)
        return
    hosts.start(*_HOSTS(), timeout_s=chosen.faults.timeout_s, saves_on_sigterm=True)
    with bucket.mirrored(_WORKDIR.value) as where:
        train.train(chosen, where)


if __name__ == "__main__":
    command.run(main, required=("config",), leave=hosts.leave)

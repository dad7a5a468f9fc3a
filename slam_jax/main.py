"""python -m slam_jax.main --config configs/tiny.py --workdir runs/tiny

Any value of the config can be overridden: --config.distill.w=7
"""

from absl import flags
from ml_collections import config_flags

from slam_jax import command, settings, train
from slam_jax.errors import UserError
from slam_jax.runtime import bucket, hosts

_CONFIG = config_flags.DEFINE_config_file("config", None, "Python file with get_config().")
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Run folder, here or gs://BUCKET/FOLDER; the same again resumes the run."
)
_HOSTS = command.hosts_flags()


def main() -> None:
    # absl calls --config parsed even where the file is missing; touching the value tells.
    try:
        config = _CONFIG.value.to_dict()
    except (OSError, AttributeError) as error:
        raise UserError(f"--config: {command.one_line(error)}") from None
    chosen = settings.from_config(config)
    hosts.start(*_HOSTS(), timeout_s=chosen.faults.timeout_s, saves_on_sigterm=True)
    with bucket.mirrored(_WORKDIR.value) as where:
        train.train(chosen, where)


if __name__ == "__main__":
    command.run(main, required=("config", "workdir"), leave=hosts.leave)

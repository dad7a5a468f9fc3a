"""What each device sends in a train step as devices are added: weak scaling, counted, not timed.

Every device keeps its number of images. The program is compiled for each number of devices, or
planned for slices of TPUs that need not be here, and its collectives are counted in XLA's text.

    python benchmarks/scaling.py --topologies v5e:1x1 v5e:2x4 v5e:8x8 v5e:16x16
    JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=8 python benchmarks/scaling.py --devices 1 2 8
"""

import argparse
import json
import pathlib
import runpy
import sys
from functools import partial
from typing import NamedTuple

# So that a checkout runs where it is not installed.
sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import jax

from benchmarks import timing
from slam_jax import arguments, program, settings
from slam_jax.nets import kernels
from slam_jax.runtime import aot, mesh, topologies
from slam_jax.settings import Mesh, Settings
from slam_jax.weights import pretrained, templates

LAYOUTS = {
    "dp": Mesh((("data", -1),), ((".*", ()),)),
    "fsdp": Mesh((("data", 1), ("fsdp", -1)), ((".*", "fsdp"),)),
    # The state cut over 16, as wide as the layers of Stable Diffusion allow, and copies of that.
    "fsdp_16": Mesh((("data", -1), ("fsdp", 16)), ((".*", "fsdp"),)),
}
# By which a law may be missed: the loss and a few numbers are summed too.
TOLERANCE = 0.01


class Row(NamedTuple):
    """One program."""

    layout: str
    devices: int
    device: str
    arrays: float  # bytes on which each device's collectives work in a step
    sent: float  # bytes that a device sends for it, by ring algorithms
    memory: int  # bytes of arguments on a device, which tell how far the state is cut
    compile_s: float
    collectives: dict  # kind and group -> count, bytes of arrays


def lower(chosen: Settings, channels: list[int] | None, places: list) -> jax.stages.Lowered:
    """The train step for those devices; chosen.batch_size is of one device."""
    chosen = chosen._replace(batch_size=chosen.batch_size * len(places), accumulate=1)
    teacher, _ = arguments.teacher(chosen)
    if channels:
        teacher = widened(teacher, channels)
    devices = mesh.make(chosen.mesh.axes, places)
    built = program.build(chosen, program.parts(chosen, teacher), devices)
    return built.step.lower(
        built.like, arguments.frozen(chosen, teacher, devices),
        arguments.batch(chosen, teacher, devices), arguments.key(devices),
    )  # fmt: skip


def lower_ahead(chosen: Settings, channels: list[int] | None, topology: str) -> jax.stages.Lowered:
    """The same in another process."""
    return lower(chosen, channels, topologies.devices(topology))


def measure(
    chosen: Settings, channels: list[int] | None, layout: str, topology: str | None, number: int
) -> Row:
    """Plans or compiles the step for a slice of TPUs, or so many of the devices here; counts."""
    chosen = chosen._replace(mesh=LAYOUTS[layout])
    places = topologies.devices(topology) if topology else jax.devices()[:number]
    lowered = lower(chosen, channels, places)

    def announce() -> None:
        print("compiling", layout, len(places), file=sys.stderr)

    if topology:
        again = partial(lower_ahead, chosen, channels, topology)
        found = aot.planned(lowered, again, places, announce)
    else:
        found = aot.compiled(lowered, places, announce)
    return Row(
        layout, len(places), places[0].device_kind,
        sum(each.payload for each in found.collectives),
        sum(each.sent for each in found.collectives),
        found.arguments, found.seconds,
        {f"{each.kind}/{each.group}": [each.count, each.payload] for each in found.collectives},
    )  # fmt: skip


def verdict(rows: list[Row]) -> str:
    """Whether one layout's bytes follow its law beyond one device."""
    least = 16 if rows[0].layout == "fsdp_16" else 1
    several = [row for row in rows if row.devices > least]
    if not several:
        return f"{rows[0].layout}: its law is about more than {least} devices"
    if rows[0].layout != "fsdp":
        law = "arrays per device stay constant"
        values = [row.arrays for row in several]
        holds = max(values) <= (1 + TOLERANCE) * min(values)
    else:
        law = "sent per device grows no faster than (n - 1) / n"
        values = [row.sent * row.devices / (row.devices - 1) for row in several]
        holds = max(values) <= (1 + TOLERANCE) * values[0]
    return f"{rows[0].layout}: {law}: {'holds' if holds else 'DOES NOT HOLD'}"


def widened(teacher: pretrained.Pretrained, channels: list[int]) -> pretrained.Pretrained:
    """The same UNet with other widths, such as an fsdp axis of 256 can cut."""
    config = {**teacher.unet.config, "block_out_channels": channels}
    return teacher._replace(unet=pretrained.Component(config, templates.of_unet(config)))


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--config", default="configs/tiny.py")
    options.add_argument("--model", help="instead of the config's teacher.model")
    options.add_argument("--batch", type=timing.positive, default=2, help="images per device")
    options.add_argument(
        "--channels", type=timing.positive, nargs="+", help="of the UNet, instead of its own"
    )
    options.add_argument("--layouts", choices=LAYOUTS, nargs="+", default=["dp", "fsdp"])
    options.add_argument("--attention", choices=kernels.BY_NAME, default="xla")
    where = options.add_mutually_exclusive_group(required=True)
    where.add_argument("--topologies", nargs="+", help="slices of TPUs, which need not be here")
    where.add_argument("--devices", type=timing.positive, nargs="+", help="so many of those here")
    return options


def main() -> None:
    known = parser()
    options = known.parse_args()
    config = runpy.run_path(options.config)["get_config"]().to_dict()
    chosen = settings.from_config(config)._replace(
        batch_size=options.batch, attention=options.attention
    )  # fmt: skip
    if options.model:
        chosen = chosen._replace(teacher=chosen.teacher._replace(model=options.model))
    where = [(name, 0) for name in options.topologies or ()]
    where += [(None, number) for number in options.devices or ()]
    for layout in options.layouts:
        with timing.refusing(known):
            rows = [measure(chosen, options.channels, layout, *each) for each in where]
        print("layout  devices  arrays MB  sent MB  arguments MB")
        for row in rows:
            print(
                f"{layout:6}  {row.devices:7}  {1e-6 * row.arrays:9.3f}  {1e-6 * row.sent:7.3f}  "
                f"{1e-6 * row.memory:12.3f}"
            )
        print(verdict(rows))
        for row in rows:
            print(json.dumps({"program": "scaling", **vars(options), **timing.surroundings(),
                              **row._asdict()}), flush=True)  # fmt: skip


if __name__ == "__main__":
    main()

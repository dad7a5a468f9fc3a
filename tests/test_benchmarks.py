"""The benchmarks print their line, count FLOPs right, and need no more than they promise."""

import ast
import collections
import importlib
import json
import os
import pathlib
import subprocess
import sys

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image

from slam_jax import flops, pipeline
from slam_jax.diffusion import sampler

ROOT = pathlib.Path(__file__).parents[1]
sys.path.append(str(ROOT))
comparison = importlib.import_module("benchmarks.comparison")
comparison_plot = importlib.import_module("benchmarks.comparison_plot")
models = importlib.import_module("benchmarks.models")

# Runs programs one after the other in one process (argv: a line each) in which all else that the
# project ever imports is missing, as on a machine with jax, flax and safetensors alone.
RUNNER = """
import runpy, shlex, sys

class Missing:
    NAMES = {
        "ml_collections", "grain", "array_record", "tokenizers", "orbax", "PIL",
        "tensorboardX", "tqdm", "torch", "diffusers", "transformers", "huggingface_hub",
        "beartype", "pytest",
    }
    OURS = {
        "nets", "diffusion", "distill", "shapes", "errors", "flops", "weights", "pipeline",
        "students", "runtime", "kept",
    }

    def find_spec(self, name, path=None, target=None):
        top, _, rest = name.partition(".")
        ours = top == "slam_jax" and rest and rest.partition(".")[0] not in self.OURS
        if top in self.NAMES or ours:
            raise ModuleNotFoundError(f"{name} is not for benchmarks")

sys.meta_path.insert(0, Missing())
for line in sys.argv[1:]:
    sys.argv = shlex.split(line)
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


def _lines(*programs):
    done = subprocess.run(
        [sys.executable, "-c", RUNNER, *programs],
        cwd=ROOT, text=True, capture_output=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    printed = done.stdout.splitlines()
    assert len(printed) == len(programs), done.stdout
    return [json.loads(line) for line in printed]


def _check(line, program, batch):
    assert (line["program"], line["size"], line["batch"]) == (program, "tiny", batch)
    assert line["device"] == "cpu" and line["jax"] == jax.__version__
    quantiles = [line[name] for name in ("ms_min", "ms_q1", "ms", "ms_q3", "ms_max")]
    assert quantiles[0] > 0 and quantiles == sorted(quantiles)
    assert line["images_per_s"] == pytest.approx(1e3 * batch / line["ms"], rel=1e-2)
    assert line["trace_s"] > 0 and line["compile_s"] > 0
    assert line["device_peak_bytes"] is None
    # At the least the student's parameters are in memory.
    assert line["program_bytes"] > 4 * line["parameters"]["student"]


def test_train_step_prints_what_a_call_costs():
    (line,) = _lines("benchmarks/train_step.py --batch 1 --repeat 1 --remat all --cached")
    _check(line, "train_step", 1)
    # The algorithm's: what is recomputed does not count.
    assert 1.05 < line["executed_flops"] / line["flops"] < 1.2
    # XLA adds element-wise operations and leaves out padding: both matter in networks so small.
    assert line["executed_flops"] == pytest.approx(line["cost_analysis_flops"], rel=0.25)


@pytest.mark.parametrize("options", [
    ("--steps", "2", "--devices", "2"),
    pytest.param(("--size", "tiny_sdxl_lora", "--cached"), marks=pytest.mark.slow),
])  # fmt: skip
def test_torch_takes_the_same_steps(options):
    """From equal weights and draws, an example on each device of ours; and an SDXL's LoRA.

    The second step's loss tells of the update before it.
    """
    done = subprocess.run(
        [
            sys.executable, "benchmarks/train_step.py", "--impl", "torch", "jax", "--batch", "2",
            "--repeat", "1", *options,
        ],
        cwd=ROOT, text=True, capture_output=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    torchs, ours = map(json.loads, done.stdout.splitlines())
    assert (torchs["impl"], ours["impl"]) == ("torch", "jax")
    assert torchs["first_losses"] == pytest.approx(ours["first_losses"], rel=1e-4)
    first, second = ours["first_losses"]
    assert abs(first - second) > 1e-3 * first
    assert torchs["flops"] == ours["flops"] and torchs["in_turns_with"] == ["torch", "jax"]
    assert torchs["ms_over_jax"] == pytest.approx(torchs["ms"] / ours["ms"], rel=1e-2)


def test_torch_draws_the_same_pictures():
    """In one step, which adds no noise of its own."""
    torch_sampler = importlib.import_module("benchmarks.torch_sampler")
    size, batch = models.SIZES["tiny"](), 2
    start = models.start(size, jnp.float32, models.random_parameters(models.parameter_shapes(size)))
    prompts = models.tokens(size, batch)
    noise = np.random.default_rng(4).standard_normal((1, batch, 8, 8, 4), np.float32)
    sample = torch_sampler.build(
        size, start, prompts, dtype="float32", num_steps=1, decodes=True, compile_mode=None
    )
    drawn = sample(torch.from_numpy(noise[0]).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).numpy()

    nets = models.nets(size, jnp.float32)
    decode = pipeline.decode(size.model.vae.config, jnp.float32)
    few_step = pipeline.few_step(nets.student, decode, *models.diffusion(size), 1, 50)
    text = jax.jit(nets.encode_text)(start.text_encoder, prompts)
    ours = jax.jit(few_step)(start.student, start.vae, text, noise)
    np.testing.assert_allclose(drawn, ours, atol=1e-4)
    assert ours.std() > 0.05


def test_torch_samples_at_the_same_times():
    scheduler = diffusers.LCMScheduler(beta_schedule="scaled_linear")
    for steps in (1, 2, 4, 8):
        scheduler.set_timesteps(steps, original_inference_steps=50)
        assert scheduler.timesteps.tolist() == sampler.few_step_times(steps).tolist()


def test_sampler_prints_what_a_call_costs():
    line, sd15 = _lines(
        "benchmarks/sampler.py --batch 2 --repeat 2 --steps 3",
        "benchmarks/sampler.py --size sd15 --dtype bfloat16 --dry_run",
    )
    _check(line, "sampler", 2)
    # Of the three steps XLA counts one; text encoding and decoding are outside the loop.
    assert 1.5 < line["flops"] / line["cost_analysis_flops"] < 3.0

    # Stable Diffusion 1.5's published sizes, without being allocated.
    assert sd15["parameters"] == {
        # The UNet, and cond_proj, which takes the embedding of gamma.
        "student": 859_520_964 + 256 * 320,
        "vae": 83_653_863,
        "text_encoder": 123_060_480,
    }
    assert "ms" not in sd15
    # As torch.utils.flop_counter counts diffusers' and transformers' classes on the meta device.
    student, decoder, text_encoder = 803_273_605_120, 2_514_518_933_504, 13_298_503_680
    assert sd15["flops"] == 8 * (4 * student + decoder + text_encoder)


def test_gaussian_mixture_prints_what_a_form_reaches():
    (line,) = _lines(
        "benchmarks/gaussian_mixture.py --form published --dim 3 --seeds 2 --length 40 "
        "--iterations 60 --fit_iterations 60 --batch 32 --width 16 --samples 64"
    )
    assert (line["program"], line["form"]) == ("gaussian_mixture", "published")
    assert (line["dim"], line["length"], line["stride"], line["seeds"]) == (3, 40, 20, 2)
    assert set(line["minus_first"]) == {"err1", "E1", "E2", "E4"}
    for name in line["minus_first"]:
        mean, error = line[name]
        assert mean > 0 < error and line["minus_first"][name] == [0, 0]
    # One step of a poor student is worse than the teacher's fifty.
    assert 0 < line["solver_err1"] < line["err1"][0] and abs(line["exact_E"]) < line["E1"][0]


@pytest.mark.parametrize("measures", ["jpeg workers cache memory", "tar"])
def test_data_prints_a_line_for_each_measure_and_leaves_nothing(measures, tmp_path):
    """With what the project imports: a bare machine has no Pillow to be measured."""
    program = ["benchmarks/data.py", "--quick", "--folder", str(tmp_path), "--only"]
    done = subprocess.run(
        [sys.executable, *program, *measures.split()],
        cwd=ROOT, text=True, capture_output=True, timeout=120,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = {line["measure"]: line for line in map(json.loads, done.stdout.splitlines())}
    assert " ".join(lines) == measures and not list(tmp_path.iterdir())
    for line in lines.values():
        assert (line["program"], line["quick"], line["jax"]) == ("data", True, jax.__version__)
        assert line["samples_per_s"] > 0 and line["commit"] and line["cpus"] >= 1
    if "jpeg" in lines:
        rates = lines["jpeg"]["bare_samples_per_s"], lines["jpeg"]["samples_per_s"]
        assert lines["jpeg"]["times_bare"] == pytest.approx(rates[0] / rates[1], rel=1e-2)
        rates = lines["workers"]["samples_per_s_of_two"], lines["workers"]["samples_per_s"]
        assert lines["workers"]["two_over_one"] == pytest.approx(rates[0] / rates[1], rel=1e-2)
        # A record is at least its moments.
        assert lines["cache"]["mb_per_s"] > lines["cache"]["samples_per_s"] * 65_536e-6
        assert lines["memory"]["mb_after"] > 50
    else:
        assert lines["tar"]["shards"] == 10 and lines["tar"]["first_batch_s"] > 0


@pytest.mark.parametrize("step", [["--products", "1"], ["--idle_ms", "5"]], ids=" ".join)
def test_checkpoint_prints_what_a_save_costs_and_leaves_nothing(step, tmp_path):
    program = ["benchmarks/checkpoint.py", "--mb", "20", "--saves", "2", "--folder", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, *program, *step],
        cwd=ROOT, text=True, capture_output=True, timeout=120,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert done.returncode == 0 and not list(tmp_path.iterdir()), done.stderr
    (line,) = map(json.loads, done.stdout.splitlines())
    assert (line["program"], line["jax"], line["saves"]) == ("checkpoint", jax.__version__, 2)
    assert line["state_mb"] == pytest.approx(20, rel=0.1)
    assert line["overhead"] == pytest.approx(line["ms_while_saving"] / line["ms"] - 1, abs=0.01)
    assert 0 < line["blocked_ms"] < line["save_ms"] and line["check_ms"] > 0 < line["copy_ms"]
    if step[0] == "--idle_ms":
        assert line["ms"] >= 5


def _flops(function, *shapes):
    inputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return flops.count(jax.jit(function).trace(*inputs).jaxpr.jaxpr)


def test_overhead_prints_what_shows_beside_a_device():
    done = subprocess.run(
        [
            sys.executable, "benchmarks/overhead.py", "--size", "tiny", "--batch", "4",
            "--repeat", "20", "--device_ms", "50",
        ],
        cwd=ROOT, text=True, capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    line = json.loads(done.stdout)
    assert line["program"] == "overhead" and line["arrays"] > 800
    # As long as the device's loop, which was timed beforehand on whatever else runs here.
    assert 5 < line["ms"] < 1000
    assert line["share_shown"] == pytest.approx(line["ms"] / 50 - 1, abs=1e-3)


def test_compile_prints_what_a_later_process_spares(tmp_path, tiny_folder):
    config = tmp_path / "small.py"
    config.write_text(
        "from configs import tiny\n\n\ndef get_config():\n    config = tiny.get_config()\n"
        f"    config.teacher.model = {str(tiny_folder)!r}\n    return config\n"
    )
    done = subprocess.run(
        [sys.executable, "benchmarks/compile.py", "--config", str(config), "--batch", "4"],
        cwd=ROOT, check=True, capture_output=True, text=True,
        env={**os.environ, "JAX_NUM_CPU_DEVICES": "1"},
    )  # fmt: skip
    line = json.loads(done.stdout)
    assert line["config"] == str(config) and line["batch"] == 4
    assert 0 < 4 * line["warm_lower_s"] < line["cold_lower_s"]
    assert 0 < 2 * line["warm_compile_s"] < line["cold_compile_s"]


def test_flops_of_products_loops_and_recomputation():
    product = 2 * 3 * 5 * 7
    x, w = (3, 5), (5, 7)
    assert _flops(jnp.matmul, x, w) == product
    assert _flops(lambda x, w: jnp.einsum("bij,bjk->bik", x, w), (4, *x), (4, *w)) == 4 * product

    def loop(x, w):
        return jax.lax.fori_loop(0, 6, lambda _, total: total + jnp.sum(x @ w), 0.0)

    assert _flops(loop, x, w) == 6 * product

    def loss(x, w):
        return jnp.sum(jnp.sin(x @ w) ** 2)

    # Forwards once, backwards twice; recomputation adds another time forwards.
    assert _flops(jax.grad(loss, argnums=(0, 1)), x, w) == 3 * product
    assert _flops(jax.grad(jax.checkpoint(loss), argnums=(0, 1)), x, w) == 4 * product
    # As XLA counts, a loop's body once.
    traced = jax.jit(loop).trace(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in (x, w)))
    assert flops.count(traced.jaxpr.jaxpr, unrolled=False) == product
    either = lambda x, w: jax.lax.cond(x[0, 0] > 0, lambda: x @ w, lambda: x @ w + x @ w)  # noqa: E731
    assert _flops(either, x, w) == 2 * product


def test_flops_of_convolutions_and_their_gradients():
    def convolve(x, w):
        return jax.lax.conv_general_dilated(
            x, w, (2, 2), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    # 4 x 4 places, each 3 x 3 x 5 inputs to 7 outputs.
    once = 2 * 2 * 4 * 4 * 3 * 3 * 5 * 7
    shapes = (2, 8, 8, 5), (3, 3, 5, 7)
    assert _flops(convolve, *shapes) == once
    both = jax.grad(lambda x, w: jnp.sum(convolve(x, w) ** 2), argnums=(0, 1))
    assert _flops(both, *shapes) == 3 * once


ALLOWED = {"jax", "flax", "optax", "numpy", "absl", "jaxtyping", "benchmarks", "slam_jax"}
# They measure what a bare machine lacks, or need the demo's own teacher and drawings.
NEED_MORE = {
    "data.py",
    "synthetic.py",
    "checkpoint.py",
    "laboratory.py",
    "overhead.py",
    "comparison_plot.py",
    "compile.py",
    "page_load.py",
    "torch_nets.py",
    "torch_step.py",
    "torch_sampler.py",
}
FOLDERS = ("benchmarks", "slam_jax/nets", "slam_jax/diffusion", "slam_jax/distill")


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_stay_within_what_a_bare_machine_has(folder):
    """Also where a run does not pass, as inside a function."""
    for path in sorted((ROOT / folder).glob("*.py")):
        if path.name in NEED_MORE:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or "."]
            for name in names:
                top = name.partition(".")[0]
                assert top in ALLOWED | sys.stdlib_module_names, f"{path}:{node.lineno}: {name}"


# In the place of python: says what it is asked to run, and fails for one program.
INTERPRETER = """#!/bin/sh
if [ "$1" = -c ]; then exec {python} "$@"; fi
shift 2
case "$*" in *train_step*torch*) echo "out of memory" >&2; exit 1 ;; esac
echo "{{\\"program\\": \\"$*\\"}}"
"""


def _gpu_script(folder, interpreter, device):
    """It run with that interpreter: how it ended, the line of what failed, and what it wrote."""
    python = folder / "python"
    python.write_text(interpreter.format(python=sys.executable))
    python.chmod(0o755)
    done = subprocess.run(
        ["bash", "benchmarks/gpu.sh", str(folder)], cwd=ROOT, text=True, capture_output=True,
        env={**os.environ, "PYTHON": str(python), "SIZE": "tiny", "DEVICE_NAME": device},
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    (failure,) = [line for line in done.stderr.splitlines() if line.startswith("failed: ")]
    (results,) = folder.glob("*.jsonl")
    return failure, results


def test_gpu_script_goes_on_where_a_run_fails(tmp_path):
    failure, results = _gpu_script(tmp_path, INTERPRETER, "Some GPU 9")
    assert "train_step" in failure and failure.endswith("torch torch_compile: out of memory")
    assert results.name.endswith("-some-gpu-9.jsonl")
    commands = [json.loads(line)["program"] for line in results.read_text().splitlines()]
    kinds = collections.Counter(pathlib.PurePath(each.split()[0]).stem for each in commands)
    assert kinds == {"peak": 1, "train_step": 3, "sampler": 8, "overhead": 1, "compile": 1}
    for command in commands[1:-2]:
        assert "--size tiny --dtype bfloat16 --repeat 10" in command
    by_cudnn = ["--attention cudnn" in each for each in commands]
    assert not any(by_cudnn[:2]) and by_cudnn[2:] == [True] * 10 + [False, True]


def test_gpu_script_keeps_to_xla_where_cudnn_fails(tmp_path):
    fails = INTERPRETER.replace("train_step*torch", "cudnn").replace("out of memory", "no cuDNN")
    failure, results = _gpu_script(tmp_path, fails, "gpu")
    assert failure.endswith("--attention cudnn: no cuDNN")
    assert "cudnn" not in results.read_text() and results.read_text().count("sampler") == 8


def _answers(folder, name, seed, quality):
    """What benchmarks/comparison.py keeps, of a student whose features are off by `quality`."""
    rng = np.random.default_rng(seed)
    real = rng.normal(size=(60, 3))
    answers = {"real": real, "losses": np.ones(60), "seconds": 1.0, "curve": np.arange(10.0)}
    for steps in comparison.STEPS:
        answers |= {
            f"features_{steps}": real + quality, f"accuracy_{steps}": 1 - quality,
            f"endpoint_{steps}": quality * steps,
        }  # fmt: skip
    answers["shown"] = np.full((2, 8, 8, 3), quality, np.float32)
    np.savez(folder / f"{name}-{seed}.npz", **answers)


def test_a_comparison_pairs_seeds(tmp_path):
    for seed, common in ((0, 0.1), (1, 0.3)):
        _answers(tmp_path, "lcm_k20", seed, common)
        _answers(tmp_path, "splam_k20", seed, common + 0.05)
    _answers(tmp_path, "lcm_k100", 0, 0.0)
    out = tmp_path / "lines.jsonl"
    program = [sys.executable, "benchmarks/comparison_table.py"]
    done = subprocess.run(
        [*program, "--keep", tmp_path, "--out", out], cwd=ROOT, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    lines = {
        (each["arm"], each["seed"]): each for each in map(json.loads, out.read_text().splitlines())
    }
    # Moved by d in each of three directions: |d|^2 in all.
    assert lines["splam_k20", 1]["frechet_4"] == pytest.approx(3 * 0.35**2)
    assert lines["splam_k20", 0]["error_curve"]["999"] == 9.0
    means, differences = done.stdout.split("\n\n")
    assert "| lcm_k20 | 2 |" in means and "0.800 ± 0.100" in means
    (row,) = differences.splitlines()[2:]
    # 0.05 off in both seeds, though the seeds themselves differ by 0.2.
    assert row.startswith("| splam_k20 - lcm_k20 | 2 |") and "-0.050 ± 0.000" in row
    arms = ["lcm_k20", "splam_k20"]
    comparison_plot.plot(list(lines.values()), arms, tmp_path / "plot.png")
    assert np.asarray(Image.open(tmp_path / "plot.png")).std() > 10
    comparison_plot.pictures(tmp_path, arms, 0, tmp_path / "pictures.png")
    assert np.asarray(Image.open(tmp_path / "pictures.png")).shape[0] > 2 * 32
    empty = subprocess.run(
        [*program, "--keep", tmp_path / "none"], cwd=ROOT, text=True, capture_output=True
    )
    assert empty.returncode == 2 and "holds no *.npz" in empty.stderr.splitlines()[-1]
    joined = subprocess.run(
        [*program, "--keep", tmp_path / "none", "--earlier", out], cwd=ROOT, text=True,
        capture_output=True,
    )  # fmt: skip
    assert joined.stdout == done.stdout

"""The documentation builds, and no command in it has gone stale.

Every command is run by a test, on something small, or needs what PLACES says; the programs
themselves parse all of them.
"""

import ast
import importlib
import json
import os
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest
import yaml

ROOT = pathlib.Path(__file__).parents[1]
sys.path.append(str(ROOT / "tests"))
documented = importlib.import_module("documented")

HARDWARE = "needs an accelerator, and real weights or data"
CLUSTER = "needs a cluster; the launchers run with stand-ins in tests/test_launch.py"
NETWORK = "needs the network"
HOURS = "needs a machine for minutes to hours"
MAIN, EXPORT = r"python -m slam_jax\.main --config configs/", r"python -m slam_jax\.export "
EVALUATE, PREPARE = r"python -m slam_jax\.evaluate ", r"python -m slam_jax\.prepare "
# How a command starts, the first that fits -> where the same is run on something small, or what
# keeps it from being run.
PLACES = (
    (r"(TPU=.*|MODULE=.*|sbatch .*|launch/mpi.*|kubectl .*)", CLUSTER),
    (r"launch/local\.sh ", "tests/test_main_on_hosts.py::test_two_hosts_train_as_one_does"),
    (r"(pip install|img2dataset) ", NETWORK),
    (r".*runs/(sd15|sdxl)", HARDWARE),
    (r".*(stable-diffusion-v1-5|stable-diffusion-xl)/?", HARDWARE),
    (rf"{MAIN}sd15\.py .*--dry_run", HOURS + ", and tests/test_dry_run.py is the same"),
    (rf"{MAIN}\w+\.py --dry_run --topology", HOURS + "; tests/test_scaling.py compiles so"),
    (r"make install", NETWORK + "; make minimal installs the same"),
    (r"make demo|make test", "tests/test_main.py::test_run_folder_is_complete"),
    (rf"{MAIN}tiny\.py .*student\.lora", "tests/test_lora_run.py::test_resumed_run_goes_on"),
    (rf"{MAIN}tiny\.py .*num_steps=1200", "tests/test_lora_run.py::test_resumed_run_goes_on"),
    (rf"{MAIN}tiny\.py .*start", "tests/test_experiment.py::test_a_student_starts_as_a_plain_unet"),
    (
        rf"{MAIN}tiny\.py .*caches/",
        "tests/test_train.py::test_training_from_a_cache_equals_training_from_the_pictures",
    ),
    (rf"(JAX_DEBUG_NANS=1 )?{MAIN}tiny\.py ", "tests/test_main.py::test_run_folder_is_complete"),
    (r"python -m slam_jax\.sample .*--w ", "tests/test_sample.py::test_teacher_images_equal_diff"),
    (
        r"python -m slam_jax\.sample --prompt ",
        "tests/test_first_hour.py::test_the_first_picture_is_what_was_asked_for",
    ),
    (r"python -m slam_jax\.sample ", "tests/test_sample.py::test_student_images_equal_diffusers"),
    (rf"{PREPARE}.*--verify", "tests/test_prepare.py::test_a_damaged_shard_is_named_and_made_aga"),
    (rf"{PREPARE}.*shapes2d", "tests/test_prepare.py::test_drawings_are_a_source"),
    (rf"{EVALUATE}.*--watch", "tests/test_evaluate.py::test_each_checkpoint_is_scored_and_the_be"),
    (EVALUATE, "tests/test_evaluate.py::test_results_are_written_and_printed"),
    (
        rf"{EXPORT}.*--format lora",
        "tests/test_export.py::test_a_lora_run_is_exported_in_every_form",
    ),
    (
        r"python -m slam_jax\.report ",
        "tests/test_run_report.py::test_the_program_says_where_it_is",
    ),
    (EXPORT, "tests/test_export.py::test_torch_draws_the_same_images_from_every_format"),
    (r"python benchmarks/scaling\.py", "tests/test_scaling.py::test_dp_sums_the_gradients"),
    (
        r"python benchmarks/largest_batch",
        "tests/test_largest_batch.py::test_the_largest_batch_fits",
    ),
    (r"python benchmarks/data\.py", "tests/test_benchmarks.py::test_data_prints_a_line"),
    (r"python benchmarks/checkpoint\.py", "tests/test_benchmarks.py::test_checkpoint_prints_what"),
    (r"python benchmarks/overhead\.py", "tests/test_benchmarks.py::test_overhead_prints_what"),
    (r"python benchmarks/compile\.py", "tests/test_benchmarks.py::test_compile_prints_what"),
    (r"python benchmarks/gaussian", "tests/test_benchmarks.py::test_gaussian_mixture_prints"),
    (
        r"JAX_NUM_CPU_DEVICES=2 python benchmarks/train_step\.py",
        "tests/test_benchmarks.py::test_torch_takes_the_same",
    ),
    (r"python benchmarks/interactive\.py", HOURS + ", and a trained student"),
    (r"python benchmarks/roofline\.py", "tests/test_roofline.py::test_the_committed_limit_is_what"),
    (r"python -m slam_jax$", "tests/test_command.py::test_the_package_lists_its_programs"),
    (r"python -m slam_jax\.env", "tests/test_command.py::test_env_"),
    (r"make fuzz", "tests/test_fuzz.py::test_whatever_comes_is_read_or_refused"),
    (r"make minimal", NETWORK + "; tests/test_minimal.py draws where they are blocked"),
    (r"python benchmarks/comparison_plot", "tests/test_benchmarks.py::test_a_comparison_pairs"),
    (r"python benchmarks/comparison_table", "tests/test_benchmarks.py::test_a_comparison_pairs"),
    (r"python benchmarks/(comparison|gamma_gradients)\.py", HOURS),
    (r"make soak|python -m pytest -m slow", HOURS),
    (r"python tests/reference_step\.py", "tests/test_reference_step.py::test_recorded_step_passes"),
    (r"make serve", "tests/test_page.py::test_the_picture_changes_as_one_types"),
    (r"python -m slam_jax\.serve", "tests/test_page.py::test_the_picture_changes_as_one_types"),
    (r"python benchmarks/page_load", "tests/test_page.py::test_clients_get_their_pictures"),
    (r"make docs", "tests/test_docs.py::test_the_site_is_built"),
    (r"python -m pytest ", "tests/test_docs.py::test_what_a_command_names_is_there"),
    (r"python -c ", "needs a file of others; tests/nets/test_inception.py reads its like"),
)
# What must be found in commands: each is stale in another way.
STALE = (
    "python -m slam_jax.main --config configs/tiny.py --workdir w --config.distil.w=5",
    "python -m slam_jax.main --config configs/tiny.py --workdir w --config.num_steps=many",
    "launch/local.sh 2 --config configs/tiny.py --wrokdir w",
    "python -m slam_jax.sample --model m --prompt p",
    "python -m slam_jax.export --workdir w --out o --format ckpt",
    "python -m slam_jax.evaluate --protocol configs/eval/none.py --out o",
    "python benchmarks/checkpoint.py --idle 9 --mbs 3",
)


@pytest.fixture(scope="module")
def commands():
    texts = [path.read_text(encoding="utf-8") for path in documented.pages()]
    found = list(dict.fromkeys(command for text in texts for command in documented.commands(text)))
    assert len(found) > 40
    return found


def test_every_command_is_run_or_needs_something(commands):
    first = {c: next((p for p in PLACES if re.match(p[0], c)), None) for c in commands}
    homeless = [command for command, place in first.items() if place is None]
    assert not homeless, f"say in PLACES where these are run: {homeless}"
    unused = [pattern for pattern, _ in set(PLACES) - {*first.values()}]
    assert not unused, f"no command starts so any more: {unused}"
    for _, place in PLACES:
        path, _, name = place.partition("::")
        if name:
            text = (ROOT / path).read_text(encoding="utf-8")
            assert f"def {name}" in text, f"{path} has no {name}"


def test_the_programs_take_every_command(commands):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(ROOT / "tests" / "documented.py")],
        input=json.dumps([*commands, *STALE]), cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    wrong = json.loads(done.stdout)
    refused = {c: why for c, why in zip(commands, wrong, strict=False) if why}
    assert not refused, "\n".join(f"{command}: {why}" for command, why in refused.items())
    assert all(wrong[len(commands) :]), f"seen as right: {wrong[len(commands) :]}"


def test_what_a_command_names_is_there(commands):
    """Targets of make, extras of pip, files of the repository."""
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for command in commands:
        words = documented.parts(command)[1]
        if words[0] == "make":
            assert words[1] in targets, command
        for extras in re.findall(r"slam_jax\[([\w,-]+)\]", command):
            assert {*extras.split(",")} <= {*project["optional-dependencies"]}, command
        for word in words:
            if re.match(r"(configs|launch|benchmarks|tests|assets)/", word):
                assert (ROOT / word).exists(), command


def test_extras_have_names_that_every_pip_finds():
    """Until 23.3 pip looked for a_b where setuptools had written a-b, and warned in passing."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for extra in project["optional-dependencies"]:
        assert re.fullmatch(r"[a-z]+(-[a-z]+)*", extra), extra


def test_every_program_is_in_the_reference():
    """Or its flags would be missing from the page, and its commands would not be parsed."""
    text = (ROOT / "docs" / "reference.py").read_text(encoding="utf-8")
    known = {*re.findall(r'"(\w+)"', re.search(r"^PROGRAMS = \((.*?)\)", text, re.M | re.S)[1])}
    programs = {
        path.stem
        for path in (ROOT / "slam_jax").glob("*.py")
        if "command.run(" in path.read_text(encoding="utf-8")
    }
    assert programs == known


def test_python_in_pages_is_python():
    for page in documented.pages():
        for block in re.findall(r"^```python\n(.*?)^```", page.read_text("utf-8"), re.S | re.M):
            ast.parse(block)


def test_the_site_is_built(tmp_path):
    """Strictly, with flags, config, map and equations in their places."""
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert built.returncode == 0, built.stdout + built.stderr
    pages = {path.stem: path.read_text("utf-8") for path in tmp_path.glob("*.html")}
    for page, wanted in {
        "cli": ["--topology", "--init_image", "--watch_once", "--extract_lora", "--num_workers"],
        "config": ["distill.sigma", "markov (as released), ddim, fixed, matched"],
        "design": ["<code>diffusion/</code>", "diffusion, errors, shapes"],
        "notebook": ["data:image/png;base64,", "incremental_update"],
        "results": ["SNR-matched", "matched, gamma = 1 in half"],
        "method": ["<math", "<mfrac>"],
    }.items():
        for text in wanted:
            assert text in pages[page], f"{page}.html lacks {text}"
    for name, page in pages.items():
        assert "<!-- generated" not in page and r"\(" not in page, name
        assert not re.search(r'(src|<link[^>]*href)="https?://', page), f"{name} needs the network"


def test_the_hooks_before_a_commit_are_what_the_project_pins():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    asked = {need for hook in hooks for need in hook["additional_dependencies"]}
    pinned = (ROOT / "constraints.txt").read_text().splitlines()
    assert asked <= {*pinned}
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (citation["version"], citation["license"]) == (project["version"], project["license"])

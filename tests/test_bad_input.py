"""A user's mistake is one line on stderr that names the value, status 2, and no device is touched.

All cases run in children of one process that has imported the programs once.
"""

import importlib
import json
import pathlib
import re
import runpy
import shutil
import sys

import pytest

sys.path.append(str(pathlib.Path(__file__).parent))
children = importlib.import_module("children")
ROOT = pathlib.Path(__file__).parents[1]

# Name -> (overrides of configs/tiny.py, what stderr says).
VALUES = {
    "unknown_key": (
        ["--config.distil.w=3"],
        r"distil\.w=3 is not in .*mean --config\.distill\.w\?",
    ),
    "unknown_leaf": (["--config.distill.ww=3"], r"mean --config\.distill\.w\?"),
    "wrong_group": (["--config.w=3"], r"mean --config\.distill\.w\?"),
    "group": (["--config.log=3"], r"log=3 is a group; .* --config\.log\.every_steps=10"),
    "wrong_type": (["--config.num_steps=many"], "=many must be a whole number, such as .*=600"),
    "no_number": (["--config.distill.w=big"], r"=big must be a number, such as .*\.w=8\.0"),
    "remat": (["--config.student.remat=True"], "'True' is not one of none, .*save_convs, all"),
    "wandb": (["--config.log.wandb_project=x"], r"pip install 'slam_jax\[wandb\]'"),
    "unknown_flag": (["--wrokdir=x"], "wrokdir.*Did you mean: workdir"),
    "mesh_pairs": (["--config.mesh.axes=1"], r"mesh\.axes \(1,\) must be pairs"),
    "stray_word": (["resume"], "'resume'"),
    "not_positive": (["--config.num_steps=0"], r"config\.num_steps=0 must be at least 1"),
    "ema_rate": (["--config.ema_rate=1.0"], r"config\.ema_rate=1\.0 .*\[0, 1\)"),
    "no_folder": (["--config.teacher.model=/no/such"], "no folder /no/such; .*ORG/NAME"),
    "attention": (["--config.attention=fast"], "'fast' is not known; there are xla, flash, cudnn"),
    "mu_dtype": (["--config.optimizer.mu_dtype=float16"], "'float16'.*float32, bfloat16"),
    "dtype": (["--config.student.dtype=int8"], "'int8'.*float32, bfloat16"),
    "cond_proj": (["--config.student.cond_proj=ones"], "'ones'.*random, zero"),
    "gamma_dim": (["--config.student.gamma_dim=7"], "gamma_dim 7 must be even"),
    "lora_target": (
        ["--config.student.lora.rank=4", "--config.student.lora.targets=('to_q','to_x')"],
        "'to_x' matches no module; there are conv_in",
    ),
    "lora_rank": (["--config.student.lora.rank=-1"], r"student\.lora\.rank=-1 must be at least 0"),
    "lora_alpha": (["--config.student.lora.alpha=0.0"], r"student\.lora\.alpha=0\.0 must be pos"),
    "lora_none": (
        ["--config.student.lora.rank=4", "--config.student.lora.targets=()"],
        "targets is empty",
    ),
    "source": (["--config.data.source=laion"], "'laion'.*shapes2d"),
    "start": (["--config.student.start=assets/tiny_sd"], "student.start assets/tiny_sd: .* there"),
    "start_lora": (
        ["--config.student.start=assets/tiny_sd", "--config.student.lora.rank=2"],
        "start is for a full student",
    ),
    "judge": (
        ["--config.eval.judge=assets/tiny_sd/classifier", "--config.data.source=laion"],
        "eval.judge knows shapes2d, not laion",
    ),
    "size": (["--config.data.size=31"], "size=31.*32 or 64"),
    "mesh": (["--config.mesh.rules=(('.*',('model',)),)"], "names the axis 'model'"),
    "variant": (["--config.teacher.variant=fp16"], "no .*fp16.safetensors"),
    "hub": (["--config.teacher.model=no/such"], "model no/such, .*HF_HUB_OFFLINE is set"),
    "revision": (["--config.teacher.revision=v1"], "revision 'v1' is for models of the hub"),
}
# The same, where the schedule, which lies on a device, has to be made first.
LATE_VALUES = {
    "gamma": (["--config.distill.gamma=('beta',2)"], "'beta'.*uniform, ones, mixture, annealed"),
    "gamma_list": (["--config.distill.gamma=([],)"], r"gamma \[\] is not known"),
    "gamma_numbers": (["--config.distill.gamma=('mixture',)"], r"must be \('mixture', 'p'\)"),
    "gamma_range": (["--config.distill.gamma=('mixture',1.5)"], "p_0 1.5 is a probability"),
    "distance": (["--config.distill.distance=('l1',)"], "'l1'.*l2, huber"),
    "sigma": (["--config.distill.sigma=none"], "'none'.*markov, ddim, fixed, matched"),
    "times": (["--config.distill.times=some"], "'some'.*grid, all"),
    "length": (
        ["--config.distill.length=50", "--config.distill.stride=20"],
        "length 50 must be a positive multiple of stride",
    ),
    "flash": (["--config.attention=flash"], "attention=flash is made for TPUs, not for cpu"),
    "learning_rate": (["--config.optimizer.learning_rate=0.0"], "learning_rate 0.0"),
    "batch_size": (["--config.batch_size=30"], "batch_size 30 .* 4 devices .*use 28 or 32"),
    "accumulate": (
        ["--config.accumulate=5", "--config.batch_size=32"],
        "batch_size 32 .*accumulate 5; use 20 or 40",
    ),
}


def _config_files(folder: pathlib.Path) -> dict[str, tuple[list[str], str]]:
    """Config files that cannot be used."""
    tiny = (ROOT / "configs" / "tiny.py").read_text()
    sources = {
        "import_error": ("import no_such_module", "no_such_module"),
        "syntax_error": ("def get_config(:", "SyntaxError|invalid syntax"),
        "no_function": ("x = 1", "get_config"),
        "no_config_dict": ("def get_config():\n    return [1]", "'list' object"),
        "raises": ("def get_config():\n    return 1 / 0", "ZeroDivisionError"),
        "missing_key": (
            tiny.replace("    config.accumulate = 1\n", ""), r"config\.accumulate is missing"
        ),
        "extra_key": (
            tiny.replace("config.accumulate", "config.lr = 1\n    config.accumulate"),
            r"config\.lr is not known",
        ),
        "no_group": (
            re.sub(r"config\.log = .*", "config.log = 10", tiny),
            r"config\.log=10 must be a group",
        ),
    }  # fmt: skip
    cases = {}
    for name, (source, said) in sources.items():
        (folder / f"{name}.py").write_text(source)
        cases[name] = ([f"--config={folder / f'{name}.py'}", f"--workdir={folder / name}"], said)
    boolean = folder / "boolean.py"
    boolean.write_text(tiny.replace('remat="none"', "remat=False"))
    cases["no_boolean"] = (
        [f"--config={boolean}", f"--workdir={folder / 'c'}", "--config.student.remat=maybe"],
        "must be true or false, such as .*=false",
    )
    cases["no_config_file"] = (["--config=nope.py", f"--workdir={folder / 'a'}"], r"nope\.py")
    cases["no_config"] = ([f"--workdir={folder / 'b'}"], "--config must be given")
    cases["no_workdir"] = ([f"--config={folder / 'extra_key.py'}"], "--workdir must be given")
    return cases


def _folders(
    folder: pathlib.Path, model: pathlib.Path, sdxl: pathlib.Path
) -> dict[str, tuple[list[str], str]]:
    """Model folders that cannot be used, and work folders."""

    def copy(name):
        return pathlib.Path(shutil.copytree(model, folder / name))

    weights = pathlib.Path("unet") / "diffusion_pytorch_model.safetensors"
    path = copy("truncated") / weights
    path.write_bytes(path.read_bytes()[:-1000])
    (copy("without") / weights).unlink()
    for name, file, key, value in (
        ("other_pipeline", "model_index.json", "_class_name", "FluxPipeline"),
        ("student", "unet/config.json", "time_cond_proj_dim", 8),
        ("plain_student", "scheduler/scheduler_config.json", "_class_name", "LCMScheduler"),
        ("inpainting", "unet/config.json", "in_channels", 9),
        ("latents", "vae/config.json", "latent_channels", 16),
        ("text_width", "text_encoder/config.json", "hidden_size", 8),
    ):
        path = copy(name) / file
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    shutil.rmtree(shutil.copytree(sdxl, folder / "one_encoder") / "text_encoder_2")
    flow = copy("flow") / "scheduler" / "scheduler_config.json"
    flow.write_text('{"_class_name": "FlowMatchEulerDiscreteScheduler"}')
    (folder / "file").touch()
    said = {
        "truncated": r"unet/diffusion_pytorch_model\.safetensors is cut short",
        "without": r"no diffusion_pytorch_model\.safetensors",
        "other_pipeline": "FluxPipeline",
        "student": "cond_proj",
        "plain_student": "few-step student already.*student.start",
        "inpainting": r"in_channels 9 \(9 are an inpainting model's\).*latent_channels are 4",
        "latents": "in_channels 4, .*latent_channels are 16",
        "text_width": "8 wide .*cross_attention_dim is 16",
        "one_encoder": "cannot read .*/one_encoder/text_encoder_2/config.json",
        "flow": "FlowMatchEulerDiscreteScheduler",
    }
    cases = {name: ([f"--config.teacher.model={folder / name}"], said[name]) for name in said}
    cases["workdir"] = ([f"--workdir={folder}/file/run"], "file/run.*Not a directory.*--workdir")
    cases["workdir_url"] = (["--workdir=s3://b/run"], "s3://b/run is neither gs://BUCKET/FOLDER")
    started = folder / "started"
    (started / "checkpoints" / "5").mkdir(parents=True)
    (started / "config.json").write_text('{"seed": 1}')
    cases["resume"] = ([f"--workdir={started}", "--config.seed=0"], "was trained with .*absent")
    other = shutil.copytree(started, folder / "other")
    config = runpy.run_path(str(ROOT / "configs" / "tiny.py"))["get_config"]()
    config.teacher.model = str(model)
    (other / "config.json").write_text(json.dumps(config.to_dict()))
    cases["resume_mu_dtype"] = (
        [f"--workdir={other}", "--config.optimizer.mu_dtype=bfloat16"],
        'trained with optimizer.mu_dtype="float32" and now asks .*"bfloat16"; give the old value',
    )
    return cases


def _sample_cases(folder: pathlib.Path, model: pathlib.Path) -> dict[str, tuple[list[str], str]]:
    known = [f"--model={model}", f"--out={folder}/out.png"]
    prompt = "--prompt=a circle"
    return {
        "sample_no_out": ([known[0], prompt], "--out must be given"),
        "sample_out": ([known[0], f"--out={folder}/x.jpg", prompt], r"x\.jpg must end in"),
        "sample_no_prompt": (known, "one of --prompt and --prompts"),
        "sample_no_file": ([*known, "--prompts=/no/file"], "cannot read --prompts /no/file"),
        "sample_folder": (["--model=/no/such", known[1], prompt], "no folder /no/such"),
        "sample_url": (["--model=gs://", known[1], prompt], "--model gs:// is neither gs://BUCKET"),
        "sample_to_url": ([known[0], "--out=gs://b/c.png", prompt], "cannot write to gs:/b: give"),
        "sample_hub": (["--model=no/such", known[1], prompt], "no/such.*HF_HUB_OFFLINE"),
        "sample_revision": ([*known, prompt, "--revision=v1"], "revision 'v1' is for models"),
        "sample_pickle": (
            [*known, prompt, "--noise=assets/tiny_sd/model_index.json"],
            "cannot read --noise .*np.save",
        ),
        "sample_bytes": ([*known, "--prompt=\udcff"], r"'\\udcff' is not UTF-8"),
        "sample_noise": ([*known, prompt, "--noise=/no.npy"], "cannot read --noise /no.npy"),
        "sample_lora": (
            [*known, prompt, "--lora=a.safetensors"],
            "a.safetensors must be FILE:SCALE",
        ),
        "sample_lora_file": ([*known, prompt, "--lora=/no.safetensors:1"], "cannot read /no.safet"),
        "sample_steps": ([*known, prompt, "--steps=0"], "0 sampling steps at strength 1.0: there"),
    }


def _export_cases(folder: pathlib.Path) -> dict[str, tuple[list[str], str]]:
    run, out = folder / "exported", f"--out={folder}/out"
    run.mkdir()
    config = runpy.run_path(str(ROOT / "configs" / "tiny.py"))["get_config"]().to_dict()
    (run / "config.json").write_text(json.dumps(config))
    known = [f"--workdir={run}", out]
    return {
        "export_no_run": ([f"--workdir={folder}/none", out], "cannot read .*none/config.json"),
        "export_url": (["--workdir=gs://", out], "--workdir gs:// is neither gs://BUCKET/FOLDER"),
        "export_to_url": ([known[0], "--out=gs://b/c"], "cannot write to .*gs:/b: give a folder"),
        "export_no_checkpoint": (known, "holds no checkpoint yet"),
        "export_exists": ([known[0], f"--out={folder}"], "exists; give another, or --overwrite"),
        "export_name": ([*known, "--format=single-file"], "single-file writes a File.safetensors"),
        "export_format": ([*known, "--format=ckpt"], "ckpt.*diffusers"),
        "export_full_as_lora": ([*known, "--format=lora"], "give --extract_lora RANK"),
        "export_rank": ([*known, "--format=lora", "--extract-lora=0"], "rank of at least 1"),
    }


@pytest.fixture(scope="module")
def answers(tmp_path_factory, tiny_folder, tiny_sdxl_folder):
    """Name -> (status, stderr, devices touched, what stderr should say)."""
    folder = tmp_path_factory.mktemp("bad_input")
    good = [
        f"--config={ROOT / 'configs' / 'tiny.py'}", f"--config.teacher.model={tiny_folder}",
        f"--workdir={folder / 'run'}", "--config.eval.judge=",
    ]  # fmt: skip
    cases = {
        name: ([*good, *extra], said)
        for name, (extra, said) in _folders(folder, tiny_folder, tiny_sdxl_folder).items()
    }
    cases |= {
        name: ([*good, *extra], said) for name, (extra, said) in (VALUES | LATE_VALUES).items()
    }
    cases |= _config_files(folder)
    groups = {
        "main": cases, "sample": _sample_cases(folder, tiny_folder), "export": _export_cases(folder)
    }  # fmt: skip
    every = {name: case for group in groups.values() for name, case in group.items()}
    requests = {
        name: children.Request(module, arguments)
        for module, group in groups.items()
        for name, (arguments, _) in group.items()
    }
    found = children.run(requests, num_devices=4)
    return {
        name: (found[name].status, found[name].stderr, found[name].touched, said)
        for name, (_, said) in every.items()
    }


def test_every_mistake_is_one_line_with_status_2(answers):
    wrong = {}
    for name, (status, stderr, _, said) in answers.items():
        one_line = re.fullmatch(r"error: [^\n]*\n", stderr) is not None
        if status != 2 or not one_line or not re.search(said, stderr):
            wrong[name] = (status, stderr)
    assert not wrong, "\n".join(f"{name}: {status} {err}" for name, (status, err) in wrong.items())


def test_no_device_is_touched_before(answers):
    late = {*LATE_VALUES, "flow", "sample_steps", "sample_noise"}
    assert {name for name, (_, _, touched, _) in answers.items() if touched} <= late

"""Fetching from the hub: a hub of our own on this machine, and caches laid out by hand."""

import contextlib
import hashlib
import http.server
import io
import json
import re
import shutil
import sys
import threading
from pathlib import Path

import diffusers
import huggingface_hub.constants
import jax
import numpy as np
import pytest

from slam_jax.errors import UserError
from slam_jax.weights import hub, pretrained

NAME = "org/name"
STEM = "diffusion_pytorch_model"
PARTS = ("unet", "vae", "text_encoder")


class Hub(http.server.ThreadingHTTPServer):
    """Serves folders as the hub serves models, and remembers what was downloaded."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.models: dict[tuple[str, str], Path] = {}  # (name, revision) -> folder
        self.refusal: dict[str, tuple[int, str]] = {}  # a word of the path -> (status, code)
        self.downloaded: set[str] = set()

    def commit(self, name: str, revision: str) -> str:
        return hashlib.sha1(f"{name} {revision}".encode()).hexdigest()

    def folder(self, name: str, revision: str) -> Path | None:
        for (model, branch), folder in self.models.items():
            if model == name and revision in (branch, self.commit(name, branch)):
                return folder
        return None


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.partition("?")[0]
        for word, (status, code) in self.server.refusal.items():
            if word in path:
                return self.answer(status, b"", {"X-Error-Code": code})
        match path.strip("/").split("/"):
            case ["api", "models", org, name, ("revision" | "tree") as what, revision]:
                self.describe(f"{org}/{name}", what, revision)
            case [org, name, "resolve", revision, *file]:
                self.send(f"{org}/{name}", revision, "/".join(file))
            case _:
                self.answer(404, b"", {})

    def describe(self, name, what, revision):
        server = self.server
        if not any(model == name for model, _ in server.models):
            return self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})
        folder = server.folder(name, revision)
        if folder is None:
            return self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        files = [
            {
                "type": "file", "path": path.relative_to(folder).as_posix(), "oid": etag(path),
                "size": path.stat().st_size,
            }
            for path in paths
        ]  # fmt: skip
        info = {"id": name, "sha": server.commit(name, revision), "siblings": []}
        content = json.dumps(info if what == "revision" else files).encode()
        self.answer(200, content, {"Content-Type": "application/json"})

    def send(self, name, revision, file):
        path = self.server.folder(name, revision) / file
        if self.command == "GET":
            self.server.downloaded.add(file)
        headers = {"ETag": f'"{etag(path)}"', "X-Repo-Commit": revision}
        self.answer(200, path.read_bytes(), headers)

    def answer(self, status, content, headers):
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


def etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache of huggingface_hub, offline."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    assert huggingface_hub.constants.is_offline_mode()
    return tmp_path / "cache"


@pytest.fixture
def online(cache, monkeypatch):
    """A hub that can be reached."""
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        address = f"http://127.0.0.1:{server.server_port}"
        constants = huggingface_hub.constants
        monkeypatch.setattr(constants, "ENDPOINT", address)
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE
        template = address + template[template.index("/{repo_id}") :]
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def cluttered(torch_folder, tmp_path_factory):
    """A model as the hub has them, with all that nobody here needs. Read only."""
    folder = shutil.copytree(torch_folder, tmp_path_factory.mktemp("cluttered") / "model")
    for part, stem in (("unet", STEM), ("vae", STEM), ("text_encoder", "model")):
        plain = folder / part / f"{stem}.safetensors"
        shutil.copyfile(plain, plain.with_name(f"{stem}.fp16.safetensors"))
        for name in (f"{stem}.bin", f"{stem}.fp16.bin", f"{stem}.onnx"):
            (folder / part / name).write_bytes(b"never fetched")
        flax = {"model": "flax_model"}.get(stem, "diffusion_flax_model")
        (folder / part / f"{flax}.msgpack").write_bytes(b"never fetched")
    (folder / "unet" / f"{STEM}.non_ema.safetensors").write_bytes(b"never fetched")
    (folder / "safety_checker").mkdir()
    (folder / "safety_checker" / "model.safetensors").write_bytes(b"never fetched")
    for name in ("v1-5-pruned.ckpt", "v1-5-pruned.safetensors", "README.md"):
        (folder / name).write_bytes(b"never fetched")
    return folder


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def assert_same_model(one: Path, other: Path):
    ours, theirs = (
        [getattr(pretrained.read(f), part).params for part in PARTS] for f in (one, other)
    )
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def refusal(name=NAME, revision="", variant=None) -> str:
    with pytest.raises(UserError) as caught:
        hub.locate(name, revision, variant)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_fetches_what_diffusers_reads_and_no_more(online, cluttered, torch_folder, capfd):
    online.models[NAME, "main"] = cluttered
    capfd.readouterr()
    found = hub.locate(NAME)
    assert capfd.readouterr().err == ""  # no bar where nobody looks
    assert files(found) == files(torch_folder) == online.downloaded
    assert_same_model(found, torch_folder)
    diffusers.StableDiffusionPipeline.from_pretrained(found, safety_checker=None)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_shows_how_far_it_is(online, torch_folder, monkeypatch):
    online.models[NAME, "main"] = torch_folder
    monkeypatch.setattr(sys, "stderr", Terminal())
    hub.locate(NAME)
    assert re.search(r"Fetching \d+ files: 100%\|.*\[\d\d:\d\d<00:00", sys.stderr.getvalue())


def test_fetches_the_variant_alone(online, cluttered, torch_folder):
    online.models[NAME, "main"] = cluttered
    found = hub.locate(NAME, variant="fp16")
    plain = {name for name in files(torch_folder) if name.endswith(".safetensors")}
    variant = {name.replace(".safetensors", ".fp16.safetensors") for name in plain}
    assert files(found) == files(torch_folder) - plain | variant
    pretrained.read(found, variant="fp16")


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_fetches_shards(online, pipeline, torch_folder, tmp_path, variant):
    model = shutil.copytree(torch_folder, tmp_path / "model")
    (model / "unet" / f"{STEM}.safetensors").unlink()
    for each in (None, "fp16"):
        pipeline.unet.save_pretrained(model / "unet", max_shard_size="30KB", variant=each)
    # As diffusers called the variant's shards before 0.28.
    (model / "unet" / f"{STEM}-00001-of-00002.fp16.safetensors").write_bytes(b"old")
    online.models[NAME, "main"] = model
    if variant is not None:
        for part, stem in (("vae", STEM), ("text_encoder", "model")):
            path = model / part / f"{stem}.safetensors"
            path.rename(path.with_name(f"{stem}.fp16.safetensors"))
    found = hub.locate(NAME, variant=variant)
    assert pretrained.read(found, variant=variant).unet.params["conv_in"]
    weights = [path.name for path in (found / "unet").glob("*.safetensors")]
    assert len(weights) > 2 and all(("fp16" in name) == (variant == "fp16") for name in weights)


def test_fetches_msgpack_where_there_are_no_safetensors(online, cluttered, tmp_path):
    model = shutil.copytree(cluttered, tmp_path / "model")
    for part in ("unet", "vae"):
        (model / part / f"{STEM}.safetensors").unlink()
    online.models |= {(NAME, "main"): cluttered, (NAME, "flax"): model}
    found = hub.locate(NAME, "flax")
    weights = {name for name in files(found) if not name.endswith((".json", ".txt"))}
    assert weights == {
        "unet/diffusion_flax_model.msgpack", "vae/diffusion_flax_model.msgpack",
        "text_encoder/model.safetensors",
    }  # fmt: skip
    assert found.name == online.commit(NAME, "flax")


def test_a_model_of_pickles_is_refused(online, cluttered, tmp_path):
    model = shutil.copytree(cluttered, tmp_path / "model")
    for suffix in ("safetensors", "msgpack"):
        for path in (model / "vae").glob(f"*.{suffix}"):
            path.unlink()
    online.models[NAME, "main"] = model
    assert "org/name, revision main, has no safetensors or Flax msgpack for its vae" in refusal()
    assert "has no fp16 safetensors for its vae" in refusal(variant="fp16")
    assert not [name for name in online.downloaded if name.endswith(".bin")]


def test_what_was_fetched_is_found_again_offline(online, cluttered, monkeypatch):
    online.models |= {(NAME, "main"): cluttered, (NAME, "v2"): cluttered}
    found = hub.locate(NAME, "v2")
    online.downloaded.clear()
    assert hub.locate(NAME, "v2") == found and not online.downloaded
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert hub.locate(NAME, "v2") == found
    assert "revision main; HF_HUB_OFFLINE is set" in refusal()
    assert "HF_HUB_OFFLINE is set" in refusal(revision="v2", variant="fp16")


def by_hand(cache: Path, folder: Path, revision: str) -> Path:
    """Puts a folder into the cache as the hub's documentation lays it out."""
    root, commit = cache / "models--org--name", hashlib.sha1(revision.encode()).hexdigest()
    for name in files(folder):
        blob = root / "blobs" / etag(folder / name)
        blob.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / name, blob)
        link = root / "snapshots" / commit / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
    (root / "refs").mkdir(exist_ok=True)
    (root / "refs" / revision).write_text(commit)
    return root / "snapshots" / commit


def test_a_cache_made_by_hand(cache, torch_folder):
    main = by_hand(cache, torch_folder, "main")
    other = by_hand(cache, torch_folder, "other")
    assert hub.locate(NAME) == hub.locate(NAME, "main") == hub.locate(NAME, main.name) == main
    assert hub.locate(NAME, "other") == hub.locate(NAME, other.name) == other
    assert_same_model(main, torch_folder)
    assert "revision none; HF_HUB_OFFLINE is set" in refusal(revision="none")
    message = refusal(variant="fp16")
    assert "no fp16 safetensors for its unet" in message and "HF_HUB_OFFLINE" in message


def test_an_empty_cache_offline(cache):
    message = refusal()
    assert "no folder org/name" in message
    assert "HF_HUB_OFFLINE is set, so unset it once" in message


@pytest.mark.parametrize(
    ("word", "status", "code", "said"),
    [
        ("/api/", 404, "RepoNotFound", "nor is there such a model on the hub"),
        ("/api/", 401, "", "the hub refuses org/name ("),
        ("/api/", 500, "", "the hub refuses org/name ("),
        ("/resolve/", 403, "GatedRepo", "ask: do so on https://huggingface.co/org/name, then run"),
        ("/resolve/", 401, "GatedRepo", "ask: do so on https://huggingface.co/org/name, then run"),
        ("/api/", 403, "", "the hub refuses org/name (403 Forbidden"),
        ("/api/", 404, "RevisionNotFound", "has no revision 'v9'; choose one of"),
        ("/resolve/", 404, "EntryNotFound", "the hub refuses org/name (404"),
    ],
)
def test_refusals_of_the_hub(online, cluttered, word, status, code, said):
    online.models[NAME, "v9"] = cluttered
    online.refusal[word] = (status, code)
    assert said in refusal(revision="v9")


def test_a_hub_that_cannot_be_reached(online):
    online.shutdown()
    online.server_close()
    message = refusal()
    assert "no folder org/name" in message and "the hub cannot be reached" in message


def test_a_full_disk_is_told(online, cluttered, monkeypatch):
    online.models[NAME, "main"] = cluttered

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    assert "cannot download org/name ([Errno 28] No space left on device)" in refusal()


def test_folders_go_first_and_have_no_revision(torch_folder, tmp_path):
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "name").symlink_to(torch_folder)
    with contextlib.chdir(tmp_path):
        assert hub.locate(NAME) == Path(NAME)
        assert "revision 'v1' is for models of the hub, and org/name is none" in refusal(
            revision="v1"
        )


@pytest.mark.parametrize("name", ["/no/such", "name", "a/b/c", "./org/name", "~/name"])
def test_other_paths_are_left_to_the_reader(name):
    assert hub.locate(name) == Path(name)


@pytest.mark.parametrize("name", ["org/na--me", "org/name.git", "org/a..b"])
def test_names_that_the_hub_does_not_give(cache, name):
    assert f"there is no folder {name}, and no model of the hub is called so" in refusal(name)

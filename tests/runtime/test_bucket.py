"""Run folders in a bucket: what is copied when, and what goes wrong, on an emulated bucket."""

import contextlib
import io
import itertools
import pathlib
import re
import socket
import sys
import tempfile

import fsspec
import pytest
from etils import epath

import slam_jax.runtime
from slam_jax.errors import UserError
from slam_jax.runtime import bucket, checkpoint, gcs

_NAMES = itertools.count()


@pytest.fixture
def run(cloud, tmp_path, monkeypatch):
    """The name of a run folder that nobody uses yet."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield f"gs://bucket/run{next(_NAMES)}"
    cloud.writes_left = None


def _objects(name):
    """Name below the folder -> content, read by another library than the one that wrote."""
    there = fsspec.filesystem("gs", use_listings_cache=False, skip_instance_cache=True)
    start = f"{name}/".removeprefix("gs://")
    return {path.removeprefix(start): there.cat(path) for path in there.find(start)}


def _write(folder, **files):
    for name, text in files.items():
        path = folder / name.replace("__", "/").replace("_json", ".json")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_a_local_folder_is_taken_as_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with bucket.mirrored("runs/a") as where:
        assert str(where.local) == where.name == "runs/a"
        assert where.checkpoints == epath.Path(tmp_path / "runs" / "a" / "checkpoints")
        where.push()
    assert bucket.reached("workdir", "runs/a") == epath.Path(tmp_path / "runs" / "a")
    assert not list(tmp_path.iterdir())


def test_what_changed_is_copied_and_comes_back(run):
    with bucket.mirrored(f"{run}/") as where:
        assert where.name == run and str(where.checkpoints) == f"{run}/checkpoints"
        _write(where.local, config_json="1", samples__a="2", student__unet__weights="3")
        _write(where.local, metrics="old", **{".half": "4", ".student.partial__weights": "5"})
        assert not _objects(run)
        where.push()
        expected = {"config.json": b"1", "samples/a": b"2", "student/unet/weights": b"3"}
        assert _objects(run) == expected | {"metrics": b"old"}
        _write(where.local, metrics="newer")
    assert _objects(run) == expected | {"metrics": b"newer"}
    assert not where.local.exists()
    # A run goes on from the files of its folder, not from those in folders of it, nor from what
    # another host is about to remove.
    fsspec.filesystem("gs").pipe(f"{run}/.probe-of-another", b"")
    with bucket.mirrored(run) as where:
        found = {p.relative_to(where.local).as_posix() for p in where.local.rglob("*")}
        assert found == {"config.json", "metrics"}
        assert (where.local / "metrics").read_text() == "newer"


def test_only_what_changed_is_copied(run, cloud):
    with bucket.mirrored(run) as where:
        _write(where.local, config_json="1", student__weights="2")
        where.push()
        cloud.writes_left = 1
        _write(where.local, metrics="3")
        where.push()
        cloud.writes_left = 0  # nothing is left to be written
    assert _objects(run) == {"config.json": b"1", "student/weights": b"2", "metrics": b"3"}
    cloud.writes_left = 2
    with bucket.mirrored(run):
        """Only tried whether it can write: what came from the bucket needs not go back."""


def test_large_files_arrive_whole(run):
    """Over 8 MB Google's library sends them in pieces."""
    content = bytes(range(256)) * 2**16
    with bucket.mirrored(run) as where:
        (where.local / "weights").write_bytes(content)
    assert _objects(run) == {"weights": content}


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_shows_what_is_copied_here(run, capfd, monkeypatch):
    with bucket.mirrored(run) as where:
        _write(where.local, weights="x" * 3000)
    monkeypatch.setattr(bucket, "_SEEN_AFTER_S", 0.0)
    with bucket.copied("model", run):
        assert capfd.readouterr().err == ""
    monkeypatch.setattr(sys, "stderr", Terminal())
    with bucket.copied("model", run):
        assert re.search(r"downloading: 100%\|.* 3.00k/3.00k \[00:0", sys.stderr.getvalue())


def test_a_model_folder_is_never_seen_in_part(run, cloud, capfd):
    """Cut off after each number of requests: an index stands for files of its own version alone."""
    files = ("student__model_index_json", "student__unet__weights", "student__vae__weights")
    with bucket.mirrored(run) as where:
        _write(where.local, **dict.fromkeys(files, "0"))
    seen = []
    for version in range(1, 7):
        ends = pytest.raises(UserError) if version < 5 else contextlib.nullcontext()
        with ends, bucket.mirrored(run) as where:
            _write(where.local, **dict.fromkeys(files, f"{version}"))
            cloud.writes_left = version - 1
        cloud.writes_left = None
        found = _objects(run)
        whole = "student/model_index.json" in found
        seen.append(whole)
        assert not whole or len(set(found.values())) == 1
    assert seen == [True, False, False, False, True, True]


def test_a_checkpoint_of_another_host_is_found_and_a_half_written_one_is_not(run):
    with bucket.mirrored(run) as where:
        assert checkpoint.latest(where.checkpoints) is None
        for step in (8, 9, 10):
            _write(where.local, **{f"checkpoints__{step}__default__manifest": ""})
            where.push()
            assert checkpoint.latest(where.checkpoints) == (None if step == 8 else step - 1)
            _write(where.local, **{f"checkpoints__{step}__commit_success.txt": ""})
            where.push()
            assert checkpoint.latest(where.checkpoints) == step


def test_a_copy_that_fails_is_made_later(run, cloud, capfd):
    with bucket.mirrored(run) as where:
        _write(where.local, a="1", b="2")
        cloud.writes_left = 1
        where.push()
        warning = f"warning: cannot copy b to {run}/: You may not write. (403); this is tried again"
        assert capfd.readouterr().err == f"{warning}\n"
        assert _objects(run) == {"a": b"1"}
        cloud.writes_left = None
        where.push()
        assert _objects(run) == {"a": b"1", "b": b"2"} and not capfd.readouterr().err


def test_what_was_not_copied_at_the_end_is_kept_here(run, cloud, capfd):
    with pytest.raises(UserError) as caught, bucket.mirrored(run) as where:
        _write(where.local, a="1")
        cloud.writes_left = 0
    message = f"cannot copy a to {run}/: You may not write. (403); what is missing there is kept in"
    assert str(caught.value).startswith(f"{message} {where.local}: copy it from there, or run")
    assert (where.local / "a").read_text() == "1"
    # What ended the program matters more, and is not replaced.
    cloud.writes_left = None
    with pytest.raises(ZeroDivisionError), bucket.mirrored(run) as where:
        _write(where.local, a="1")
        cloud.writes_left = 0
        raise ZeroDivisionError
    assert capfd.readouterr().err == f"warning: {message} {where.local}: copy it from there\n"


def test_whatever_ends_a_run_its_files_are_copied_and_errors_name_the_bucket(run):
    bad = pytest.raises(UserError, match=f"^{run}/config.json is bad$")
    with bad, bucket.mirrored(run) as where:
        _write(where.local, a="1")
        raise UserError(f"{where.local / 'config.json'} is bad")
    with pytest.raises(KeyboardInterrupt), bucket.mirrored(run) as where:
        _write(where.local, b="2")
        raise KeyboardInterrupt
    assert _objects(run) == {"a": b"1", "b": b"2"} and not where.local.exists()


def _refused(name):
    with pytest.raises(UserError) as caught, bucket.mirrored(name):
        raise AssertionError("never gets here")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_bucket_that_cannot_be_used_is_said_at_once(run, cloud, tmp_path):
    assert re.match(
        "cannot use --workdir gs://nosuch/run: .*404.*; check", _refused("gs://nosuch/run")
    )
    cloud.writes_left = 0
    said = _refused(run)
    assert said.startswith(f"cannot use --workdir {run}: You may not write. (403); check the name")
    assert not list(tmp_path.iterdir())


def test_without_a_network_it_does_not_wait_for_ever(cloud, monkeypatch):
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{deaf.getsockname()[1]}")
        short = gcs.DEFAULT_RETRY.with_timeout(0.1)
        monkeypatch.setattr(gcs, "_PATIENCE", {"timeout": 1, "retry": short})
        assert "Connection refused" in _refused("gs://bucket/run")


@pytest.mark.parametrize(
    "name", ["s3://bucket/run", "gs://", "gs:/bucket/run", "gs:///run", "gs://Bucket/run",
             "gs://bucket/run/../other"],
)  # fmt: skip
def test_other_names_are_refused(name):
    assert _refused(name).startswith(f"--workdir {name} is neither gs://BUCKET/FOLDER nor")


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.delitem(sys.modules, "slam_jax.runtime.gcs", raising=False)
    monkeypatch.delattr(slam_jax.runtime, "gcs", raising=False)
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    said = _refused("gs://bucket/run")
    assert said == "--workdir gs://bucket/run needs the package gcsfs; pip install 'slam_jax[gcs]'"


def test_without_credentials_the_line_says_how_to_get_them(monkeypatch, tmp_path):
    monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path))
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    assert "credentials were not found. To set up " in _refused("gs://bucket/run")


def test_a_model_folder_comes_with_all_that_is_in_it(run):
    with bucket.mirrored(run) as where:
        _write(where.local, student__model_index_json="0", student__unet__weights="1", other="2")
    with bucket.copied("model", f"{run}/student") as name:
        folder = pathlib.Path(name)
        assert (folder / "unet" / "weights").read_text() == "1"
        assert (folder / "model_index.json").exists() and len(list(folder.iterdir())) == 2
    assert not folder.exists()
    bad = pytest.raises(UserError, match=f"^{run}/student/unet is bad$")
    with bad, bucket.copied("model", f"{run}/student") as name:
        raise UserError(f"{name}/unet is bad")
    none = pytest.raises(UserError, match=f"--model {run}/studnt holds no files")
    with none, bucket.copied("model", f"{run}/studnt"):
        """Never gets here."""
    with bucket.copied("model", "org/name") as name:
        assert name == "org/name"

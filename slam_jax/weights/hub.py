"""Models of the Hugging Face hub, fetched into its library's own cache and read from there.

The library's environment variables hold: HF_HOME, HF_TOKEN, HF_HUB_OFFLINE and so on.
"""

import contextlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from slam_jax.errors import UserError
from slam_jax.weights import folder as folders
from slam_jax.weights import pretrained

_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")

# All of a model folder but its weights.
_DESCRIPTIONS = [
    "model_index.json", "scheduler/scheduler_config.json",
    *(
        f"{tokenizer}/{file}.{suffix}"
        for tokenizer in ("tokenizer", "tokenizer_2")
        for file, suffix in (
            ("vocab", "json"), ("merges", "txt"), ("tokenizer", "json"),
            ("tokenizer_config", "json"), ("special_tokens_map", "json"),
        )
    ),
]  # fmt: skip
# Networks, and how their files of weights are called.
_STEMS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
}


def find(model: str, revision: str, variant: str, config: str) -> pretrained.Pretrained:
    """The model of that name, checked, its parameters still unread: for pretrained.load.

    model: a folder in diffusers' layout, ORG/NAME on the hub, or a single .safetensors file; for
    the last, config is a folder or ORG/NAME with what such a file lacks. "" means none.
    """
    return pretrained.find(
        locate(model, revision, variant or None),
        variant=variant or None,
        config=locate(config) if config else None,
    )


def locate(model: str, revision: str = "", variant: str | None = None) -> Path:
    """The folder of `model`: it itself, or where that model of the hub was fetched to.

    Raises UserError for a folder with a revision, and as `fetch` does.
    """
    path = Path(model)
    if _ID.fullmatch(model) and not path.exists():
        return fetch(model, revision, variant)
    if revision:
        raise UserError(
            f"revision {revision!r} is for models of the hub, and {model} is none; leave it out"
        )
    return path


def locate_configs(model: str, revision: str = "") -> Path:
    """The same for who needs no weights: of a model of the hub only configs and tokenizer come."""
    configs = [f"{part}/config.json" for part in _STEMS]
    return locate_files(model, revision, [*_DESCRIPTIONS, *configs])


def locate_files(model: str, revision: str, patterns: list[str]) -> Path:
    """The same, but of a model of the hub come the files of those patterns, if there are any."""
    path = Path(model)
    if not _ID.fullmatch(model) or path.exists():
        return locate(model, revision)
    return _snapshot(model, revision, patterns)


def fetch(name: str, revision: str = "", variant: str | None = None) -> Path:
    """The folder of model ORG/NAME in the hub's cache, what it lacked downloaded, with progress.

    revision: branch, tag or commit, "" for main. Fetches configs, tokenizer, and of each network
    the safetensors of that variant, or, where there are none and no variant is asked for, Flax's
    msgpack. UserError, with the remedy, if that cannot be had.
    """
    configs = [f"{part}/config.json" for part in _STEMS]
    weights = {part: _safetensors(part, variant) for part in _STEMS}
    root = _snapshot(name, revision, [*_DESCRIPTIONS, *configs, *sum(weights.values(), [])])
    lacking = _lacking(root, weights)
    if lacking and variant is None:
        weights = {part: [f"{part}/{folders.FLAX_STEMS[_STEMS[part]]}.msgpack"] for part in lacking}
        # The folder is called by its commit.
        _snapshot(name, root.name, sum(weights.values(), []))
        lacking = _lacking(root, weights)
    if lacking:
        kind = "safetensors or Flax msgpack" if variant is None else f"{variant} safetensors"
        raise UserError(
            f"{name}, revision {revision or 'main'}, has no {kind} for its {lacking[0]}, or the "
            "cache has none and HF_HUB_OFFLINE is set; choose another variant or revision (a "
            "pickle, .bin, is never fetched: convert it with diffusers' save_pretrained)"
        )
    return root


def _snapshot(name: str, revision: str, patterns: list[str]) -> Path:
    """The model's folder in the cache, the files of those patterns downloaded if need be."""
    # Imported here, since it takes a fifth of a second and most models are folders.
    import huggingface_hub
    from huggingface_hub import errors

    page = f"https://huggingface.co/{name}"
    try:
        with _bars_on_a_terminal():
            found = huggingface_hub.snapshot_download(
                name, revision=revision or None, allow_patterns=patterns
            )
    except errors.GatedRepoError:
        problem = f"{name} is for those who ask: do so on {page}, then run `hf auth login`"
    except errors.RepositoryNotFoundError:
        problem = (
            f"there is no folder {name}, nor is there such a model on the hub, unless it is "
            "private; correct the name, or run `hf auth login`"
        )
    except errors.RevisionNotFoundError:
        problem = f"{name} has no revision {revision!r}; choose one of {page}/tree/main"
    except errors.HFValidationError as error:
        problem = f"there is no folder {name}, and no model of the hub is called so: {error}"
    except errors.LocalEntryNotFoundError as error:
        problem = _unreachable(name, revision, error.__cause__)
    except errors.HfHubHTTPError as error:
        problem = _refused(name, error)
    # HTTPError: the base of all that goes wrong in a connection.
    except (errors.HTTPError, OSError) as error:
        problem = f"cannot download {name} ({error}); run again: what has come so far is kept"
    else:
        return Path(found)
    raise UserError(" ".join(problem.split()))


@contextlib.contextmanager
def _bars_on_a_terminal() -> Iterator[None]:
    """Where nobody looks, the library would draw one of its bars all the same."""
    from huggingface_hub import utils

    if sys.stderr.isatty() or utils.are_progress_bars_disabled():
        yield
        return
    utils.disable_progress_bars()
    try:
        yield
    finally:
        utils.enable_progress_bars()


def _unreachable(name: str, revision: str, cause: BaseException | None) -> str:
    """Why files that the cache lacks could not be fetched, and what to do."""
    from huggingface_hub import errors

    lacking = (
        f"there is no folder {name}, and the hub's cache lacks files of a model {name}, "
        f"revision {revision or 'main'}"
    )
    if isinstance(cause, errors.OfflineModeIsEnabled):
        return f"{lacking}; HF_HUB_OFFLINE is set, so unset it once to fetch them"
    if isinstance(cause, errors.HfHubHTTPError):
        return f"{lacking}; {_refused(name, cause)}"
    return f"{lacking}, and the hub cannot be reached ({cause}); connect, or give a folder"


def _refused(name: str, error: OSError) -> str:
    """The hub's own words without advice on HTTP, and what to do."""
    words = str(error).partition("For more information")[0]
    return f"the hub refuses {name} ({words}); see `hf auth whoami`, or run again later"


def _safetensors(part: str, variant: str | None) -> list[str]:
    """Patterns of the weights in one file, in shards, and of the shards' index."""
    stem, suffix = f"{part}/{_STEMS[part]}", "safetensors"
    dotted = "" if variant is None else f".{variant}"
    shard = "-?????-of-?????"
    return [
        f"{stem}{dotted}.{suffix}", f"{stem}.{suffix}.index{dotted}.json",
        f"{stem}{dotted}{shard}.{suffix}", f"{stem}{shard}{dotted}.{suffix}",
    ]  # fmt: skip


def _lacking(root: Path, weights: dict[str, list[str]]) -> list[str]:
    """The networks without any of their files of weights."""
    return [
        part
        for part, patterns in weights.items()
        if (root / part).is_dir() and not any(any(root.glob(pattern)) for pattern in patterns)
    ]

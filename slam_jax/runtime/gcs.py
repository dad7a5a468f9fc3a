"""Folders in Google Cloud Storage. Whatever goes wrong there is an OSError with one line.

Imported only where a name starts with gs://, since its packages come with the extra `gcs`.
"""

import contextlib
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import fsspec
import gcsfs
import requests
from google.api_core.exceptions import GoogleAPICallError, GoogleAPIError, NotFound
from google.auth.exceptions import GoogleAuthError
from google.cloud import storage
from google.cloud.storage.exceptions import DataCorruption
from google.cloud.storage.retry import DEFAULT_RETRY

# A request that fails is repeated for so long, and the program waits. Seconds.
_PATIENCE = {"timeout": (10, 60), "retry": DEFAULT_RETRY.with_timeout(30)}


class Folder(NamedTuple):
    """All objects whose names start with the prefix, which is "" or ends with a slash."""

    bucket: storage.Bucket
    prefix: str

    def check_writable(self) -> None:
        """Makes an object, which is removed again."""
        name = f".probe-{uuid.uuid4().hex}"
        with _one_line():
            self._blob(name).upload_from_string(b"", **_PATIENCE)
        self.remove(name)

    def sizes(self, *, nested: bool) -> dict[str, int]:
        """Names below the folder's -> bytes; nested: "unet/config.json" too, in a folder in it.

        Those that start with a dot are left out: other hosts' probes come and go.
        """
        delimiter = None if nested else "/"
        with _one_line():
            blobs = self.bucket.list_blobs(prefix=self.prefix, delimiter=delimiter, **_PATIENCE)
            found = {blob.name.removeprefix(self.prefix): blob.size for blob in blobs}
        # Consoles make empty objects that stand for folders.
        return {
            name: size
            for name, size in found.items()
            if name and not name.startswith(".") and name[-1] != "/"
        }

    def get(self, name: str, path: Path) -> None:
        """Copies an object to a file, in a folder that is made if need be."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with _one_line():
            self._blob(name).download_to_filename(path, **_PATIENCE)

    def put(self, name: str, path: Path) -> None:
        """Copies a file to an object, which changes at once, when all has arrived."""
        with _one_line():
            self._blob(name).upload_from_filename(path, **_PATIENCE)

    def remove(self, name: str) -> None:
        """Removes the object, if there is one."""
        with _one_line(), contextlib.suppress(NotFound):
            self._blob(name).delete(**_PATIENCE)

    def _blob(self, name: str) -> storage.Blob:
        return self.bucket.blob(self.prefix + name)


def opened(bucket: str, path: str) -> Folder:
    """The folder, which need not exist yet. OSError if the bucket does not, or shuts us out."""
    # Orbax lists folders through gcsfs, which would never see what another host adds later.
    for protocol in gcsfs.GCSFileSystem.protocol:
        fsspec.config.conf.setdefault(protocol, {})["use_listings_cache"] = False
    with _one_line():
        return Folder(storage.Client().get_bucket(bucket, **_PATIENCE), path and f"{path}/")


@contextlib.contextmanager
def _one_line() -> Iterator[None]:
    try:
        yield
    except (OSError, GoogleAPIError, GoogleAuthError, DataCorruption) as error:
        raise OSError(" ".join(_reason(error).split())) from None


def _reason(error: Exception) -> str:
    """The service's own words, where an error has them among much else."""
    match error:
        case GoogleAPICallError(code=code, response=requests.Response() as response):
            with contextlib.suppress(ValueError, KeyError, TypeError):
                return f"{response.json()['error']['message']} ({code:d})"
    return str(error)

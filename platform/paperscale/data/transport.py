"""Requests to the server that holds a set: parts of its shards over HTTP, S3 and whatever fsspec knows.

A request either gives exactly the bytes asked for, of the version of the file that was asked for, or it is an error:
:class:`Transient` where another attempt may succeed, else a :class:`RemoteError`.
"""

from __future__ import annotations

import base64
import netrc
import re
import socket
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from paperscale import __version__
from paperscale.data.faults import RemoteError

if TYPE_CHECKING:
    from urllib3 import BaseHTTPResponse

T = TypeVar("T")
_CHUNK = 128 << 10
_CONNECTIONS = 32


class Version(NamedTuple):
    """Which content a name stands for.

    Attributes:
        size: bytes.
        tag: what the server tells two contents apart by (ETag, else the time of the last change), or nothing.
    """

    size: int
    tag: str


class Transient(Exception):
    """A request that failed for a reason that may pass.

    Args:
        reason: what happened.
        fix: what to do where it does not pass.
        wait_s: the seconds after which the server wants to be asked again.
    """

    def __init__(self, reason: str, fix: str, wait_s: float = 0):
        super().__init__(reason)
        self.fix, self.wait_s = fix, wait_s


class Missing(RemoteError, FileNotFoundError):
    """There is no such file on the server."""

    def __init__(self, url: str):
        super().__init__(url)
        self.filename = url

    def __str__(self) -> str:
        return (
            f"{self.filename} is not there; check data.path (manifest.json, the shards and their .idx files belong "
            "into one folder), and copy what is missing to it"
        )


class Replaced(RemoteError):
    """The file on the server is not the one that was opened."""

    def __str__(self) -> str:
        return (
            f"{self.args[0]} was replaced on the server while this run was reading it; start the run again, and write "
            "a changed set to a new folder: runs that read the old one then go on"
        )


class Transport(Protocol):
    """A folder on a server. Every method raises :class:`Transient` and :class:`RemoteError`."""

    def url(self, name: str) -> str:
        """Return what to call a file in a message: its URL without credentials."""

    def stat(self, name: str) -> Version:
        """Return a file's version."""

    def stream(self, name: str, version: Version, offset: int, size: int) -> Iterator[bytes]:
        """Yield ``size`` bytes at ``offset`` of this version of the file, in pieces."""

    def whole(self, name: str, tag: str) -> tuple[str, bytes | None]:
        """Return a small file's tag and its content, ``None`` where its tag is still ``tag``."""


def connect(url: str, timeout_s: float) -> Transport:
    """Return the transport of a URL.

    Args:
        url: address of the folder.
        timeout_s: the longest that one request may take.

    Raises:
        RemoteError: fsspec does not know the protocol, or needs a package for it.
    """
    kind = HttpTransport if urlsplit(url).scheme in ("http", "https") else FsspecTransport
    return kind(url, timeout_s)


def shown(url: str, name: str = "") -> str:
    """Return the URL of a file in the folder ``url``, without what may be secret in it."""
    parts = urlsplit(url)
    path = "/".join(filter(None, (parts.path.rstrip("/"), name)))
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], path, "", ""))


def _denied(url: str, reason: object) -> RemoteError:
    return RemoteError(
        f"{url}: access denied ({reason}), or not there; check data.path, that the file may be read, and the "
        "credentials on this node (~/.netrc for https, the AWS profile or environment for s3)"
    )


class HttpTransport:
    """A folder on a web server that answers Range requests.

    Args:
        url: may hold a user and a password, and a query that is sent along with each request; without a password
            ``~/.netrc`` is asked. Proxies are those of the environment.
        timeout_s: the longest that one request may take.
    """

    def __init__(self, url: str, timeout_s: float):
        self._url = url
        self._parts = urlsplit(url)
        try:
            complete = bool(self._parts.hostname) and self._parts.port != 0
        except ValueError:  # the port is no number
            complete = False
        if not complete:
            raise RemoteError(f"data.path: '{shown(url)}' is no address; write it as https://host/folder")
        self._timeout_s = timeout_s
        self._headers = {"User-Agent": f"paperscale/{__version__}", "Accept-Encoding": "identity", **self._login()}
        self._pool = self._make_pool()

    def url(self, name: str) -> str:
        """Return the URL without password and query."""
        return shown(self._url, name)

    def stat(self, name: str) -> Version:
        """Ask for one byte: shows the size, the tag, and whether the server can give ranges at all."""
        response = self._get(name, {"Range": "bytes=0-0"})
        version, _, _ = self._version(name, response)
        response.drain_conn()
        return version

    def stream(self, name: str, version: Version, offset: int, size: int) -> Iterator[bytes]:
        """Yield the bytes as they arrive."""
        deadline = time.monotonic() + self._timeout_s
        response = self._get(name, {"Range": f"bytes={offset}-{offset + size - 1}"})
        found, start, stop = self._version(name, response)
        if found.size != version.size or (found.tag and version.tag and found.tag != version.tag):
            response.close()
            raise Replaced(self.url(name))
        if (start, stop) != (offset, offset + size):
            response.close()
            raise Transient(f"bytes {start}-{stop} came for {offset}-{offset + size}", "check the server's log")
        yield from self._body(response, deadline)

    def whole(self, name: str, tag: str) -> tuple[str, bytes | None]:
        """Ask for a file unless it is still the same."""
        deadline = time.monotonic() + self._timeout_s
        known = {"If-None-Match" if tag.lstrip("W/").startswith('"') else "If-Modified-Since": tag} if tag else {}
        response = self._get(name, known)
        if response.status == 304:
            response.drain_conn()
            return tag, None
        return _tag(response), b"".join(self._body(response, deadline))

    def _body(self, response: BaseHTTPResponse, deadline: float) -> Iterator[bytes]:
        try:
            while chunk := self._guarded(lambda: response.read1(_CHUNK)):
                yield chunk
                if time.monotonic() > deadline:  # a server that trickles never runs into the socket's timeout
                    raise _too_slow(self._timeout_s)
        finally:
            if response.length_remaining:  # the connection cannot be used again before the rest is read
                response.close()
            response.release_conn()

    def _version(self, name: str, response: BaseHTTPResponse) -> tuple[Version, int, int]:
        """Return which version an answer to a Range request is of, where it starts and where it stops."""
        empty = {200: ("Content-Length", "0"), 416: ("Content-Range", "bytes */0")}.get(response.status)
        if empty and response.headers.get(empty[0]) == empty[1]:
            return Version(0, _tag(response)), 0, 0
        if response.status == 416:
            raise Replaced(self.url(name))  # it is shorter than it was
        fields = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", response.headers.get("Content-Range", ""))
        if response.status != 206 or not fields:
            response.close()
            raise RemoteError(
                f"{self.url(name)}: the server does not answer Range requests (status {response.status}); serve the "
                "set with one that does (nginx, Apache, S3), or copy it to a folder and set data.path to that"
            )
        return Version(int(fields[3]), _tag(response)), int(fields[1]), int(fields[2]) + 1

    def _get(self, name: str, headers: dict[str, str]) -> BaseHTTPResponse:
        parts = self._parts
        path = f"{parts.path.rstrip('/')}/{quote(name)}"
        url = urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], path, parts.query, ""))
        response = self._guarded(
            lambda: self._pool.request("GET", url, headers={**self._headers, **headers}, preload_content=False)
        )
        if response.status in (200, 206, 304, 416):
            return response
        response.close()
        if response.status in (404, 410):
            raise Missing(self.url(name))
        if response.status in (401, 403):
            raise _denied(self.url(name), response.status)
        if response.status in (408, 429) or response.status >= 500:
            after = response.headers.get("Retry-After", "")
            raise Transient(f"status {response.status}", "try again later", float(after) if after.isdigit() else 0)
        raise RemoteError(f"{self.url(name)}: the server answers with status {response.status}; check data.path")

    def _guarded(self, action: Callable[[], T]) -> T:
        """Turn a failed connection into :class:`Transient`."""
        from urllib3 import exceptions

        try:
            return action()
        except exceptions.HTTPError as error:
            cause = getattr(error, "reason", None) or error
            host = self._parts.hostname
            if isinstance(cause, exceptions.SSLError):
                fix = "set SSL_CERT_FILE to the certificates to trust"
                raise RemoteError(f"{self.url('')}: no trusted connection ({cause}); {fix}") from error
            if isinstance(cause, exceptions.NameResolutionError):
                fix = "check the host's name in data.path, and that this node can look up names"
                raise Transient(f"the host's name '{host}' is not known", fix) from error
            if isinstance(cause, exceptions.NewConnectionError):
                fix = "check the host and port in data.path, and that the server runs"
                raise Transient(f"no connection to '{host}' ({_last(cause)})", fix) from error
            if isinstance(cause, exceptions.TimeoutError):
                raise _too_slow(self._timeout_s) from error
            fix = "check the server's log"
            raise Transient(f"the connection broke ({_last(cause)})", fix) from error
        except OSError as error:
            raise Transient(f"the connection broke ({error})", "check the server's log") from error

    def _login(self) -> dict[str, str]:
        user, password = self._parts.username, self._parts.password
        if user is None:
            try:
                entry = netrc.netrc().authenticators(self._parts.hostname or "")
            except (OSError, netrc.NetrcParseError):
                entry = None
            if entry is None:
                return {}
            user, password = entry[0], entry[2]
        pair = f"{unquote(user)}:{unquote(password or '')}".encode()
        return {"Authorization": f"Basic {base64.b64encode(pair).decode()}"}

    def _make_pool(self) -> Any:
        from urllib3 import PoolManager, ProxyManager, Retry, Timeout, make_headers

        options: dict[str, Any] = {
            "maxsize": _CONNECTIONS,
            "retries": Retry(None, connect=0, read=0, status=0, other=0, redirect=5, respect_retry_after_header=False),
            "timeout": Timeout(connect=min(10, self._timeout_s), read=self._timeout_s),
        }
        host = self._parts.hostname or ""
        proxy = urllib.request.getproxies().get(self._parts.scheme)
        if not proxy or urllib.request.proxy_bypass(host):
            return PoolManager(**options)
        login = urlsplit(proxy).netloc.rpartition("@")[0]
        return ProxyManager(proxy, proxy_headers=make_headers(proxy_basic_auth=unquote(login) or None), **options)


def _tag(response: BaseHTTPResponse) -> str:
    return str(response.headers.get("ETag") or response.headers.get("Last-Modified") or "")


def _last(cause: object) -> str:
    """Return what the operating system said, without the objects that urllib3 names in front of it."""
    return str(cause).rpartition(": ")[2].strip("()'\"")


def _too_slow(timeout_s: float) -> Transient:
    return Transient(f"no complete answer in {timeout_s:g} s", "check the network between this node and the server")


class FsspecTransport:
    """A folder that fsspec reads, such as ``s3://bucket/set``; credentials are what fsspec's file system finds.

    Args:
        url: address of the folder.
        timeout_s: the longest that one request may take.
    """

    def __init__(self, url: str, timeout_s: float):
        from fsspec.core import url_to_fs  # type: ignore[import-untyped]

        self._url, self._timeout_s = url, timeout_s
        self._files: dict[str, tuple[Any, Version]] = {}
        protocol = urlsplit(url).scheme
        try:
            self._system, self._root = url_to_fs(url, use_listings_cache=False, skip_instance_cache=True)
        except ImportError as error:
            extra = "paperscale[s3]" if protocol in ("s3", "s3a") else f"fsspec[{protocol}]"
            raise RemoteError(f"{shown(url)}: {error}; pip install '{extra}'") from error
        except ValueError as error:
            raise RemoteError(f"{shown(url)}: {error}; set data.path to a folder, https://... or s3://...") from error

    def url(self, name: str) -> str:
        """Return the URL without user and query."""
        return shown(self._url, name)

    def stat(self, name: str) -> Version:
        """Open the file anew."""
        # The file's own _fetch_range, which every buffered file of fsspec implements, may be called from several
        # threads, and on S3 each of its requests is refused if the object is no longer the one that was opened.
        file = self._within(name, lambda: self._system.open(self._path(name), "rb", cache_type="none"))
        details = getattr(file, "details", None) or self._within(name, lambda: self._system.info(self._path(name)))
        version = Version(int(details["size"]), _change(details))
        self._files[name] = (file, version)
        return version

    def stream(self, name: str, version: Version, offset: int, size: int) -> Iterator[bytes]:
        """Yield the bytes in one piece."""
        if name not in self._files:
            self.stat(name)
        file, found = self._files[name]
        if found != version:
            raise Replaced(self.url(name))
        if hasattr(file, "_fetch_range"):
            yield self._within(name, lambda: file._fetch_range(offset, offset + size))
            return
        path = self._path(name)
        content = self._within(name, lambda: self._system.cat_file(path, start=offset, end=offset + size))
        if _change(self._within(name, lambda: self._system.info(path))) != version.tag:
            raise Replaced(self.url(name))
        yield content

    def whole(self, name: str, tag: str) -> tuple[str, bytes | None]:
        """Ask for a file unless it is still the same."""
        path = self._path(name)
        found = _change(self._within(name, lambda: self._system.info(path)))
        if tag and found == tag:
            return tag, None
        return found, self._within(name, lambda: self._system.cat_file(path))

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"

    def _within(self, name: str, action: Callable[[], T]) -> T:
        """Run a call of fsspec, which has no timeout of its own for every file system, for so long at the most."""
        results: list[T | Exception] = []

        def run() -> None:
            try:
                results.append(action())
            except Exception as error:
                results.append(error)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        thread.join(self._timeout_s)
        if not results:
            raise _too_slow(self._timeout_s)
        if isinstance(result := results[0], Exception):
            raise self._failure(name, result) from result
        return result

    def _failure(self, name: str, error: Exception) -> Exception:
        """Return what to raise for an error of fsspec or of the client below it."""
        kind = type(error).__name__
        if isinstance(error, FileNotFoundError):
            return Missing(self.url(name))
        if isinstance(error, PermissionError) or "Credentials" in kind or "Token" in kind:
            return _denied(self.url(name), error or kind)
        if kind == "FileExpired":  # of s3fs, which need not be installed
            return Replaced(self.url(name))
        if isinstance(error, socket.gaierror) or "Endpoint" in kind:
            return Transient(str(error), "check data.path, AWS_ENDPOINT_URL, and that this node has a network")
        return Transient(f"{kind}: {error}", "check the server, or try again later")


def _change(details: dict[str, Any]) -> str:
    """Return what tells the contents of a file apart, as far as its file system knows such a thing."""
    names = ("ETag", "etag", "e_tag", "generation", "mtime", "LastModified", "last_modified", "updated", "created")
    return next((str(details[name]) for name in names if details.get(name)), "")

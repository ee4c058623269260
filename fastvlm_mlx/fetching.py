"""Where a picture comes from: path, URL, data URI, bytes or file object -> a stream to decode.

http is spoken directly, because the address that is checked must be the address that is connected
to; sizes, times and redirects have limits.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import errno
import http.client
import io
import ipaddress
import os
import re
import socket
import ssl
import stat
import sys
import time
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import SplitResult, quote, unquote_to_bytes, urljoin, urlsplit
from urllib.request import url2pathname

from .errors import ImageError

__all__ = ["open_source", "permission_advice", "reason"]

_MAX_DOWNLOAD = 100_000_000
_MAX_REDIRECTS = 5
_SOCKET_SECONDS = 20.0
_FETCH_SECONDS = 60.0


def open_source(
    source: Any, allow_private_urls: bool, stack: contextlib.ExitStack
) -> tuple[BinaryIO, str]:
    """A seekable stream with something in it, and the name to call it by in messages."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _in_memory(bytes(source), "the image data")
    if isinstance(source, str):
        scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):", source)
        kind = scheme[1].lower() if scheme else ""
        if kind in ("http", "https"):
            return _in_memory(*_fetch(source, allow_private_urls))
        if kind == "data":
            return _in_memory(_decode_data_uri(source), "the data: URI")
        if kind == "file":
            source = _path_of_file_url(source)
        elif kind and source[len(kind) :].startswith("://"):
            raise ImageError(
                f"got a {kind}:// address, expected a path or an http, https, file or data URL: "
                "download the image first"
            )
    if isinstance(source, (str, os.PathLike)):
        return _open_file(os.fsdecode(source), stack)
    if hasattr(source, "read"):
        return _read_file_object(source)
    raise ImageError(
        f"got {type(source).__name__}, expected one image: a path, URL, bytes, binary file, "
        "PIL image, or NumPy or MLX array"
    )


def _in_memory(data: bytes, name: str) -> tuple[BinaryIO, str]:
    if not data:
        raise ImageError(f"{name}: got 0 bytes, expected an image")
    return io.BytesIO(data), name


def _open_file(name: str, stack: contextlib.ExitStack) -> tuple[BinaryIO, str]:
    if not name:
        raise ImageError("got an empty name, expected the path or URL of an image")
    try:
        # pathlib's expanduser raises for a file whose name begins with ~.
        path = Path(os.path.expanduser(name))  # noqa: PTH111
        stream = stack.enter_context(path.open("rb"))
        status = os.fstat(stream.fileno())
        if not stat.S_ISREG(status.st_mode):  # a pipe cannot seek, and a device may never end
            return _in_memory(stream.read(_MAX_DOWNLOAD), name)
    except FileNotFoundError as error:
        raise ImageError(f"{name}: no such file; check the path") from error
    except IsADirectoryError as error:
        raise ImageError(
            f"{name} is a directory, expected an image file: name one in it"
        ) from error
    except PermissionError as error:
        raise ImageError(f"{name}: permission denied; {permission_advice(error)}") from error
    except (OSError, ValueError, RuntimeError) as error:  # name too long, NUL in it, unknown ~user
        shown = name if len(name) <= 100 else f"{name[:100]}..."
        raise ImageError(
            f"{shown!r} cannot be opened ({reason(error)}); expected a path"
        ) from error
    if status.st_size == 0:
        raise ImageError(f"{name}: the file is empty, expected an image: fetch or export it again")
    return stream, name


def permission_advice(error: OSError) -> str:
    """What to do about a file or folder that may not be read."""
    if sys.platform == "darwin" and error.errno == errno.EPERM:
        # Not the file's permissions: macOS keeps Desktop, Photos and others from programs.
        return (
            "allow your terminal to read it, in System Settings > Privacy & Security > Files and "
            "Folders, or Full Disk Access"
        )
    return "make it readable first"


def _read_file_object(source: Any) -> tuple[BinaryIO, str]:
    name = f"the file object {getattr(source, 'name', '')}".rstrip()
    try:
        data = source.read()
    except (OSError, ValueError) as error:  # ValueError: closed, or text that is not UTF-8
        raise ImageError(
            f"{name} cannot be read ({reason(error)}); expected a file opened with mode 'rb'"
        ) from error
    if not isinstance(data, (bytes, bytearray, memoryview)):
        raise ImageError(
            f"{name} gives {type(data).__name__}, expected bytes: open it with mode 'rb'"
        )
    return _in_memory(bytes(data), name)


def _path_of_file_url(url: str) -> str:
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost"):
        raise ImageError(
            f"{url} names the host {parts.netloc}, expected file:///path: use a local path"
        )
    return url2pathname(parts.path)


def _decode_data_uri(uri: str) -> bytes:
    header, comma, body = uri.partition(",")
    if not comma:
        raise ImageError("the data: URI has no comma; expected data:image/...;base64,...")
    data = unquote_to_bytes(body)
    if not header.lower().endswith(";base64"):
        return data
    try:
        return base64.b64decode(b"".join(data.split()), validate=True)
    except binascii.Error as error:
        raise ImageError(
            f"the data: URI is not valid base64 ({reason(error)}); expected it complete: "
            "check that it was not cut off"
        ) from error


def reason(error: BaseException) -> str:
    """An exception's own words on one line, for use inside our message."""
    if isinstance(error, OSError) and error.strerror:
        return str(error.strerror)  # without the number, and the path once more
    return " ".join(str(error).split()) or type(error).__name__


# --- http: one address is looked up, judged, and connected to ---


def _fetch(url: str, allow_private: bool) -> tuple[bytes, str]:
    """The body, and the URL with its content type as a name for messages."""
    deadline = time.monotonic() + _FETCH_SECONDS
    target = url
    for _ in range(_MAX_REDIRECTS + 1):
        parts = _split_url(target)
        try:
            with (
                contextlib.closing(_connect(parts, target, allow_private)) as connection,
                _answer(connection, parts) as response,
            ):
                location = response.getheader("Location")
                if response.status in (301, 302, 303, 307, 308) and location:
                    target = urljoin(target, location)
                    continue
                if response.status != 200:
                    raise ImageError(
                        f"{target}: the server answered {response.status} {response.reason}, "
                        "expected 200: check the address in a browser"
                    )
                kind = response.getheader("Content-Type") or "no content type"
                return _read_body(response, target, deadline), f"{target} ({kind})"
        except TimeoutError as error:
            raise ImageError(
                f"{target}: no answer within {_SOCKET_SECONDS:g} s; try again, or download it first"
            ) from error
        except (OSError, http.client.HTTPException) as error:
            raise ImageError(
                f"{target} cannot be fetched ({reason(error)}); check the address and your "
                "connection (proxies are not used), or download it first"
            ) from error
    raise ImageError(
        f"{url} redirects more than {_MAX_REDIRECTS} times; use the address of the image itself"
    )


def _split_url(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
            if parts.username is None and parts.password is None:
                return parts
            raise ValueError("a user name or password in it is not supported")
        raise ValueError("not http or https, or without a host")
    except ValueError as error:  # also a port that is no number, or an unclosed [
        raise ImageError(
            f"{url!r} is not a usable address ({reason(error)}); expected https://host/path"
        ) from error


def _connect(parts: SplitResult, url: str, allow_private: bool) -> http.client.HTTPConnection:
    """A connection to an address that was checked: one look-up, so DNS cannot change its mind."""
    secure = parts.scheme == "https"
    try:
        host = cast(str, parts.hostname).encode("idna").decode("ascii")
        port = parts.port or (443 if secure else 80)
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError) as error:
        raise ImageError(
            f"{url}: the host {parts.hostname} is not known ({reason(error)}); check the address "
            "and your connection"
        ) from error
    addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
    if not allow_private and (private := [a for a in addresses if not _is_public(a)]):
        raise ImageError(
            f"{url} leads to {private[0]}, which is not a public address: download the image "
            "yourself, or allow it (allow_private_urls=True, --allow-private-urls)"
        )
    plain = _first_connection(addresses, port)
    connection: http.client.HTTPConnection
    if secure:
        context = _trust()
        connection = http.client.HTTPSConnection(host, port, context=context)
        try:
            connection.sock = context.wrap_socket(plain, server_hostname=host)
        except BaseException:
            plain.close()
            raise
    else:
        connection = http.client.HTTPConnection(host, port)
        connection.sock = plain
    connection.auto_open = 0  # never connect again, by name
    return connection


def _trust() -> ssl.SSLContext:
    context = ssl.create_default_context()
    if sys.platform == "darwin" and not context.cert_store_stats()["x509_ca"]:
        # python.org's Python has no certificates until a script of its installer is run. The
        # system's are reached by what huggingface-hub brings from its version 2 on.
        with contextlib.suppress(ImportError):
            import truststore

            return truststore.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    return context


def _first_connection(addresses: list[str], port: int) -> socket.socket:
    problem = OSError("the host has no address")
    for address in addresses:
        try:
            return socket.create_connection((address, port), timeout=_SOCKET_SECONDS)
        except OSError as error:
            problem = error
    raise problem


def _is_public(address: str) -> bool:
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address):
        # These forms carry an IPv4 address, and the packet ends up there.
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if ip in ipaddress.ip_network("64:ff9b::/96"):
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            ip = inner
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


def _answer(connection: http.client.HTTPConnection, parts: SplitResult) -> http.client.HTTPResponse:
    query = f"?{parts.query}" if parts.query else ""
    connection.request(
        "GET",
        quote((parts.path or "/") + query, safe="/%?:@!$&'()*+,;=~-._[]"),
        headers={"User-Agent": "fastvlm-mlx", "Accept": "image/*"},
    )
    return connection.getresponse()


def _read_body(response: http.client.HTTPResponse, url: str, deadline: float) -> bytes:
    expected = response.length
    too_big = ImageError(
        f"{url} is larger than {_MAX_DOWNLOAD / 1e6:g} MB, the most that is fetched: "
        "download it and scale it down first"
    )
    if expected is not None and expected > _MAX_DOWNLOAD:
        raise too_big
    body = bytearray()
    while chunk := response.read1(1 << 16):
        body += chunk
        if len(body) > _MAX_DOWNLOAD:
            raise too_big
        if time.monotonic() > deadline:
            raise ImageError(
                f"{url}: {len(body)} bytes in {_FETCH_SECONDS:g} s, too slow; download it first"
            )
    if expected is not None and len(body) != expected:
        raise ImageError(
            f"{url}: the connection ended after {len(body)} of {expected} bytes; try again"
        )
    return bytes(body)

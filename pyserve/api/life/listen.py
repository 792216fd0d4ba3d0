"""The socket that the server listens on: TCP or Unix, plain or TLS. It opens before loading."""

from __future__ import annotations

import errno
import os
import socket
import ssl
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pyserve.api.http.bounds import BACKLOG
from pyserve.config import ServerConfig
from pyserve.errors import StartupError

MAX_UDS_BYTES = 107  # size of the path in sockaddr_un, without its closing NUL
UDS_UMASK = 0o117  # gives the socket's file the mode 0660: for its owner and group
CONNECT_TIMEOUT_S = 1.0
PORT_ERRORS = (errno.EADDRINUSE, errno.EACCES, errno.EPERM)  # the port is taken, or only for root


@dataclass(frozen=True, slots=True)
class Listener:
    """A listening socket, the TLS context of its connections (None: plain HTTP) and its URL."""

    sock: socket.socket
    tls: ssl.SSLContext | None
    url: str


@contextmanager
def listening_socket(config: ServerConfig) -> Iterator[Listener]:
    """Open the TCP or Unix socket of `config`; at the end close it and remove its file, if any.

    Raises StartupError naming the flag at fault.
    """
    tls = tls_context(config.ssl_certfile, config.ssl_keyfile)
    if config.uds is not None:
        with _unix_socket(config.uds) as sock:
            yield Listener(sock, tls, f"unix:{config.uds}")
        return
    with listen(config.host, config.port) as sock:
        yield Listener(sock, tls, url(config.host, sock, is_tls=tls is not None))


def listen(host: str, port: int) -> socket.socket:
    """A listening TCP socket. Raises StartupError naming the port."""
    try:
        found = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except (OSError, ValueError):
        raise StartupError(f"--host {host} is not an address of this machine") from None
    family, _, _, _, address = min(found, key=lambda info: info[0] != socket.AF_INET)
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRNOTAVAIL:
            raise StartupError(
                f"--host {host} is not an address of this machine: 0.0.0.0 listens on all it has"
            ) from None
        reason = os.strerror(error.errno or 0)
        remedy = "; choose another with --port" if error.errno in PORT_ERRORS else ""
        raise StartupError(f"cannot listen on {host} port {port}: {reason}{remedy}") from None
    return sock


def url(host: str, sock: socket.socket, *, is_tls: bool = False) -> str:
    """The URL of a server whose TCP socket is `sock`."""
    scheme, port = "https" if is_tls else "http", sock.getsockname()[1]
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def tls_context(certfile: Path | None, keyfile: Path | None) -> ssl.SSLContext | None:
    """A context for TLS 1.2 or later with this certificate chain; None where none is given.

    `keyfile` None: the key is in `certfile`. Raises StartupError naming the file at fault.
    """
    if certfile is None:
        return None
    key_flag = "--ssl-certfile" if keyfile is None else "--ssl-keyfile"
    for flag, path in (("--ssl-certfile", certfile), ("--ssl-keyfile", keyfile or certfile)):
        try:
            with path.open("rb"):
                pass
        except OSError as error:
            raise StartupError(f"{flag} {path}: {os.strerror(error.errno or 0)}") from None

    def refuse_password() -> str:
        # Without this callback OpenSSL would ask for the password on the terminal.
        raise StartupError(
            f"{key_flag} {keyfile or certfile} is protected by a password: give a key without one"
        )

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(certfile, keyfile, password=refuse_password)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise StartupError(
                f"{key_flag} {keyfile or certfile} is not the key of --ssl-certfile {certfile}"
            ) from None
        raise StartupError(
            f"--ssl-certfile {certfile} and its key are not a certificate and a key in PEM form"
        ) from None
    return context


@contextmanager
def _unix_socket(path: Path) -> Iterator[socket.socket]:
    """Listen on a Unix socket at `path`. Raises StartupError.

    Replaces a socket file on which no server listens any more, and refuses any other file.
    """
    name = os.fsencode(path)
    if len(name) > MAX_UDS_BYTES:
        raise StartupError(
            f"--uds {path} has {len(name)} bytes, the limit of a socket's path is {MAX_UDS_BYTES}"
        )
    _remove_stale(path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        before = os.umask(UDS_UMASK)
        try:
            sock.bind(name)
        except OSError as error:
            reason = os.strerror(error.errno or 0)
            raise StartupError(f"cannot listen on --uds {path}: {reason}") from None
        finally:
            os.umask(before)
        mine = os.stat(path)
        try:
            sock.listen(BACKLOG)
            yield sock
        finally:
            _remove_own(path, mine)


def _remove_stale(path: Path) -> None:
    try:
        found = os.lstat(path)
    except OSError:
        return  # nothing is there; if the folder is at fault, bind will say so
    if not stat.S_ISSOCK(found.st_mode):
        raise StartupError(f"--uds {path} is there already and is not a socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(CONNECT_TIMEOUT_S)
        try:
            probe.connect(os.fsencode(path))
        except ConnectionRefusedError:
            pass  # nobody listens, so its server was killed
        except FileNotFoundError:
            return
        except OSError as error:
            reason = os.strerror(error.errno or 0) if error.errno else "no answer"
            raise StartupError(f"--uds {path} is in use, or not to be known: {reason}") from None
        else:
            raise StartupError(f"--uds {path}: another server listens there")
    try:
        os.unlink(path)
    except OSError as error:
        raise StartupError(
            f"--uds {path} is left from another server: {os.strerror(error.errno or 0)}"
        ) from None


def _remove_own(path: Path, mine: os.stat_result) -> None:
    """Remove our socket file, unless another server has meanwhile put its own there."""
    try:
        found = os.lstat(path)
        if (found.st_ino, found.st_dev) == (mine.st_ino, mine.st_dev):
            os.unlink(path)
    except OSError:
        pass

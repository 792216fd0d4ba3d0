"""Sockets: TCP, Unix and TLS; what is wrong with them is one line that names the flag."""

from __future__ import annotations

import errno
import os
import socket
import ssl
import stat
from pathlib import Path

import pytest

from pyserve.api.life.listen import MAX_UDS_BYTES, listening_socket, tls_context
from pyserve.config import ServerConfig
from pyserve.errors import StartupError
from tests.api.tls_files import CERTIFICATE, KEY, OTHER_KEY, PROTECTED_KEY


def config(**settings: object) -> ServerConfig:
    return ServerConfig(served_model_names=("m",), **settings)  # type: ignore[arg-type]


def refusal(**settings: object) -> str:
    with pytest.raises(StartupError) as caught, listening_socket(config(**settings)):
        pass
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(("host", "shown"), [("127.0.0.1", "127.0.0.1"), ("::1", "[::1]")])
def test_tcp(host: str, shown: str) -> None:
    if ":" in host and not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    with listening_socket(config(host=host, port=0)) as listener:
        port = listener.sock.getsockname()[1]
        assert listener.url == f"http://{shown}:{port}" and listener.tls is None
        socket.create_connection((host, port), timeout=30).close()
        taken = refusal(host=host, port=port)
    assert taken == (
        f"cannot listen on {host} port {port}: Address already in use; choose another with --port"
    )
    assert refusal(host="nowhere.invalid") == (
        "--host nowhere.invalid is not an address of this machine"
    )
    assert "--host" in refusal(host="a" * 70)


@pytest.mark.parametrize(
    ("number", "line"),
    [
        (
            errno.EACCES,
            "cannot listen on 1.2.3.4 port 80: Permission denied; choose another with --port",
        ),
        (errno.EMFILE, "cannot listen on 1.2.3.4 port 80: Too many open files"),
        (
            errno.EADDRNOTAVAIL,
            "--host 1.2.3.4 is not an address of this machine: 0.0.0.0 listens on all it has",
        ),
    ],
)
def test_another_port_is_advised_only_where_it_helps(
    number: int, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bind(sock: socket.socket, address: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("pyserve.api.life.listen.socket.socket.bind", bind)
    assert refusal(host="1.2.3.4", port=80) == line


def test_a_unix_socket_is_for_its_owner_and_group_and_goes_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with listening_socket(config(uds=path)) as listener:
        assert listener.url == f"unix:{path}"
        mode = path.stat().st_mode
        assert stat.S_ISSOCK(mode) and stat.S_IMODE(mode) == 0o660
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
        assert refusal(uds=path) == f"--uds {path}: another server listens there"
        assert path.exists()
    assert not path.exists()


def test_the_socket_of_a_killed_server_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with listening_socket(config(uds=path)), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))


def test_what_another_has_put_there_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "s"
    path.write_text("precious")
    assert refusal(uds=path) == f"--uds {path} is there already and is not a socket"
    assert path.read_text() == "precious"
    path.unlink()
    with listening_socket(config(uds=path)):
        path.unlink()
        path.write_text("a later server's")
    assert path.exists()


def test_a_path_that_cannot_be_a_socket(tmp_path: Path) -> None:
    limit = tmp_path / ("x" * (MAX_UDS_BYTES - len(os.fsencode(tmp_path)) - 1))
    with listening_socket(config(uds=limit)):
        assert limit.exists()
    message = refusal(uds=Path(f"{limit}é"))
    assert f"has {MAX_UDS_BYTES + 2} bytes, the limit of a socket's path is 107" in message
    assert refusal(uds=tmp_path / "no" / "s").endswith("No such file or directory")


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    texts = {
        "cert": CERTIFICATE, "key": KEY, "other": OTHER_KEY, "protected": PROTECTED_KEY,
        "both": KEY + CERTIFICATE, "junk": "no certificate", "protected_both":
        PROTECTED_KEY + CERTIFICATE,
    }  # fmt: skip
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    return {name: tmp_path / name for name in (*texts, "missing")}


@pytest.mark.parametrize(("certfile", "keyfile"), [("cert", "key"), ("both", None)])
def test_tls(files: dict[str, Path], certfile: str, keyfile: str | None) -> None:
    settings = config(
        host="127.0.0.1", port=0, ssl_certfile=files[certfile],
        ssl_keyfile=None if keyfile is None else files[keyfile],
    )  # fmt: skip
    with listening_socket(settings) as listener:
        assert listener.url.startswith("https://127.0.0.1:")
        assert listener.tls is not None
        assert listener.tls.minimum_version == ssl.TLSVersion.TLSv1_2


@pytest.mark.parametrize(
    ("certfile", "keyfile", "message"),
    [
        ("missing", "key", "--ssl-certfile {missing}: No such file or directory"),
        ("cert", "missing", "--ssl-keyfile {missing}: No such file or directory"),
        ("cert", "other", "--ssl-keyfile {other} is not the key of --ssl-certfile {cert}"),
        ("cert", "protected", "--ssl-keyfile {protected} is protected by a password: give a key"),
        ("protected_both", None, "--ssl-certfile {protected_both} is protected by a password"),
        ("junk", "key", "--ssl-certfile {junk} and its key are not a certificate and a key in PEM"),
        ("cert", None, "--ssl-certfile {cert} and its key are not a certificate and a key in PEM"),
        ("cert", "junk", "--ssl-certfile {cert} and its key are not a certificate and a key"),
    ],
)  # fmt: skip
def test_wrong_tls_files(
    files: dict[str, Path], certfile: str, keyfile: str | None, message: str
) -> None:
    with pytest.raises(StartupError) as caught:
        tls_context(files[certfile], None if keyfile is None else files[keyfile])
    assert str(caught.value).startswith(message.format(**files))
    assert "\n" not in str(caught.value)

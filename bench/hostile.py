"""Hostile and malformed HTTP requests, each made from (seed, number) and nothing else.

A `Case` is what is written to one fresh connection, in pieces, and what may come back: `fuzz.py`
sends it. But for the few of `large` no case asks for much work: what may be slow and legal is hung
up on (`patience_s`).
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass

from bench.hostile_grammars import hostile_grammar
from bench.hostile_json import chat_body, hostile_fields, hostile_text
from bench.hostile_large import large_request
from bench.hostile_structured import hostile_structure
from bench.hostile_templates import hostile_chat

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
POSTS = (CHAT, COMPLETIONS, "/v1/messages", "/tokenize", "/detokenize")
GETS = ("/health", "/ping", "/version", "/v1/models", "/metrics")
PATIENCE_S = 0.2
BIG_HEADER_BYTES = 20_000  # more than any server takes


@dataclass(slots=True)
class Case:
    """One connection's worth of bytes.

    pieces       written one after the other, `pause_s` apart.
    num_answers  how many must come, or the connection must be closed after the last one of them;
                 0: none need come, and the client hangs up after `patience_s`.
    wanted       statuses of which the last answer must have one; none: any but 5xx (503 may be).
    heads        number of requests among them, from the first, that are HEAD.
    abort_bytes  hang up after so many bytes of the answer.
    ending       how the client leaves: close (FIN), reset (RST), half (FIN, then it reads on).
    """

    number: int
    family: str
    name: str
    pieces: list[bytes]
    pause_s: float = 0.0
    num_answers: int = 1
    wanted: tuple[int, ...] = ()
    heads: int = 0
    patience_s: float = PATIENCE_S
    abort_bytes: int | None = None
    ending: str = "reset"

    @property
    def is_slow(self) -> bool:
        return self.num_answers == 0 or self.pause_s > 0

    @property
    def title(self) -> str:
        return f"{self.number} ({self.family}: {self.name})"

    @property
    def request(self) -> bytes:
        return b"".join(self.pieces)


def make_case(seed: int, number: int, family: str | None = None) -> Case:
    """Case `number` of a seed, of any family or of one: the same bytes every time."""
    rng = random.Random(f"{seed}:{number}")
    chosen = rng.choices(FAMILY_NAMES, FAMILY_WEIGHTS)[0]
    family = family or chosen
    case = FAMILIES[family][1](rng)
    case.number, case.family = number, family
    if case.num_answers and case.ending == "reset" and rng.random() < 0.2:
        case.ending = "close"
    return case


def post(path: str, body: bytes, *headers: str, close: bool = False) -> bytes:
    """A well-formed POST."""
    extra = [*headers, "Connection: close"] if close else headers
    lines = [f"POST {path} HTTP/1.1", "Host: x", "Content-Type: application/json", *extra]
    lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def get(path: str, *headers: str, method: str = "GET") -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: x", *headers, "", ""]).encode("latin-1")


def _case(name: str, *pieces: bytes, **options: object) -> Case:
    return Case(0, "", name, list(pieces), **options)  # type: ignore[arg-type]


# -- well-formed HTTP ------------------------------------------------------------------------------


def valid(rng: random.Random) -> Case:
    """An innocent request: it must be served."""
    path = rng.choice([*GETS, *POSTS])
    if path in GETS:
        if rng.random() < 0.2:
            return _case(f"HEAD {path}", get(path, method="HEAD"), heads=1, wanted=(200,))
        return _case(f"GET {path}", get(path), wanted=(200,))
    bodies: dict[str, dict[str, object]] = {
        CHAT: {"messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 3},
        COMPLETIONS: {"prompt": "La capital de Francia es", "max_tokens": 3},
        "/v1/messages": {"messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 3},
        "/tokenize": {"prompt": "Hello world"},
        "/detokenize": {"tokens": [rng.randrange(200) for _ in range(8)]},
    }
    body = bodies[path]
    if "max_tokens" in body:
        body |= {"stream": rng.random() < 0.5, "temperature": rng.choice([0, 0.7, 2])}
    return _case(path, post(path, json.dumps(body).encode()), wanted=(200,))


def field(rng: random.Random) -> Case:
    """A body whose JSON is sound but whose fields are not."""
    path = rng.choices(POSTS, [5, 4, 3, 1, 1])[0]
    body, name, wanted, is_costly = hostile_fields(rng, path)
    case = _case(f"{path} {name}", post(path, body), wanted=wanted)
    if is_costly:
        case.num_answers, case.patience_s = 0, 1.0
    return case


def text(rng: random.Random) -> Case:
    """A body that is no JSON, no UTF-8, too deep or too wide."""
    body, name, wanted = hostile_text(rng)
    return _case(name, post(rng.choice((CHAT, COMPLETIONS, "/v1/messages")), body), wanted=wanted)


HEADERS = (
    ("Content-Type", ("text/plain", "multipart/form-data; boundary=x", "", "application/xml",
                      "application/json; charset=utf-16", "application/json" * 400, "\xff\xfe",
                      "application/x-www-form-urlencoded", "APPLICATION/JSON;;;===", "*/*")),
    ("Content-Encoding", ("gzip", "br", "deflate", "zstd", "identity", "gzip, gzip", "x", "")),
    ("Accept", ("text/event-stream", "*/*;q=9", "", "image/png")),
    ("Accept-Encoding", ("gzip", "gzip;q=x", "*;q=0", "identity;q=0", "\x80")),
    ("Expect", ("100-continue", "200-ok", "", "100-continue, x")),
    ("Connection", ("close", "upgrade", "keep-alive, close", "x" * 500, "", "close, close", "TE")),
    ("Upgrade", ("websocket", "h2c", "HTTP/2.0", "TLS/1.0", "x")),
    ("Authorization", ("Bearer", "Bearer ", "Bearer \xff", "Basic ===", "Bearer " + "k" * 5000,
                       "Digest x", "", "Bearer a b c", "Bearer %00")),
    ("X-Request-Id", ("", "a" * 4000, "\xff\xfe\xfd", "%0d%0aX-Injected: 1", "\t", "<script>", "é",
                      "a;b=c,d", "../../etc/passwd")),
    ("Origin", ("null", "http://evil.example", "\xff", "http://a\tb", "*", "file://")),
    ("Host", ("", "evil.example:99999", "[::1", "a b", "\xff", "x" * 3000, "x:y:z", "[]", "@:@")),
    ("Range", ("bytes=0-1", "bytes=-1-", "bytes=999999999999999999999-", "x")),
    ("If-None-Match", ("*", '"x"', 'W/"', "x" * 1000)),
    ("If-Modified-Since", ("Thu, 01 Jan 1970 00:00:00 GMT", "never", "9" * 40)),
    ("Cookie", ("a=b; " * 300, "=", ";;;;", '"', "\x80=\x81")),
    ("X-Forwarded-For", ("127.0.0.1", "x" * 500, "\xff")),
    ("Forwarded", ("for=;;;", 'for="', "for=127.0.0.1;proto=x")),
    ("Content-Length", ("0", "00", "000000000000000000005")),
    ("Transfer-Encoding", ("identity", "gzip", "chunked, gzip", "x", "")),
    ("Sec-WebSocket-Key", ("x", "dGhlIHNhbXBsZSBub25jZQ==")),
    ("Keep-Alive", ("timeout=-1", "timeout=99999999999, max=0")),
    ("Date", ("x",)), ("Via", ("1.1 " * 200,)), ("TE", ("trailers", "chunked")),
    ("Trailer", ("Content-Length", "x")), ("Max-Forwards", ("-1",)),
)  # fmt: skip


def header(rng: random.Random) -> Case:
    """Header values that are legal bytes and nonsense."""
    chosen = [rng.choice(HEADERS) for _ in range(rng.randint(1, 4))]
    lines = [f"{name}: {rng.choice(values)}" for name, values in chosen]
    name = ", ".join(line[:40] for line in lines)
    path = rng.choice([*GETS, CHAT, "/", "/docs", "/openapi.json", "/load"])
    body = chat_body(max_tokens="2") if path == CHAT else b""
    request = (f"{'POST' if body else 'GET'} {path} HTTP/1.1\r\n" + "\r\n".join(lines)).encode(
        "latin-1"
    )
    names = {line.partition(":")[0] for line in lines}
    if "Host" not in names:
        request += b"\r\nHost: x"
    if body and "Content-Type" not in names:
        request += b"\r\nContent-Type: application/json"
    if body and not names & {"Content-Length", "Transfer-Encoding"}:
        request += b"\r\nContent-Length: %d" % len(body)
    request += b"\r\n\r\n" + body
    # An upgrade or a wrong coding leaves open how much of the rest is a body.
    is_framed = not names & {"Transfer-Encoding", "Content-Length", "Upgrade", "Connection"}
    return _case(name, request, num_answers=int(is_framed))


METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "HEAD", "TRACE", "CONNECT", "PRI",
           "get", "Post", "PROPFIND", "BREW", "M-SEARCH", "QUERY", "X" * 300, "G\x00T", "GÉT", "",
           "G ET", "{}", "POST\t", "LINK", "SOURCE", "PURGE", "\x7f")  # fmt: skip
PATHS = ("/", "//", "/..", "/../../etc/passwd", "/v1", "/v1/", "/v1//chat/completions", "/%00",
         "/%ff%fe", "/%", "/%zz", "/%2e%2e/%2e%2e", "/v1/models/%00", "/v1/models/..%2f..%2fx",
         "/v1/models/" + "m" * 3000, "/v1/models/%ed%a0%80", "/v1/models/\xff\xfe",
         "/v1/models/a b",
         "/v1/models/%0d%0aX-Injected:%201", "*", "http://evil.example/health",
         "http://[::1/health",
         "http://a:99999999/health", "http://a:b/health", "http:///health", "x:443", "/health?",
         "/#",
         "/health?" + "a=b&" * 1500, "/health#x", "/health;x=1", "/HEALTH", "/health/",
         "/metrics/x",
         "/static/../../pyserve/config.py", "/static/%2e%2e%2f%2e%2e%2fconfig.py",
         "/docs/../health",
         "/static//etc/passwd", "/docs/%00", "/static/%00", "/static/" + "x" * 1000, "/static/",
         "/~",
         "/v1/chat/completions?x=" + "y" * 9000, "/\x01\x02", "/é", "\\health", "health", "?", "/ ",
         "/favicon.ico", "/robots.txt", "/.git/config", "/v1/embeddings", "/v1/models?x=%ff",
         "/health/live", "/health/ready", "/" + "a/" * 4000, "/%F0%9F%98%80", "//evil/x", "/:80",
         "http://user:pw@x/health", "ftp://x/health", "data:,x", "http://%zz/x", "/?\x80=\xff",
         "http://x\xff/health", "/v1/models/", "/health%0a", "/load", "/ping",
         "/invocations")  # fmt: skip


def target(rng: random.Random) -> Case:
    """Methods, paths, percent-encodings, versions."""
    method, path = rng.choice(METHODS), rng.choice(PATHS)
    if rng.random() < 0.5:
        method = rng.choice(METHODS[:7])
    if rng.random() < 0.3:
        bad = "".join(rng.choice("%/.\\?#[]@:;&=+$,'\"<>^`{|}~0aZ \xff") for _ in range(12))
        path = "/" + bad if rng.random() < 0.8 else bad
    version = "HTTP/1.1"
    if rng.random() < 0.15:
        version = rng.choice(["HTTP/1.0", "HTTP/0.9", "HTTP/2.0", "HTTP/9.9", "HTTP/1.10",
                             "http/1.1",
                              "HTTP/1.", "HTTP/", "", "HTTP/1.1 x", "HTTP/-1.1", "ICE/1.0",
                              "HTTP/1.1\x00", "HTTP/99999999999.1", "RTSP/1.0"])  # fmt: skip
    name = f"{method[:20]} {path[:60]} {version}"
    request = f"{method} {path} {version}\r\nHost: x\r\n\r\n".encode("latin-1")
    is_plain = method in METHODS[:7] and version == "HTTP/1.1"
    return _case(name, request, num_answers=int(is_plain), heads=int(method == "HEAD"))


# -- broken HTTP -----------------------------------------------------------------------------------


def bomb(rng: random.Random) -> Case:
    """Heads that are too many, too long, or not headers."""
    size = rng.choice([1000, 8000, 8190, 8191, 16_000, 16_384, BIG_HEADER_BYTES, 70_000, 300_000])
    big = "x" * size
    kind = rng.randrange(12)
    names = ("value", "name", "path", "count", "same", "folded", "no colon", "space before colon",
             "control", "empty name", "query", "no end")  # fmt: skip
    lines = {
        0: [f"X: {big}"], 1: [f"{big}: 1"], 2: [], 3: [f"X-{i}: {i}" for i in range(size // 10)],
        4: ["A: b"] * (size // 8), 5: ["X: a", " folded" * 20, "\tb"], 6: ["no colon here"],
        7: ["X : a", "Content-Length : 5"], 8: ["X: a\x00b", "Y: \x01\x7f"], 9: [": x"],
        10: [], 11: [f"X: {big}"],
    }[kind]  # fmt: skip
    path = {2: f"/{big}", 10: f"/health?{big}"}.get(kind, "/health")
    request = "\r\n".join([f"GET {path} HTTP/1.1", "Host: x", *lines, "", ""]).encode("latin-1")
    if kind == 11:
        return _case("head without an end", request[:-4], num_answers=0)
    return _case(f"{names[kind]} of {size}", request)


def length(rng: random.Random) -> Case:
    """Content-Length that lies, or is no number."""
    body = chat_body(max_tokens="2")
    start = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n".encode()
    kind = rng.randrange(6)
    if kind == 0:
        values = ("-5", "+5", "0x10", "5 5", "5, 5", "5,6", "1e3", "", " ", "9" * 30, "٣", "5;",
                  "5.0",
                  "1_0", "18446744073709551616", "-0", "\x00", "5\x0b")  # fmt: skip
        value = rng.choice(values).encode("utf-8")
        request = start + b"Content-Length: " + value + b"\r\n\r\n" + body
        is_wrong = value.strip() not in (b"", b"5, 5", b"-0", b"+5")
        return _case(f"length {value!r}", request, num_answers=int(is_wrong))
    if kind == 1:
        lengths = rng.choice([(5, 5), (5, 6), (len(body), 0), (0, len(body)), (10**18, 0)])
        lines = b"".join(b"Content-Length: %d\r\n" % number for number in lengths)
        return _case(f"lengths {lengths}", start + lines + b"\r\n" + body, num_answers=0)
    if kind == 2:  # too short: the rest is read as another request
        short = rng.randrange(len(body))
        return _case("length too short", start + b"Content-Length: %d\r\n\r\n" % short + body)
    if kind == 3:  # half a body, then nothing
        cut = rng.randrange(len(body))
        head = start + b"Content-Length: %d\r\n\r\n" % len(body)
        ending = rng.choice(["close", "reset", "half"])
        return _case("half a body", head + body[:cut], num_answers=0, ending=ending)
    if kind == 4:
        huge = rng.choice([33_554_433, 50_000_000, 2**31, 2**32, 2**53, 2**63 - 1])
        head = start + b"Content-Length: %d\r\n\r\n" % huge
        return _case(f"length of {huge}", head, b"{" * 1000, wanted=(413, 400))
    cut = rng.randrange(len(start))
    return _case("half a head", start[:cut], num_answers=0, ending=rng.choice(["close", "half"]))


def chunked(rng: random.Random) -> Case:
    """Chunks of wrong sizes, endless extensions, trailers; two framings at once."""
    body = chat_body(max_tokens="2")
    start = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n".encode()
    coded = start + b"Transfer-Encoding: chunked\r\n\r\n"
    whole = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    kind = rng.randrange(9)
    if kind == 0:
        size = rng.choice([b"zz", b"-1", b"", b" 5", b"0x5", b"f" * 17, b"f" * 4000, b"+5", b"5 ",
                           b"1e1", b"\xff", b"5\x00", b"_5", b"7fffffffffffffff"])  # fmt: skip
        return _case(f"chunk size {size[:20]!r}", coded + size + b"\r\nhello\r\n0\r\n\r\n",
                     num_answers=0)  # fmt: skip
    if kind == 1:
        extension = b";x=" + b"y" * rng.choice([10, 5000, 100_000])
        framed = b"%x%b\r\n%b\r\n0\r\n\r\n" % (len(body), extension, body)
        return _case("chunk extension", coded + framed)
    if kind == 2:
        framed = b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n"
        return _case("chunks of one byte", coded + framed, wanted=(200,))
    if kind == 3:
        trailers = rng.choice([b"X: y\r\n" * 50, b"Content-Length: 5\r\n", b"X: " + b"y" * 30_000
                               + b"\r\n", b"bad\r\n", b": \r\n"])  # fmt: skip
        return _case("trailers", coded + whole[:-2] + trailers + b"\r\n", num_answers=0)
    if kind == 4:
        return _case("chunks without an end", coded + whole[: rng.randrange(len(whole) - 1)],
                     num_answers=0, ending=rng.choice(["reset", "half", "close"]))  # fmt: skip
    if kind == 5:  # request smuggling: two framings
        first = b"Content-Length: %d\r\n" % rng.choice([0, 4, len(whole), len(body)])
        both = [first, b"Transfer-Encoding: chunked\r\n"]
        rng.shuffle(both)
        smuggled = get("/v1/models/smuggled")
        return _case("length and chunks", start + b"".join(both) + b"\r\n" + whole + smuggled,
                     wanted=(400,))  # fmt: skip
    if kind == 6:
        value = rng.choice([b"xchunked", b"chunked, chunked", b"chunked, identity", b"chunked;x",
                            b"\x0bchunked", b"chunke", b"gzip, chunked", b'"chunked"', b",chunked",
                            b"CHUNKED", b"chunked,", b"chunked\x00",
                            b"identity, chunked"])  # fmt: skip
        request = start + b"Transfer-Encoding: " + value + b"\r\n\r\n" + whole
        return _case(f"coding {value!r}", request, num_answers=0)
    if kind == 7:
        lines = b"Transfer-Encoding: chunked\r\n" * 2
        return _case("coding twice", start + lines + b"\r\n" + whole, num_answers=0)
    old = coded.replace(b"HTTP/1.1", b"HTTP/1.0")
    return _case("chunks in HTTP/1.0", old + whole, num_answers=0)


GARBAGE = (
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 200,  # a TLS hello
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x12\x04\x00\x00\x00\x00\x00",
    b"SSH-2.0-OpenSSH_9.6\r\n", b"EHLO x\r\n", b"*1\r\n$4\r\nPING\r\n", b"\x00" * 1000,
    b"PROXY TCP4 1.2.3.4 5.6.7.8 1 2\r\nGET /health HTTP/1.1\r\nHost: x\r\n\r\n", b"\r\n" * 500,
    b"GET /health\r\n\r\n", b"GET /health\n\n", b"GET\r\n\r\n", b" GET /health HTTP/1.1\r\n\r\n",
    b"GET /health HTTP/1.1\nHost: x\n\n", b"GET /health HTTP/1.1\r\n\r\n", b"\n", b"\r", b"\x04",
    b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", b"GET /health HTTP/1.1\rHost: x\r\r",
    b"\xef\xbb\xbfGET /health HTTP/1.1\r\nHost: x\r\n\r\n", b"{}\r\n\r\n",
    b"GET  /  HTTP/1.1\r\n\r\n",
)  # fmt: skip


def garbage(rng: random.Random) -> Case:
    """Other protocols, random bytes, good requests with some bytes changed."""
    kind = rng.randrange(3)
    if kind == 0:
        return _case("another protocol", rng.choice(GARBAGE), num_answers=0)
    if kind == 1:
        return _case("random bytes", rng.randbytes(rng.randint(1, 2000)), num_answers=0)
    request = bytearray(post(rng.choice(POSTS), chat_body(max_tokens="2")))
    for _ in range(rng.randint(1, 8)):
        place = rng.randrange(len(request))
        if rng.random() < 0.5:
            request[place] = rng.randrange(256)
        else:
            del request[place : place + rng.randint(1, 5)]
    return _case("changed bytes", bytes(request), num_answers=0, patience_s=0.5)


# -- how it is sent --------------------------------------------------------------------------------


def pipeline(rng: random.Random) -> Case:
    """Several requests at once; after refused bodies the last, an innocent one, is served."""
    requests = []
    for _ in range(rng.randint(1, 9)):
        body, _, _ = hostile_text(rng)
        if len(body) > 100_000:  # a 413 closes the connection, rightly
            body = b"{"
        requests.append(rng.choice([get(rng.choice(GETS)), post(rng.choice(POSTS), body)]))
    whole = b"".join(requests) + get("/version")
    pieces = [whole]
    if rng.random() < 0.3:
        cut = rng.randrange(1, len(whole))
        pieces = [whole[:cut], whole[cut:]]
    return _case(f"{len(requests) + 1} pipelined", *pieces, num_answers=len(requests) + 1,
                 wanted=(200,))  # fmt: skip


def slow(rng: random.Random) -> Case:
    """A good request in drops: it is served, if the client does not give up."""
    request = post(CHAT, chat_body(max_tokens="2"))
    num_pieces = rng.randint(3, 40)
    cuts = sorted(rng.sample(range(1, len(request)), num_pieces - 1))
    pieces = [request[i:j] for i, j in zip([0, *cuts], [*cuts, len(request)], strict=True)]
    pause_s = rng.uniform(0.005, 0.05)
    if rng.random() < 0.5:
        pieces = pieces[: rng.randrange(1, len(pieces))]
        return _case("slow, given up", *pieces, pause_s=pause_s, num_answers=0)
    return _case("slow", *pieces, pause_s=pause_s, wanted=(200,))


def abort(rng: random.Random) -> Case:
    """A good request whose client leaves: before, between or after the first frames."""
    body = chat_body(max_tokens="400", stream=rng.choice(["true", "false"]), ignore_eos="true",
                     n=rng.choice(["1", "1", "3"]), temperature="0.8")  # fmt: skip
    ending = rng.choice(["reset", "close", "half"])
    return _case("left alone", post(CHAT, body), num_answers=0, ending=ending,
                 abort_bytes=rng.choice([None, 1, 500, 3000]),
                 patience_s=rng.choice([0.0, 0.005, 0.02, 0.1]))  # fmt: skip


def silent(rng: random.Random) -> Case:
    """A connection that says nothing, or not enough."""
    start = rng.choice([b"", b"\r\n", b"G", b"GET /health HTTP/1.1\r\n", b"POST / HTTP/1.1\r\nX: "])
    return _case("silent", start, num_answers=0, patience_s=rng.uniform(0, 1),
                 ending=rng.choice(["close", "reset", "half"]))  # fmt: skip


def large(rng: random.Random) -> Case:
    """As much as one request may ask: the others do not feel it."""
    path, body, name, is_endless = large_request(rng)
    if is_endless:
        return _case(name, post(path, body), num_answers=0, patience_s=rng.uniform(0.1, 2))
    return _case(name, post(path, body), wanted=(200, 400, 429))


def ended(rng: random.Random) -> Case:
    """Good requests whose client ends its side behind them: they are answered."""
    case = valid(rng)
    if not case.heads:
        num_before = rng.choice([0, 0, 1, 5])
        case.pieces = [get("/version") * num_before + case.request]
        case.num_answers += num_before
    case.ending = "half"
    return case


def gone(rng: random.Random) -> Case:
    """A long request, more behind it than is read, and a client that leaves."""
    body = chat_body(max_tokens="2000", stream=rng.choice(["true", "false"]), ignore_eos="true",
                     n=rng.choice(["1", "4"]), temperature="0.8")  # fmt: skip
    behind = rng.choice([get("/version") * 200, post(CHAT, b" " * 300_000), get("/version")])
    return _case("left with more behind", post(CHAT, body), behind, num_answers=0,
                 ending=rng.choice(["reset", "close", "half"]),
                 patience_s=rng.choice([0.0, 0.02, 0.1]))  # fmt: skip


def template(rng: random.Random) -> Case:
    """What a chat template may do, of the request or with it, in one step that nothing stops."""
    body, name = hostile_chat(rng)
    return _case(name, post(rng.choice([CHAT, "/tokenize"]), body), wanted=(200, 400, 429))


def grammar(rng: random.Random) -> Case:
    """What a schema, a pattern or a tool may ask of the compiler of grammars and of the masks."""
    path, body, name = hostile_grammar(rng)
    return _case(name, post(path, body), wanted=(200, 400, 429))


def structured(rng: random.Random) -> Case:
    """Schemas, patterns, grammars and tools that would take an engine of grammars long."""
    path, body, name, wanted = hostile_structure(rng)
    return _case(name, post(path, body), wanted=wanted)


# name -> (weight, maker)
FAMILIES: dict[str, tuple[float, Callable[[random.Random], Case]]] = {
    "valid": (8, valid),
    "field": (36, field),
    "text": (16, text),
    "header": (8, header),
    "target": (12, target),
    "bomb": (3, bomb),
    "length": (4, length),
    "chunked": (4, chunked),
    "garbage": (4, garbage),
    "pipeline": (2, pipeline),
    "slow": (1, slow),
    "abort": (1, abort),
    "silent": (1, silent),
    "large": (0.3, large),
    "template": (0.5, template),
    "structured": (0.5, structured),
    "grammar": (0.5, grammar),
    "ended": (1, ended),
    "gone": (1, gone),
}
FAMILY_NAMES = list(FAMILIES)
FAMILY_WEIGHTS = [weight for weight, _ in FAMILIES.values()]

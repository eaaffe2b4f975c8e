"""Downloads as the web has them: URLs exactly as listed, opt-outs, codings, addresses that a list may not name, memory."""

import asyncio
import gzip
import socket
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace

import pytest

from pipelines.ingest.addresses import is_public
from pipelines.ingest.config import DownloadConfig
from pipelines.ingest.download import fetch_all, retryable_reasons
from pipelines.ingest.memory import Memory
from pipelines.ingest.web import as_listed, opt_outs
from pipelines.tables.rejects import RowRefused
from tests.support.hostile_images import encode, noise
from tests.support.image_server import ImageServer, Reply

IMAGE = encode(noise(), "PNG")
TIFF = encode(noise(), "TIFF")  # no first bytes that tell at once that a coding was named and not applied
FAST = DownloadConfig(timeout=2.0, first_wait=0.01, attempts=2, allow_private=True)
STRICT = replace(FAST, allow_private=False)
AGENT = "My-Bot/2.0 (+https://example.org)"


@pytest.fixture(scope="module")
def server() -> Iterator[ImageServer]:
    with ImageServer({}).running() as running:
        yield running


def fetch(urls: list[str], config: DownloadConfig = FAST, max_bytes: int = 100_000, total: int = 2**30) -> list[str | bytes]:
    return [found.reason if isinstance(found, RowRefused) else found for found in fetch_all(urls, config, max_bytes, total)]


@pytest.mark.parametrize(
    ("listed", "asked"),
    [
        ("/a%2fb.png?x=%7e%3A+y&z=a|b~", None),  # as signatures cover them
        ("/a%2Fb.png?sig=%2f%2F%3d==&e=%5b", None),
        ("/a/../b/./c.png", None),
        ("/100%.png?%zz", None),
        ("/double//slash.png", None),
        ("/q.png?&", None),
        ("/semi;v=1.png?a;b", None),
        ("/frag.png#part", "/frag.png"),
        ("/sp ace.png?ü=日", "/sp%20ace.png?%C3%BC=%E6%97%A5"),
        ("/line\r\nHost: evil\r\n.png", "/line%0D%0AHost:%20evil%0D%0A.png"),
        ("?only=query", "/?only=query"),
    ],
)
@pytest.mark.parametrize("redirected", [False, True])
def test_a_url_is_asked_for_exactly_as_it_is_listed(
    server: ImageServer, listed: str, asked: str | None, redirected: bool
) -> None:
    if redirected and not (listed.isascii() and listed.isprintable()):
        pytest.skip("no header can hold it")
    server.replies = {
        listed if asked is None else asked: (200, [], IMAGE),
        "/from": (302, [("Location", server.url + listed)], b""),
    }
    assert fetch([server.url + ("/from" if redirected else listed)]) == [IMAGE], dict(server.answers)


@pytest.mark.parametrize(
    ("location", "asked"),
    [
        ("next.png?a=%2f", "/deep/next.png?a=%2f"),
        ("/top%2f.png", "/top%2f.png"),
        ("?q=%7E", "/deep/from?q=%7E"),
        ("//HOST/other.png", "/other.png"),
        ("../up.png", "/up.png"),
        ("ftp://x/y.png", "bad_url"),
        ("data:image/png;base64,AAAA", "bad_url"),
        ("http://[broken/", "bad_url"),
        ("", "http_302"),
    ],
)
def test_where_a_redirect_leads(server: ImageServer, location: str, asked: str) -> None:
    location = location.replace("HOST", server.url.removeprefix("http://"))
    server.replies = {"/deep/from": (302, [("Location", location)], b""), asked: (200, [], IMAGE)}
    assert fetch([f"{server.url}/deep/from"]) == [IMAGE if asked.startswith("/") else asked]


def test_redirects_are_counted_and_cookies_stay_with_their_row(server: ImageServer) -> None:
    steps = {f"/{step}": (307, [("Location", f"/{step + 1}"), ("Set-Cookie", f"c{step}=1")], b"") for step in range(3)}
    server.replies = {**steps, "/3": (200, [], IMAGE)}
    for allowed in (2, 3):
        server.cookies.clear()
        expected = IMAGE if allowed == 3 else "too_many_redirects"
        assert fetch([f"{server.url}/0", f"{server.url}/3"], replace(FAST, max_redirects=allowed)) == [expected, IMAGE]
    assert server.cookies["/3"] == {None, "c0=1; c1=1; c2=1"}
    assert fetch([f"{server.url}/2"], replace(FAST, max_redirects=0)) == ["too_many_redirects"]


@pytest.mark.parametrize(
    ("values", "forbidden"),
    [
        (["none"], {"none"}),
        (["NoAI , nofollow", "noimageai"], {"noai", "noimageai"}),
        (["my-bot: noindex"], {"noindex"}),
        (["MY-BOT:none"], {"none"}),
        (["*: noai"], {"noai"}),
        (["otherbot: noindex, noai"], set()),
        (["otherbot: noindex", "noai"], {"noai"}),
        (["otherbot: noindex, my-bot: noai"], {"noai"}),
        (["my-bot: nofollow, otherbot: noai"], set()),
        (["max-image-preview: large, noai"], {"noai"}),
        (["unavailable_after: Fri, 25 Jun 2010 15:00:00 PST, noindex"], {"noindex"}),
        (["nofollow, noarchive", "all"], set()),
        (["bot: none"], set()),
    ],
)
def test_opt_outs(values: list[str], forbidden: set[str]) -> None:
    assert opt_outs(values, AGENT) == forbidden


@pytest.mark.parametrize("agent", ["plain words", "Mozilla/5.0 (compatible; plain/1.0)"])
def test_opt_outs_for_the_agent_that_the_server_is_told(server: ImageServer, agent: str) -> None:
    server.replies = {"/x": (200, [("X-Robots-Tag", "other: all"), ("X-Robots-Tag", "plain: noimageai")], IMAGE)}
    assert fetch([f"{server.url}/x"], replace(FAST, user_agent=agent)) == ["robots_tag"]
    assert fetch([f"{server.url}/x"], FAST) == [IMAGE]


@pytest.mark.parametrize(
    ("status", "expected", "times"),
    [(203, IMAGE, 1), (204, "http_204", 1), (206, "http_206", 1), *[(520 + n, f"http_{520 + n}", 2) for n in range(7)],
     (530, "http_530", 2), (418, "http_418", 1), (304, "http_304", 1)],
)  # fmt: skip
def test_status(server: ImageServer, status: int, expected: bytes | str, times: int) -> None:
    server.answers.clear()
    server.replies = {"/x": (status, [], b"" if status in (204, 304) else IMAGE)}
    assert fetch([f"{server.url}/x"]) == [expected]
    assert server.answers["/x"] == times


def deflate(content: bytes, form: int) -> bytes:
    packer = zlib.compressobj(wbits=form)
    return packer.compress(content) + packer.flush()


@pytest.mark.parametrize(
    ("codings", "body", "expected"),
    [
        (["gzip"], gzip.compress(TIFF), TIFF),
        (["x-gzip"], gzip.compress(TIFF[:99]) + gzip.compress(TIFF[99:]), TIFF),
        (["deflate"], deflate(TIFF, 15), TIFF),
        (["deflate"], deflate(TIFF, -15), TIFF),
        (["gzip, deflate"], deflate(gzip.compress(TIFF), 15), TIFF),
        (["gzip", "gzip"], gzip.compress(gzip.compress(TIFF)), TIFF),
        (["gzip"], IMAGE, IMAGE),  # named, but not applied
        (["gzip"], TIFF, TIFF),
        (["br"], IMAGE, IMAGE),
        (["br"], b"\x0b\x02\x80hello\x03", "unsupported_encoding"),
        (["zstd"], b"\x28\xb5\x2f\xfd" + bytes(20), "unsupported_encoding"),
        (["aws-chunked"], TIFF, TIFF),
        (["UTF-8"], TIFF, TIFF),
        (["gzip"], gzip.compress(TIFF)[:-20], "download_failed"),
        (["gzip, " * 200 + "gzip"], gzip.compress(TIFF), "unsupported_encoding"),
        (["gzip"], gzip.compress(TIFF)[:50] + bytes(30) + gzip.compress(TIFF)[80:], "download_failed"),
        (["gzip"], gzip.compress(bytes(100_001)), "too_many_bytes"),
        (["gzip"], gzip.compress(bytes(100_000)), bytes(100_000)),
        (["gzip, gzip"], gzip.compress(gzip.compress(bytes(50_000_000))), "too_many_bytes"),
        (["gzip"], b"", b""),
    ],
)
def test_a_coded_body_is_decoded_or_named(server: ImageServer, codings: list[str], body: bytes, expected: bytes | str) -> None:
    server.replies = {"/x": (200, [("Content-Encoding", coding) for coding in codings], body)}
    assert fetch([f"{server.url}/x"]) == [expected]


def test_what_is_no_http_is_not_shown() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.listen()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/"

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.sendall(b"-ERR the password is hunter2\r\n")
                connection.shutdown(socket.SHUT_WR)
                connection.recv(10_000)

        async def both() -> list[bytes | RowRefused]:
            answering = asyncio.to_thread(answer)
            fetching = asyncio.to_thread(fetch_all, [url], replace(FAST, attempts=1), 1000, 1000)
            return (await asyncio.gather(fetching, answering))[0]

        [found] = asyncio.run(both())
    assert isinstance(found, RowRefused) and found.reason == "download_failed" and "hunter2" not in found.detail


PRIVATE = """
127.0.0.1 127.8.9.10 0.0.0.0 10.1.2.3 172.16.0.1 192.168.1.1 169.254.169.254 100.100.100.200 192.0.0.192 192.0.2.1
198.18.0.1 224.0.0.1 240.0.0.1 255.255.255.255 168.63.129.16 ::1 :: fe80::1%eth0 fec0::1 fd00:ec2::254 ff02::1 ::ffff:127.0.0.1 
::127.0.0.1 ::ffff:169.254.169.254 64:ff9b::7f00:1 64:ff9b::a9fe:a9fe 2002:7f00:1:: 2002:a00:1::1 2001:db8::1 2001::1
3fff::1 100::1 5f00::1"""
PUBLIC = "1.1.1.1 8.8.8.8 172.32.0.1 100.128.0.1 2606:4700::1111 ::ffff:8.8.8.8 64:ff9b::808:808 2002:808:808::1"


def test_addresses() -> None:
    assert [address for address in PRIVATE.split() if is_public(address)] == []
    assert [address for address in PUBLIC.split() if not is_public(address)] == []


HOSTS = """
127.0.0.1 localhost 2130706433 0177.0.0.1 0x7f.1 0x7f000001 127.1 0 0.0.0.0 [::1] [::] [::ffff:127.0.0.1] １２７.0.0.1
127.0.0.1. u:p@127.0.0.1"""


def test_special_addresses_only_if_they_are_allowed(server: ImageServer) -> None:
    port = server.server_address[1]
    server.replies = {"/x": (200, [], IMAGE)}
    server.answers.clear()
    urls = [f"http://{host}:{port}/x" for host in HOSTS.split()]
    found = fetch_all(urls, STRICT, 1000, 1000)
    assert {found.reason if isinstance(found, RowRefused) else found for found in found} == {"private_address"}
    assert all("allow_private true" in refused.detail for refused in found if isinstance(refused, RowRefused))
    assert not server.answers, "it was asked"
    assert fetch(urls[:2]) == [IMAGE, IMAGE]


def test_names_and_redirects_that_lead_to_special_addresses(server: ImageServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The address of the very connection is checked, so a name may not change between two look-ups."""
    port = server.server_address[1]
    look_up = socket.getaddrinfo
    addresses = {"inside": ["127.0.0.1"], "both": ["::1", "127.0.0.1"], "mixed": ["192.88.98.1", "127.0.0.1"]}

    def lookup(host: str, *given: object, **options: object) -> list[tuple[object, ...]]:
        found = addresses.get(host.removesuffix(".example"), [host])
        return [result for address in found for result in look_up(address, *given, **options)]

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    server.replies = {"/x": (200, [], IMAGE), "/from": (302, [("Location", f"http://inside.example:{port}/x")], b"")}
    server.answers.clear()
    assert fetch([f"http://{host}.example:{port}/x" for host in ("inside", "both")], STRICT) == ["private_address"] * 2
    [mixed] = fetch([f"http://mixed.example:{port}/x"], replace(STRICT, timeout=0.3, attempts=1))
    assert isinstance(mixed, str) and not server.answers, "the address that is private was asked"
    assert fetch([f"http://inside.example:{port}/from"], FAST) == [IMAGE]

    monkeypatch.setattr("pipelines.ingest.addresses.is_public", lambda address: len(server.answers) < 1)
    server.answers.clear()  # the first host is "public", and redirects to one that is not
    assert fetch([f"http://127.0.0.1:{port}/from"], replace(STRICT, connections=1)) == ["private_address"]
    assert set(server.answers) == {"/from"}


def test_a_name_that_does_not_exist_is_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def lookup(host: str, *given: object, **options: object) -> list[tuple[object, ...]]:
        asked.append(host)
        raise socket.gaierror(socket.EAI_NONAME if host == "gone.example" else socket.EAI_AGAIN, "as resolvers say")

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    assert fetch(["http://gone.example/x", "http://later.example/x"]) == ["no_such_host", "download_failed"]
    assert sorted(asked) == ["gone.example", "later.example", "later.example"]
    assert {"no_such_host", "download_failed", "silent_host"} <= retryable_reasons(FAST)


def test_a_host_that_never_answers_is_given_up_and_no_other(server: ImageServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its queue of connections is full, and further ones are dropped, as by a firewall. The other host is asked to the end."""
    monkeypatch.setattr("pipelines.ingest.web.SILENT_SECONDS", 0.1)
    config = replace(FAST, timeout=0.4, attempts=1)
    with socket.socket() as deaf, ExitStack() as waiting:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(0)
        for _ in range(4):
            opened = waiting.enter_context(socket.socket())
            opened.setblocking(False)
            opened.connect_ex(deaf.getsockname())
        urls = [f"http://127.0.0.1:{deaf.getsockname()[1]}/{n}" for n in range(60)]
        found = Counter(fetch(urls, config))
        assert found["timeout"] + found["silent_host"] == 60 and 16 <= found["timeout"] <= 16 + config.connections_per_host
    server.answers.clear()
    assert Counter(fetch([f"{server.url}/paused/gone?{n}" for n in range(60)], config)) == {"http_404": 60}


def test_no_url() -> None:
    for url in (
        "http://",
        "http:///x",
        "http://h:99999/",
        "http://h:x/",
        "http://[::1/",
        "http://a\u200bb.com/",
        "http://h\\@e/",
    ):
        assert fetch([url]) == ["bad_url"], url
    assert str(as_listed("HTTP://Häuser.DE/ü#é")) == "http://xn--huser-gra.de/%C3%BC#%C3%A9"


def test_bytes_on_their_way_are_bounded_and_all_arrive(server: ImageServer) -> None:
    """24 large images at once, of which three fit. Half of them come without their length."""
    size = 3 * 2**20
    chunked = b"%x\r\n%s\r\n0\r\n\r\n" % (size, bytes(size))
    plain: Reply = (200, [], bytes(size))
    server.replies = {f"/{n}": plain if n % 2 else (200, [("Transfer-Encoding", "chunked")], chunked) for n in range(24)}
    config = replace(FAST, connections=24, connections_per_host=24, bytes_in_flight=10 * 2**20, timeout=20)
    least = []
    take = Memory.take

    async def watched(memory: Memory, count: int) -> int:
        taken = await take(memory, count)
        least.append(memory.free)
        return taken

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Memory, "take", watched)
        found = fetch([f"{server.url}/{n}" for n in range(24)], config, max_bytes=size)
    assert found == [bytes(size)] * 24
    assert len(least) == 24 and 0 <= min(least) < 2**21


def test_waiting_for_memory_is_no_timeout() -> None:
    async def wait() -> None:
        memory = Memory(10, 100)
        taken = await memory.take(8)
        waiting = [asyncio.create_task(memory.take(count)) for count in (20, 1)]
        await asyncio.sleep(0.01)
        assert not any(task.done() for task in waiting), "who asks first is served first"
        await memory.give_back(taken)
        assert await waiting[0] == 10
        await memory.give_back(10)
        assert await waiting[1] == 1

    asyncio.run(wait())


def test_a_shard_takes_what_it_has_room_for(server: ImageServer) -> None:
    server.replies = {f"/{n}": (200, [], bytes(400)) for n in range(6)}
    found = fetch([f"{server.url}/{n}" for n in range(6)], replace(FAST, connections=1), total=1000)
    assert found == [bytes(400)] * 2 + ["shard_full"] * 4

"""Who may use the search server: tokens, names of hosts, pages of other sites; and the mistakes of its command line."""

import socket

import pytest

from c4c.retrieval.serve.options import ServeOptions, bind, is_loopback
from tests.c4c.retrieval import stand_in
from tests.c4c.retrieval.serving import Served, detail

pytestmark = pytest.mark.slow

TOKEN = "a-token-of-good-length"
HTML = {"accept": "text/html,*/*"}


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    return stand_in.make(tmp_path_factory.mktemp("guard"), {"a.mp4": (["red"], {})})


@pytest.fixture(scope="module")
def plain(index):
    it = Served(index)
    with it:
        yield it


@pytest.fixture(scope="module")
def open_to_others(index):
    it = Served(index, host="0.0.0.0", token=TOKEN)
    with it:
        yield it


@pytest.fixture
def guarded(open_to_others):
    open_to_others.client.cookies.clear()
    return open_to_others


# ---- tokens ----


def test_without_the_token_nothing_is_told(guarded):
    for address in (
        "/api/search?q=red",
        "/api/info",
        "/metrics",
        "/openapi.json",
        "/media/x",
        "/nothing",
        "/page/app.js",
    ):
        answer = guarded.get(address)
        assert answer.status_code == 401 and "a.mp4" not in answer.text
        assert "token" in detail(answer) and answer.headers["www-authenticate"] == "Bearer"
    assert guarded.client.post("/api/search/example", files={"file": b"x"}).status_code == 401
    for address in ("/healthz", "/readyz", "/page/style.css"):
        assert guarded.get(address).status_code == 200
    page = guarded.get("/", headers=HTML)
    assert page.status_code == 401 and "needs a token" in page.text and TOKEN not in page.text


def test_bearer(guarded):
    assert guarded.get("/api/info", headers={"authorization": f"Bearer {TOKEN}"}).status_code == 200
    assert guarded.get("/api/info", headers={"authorization": f"bearer {TOKEN}"}).status_code == 200
    for wrong in (f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}", "Bearer", "Bearer ", f"Basic {TOKEN}", TOKEN, "Bearer ä"):
        assert guarded.get("/api/info", headers={"authorization": wrong.encode()}).status_code == 401, wrong


def test_the_token_in_the_address_becomes_a_cookie(guarded):
    answer = guarded.get(f"/?token={TOKEN}&q=a%20b%26c", headers=HTML)
    assert (answer.status_code, answer.headers["location"]) == (303, "./?q=a+b%26c")
    cookie = answer.headers["set-cookie"]
    assert "HttpOnly" in cookie and "SameSite=Strict" in cookie and "Path=/" in cookie and TOKEN not in cookie
    assert "Secure" not in cookie
    assert guarded.get("/").status_code == 200 and guarded.get("/api/info").status_code == 200  # the client keeps it
    guarded.client.cookies.clear()
    for wrong in (cookie.split(";")[0] + "x", cookie.split("=")[0] + "=", cookie.split("=")[0] + f"={TOKEN}", "c4c=1"):
        assert guarded.get("/api/info", headers={"cookie": wrong}).status_code == 401, wrong
    answer = guarded.get("/?token=wrong", headers=HTML)
    assert answer.status_code == 401 and "not the server" in answer.text and "set-cookie" not in answer.headers
    assert guarded.get(f"/docs?token={TOKEN}").headers["location"] == "docs"
    assert guarded.get(f"/x%0d%0aSet-Cookie:%20a=b?token={TOKEN}").headers["location"] == "x%0D%0ASet-Cookie%3A%20a%3Db"
    assert (
        guarded.get(f"//evil.example/javascript:alert(1)?token={TOKEN}").headers["location"]
        == "javascript%3Aalert%281%29"
    )


def test_a_cookie_over_https_is_for_https_alone(guarded):
    answer = guarded.client.get(f"https://example.org/?token={TOKEN}")
    assert "; Secure" in answer.headers["set-cookie"]


def test_any_host_with_a_token(guarded):
    headers = {"authorization": f"Bearer {TOKEN}", "host": "search.example.org"}
    assert guarded.get("/api/info", headers=headers).status_code == 200


# ---- hosts and origins ----


def test_names_that_were_made_to_mean_this_machine(plain):
    for host in (
        "evil.example",
        "evil.example:8000",
        "127.0.0.1.evil.example",
        "localhost.evil.example",
        "10.0.0.1",
        "",
        "[::2]:8000",
    ):
        answer = plain.get("/api/info", headers={"host": host})
        assert answer.status_code == 421 and "localhost" in detail(answer), host
    for host in ("localhost", "LOCALHOST:9", "127.0.0.1:8000", "127.1.2.3", "[::1]:8000", "[::1]"):
        assert plain.get("/api/info", headers={"host": host}).status_code == 200, host


def test_pages_of_other_sites(plain):
    picture = {"file": ("x", stand_in.jpeg((200, 40, 40)))}

    def upload(**headers):
        return plain.client.post(
            "/api/search/example", files=picture, headers={k.replace("_", "-"): v for k, v in headers.items()}
        ).status_code

    assert upload() == 200  # a program
    assert upload(origin="http://127.0.0.1:8000") == 200
    assert upload(origin="https://search.example", sec_fetch_site="same-origin") == 200  # behind a proxy
    for origin in (
        "https://evil.example",
        "null",
        "http://127.0.0.1:9000",
        "http://127.0.0.1:8000.evil.example",
        "http://[",
        "",
    ):
        assert upload(origin=origin) == 403, origin
    for site in ("cross-site", "same-site"):
        assert upload(sec_fetch_site=site) == 403
        assert upload(sec_fetch_site=site, sec_fetch_mode="navigate", origin="null") == 403
        assert (
            plain.get("/api/search?q=a", headers={"sec-fetch-site": site, "sec-fetch-mode": "no-cors"}).status_code
            == 403
        )
    assert (
        plain.get("/?q=a", headers={"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}).status_code == 200
    )  # a link


def test_under_a_path_of_a_proxy(index):
    it = Served(index, root_path="/find/videos", token=TOKEN)
    with it:
        answer = it.get(f"/?token={TOKEN}")  # the proxy takes the path away
        assert "Path=/find/videos;" in answer.headers["set-cookie"]
        it.client.headers["authorization"] = f"Bearer {TOKEN}"
        for address in (
            "/api/info",
            "/find/videos/api/info",
            "/page/app.js",
            "/find/videos/page/app.js",
            "/find/videos/",
        ):
            assert it.get(address).status_code == 200, address
        assert it.get("/openapi.json").json()["servers"] == [{"url": "/find/videos"}]


# ---- the command line ----


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ({"index": ""}, "index is not given"),
        ({"port": -1}, "--port -1"),
        ({"port": 65536}, "--port 65536"),
        ({"host": ""}, "--host is empty"),
        ({"device": "tpu"}, "--device tpu"),
        ({"max_upload_mb": 0}, "--max-upload-mb 0"),
        ({"root_path": "search"}, "--root-path search"),
        ({"root_path": "/a/../b/"}, "--root-path"),
        ({"root_path": "/a\nb"}, "--root-path"),
        ({"token": "short"}, "--token"),
        ({"token": "with spaces in between"}, "--token"),
        ({"token": "ä" * 20}, "--token"),
    ],
)
def test_mistakes(words, says):
    with pytest.raises(ValueError, match=says):
        ServeOptions(**{"index": "my.index"} | words)


def test_a_token_is_made_where_others_can_reach_the_server():
    assert ServeOptions(index="x").with_token().token == ""
    made = [ServeOptions(index="x", host="0.0.0.0").with_token().token for _ in range(2)]
    assert len(set(made)) == 2 and min(map(len, made)) >= 20
    assert ServeOptions(index="x", host="0.0.0.0", token=TOKEN).with_token().token == TOKEN


def test_which_hosts_are_this_machine():
    for host in ("127.0.0.1", "127.9.9.9", "::1", "[::1]", "localhost"):
        assert is_loopback(host)
    for host in ("0.0.0.0", "::", "192.168.1.1", "example.org", "", "localhost.example.org", "127.0.0.1.example.org"):
        assert not is_loopback(host)


def test_a_port_that_is_taken():
    with bind("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(OSError, match=f"port {port} of 127.0.0.1 is taken: choose another one, --port \\d+"):
            bind("127.0.0.1", port)
    with socket.create_server(("127.0.0.1", 0)) as other, pytest.raises(OSError, match="is taken"):
        bind("localhost", other.getsockname()[1])
    with pytest.raises(OSError, match="no address is known"):
        bind("no.such.host.invalid", 8000)
    with pytest.raises(OSError, match=r"--host 192\.0\.2\.1"):
        bind("192.0.2.1", 8000)

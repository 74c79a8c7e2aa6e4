"""The search server as a process: signals, many clients, clients that are slow or rude, and the mistakes of its command line."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from tests.c4c.retrieval import stand_in
from tests.launch.runs import ROOT, own_environment
from tests.launch.servers import ServerProcess

pytestmark = pytest.mark.launch
TOKEN = "a-token-of-good-length"


@pytest.fixture(scope="module")
def index(tmp_path_factory) -> Path:
    """Two small videos, and one of 2 GiB: nearly all of it a hole after its end, as players see it."""
    folder = tmp_path_factory.mktemp("serve")
    index = stand_in.make(folder, {name: stand_in.FILMS[name] for name in ("scenes/red.mp4", "old/green.avi")})
    path = stand_in.film(folder / "videos" / "large.mp4", ["blue"])
    with open(path, "ab") as file:
        file.truncate(2 << 30)
    stand_in.StandIn(index).store.append([stand_in.indexed(path.parent, path, ["blue"])])
    return index


def full_pipe() -> tuple[int, int]:
    """Whoever writes to it waits until it is read."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, b"." * 4096)
    os.set_blocking(writer, True)
    return reader, writer


def folder_of(server: ServerProcess) -> Path:
    """Where its temporary files are."""
    files = [Path(file.path) for file in psutil.Process(server.process.pid).open_files()]
    (folder,) = {file.parent for file in files if file.name == ".lock" and file.parent.name.startswith("c4c-serve-")}
    return folder


@pytest.fixture(scope="module")
def killed(index, tmp_path_factory):
    """(the folder, the children) of a server that was killed. Its index went while it served, and nobody read its log."""
    lost = shutil.copytree(index, tmp_path_factory.mktemp("lost") / "my.index")
    reader, writer = full_pipe()
    with ServerProcess(lost, "--token", TOKEN, stderr=writer) as it:
        address = f"http://127.0.0.1:{it.port}/?token={TOKEN}"
        assert it.line == f"{lost}: 3 segments of 3 videos. Open {address} (Ctrl-C ends it)\n"
        assert it.get("/api/info")[0] == 401
        assert it.get("/api/info", Authorization=f"Bearer {TOKEN}")[0] == 200
        shutil.rmtree(lost)
        assert it.get("/api/search?q=red", Authorization=f"Bearer {TOKEN}")[0] == 503
        assert it.get("/healthz", timeout=20) == (200, b"ok\n")  # though the log takes nothing
        children = psutil.Process(it.process.pid).children(recursive=True)
        assert len(children) == 2  # that decode
        left = folder_of(it)
        it.end(signal.SIGKILL)
    os.close(reader)
    os.close(writer)
    return left, children


@pytest.fixture(scope="module")
def server(index, killed):
    """Ended by Ctrl-C while clients are connected; it sweeps away what the killed one left behind."""
    left, children = killed
    assert left.exists()
    with ServerProcess(index) as it:
        assert it.line.endswith(f"Open http://127.0.0.1:{it.port}/ (Ctrl-C ends it)\n") and not left.exists()
        children += psutil.Process(it.process.pid).children(recursive=True)
        mine = folder_of(it)
        yield it
        with it.connect(), it.connect() as asking:
            asking.sendall(b"GET /media/x HTTP/1.1\r\nHost: localhost\r\n")  # not finished
            code, out, err, _ = it.end(signal.SIGINT)
    assert (code, out, err) == (0, "", "")  # nothing that was tried here left a traceback
    assert not mine.exists()
    _, alive = psutil.wait_procs(children, 10)
    assert not alive  # they end when nobody has jobs for them, too


def test_200_clients(server):
    def ask(i: int) -> list[str]:
        status, body = server.get(f"/api/search?q=red%20{i % 20}&k=2", timeout=60)
        assert status == 200
        return [result["video"] for result in json.loads(body)["results"]]

    with ThreadPoolExecutor(200) as pool:
        answers = list(pool.map(ask, range(400)))
    assert answers == [["scenes/red.mp4", "old/green.avi"]] * 400


def test_slow_clients_do_not_hold_up_others(server, index):
    """200 that send a letter of their request now and then, 50 that read nothing of a video."""
    result = json.loads(server.get("/api/search?q=red&k=1")[1])["results"][0]
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(server.connect()) for _ in range(200)]
        readers = [stack.enter_context(server.connect()) for _ in range(50)]
        for reader in readers:
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            reader.sendall(f"GET /{result['media']} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        for letter in b"GET /api":
            for client in slow:
                client.sendall(bytes([letter]))
            assert server.get("/api/search?q=red&k=1", timeout=20)[0] == 200
        assert server.get("/" + result["media"])[0] == 200


def test_an_upload_that_stops_holds_up_nobody(server):
    with contextlib.ExitStack() as stack:
        head = b"POST /api/search/example HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=b\r\nContent-Length: 5000\r\n\r\n"
        stopped = [stack.enter_context(server.connect()) for _ in range(4)]
        for client in stopped:
            client.sendall(head + b"--b\r\nContent-Disposition: form-data; name=")
        deadline = time.monotonic() + 30
        while True:  # until all four are being received: a fifth is told so
            with server.connect() as fifth:
                fifth.sendall(head.replace(b"5000", b"0"))
                line = _everything(fifth)
            if b" 503 " in line.split(b"\r\n")[0] or time.monotonic() > deadline:
                break
        assert b"Too many files" in line
        assert server.get("/api/search?q=red")[0] == 200
    deadline = time.monotonic() + 30
    while b" 503 " in line and time.monotonic() < deadline:  # they are gone: there is room again
        with server.connect() as fifth:
            fifth.sendall(head.replace(b"5000", b"0"))
            line = _everything(fifth).split(b"\r\n")[0]
    assert b" 400 " in line


def _everything(client: socket.socket) -> bytes:
    """What comes until the server closes the connection, or the answer's body has ended."""
    answer = b""
    with contextlib.suppress(ConnectionError):
        while data := client.recv(1 << 16):
            answer += data
            head, _, body = answer.partition(b"\r\n\r\n")
            length = re.search(rb"content-length: (\d+)", head)
            if length and len(body) >= int(length[1]):
                break
    return answer


HOST = b" HTTP/1.1\r\nHost: localhost\r\n"
RUDE = [  # and how each is answered; 0: by closing the connection, too
    (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100), {400}),  # a TLS hello
    (b"GET / HTTP/1.1\r\n\r\n", {400}),
    (b"NONSENSE\r\n\r\n", {400}),
    (b"\0" * 1000, {400}),
    (b"GET /" + HOST + b"X: " + b"x" * 400_000 + b"\r\n\r\n", {0, 400, 431}),
    (b"GET /" + HOST + b"".join(b"X%d: x\r\n" % i for i in range(9000)) + b"\r\n", {400, 431}),
    (b"GET /" + b"a" * 400_000 + HOST + b"\r\n", {0, 400, 414}),
    (b"GET /api/search?q=" + b"a" * 200_000 + HOST + b"\r\n", {414}),
    (b"GET /" + b"%00" * 100 + HOST + b"\r\n", {404}),
    (b"GET /../../../../etc/passwd" + HOST + b"\r\n", {404}),
    (b"GET /media/..%2f..%2f..%2fetc%2fpasswd" + HOST + b"\r\n", {404}),
    (b"GET /page/%2e%2e/%2e%2e/%2e%2e/__init__.py" + HOST + b"\r\n", {404}),
    (b"GET http://evil.example/ HTTP/1.1\r\nHost: evil.example\r\n\r\n", {421}),
    (b"GET / HTTP/1.1\r\nHost: a\r\nHost: localhost\r\n\r\n", {400}),
    (b"CONNECT evil.example:443" + HOST + b"\r\n", {404}),
    (b"POST /api/search/example" + HOST + b"Content-Length: -5\r\n\r\n", {400}),
    (
        b"POST /api/search/example" + HOST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        {400, 415},
    ),
    (b"POST /api/search/example" + HOST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", {400}),
    (b"GET /" + HOST + b"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: x\r\n\r\n", {200}),
    (b"GET /media/AAAA" + HOST + b"Range: bytes=" + b"0-1," * 5000 + b"\r\n\r\n", {404}),
    (b"GET /api/search?q=%ff%fe&k=1" + HOST + b"\r\n", {200, 422}),
    (b"GET /api/search?q=a&q=b&k=1&k=2" + HOST + b"\r\n", {200}),
]


@pytest.mark.parametrize("place", range(len(RUDE)))
def test_rude_requests(server, place):
    """Each gets an answer or a closed connection; none gets a file, and the server goes on."""
    request, right = RUDE[place]
    with server.connect() as client:
        with contextlib.suppress(ConnectionError):
            client.sendall(request)
            if not request.endswith(b"\r\n\r\n"):
                client.shutdown(socket.SHUT_WR)
        answer = _everything(client)
    assert b"root:" not in answer and b"import " not in answer and str(ROOT).encode() not in answer
    assert (int(answer.split(b" ")[1]) if answer else 0) in right
    assert server.get("/healthz") == (200, b"ok\n")


def test_clients_that_leave_in_the_middle(server):
    result = json.loads(server.get("/api/search?q=green&k=1")[1])["results"][0]
    for address in (f"/{result['media']}", "/api/search?q=somewhere%20else", f"/api/play/{result['id']}?clip=true"):
        for _ in range(5):
            with server.connect() as client:
                client.sendall(f"GET {address} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    assert server.get("/" + result["media"])[0] == 200


def test_a_large_file_is_not_read_for_a_client_that_has_left(server):
    result = json.loads(server.get("/api/search?q=blue&k=1")[1])["results"][0]
    assert result["video"] == "large.mp4"
    with server.connect() as client:
        client.sendall(f"GET /{result['media']} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        assert client.recv(4096).startswith(b"HTTP/1.1 200")
    read = psutil.Process(server.process.pid).io_counters
    before = read().read_chars
    assert server.get("/healthz")[0] == 200
    time.sleep(1)
    assert read().read_chars - before < 256 << 20


# ---- the command ----


def command(*words: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "launch/serve.py", *words],
        cwd=ROOT,
        env=own_environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stdout, done.stderr


def test_mistakes_of_the_command_line(tmp_path, index):
    (tmp_path / "a.mp4").write_bytes(b"x")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for words, says in (
            ([str(tmp_path / "no.index")], "there is no index at"),
            ([__file__], "it is a file"),
            ([str(tmp_path)], f"{tmp_path} is no index: it is a folder of other things"),
            ([str(index), "--ckpt", "/nope"], "--ckpt /nope: there is no such file or folder"),
            ([str(index), "--ckpt", ""], "--ckpt is empty"),
            ([str(index), "--port", str(port)], f"port {port} of 127.0.0.1 is taken: choose another one, --port "),
            ([str(index), "--token", ""], "--token is empty"),
        ):
            code, out, err = command(*words)
            assert (code, out) == (1, ""), err
            assert err.startswith("error: ") and err.count("\n") == 1 and says in err


def test_mistakes_import_nothing_heavy(tmp_path):
    code = (
        "import runpy, sys; sys.argv = sys.argv[1:]\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as ended: print(ended.code, [m for m in ('torch', 'lancedb', 'fastapi', 'uvicorn', 'open_clip') if m in sys.modules])"
    )
    for words, status in ((["--help"], 0), (["x", "--port", "-1"], 1), ([str(tmp_path / "no.index")], 1)):
        done = subprocess.run(
            [sys.executable, "-c", code, "launch/serve.py", *words],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.stdout.splitlines()[-1] == f"{status} []", (words, done.stdout, done.stderr)

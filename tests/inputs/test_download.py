"""Fetching and unpacking archives, from servers and zips that the tests make."""

import hashlib
import http.server
import io
import os
import stat
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from made_images import make_tiny

from inputs import image_sets
from runtime.errors import InputError


class Server:
    """Serves `content`; the i-th answer breaks off after `breaks[i]` bytes. `seen` holds the Range of each request."""

    def __init__(self, content, breaks=(), ranges=True):
        served, breaks = self, list(breaks)
        self.content, self.seen = content, []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                asked = self.headers["Range"]
                served.seen.append(asked)
                if served.content is None:
                    return self.send_error(404)
                start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and ranges else 0
                if asked and start >= len(served.content):
                    return self.send_error(416)
                body = served.content[start:]
                self.send_response(206 if asked and ranges else 200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body[: breaks.pop(0) if breaks else None])

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/tiny-imagenet-200.zip"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


def md5(content):
    return hashlib.md5(content).hexdigest()


CONTENT = np.random.default_rng(1).bytes(200_000)


def test_fetch_shows_a_bar(tmp_path, capsys):
    with Server(CONTENT) as server:
        image_sets.fetch(server.url, tmp_path / "new" / "file", md5(CONTENT))
    assert (tmp_path / "new" / "file").read_bytes() == CONTENT and server.seen == [None]
    assert "downloading: 100%" in capsys.readouterr().err


def test_fetch_resumes_a_broken_transfer(tmp_path):
    with Server(CONTENT, breaks=[70_000, 50_000]) as server:
        image_sets.fetch(server.url, tmp_path / "file", md5(CONTENT))
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert server.seen == [None, "bytes=70000-", "bytes=120000-"]
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_fetch_goes_on_in_a_later_run(tmp_path):
    with Server(CONTENT, breaks=[9_000] * 2) as server:
        with pytest.raises(InputError, match=r"download failed \(the transfer breaks off\); the same command goes on"):
            image_sets.fetch(server.url, tmp_path / "file", md5(CONTENT), tries=2)
        assert (tmp_path / "file.part").read_bytes() == CONTENT[:18_000] and not (tmp_path / "file").exists()
        image_sets.fetch(server.url, tmp_path / "file", md5(CONTENT))
    assert (tmp_path / "file").read_bytes() == CONTENT and server.seen[-1] == "bytes=18000-"


def test_fetch_starts_over_where_ranges_are_not_served(tmp_path):
    with Server(CONTENT, breaks=[70_000], ranges=False) as server:
        image_sets.fetch(server.url, tmp_path / "file", md5(CONTENT))
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_fetch_of_a_part_that_is_whole(tmp_path):
    (tmp_path / "file.part").write_bytes(CONTENT)
    with Server(CONTENT) as server:
        image_sets.fetch(server.url, tmp_path / "file", md5(CONTENT))
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_fetch_refuses_a_wrong_checksum(tmp_path):
    with (
        Server(CONTENT) as server,
        pytest.raises(InputError, match=rf"^{server.url}: md5 is {md5(CONTENT)}, should be 0+; removed"),
    ):
        image_sets.fetch(server.url, tmp_path / "file", "0" * 32)
    assert list(tmp_path.iterdir()) == []


def test_fetch_of_nothing(tmp_path):
    with Server(None) as server, pytest.raises(InputError, match=r"download failed \(HTTP Error 404: Not Found\)"):
        image_sets.fetch(server.url, tmp_path / "file", md5(CONTENT))
    with pytest.raises(InputError, match=r"download failed .*refused"):  # the server is gone
        image_sets.fetch(server.url, tmp_path / "file", md5(CONTENT))


def zipped(*members):
    """A zip of (name or ZipInfo, content) members."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, text in members:
            archive.writestr(name, text)
    return content.getvalue()


def serve_tiny(tmp_path, monkeypatch):
    source = make_tiny(tmp_path / "source")
    files = [path for path in sorted(source.rglob("*")) if path.is_file()]
    content = zipped(*[(f"tiny-imagenet-200/{path.relative_to(source)}", path.read_bytes()) for path in files])
    server = Server(content, breaks=[500])
    monkeypatch.setattr(image_sets, "TINY_URL", server.url)
    monkeypatch.setattr(image_sets, "TINY_MD5", md5(content))
    return server


def test_tiny_imagenet_download(tmp_path, monkeypatch):
    with serve_tiny(tmp_path, monkeypatch) as server:
        opened = image_sets.open_set("tiny-imagenet", tmp_path / "to", download=True)
        again = image_sets.open_set("tiny-imagenet", tmp_path / "to", download=True)
        assert server.seen == [None, "bytes=500-"]  # what is there is not fetched again
    assert len(opened) == 6 and torch.equal(opened.images(torch.arange(6)), again.images(torch.arange(6)))
    assert os.listdir(tmp_path / "to") == ["tiny-imagenet-200"]


def link(name):
    member = zipfile.ZipInfo(name)
    member.create_system, member.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    return member


@pytest.mark.parametrize("name", ["../outside", "set/../../outside", "/tmp/outside", link("set/link")])
def test_unpack_makes_no_links_and_nothing_outside_its_folder(tmp_path, name):
    (tmp_path / "box").mkdir()
    archive = tmp_path / "box" / "a.zip"
    archive.write_bytes(zipped(("set/fine", "1"), (name, "/etc/passwd")))
    image_sets.unpack(archive, target := tmp_path / "box" / "set")
    assert not Path("/tmp/outside").exists()
    assert {path.parent for path in tmp_path.rglob("*") if path != archive} <= {tmp_path, archive.parent, target}
    assert not any(path.is_symlink() for path in tmp_path.rglob("*")) and (target / "fine").read_text() == "1"


def test_unpack_of_damaged_or_other_archives(tmp_path):
    archive = tmp_path / "a.zip"
    whole = zipped(("set/one", "1" * 100), ("set/two", "2" * 100))
    for content in (
        b"no zip",
        whole[: len(whole) // 2],
        whole.replace(b"2" * 100, b"3" * 100),
        zipped(("other/x", "")),
    ):
        archive.write_bytes(content)
        with pytest.raises(InputError, match=r"a\.zip: cannot be unpacked"):
            image_sets.unpack(archive, tmp_path / "set")
        assert list(tmp_path.iterdir()) == [archive]
    archive.write_bytes(whole)
    image_sets.unpack(archive, tmp_path / "set")
    assert sorted(path.name for path in (tmp_path / "set").iterdir()) == ["one", "two"]

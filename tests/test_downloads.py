"""Downloads from a server of our own: interrupted, damaged, without a network, and gone on with."""

import hashlib
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from conftest import pretrain_args

from running import downloads

CONTENT = bytes(range(256)) * 1000


class Handler(BaseHTTPRequestHandler):
    """Serves server.content, from where a Range asks for it; hangs up after server.cut bytes."""

    def do_GET(self):
        self.server.ranges.append(self.headers['Range'])
        first = int(re.search(r'\d+', self.headers['Range'] or '0')[0])
        content = self.server.content[first:]
        self.send_response(206 if first else 200)
        self.send_header('Content-Length', str(len(content)))
        self.end_headers()
        self.wfile.write(content[: self.server.cut])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    """A server on the loopback interface that has the weights; .ranges: what was asked for."""
    with ThreadingHTTPServer(('127.0.0.1', 0), Handler) as server:
        server.content, server.cut, server.ranges = CONTENT, None, []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(downloads, 'VGG16', f'http://127.0.0.1:{server.server_port}/vgg16-397923af.pth')
        monkeypatch.setattr(downloads, 'VGG16_SHA256', hashlib.sha256(CONTENT).hexdigest())
        yield server
        server.shutdown()


def test_a_download_appears_when_it_is_complete_and_is_not_repeated(server, tmp_path):
    for _ in range(2):
        assert downloads.fetch_vgg16(tmp_path).read_bytes() == CONTENT
    assert server.ranges == [None]
    assert [path.name for path in tmp_path.glob('[!.]*')] == ['vgg16-397923af.pth']


def test_an_interrupted_download_goes_on_where_it_stopped(server, tmp_path):
    server.cut = 2**17
    with pytest.raises(ConnectionError, match='goes on where it stopped'):
        downloads.fetch_vgg16(tmp_path)
    assert not (tmp_path / 'vgg16-397923af.pth').exists()
    server.cut = None
    assert downloads.fetch_vgg16(tmp_path).read_bytes() == CONTENT
    assert server.ranges == [None, 'bytes=131072-']


def test_a_download_that_was_complete_but_not_named_is_taken_without_the_network(server, tmp_path):
    (tmp_path / 'vgg16-397923af.pth.part').write_bytes(CONTENT)
    assert downloads.fetch_vgg16(tmp_path).read_bytes() == CONTENT
    assert server.ranges == []


def test_a_wrong_checksum_removes_the_download_and_the_next_start_is_from_nothing(server, tmp_path):
    server.content = CONTENT[:-1] + b'?'
    with pytest.raises(ValueError, match='its SHA-256 is not'):
        downloads.fetch_vgg16(tmp_path)
    assert list(tmp_path.glob('[!.]*')) == []
    server.content = CONTENT
    assert downloads.fetch_vgg16(tmp_path).read_bytes() == CONTENT
    assert server.ranges == [None, None]


def test_no_network_is_one_line_that_names_the_other_way(data, call, monkeypatch):
    monkeypatch.setattr(downloads, 'VGG16', 'http://127.0.0.1:1/vgg16-397923af.pth')  # nothing listens there
    done = call('pretrain.py', *pretrain_args(data), '--convert', 'vgg16')
    assert (done.code, len(done.err.splitlines())) == (1, 1)
    assert 'http://127.0.0.1:1/' in done.err and '--convert FILE' in done.err


def test_what_was_downloaded_is_converted(server, data, call, tmp_path, monkeypatch):
    torch.save({'features.0.weight': torch.zeros(1)}, tmp_path / 'weights')
    server.content = (tmp_path / 'weights').read_bytes()
    monkeypatch.setattr(downloads, 'VGG16_SHA256', hashlib.sha256(server.content).hexdigest())
    done = call('pretrain.py', *pretrain_args(data), '--convert', 'vgg16')
    assert done.code == 1 and 'vgg16-397923af.pth: conv1_1.weight is' in done.err

"""Peers that shake hands as they should and then misbehave: the backend goes on serving everybody else. Without a token, and over TLS
with it."""

import hashlib
import hmac
import os
import shutil
import socket
import struct
import subprocess
import threading
import time
import unittest

from harness import TOKEN, Backend, ClusterTest, Server, Stream

PROTOCOL_MAJOR = 2
PROMPT = "Once upon a time there was a fox named Lily."
HELLO, HEARTBEAT, RESERVE, LOAD_SLICE, WANT_CHUNKS, CHUNK, OPEN_SESSION, FORWARD, UNLOAD = 1, 4, 6, 8, 10, 11, 13, 15, 17
PROBE, PROBE_RESULT = 21, 22


def varint(n):
    out = b""
    while n > 127:
        out += bytes([n & 127 | 128])
        n >>= 7
    return out + bytes([n])


def message(**fields):
    """A protobuf message of numbered fields: f1=5 (a number), f2=b'...' (bytes)."""
    out = b""
    for name, value in fields.items():
        number = int(name[1:])
        if isinstance(value, bytes):
            out += varint(number << 3 | 2) + varint(len(value)) + value
        else:
            out += varint(number << 3) + varint(value)
    return out


def frame(kind, header=b"", payload=b"", header_bytes=None, payload_bytes=None):
    return struct.pack("<4sHHIQ", b"CRVN", kind, 0, len(header) if header_bytes is None else header_bytes,
                       len(payload) if payload_bytes is None else payload_bytes) + header + payload


def key_of(token):
    """The pre-shared key of a token: HKDF-SHA256 (RFC 5869) without salt."""
    secret = hmac.new(bytes(32), token.encode(), hashlib.sha256).digest()
    return hmac.new(secret, b"caravan rpc psk 1\x01", hashlib.sha256).digest()


def open_tls(port, token):
    """A socket whose bytes the openssl program carries over TLS with the token."""
    near, far = socket.socketpair()
    process = subprocess.Popen(["openssl", "s_client", "-connect", f"127.0.0.1:{port}", "-tls1_3", "-psk_identity", "caravan-rpc-1",
                                "-psk", key_of(token).hex(), "-quiet", "-nocommands"], stdin=far, stdout=far, stderr=subprocess.DEVNULL)
    far.close()
    near.settimeout(10)
    return near, process


class Peer:
    """A connection past its hello."""

    def __init__(self, port, token=None):
        self.process = None
        if token:
            self.socket, self.process = open_tls(port, token)
        else:
            self.socket = socket.create_connection(("127.0.0.1", port), timeout=10)
        self.socket.sendall(frame(HELLO, message(f1=PROTOCOL_MAJOR)))
        assert self.read()[0] == 2

    def read(self):
        """(type, header) of the next frame."""
        head = self.socket.recv(20, socket.MSG_WAITALL)
        assert len(head) == 20, head
        _, kind, _, header_bytes, payload_bytes = struct.unpack("<4sHHIQ", head)
        header = self.socket.recv(header_bytes, socket.MSG_WAITALL) if header_bytes else b""
        for _ in range(payload_bytes):
            self.socket.recv(1)
        return kind, header

    def send(self, data):
        try:
            self.socket.sendall(data)
        except OSError:
            pass  # the backend has had enough

    def is_refused(self):
        """Reads until the backend closes; False when it does not within ten seconds."""
        try:
            while self.socket.recv(65536):
                pass
        except socket.timeout:
            return False
        except OSError:
            pass
        return True

    def close(self):
        self.socket.close()
        if self.process:
            self.process.kill()
            self.process.wait()


SLICE = message(f1=0, f2=1, f3=1, f4=1)
BATCH = struct.pack("<IBBHII", 1, 1, 0, 0, 1, 0) + struct.pack("<iiIiiIB", 1, 0, 0, 0, 1, 0, 2)
ATTACKS = {
    "a header of 4 GiB": frame(LOAD_SLICE, header_bytes=0xFFFFFFFF),
    "a payload of 16 EiB": frame(LOAD_SLICE, payload_bytes=(1 << 64) - 1),
    "a chunk nobody asked for": frame(CHUNK, message(f1=1, f2=bytes(32)), payload_bytes=1 << 62),
    "a batch for no stage": frame(FORWARD, message(f1=1, f2=message(f1=1, f2=1, f3=1), f3=len(BATCH)), BATCH),
    "a session of no stage": frame(OPEN_SESSION, message(f1=7, f2=1, f3=1)),
    "a message of backends": frame(WANT_CHUNKS, message(f1=1, f2=bytes(32))),
    "an unknown message": frame(999),
    "a header that does not parse": frame(RESERVE, b"\xff" * 64),
    "stage 0": frame(RESERVE, message(f1=0, f6=bytes(32))),
    "a manifest of four milliard tensors": frame(LOAD_SLICE, message(f1=1, f3=SLICE), struct.pack("<I", 0xFFFFFFFF) + bytes(64)),
    "metadata longer than the payload": frame(LOAD_SLICE, message(f1=1, f3=SLICE, f5=1 << 31, f6=1 << 63), bytes(64)),
    "a layer to measure without its tensors": frame(33, message(f1=1, f2=message(f3=SLICE))),
    "a layer to measure that is too long to read": frame(33, message(f1=1), payload_bytes=1 << 32),
    "times of a layer from a server": frame(34, message(f1=1)),
    "a second hello": frame(HELLO, message(f1=PROTOCOL_MAJOR)),
    "another magic": b"NVRC" + bytes(60),
    "a question for chunks from a server": frame(29, message(f1=1, f2=bytes(32))),
    "a chunk that a backend gives": frame(32, message(f1=1), payload_bytes=1 << 20),
    "noise": os.urandom(4096),
}


# Frames that end in the middle: of what they are made of.
HALVES = {
    "nothing but the magic": frame(LOAD_SLICE, payload_bytes=1 << 20)[:4],
    "half a frame header": frame(LOAD_SLICE, payload_bytes=1 << 20)[:13],
    "no message header": frame(LOAD_SLICE, header_bytes=1 << 10),
    "half a message header": frame(LOAD_SLICE, message(f1=1, f3=SLICE), header_bytes=1 << 10),
    "all but a byte of a message header": frame(HEARTBEAT, message(f1=300))[:-1],
    "no payload": frame(LOAD_SLICE, message(f1=1, f3=SLICE), payload_bytes=1 << 20),
    "half a payload": frame(LOAD_SLICE, message(f1=1, f3=SLICE), bytes(1 << 19), payload_bytes=1 << 20),
    "all but a byte of a payload": frame(LOAD_SLICE, message(f1=1, f3=SLICE), bytes(1 << 20))[:-1],
    "half a chunk": frame(CHUNK, message(f1=1, f2=bytes(32)), bytes(1 << 20), payload_bytes=4 << 20),
    "half a layer to measure": frame(33, message(f1=1, f2=message(f3=SLICE)), bytes(1 << 10), payload_bytes=1 << 20),
}


class HostilePeers(ClusterTest):
    token = None

    def setUp(self):
        self.backend = self.start(Backend, token=self.token)
        self.server = self.start(Server, [self.backend], token=self.token, extra=("-c", 1024))
        self.expected = self.server.complete(PROMPT, n_predict=200, ignore_eos=True)["content"]

    def unharmed_during(self, attack):
        """Streams an answer while attack() runs; it must be the same as without."""
        stream = Stream(self.server, PROMPT, n_predict=200, ignore_eos=True)
        events = stream.events()
        text = next(events)["content"]
        failures = []

        def run():
            try:
                attack()
            except BaseException as failure:  # shown by the test's own thread
                failures.append(failure)

        thread = threading.Thread(target=run)
        thread.start()
        text += "".join(event["content"] for event in events)
        thread.join(60)
        self.assertFalse(thread.is_alive())
        self.assertEqual(failures, [])
        self.assertEqual(text, self.expected)
        self.assertTrue(self.backend.alive(), self.backend.log)
        self.assertEqual(self.server.complete(PROMPT, n_predict=200, ignore_eos=True)["content"], self.expected)

    def connect(self):
        peer = Peer(self.backend.port, self.token)
        self.addCleanup(peer.close)
        return peer

    def test_wrong_messages_end_only_the_connection_they_came_on(self):
        survived = []

        def attack():
            for name, data in ATTACKS.items():
                peer = self.connect()
                peer.send(data)
                if not peer.is_refused():
                    survived.append(name)
                peer.close()

        self.unharmed_during(attack)
        self.assertEqual(survived, [])

    def test_half_frames_and_silent_peers_are_dropped(self):
        def attack():
            peers = {}
            for name, data in HALVES.items():
                peers[name] = self.connect()
                peers[name].send(data)
            for name, peer in peers.items():
                self.assertTrue(peer.is_refused(), f"a peer that stopped in a frame was waited for: {name}")

        self.unharmed_during(attack)

    def test_floods_harm_nobody_else(self):
        def attack():
            peers = [self.connect() for _ in range(3)]
            deadline = time.monotonic() + 3
            digest = bytes(32)
            flood = [frame(HEARTBEAT, message(f1=1)) * 2000,
                     b"".join(frame(RESERVE, message(f1=1 + i % 64, f3=1 << 62, f6=digest)) for i in range(500)),
                     b"".join(frame(RESERVE, message(f1=1 + i % 64, f3=1 << 10, f6=digest)) + frame(UNLOAD, message(f1=1 + i % 64))
                              for i in range(500))]
            for peer in peers:
                peer.socket.settimeout(0.05)
            while time.monotonic() < deadline:
                for peer, data in zip(peers, flood):
                    peer.send(data)  # and never reads
            for peer in peers:
                peer.close()

        self.unharmed_during(attack)

    def test_probes_of_one_peer_hold_up_no_other_and_end_with_the_backend(self):
        with socket.create_server(("127.0.0.1", 0), backlog=128) as hole:  # takes connections, and says nothing
            probe = message(f1=1, f2=f"127.0.0.1:{hole.getsockname()[1]}".encode(), f3=bytes(16))
            hostile = [self.connect() for _ in range(4)]
            for peer in hostile:
                peer.send(frame(PROBE, probe) * 20)
                for _ in range(4):
                    kind, header = peer.read()
                    self.assertEqual((kind, b"busy" in header), (PROBE_RESULT, True))
            honest = self.connect()
            honest.send(frame(PROBE, message(f1=2, f2=b"127.0.0.1:1", f3=bytes(16))))
            kind, header = honest.read()
            self.assertEqual((kind, b"refused" in header), (PROBE_RESULT, True), header)
            self.assertEqual(self.backend.stop(20), 0, "those of each peer would take half a minute")

    def test_many_connections_without_a_word_keep_nobody_out_for_long(self):
        connections = []

        def attack():
            for _ in range(300):
                try:
                    connections.append(socket.create_connection(("127.0.0.1", self.backend.port), timeout=5))
                except OSError:
                    pass

        self.unharmed_during(attack)
        self.assertGreater(len(connections), 100)
        # They are still open on this side; the backend has let go of them, or does so when their time is over.
        self.assertTrue(self.start(Server, [self.backend], token=self.token).complete("Hello")["content"])
        for connection in connections:
            connection.close()


@unittest.skipUnless(shutil.which("openssl"), "there is no openssl program")
class HostilePeersWithTheToken(HostilePeers):
    token = TOKEN


if __name__ == "__main__":
    unittest.main()

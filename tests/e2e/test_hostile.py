"""Peers that shake hands as they should and then misbehave: the backend goes on serving everybody else."""

import os
import socket
import struct
import threading
import time
import unittest

from harness import Backend, ClusterTest, Server, Stream

PROTOCOL_MAJOR = 2
PROMPT = "Once upon a time there was a fox named Lily."
HELLO, HEARTBEAT, RESERVE, LOAD_SLICE, WANT_CHUNKS, CHUNK, OPEN_SESSION, FORWARD, UNLOAD = 1, 4, 6, 8, 10, 11, 13, 15, 17


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


class Peer:
    """A connection past its hello."""

    def __init__(self, port, greets=True):
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=10)
        if greets:
            self.socket.sendall(frame(HELLO, message(f1=PROTOCOL_MAJOR)))
            head = self.socket.recv(20, socket.MSG_WAITALL)
            _, kind, _, header_bytes, _ = struct.unpack("<4sHHIQ", head)
            assert kind == 2, kind
            self.socket.recv(header_bytes, socket.MSG_WAITALL)

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


class HostilePeers(ClusterTest):
    def setUp(self):
        self.backend = self.start(Backend, token=None)
        self.server = self.start(Server, [self.backend], token=None, extra=("-c", 1024))
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

    def test_wrong_messages_end_only_the_connection_they_came_on(self):
        survived = []

        def attack():
            for name, data in ATTACKS.items():
                peer = Peer(self.backend.port)
                peer.send(data)
                if not peer.is_refused():
                    survived.append(name)
                peer.close()

        self.unharmed_during(attack)
        self.assertEqual(survived, [])

    def test_half_frames_and_silent_peers_are_dropped(self):
        def attack():
            peers = []
            for data in ATTACKS.values():
                peers.append(Peer(self.backend.port))
                peers[-1].send(frame(LOAD_SLICE, payload_bytes=1 << 20)[: 10 + len(data) % 10])
            for peer in peers:
                self.assertTrue(peer.is_refused(), "a peer that stopped in a frame was waited for")

        self.unharmed_during(attack)

    def test_floods_harm_nobody_else(self):
        def attack():
            peers = [Peer(self.backend.port) for _ in range(3)]
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
        self.assertTrue(self.start(Server, [self.backend], token=None).complete("Hello")["content"])
        for connection in connections:
            connection.close()


if __name__ == "__main__":
    unittest.main()

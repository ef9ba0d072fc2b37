#!/usr/bin/env python3
"""How fast a backend gets its weights: over a link of a given rate, from its cache, and when they are still in memory.

Usage (as root): bench/loading.py CARAVAN_EXECUTABLE MODEL.gguf [--rate-mbit 1000] [--netemu PROGRAM] [--token TOKEN] [--repeat 3]

Two network namespaces, the server in one, the backend in the other, are joined by a veth pair with a token bucket (tc tbf) of the
given rate; with --netemu by that program, called `PROGRAM nsA addressA nsB addressB delay_ms jitter_ms rate_mbit loss_percent`.
Each round measures, in this order: the link with one plain TCP stream; a cold load over it and the processor time of the server; a
warm load from the backend's cache beside the time to read those files; a restarted server whose backend still holds the weights; a
load over the link from the cache of another backend, which runs beside the server.
Prints medians and the range, and both sides of each ratio. Hashes of the model are computed before the first round."""

import argparse
import os
import pathlib
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

SERVER_NS, BACKEND_NS = f"cvl{os.getpid()}a", f"cvl{os.getpid()}b"
SERVER_IP, BACKEND_IP = "10.89.7.1", "10.89.7.2"
PORT = 50777


def sh(*command):
    subprocess.run(command, check=True)


class Link:
    def __init__(self, rate_mbit, netemu):
        self.emulator = None
        for ns in (SERVER_NS, BACKEND_NS):
            sh("ip", "netns", "add", ns)
            sh("ip", "-n", ns, "link", "set", "lo", "up")
        if netemu:
            self.emulator = subprocess.Popen([netemu, SERVER_NS, SERVER_IP + "/24", BACKEND_NS, BACKEND_IP + "/24", "0.1", "0",
                                              str(rate_mbit), "0"], stderr=subprocess.DEVNULL)
            self.device = "emu0"
            time.sleep(1)
            return
        self.device = "v0"
        sh("ip", "link", "add", "v0", "netns", SERVER_NS, "type", "veth", "peer", "name", "v0", "netns", BACKEND_NS)
        for ns, ip in ((SERVER_NS, SERVER_IP), (BACKEND_NS, BACKEND_IP)):
            sh("ip", "-n", ns, "addr", "add", ip + "/24", "dev", "v0")
            sh("ip", "-n", ns, "link", "set", "v0", "up")
            sh("tc", "-n", ns, "qdisc", "add", "dev", "v0", "root", "tbf", "rate", f"{rate_mbit}mbit", "burst", "256kb", "latency", "20ms")

    def received_bytes(self):
        text = subprocess.run(["ip", "netns", "exec", BACKEND_NS, "cat", "/proc/net/dev"], capture_output=True, text=True, check=True).stdout
        return int(re.search(rf"{self.device}:\s*(\d+)", text).group(1))

    def close(self):
        if self.emulator:
            self.emulator.kill()
            self.emulator.wait()
        for ns in (SERVER_NS, BACKEND_NS):
            subprocess.run(["ip", "netns", "del", ns], check=False)


def inside(ns):
    return ["ip", "netns", "exec", ns]


class Program:
    """A caravan whose log is read line by line."""

    def __init__(self, ns, command, environment):
        self.process = subprocess.Popen(inside(ns) + command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
        self.log = ""

    def wait_for(self, pattern):
        found = re.search(pattern, self.log)
        while not found:
            line = self.process.stdout.readline()
            if not line:
                raise SystemExit(f"no line with '{pattern}' came; the log:\n{self.log}")
            self.log += line
            found = re.search(pattern, line)
        return found

    def cpu_seconds(self):
        fields = pathlib.Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def stop(self):
        self.process.terminate()
        self.process.communicate()


def tcp_rate(n_bytes):
    """Bytes per second of one TCP stream from the server's namespace to the backend's."""
    sink = ("import socket;s=socket.create_server(('%s',5999));print('up',flush=True);c,_=s.accept();b=bytearray(1<<20)\n"
            "while c.recv_into(b):pass\nc.sendall(b'x')" % BACKEND_IP)
    source = ("import socket,time;c=socket.create_connection(('%s',5999));b=bytes(1<<20);t=time.perf_counter()\n"
              "for _ in range(%d):c.sendall(b)\nc.shutdown(1);c.recv(1);print(time.perf_counter()-t)" % (BACKEND_IP, n_bytes >> 20))
    receiver = subprocess.Popen(inside(BACKEND_NS) + [sys.executable, "-c", sink], stdout=subprocess.PIPE, text=True)
    receiver.stdout.readline()
    sender = subprocess.run(inside(SERVER_NS) + [sys.executable, "-c", source], capture_output=True, text=True, check=True)
    receiver.wait()
    return (n_bytes >> 20 << 20) / float(sender.stdout)


def read_seconds(folder):
    """Reads every file once."""
    buffer = bytearray(4 << 20)
    start = time.perf_counter()
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass
    return time.perf_counter() - start


def drop_page_cache():
    try:
        os.sync()
        pathlib.Path("/proc/sys/vm/drop_caches").write_text("1")
        return True
    except OSError:
        return False


def show(title, values, unit="", scale=1.0):
    values = [v * scale for v in values]
    print(f"{title:58} median {statistics.median(values):9.3f} {unit}, {min(values):.3f} to {max(values):.3f}, n = {len(values)}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("caravan")
    parser.add_argument("model")
    parser.add_argument("--rate-mbit", type=int, default=1000)
    parser.add_argument("--netemu", help="use this program in place of tc tbf")
    parser.add_argument("--token", default="")
    parser.add_argument("--repeat", type=int, default=3)
    a = parser.parse_args()
    a.caravan = str(pathlib.Path(a.caravan).resolve())
    folder = pathlib.Path(tempfile.mkdtemp(prefix="caravan-bench-loading-"))
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("APP_", "LLAMA_"))}
    if a.token:
        environment["APP_RPC_TOKEN"] = a.token

    def backend(ns=BACKEND_NS, ip=BACKEND_IP, cache=("--cache-dir", str(folder / "cache"))):
        program = Program(ns, [a.caravan, "backend", "--host", ip, "--port", str(PORT), *cache, "-t", "1"], environment)
        program.wait_for("backend on ")
        return program

    def server(backends=f"{BACKEND_IP}:{PORT}", *options):
        start = time.perf_counter()
        program = Program(SERVER_NS, [a.caravan, "server", "-m", a.model, "--rpc", backends, "-ngl", "99", "--plan", "memory", "--port", "0",
                                      "-t", "1", "-c", "512", "--cache-dir", str(folder / "server"), *options], environment)
        cpu = None
        program.wait_for("plan:")
        cpu = program.cpu_seconds()
        program.wait_for("ready: ")
        return program, time.perf_counter() - start, program.cpu_seconds() - cpu

    link = Link(a.rate_mbit, a.netemu)
    rates, cold, cores, cold_ratio, warm, reads, warm_bytes, held, held_bytes = [], [], [], [], [], [], [], [], []
    given, given_ratio, given_cores = [], [], []
    dropped = True
    try:
        for i in range(a.repeat + 1):  # the first computes the hashes
            shutil.rmtree(folder / "cache", ignore_errors=True)
            rate = tcp_rate(256 << 20)
            b = backend()
            s, _, cpu = server()
            seconds = float(b.wait_for(r"loaded in ([\d.]+) s").group(1))
            s.stop()
            before = link.received_bytes()
            s, held_seconds, _ = server()
            held_received = link.received_bytes() - before
            s.stop()
            b.stop()
            n_bytes = sum(p.stat().st_size for p in (folder / "cache" / "chunks").rglob("*") if p.is_file())
            if i == 0:
                print(f"{n_bytes / 1e6:.0f} MB of weights; link {a.rate_mbit} Mbit/s{', TLS' if a.token else ''}")
                continue
            rates.append(rate)
            cold.append(n_bytes / seconds)
            cold_ratio.append(n_bytes / seconds / rate)
            cores.append(cpu / seconds)
            held.append(held_seconds)
            held_bytes.append(held_received)
            dropped = drop_page_cache() and dropped
            reads.append(read_seconds(folder / "cache" / "chunks"))
            dropped = drop_page_cache() and dropped
            b = backend()
            before = link.received_bytes()
            s, seconds, _ = server()
            warm_bytes.append(link.received_bytes() - before)
            warm.append(seconds)
            s.stop()
            b.stop()
            rate = tcp_rate(256 << 20)
            giver, taker = backend(SERVER_NS, SERVER_IP), backend(cache=())
            before = giver.cpu_seconds()
            s, _, _ = server(f"{BACKEND_IP}:{PORT},{SERVER_IP}:{PORT}", "-ts", "1,0")
            found = taker.wait_for(r"loaded in ([\d.]+) s: .* (\S+ \S+) from other backends, (\S+ \S+) from the server")
            print(f"round {i}: {found.group(2)} from the other backend, {found.group(3)} from the server")
            given.append(n_bytes / float(found.group(1)))
            given_ratio.append(given[-1] / rate)
            given_cores.append((giver.cpu_seconds() - before) / float(found.group(1)))
            for program in (s, giver, taker):
                program.stop()
    finally:
        link.close()
        shutil.rmtree(folder, ignore_errors=True)
    show("link, one TCP stream", rates, "MB/s", 1e-6)
    show("cold load", cold, "MB/s", 1e-6)
    show("cold load / link", cold_ratio)
    show("processor of the server during it", cores, "cores")
    show("load from another backend", given, "MB/s", 1e-6)
    show("load from another backend / link", given_ratio)
    show("processor of that backend during it", given_cores, "cores")
    show(f"reading the cached files{'' if dropped else ' (page cache not dropped)'}", reads, "s")
    show("warm: from the server's start until it is ready", warm, "s")
    show("warm: beyond reading the files", [w - r for w, r in zip(warm, reads)], "s")
    show("warm: bytes received by the backend, manifest included", warm_bytes, "kB", 1e-3)
    show("weights in memory: from the server's start until ready", held, "s")
    show("weights in memory: bytes received, manifest included", held_bytes, "kB", 1e-3)


if __name__ == "__main__":
    main()

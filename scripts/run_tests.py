#!/usr/bin/env python3
"""Runs every test program of a build folder and the end-to-end tests, and prints run and skipped counts per suite.

Usage: run_tests.py BUILD_FOLDER [--units-only | --e2e-only] [--filter NAME]
A suite is a test_<module> program (GoogleTest), a tests/e2e/test_*.py file (unittest) or a folder tests/* with *.test.mjs files
(node --test; skipped where Node.js or a package that it needs cannot be had, a failure then with CARAVAN_CLIENTS=required). Exits 1
when a test failed, a suite died or nothing ran. The last line is "N passed, N failed, N skipped".
"""

import argparse
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
import unittest

ROOT = pathlib.Path(__file__).resolve().parent.parent


def run_program(program):
    """Returns (run, failed, skipped, messages) of one GoogleTest program."""
    with tempfile.TemporaryDirectory() as folder:
        report = pathlib.Path(folder) / "report.json"
        result = subprocess.run(
            [program, f"--gtest_output=json:{report}", "--gtest_brief=1"],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", check=False)
        if not report.exists():
            return 1, 1, 0, [f"{program.name} died with status {result.returncode}:\n{result.stdout[-4000:]}"]
        tests = [(f"{suite['name']}.{test['name']}", test)
                 for suite in json.loads(report.read_text())["testsuites"] for test in suite["testsuite"]]
    run, failed, skipped, messages, reasons = 0, 0, 0, [], {}
    for name, test in tests:
        if test.get("result") == "SKIPPED":
            skipped += 1
            text = (test.get("skipped") or [{"message": "no reason given"}])[0]["message"].strip()
            reason = text.split("\n")[-1]
            reasons[reason] = reasons.get(reason, 0) + 1
        elif test.get("status") == "RUN":
            run += 1
            if test.get("failures"):
                failed += 1
                messages.append(f"FAILED {name}\n" + "\n".join(f["failure"] for f in test["failures"]))
    if result.returncode != 0 and failed == 0:
        failed += 1
        messages.append(f"{program.name} exited with {result.returncode}:\n{result.stdout[-4000:]}")
    messages.extend(f"  {count} skipped: {reason}" for reason, count in reasons.items())
    return run, failed, skipped, messages


def run_e2e(file, build):
    """Returns (run, failed, skipped, messages) of one unittest file."""
    os.environ["CARAVAN_EXECUTABLE"] = str(build.resolve() / "apps" / "caravan")
    sys.path.insert(0, str(file.parent))
    suite = unittest.defaultTestLoader.loadTestsFromName(file.stem)
    with open(os.devnull, "w", encoding="utf-8") as quiet:
        result = unittest.TextTestRunner(stream=quiet, verbosity=0).run(suite)
    bad = result.failures + result.errors
    messages = [f"FAILED {test.id()}\n{trace}" for test, trace in bad]
    messages.extend(f"  skipped {test.id()}: {reason}" for test, reason in result.skipped)
    return result.testsRun - len(result.skipped), len(bad), len(result.skipped), messages


def install_node_packages(folder):
    """Installs what folder/package-lock.json names, if that changed. Returns why it could not, or None."""
    lock = folder / "package-lock.json"
    installed = folder / "node_modules" / ".installed"
    if not lock.exists() or (installed.exists() and installed.read_bytes() == lock.read_bytes()):
        return None
    if not shutil.which("npm"):
        return "npm is not installed"
    result = subprocess.run(["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"], cwd=folder, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True, errors="replace", check=False)
    if result.returncode != 0:
        return f"npm ci failed: {result.stdout.strip()[-300:]}"
    installed.write_bytes(lock.read_bytes())
    return None


def run_node(folder, build):
    """Returns (run, failed, skipped, messages) of the *.test.mjs files of a folder."""
    reason = install_node_packages(folder) if shutil.which("node") else "Node.js is not installed"
    if reason:
        required = os.environ.get("CARAVAN_CLIENTS") == "required"
        return (1, 1, 0, [f"FAILED {folder.name}: {reason}"]) if required else (0, 0, 1, [f"  1 skipped: {reason}"])
    files = sorted(str(file) for file in folder.glob("*.test.mjs"))
    environment = {**os.environ, "CARAVAN_EXECUTABLE": str(build.resolve() / "apps" / "caravan")}
    result = subprocess.run(["node", "--test", "--test-reporter=tap", *files], cwd=ROOT, env=environment, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True, errors="replace", check=False)
    passed, failed, cancelled, skipped = (
        int(found.group(1)) if (found := re.search(rf"^# {name} (\d+)$", result.stdout, re.MULTILINE)) else 0
        for name in ("pass", "fail", "cancelled", "skipped"))
    failed += cancelled
    if result.returncode != 0 and failed == 0:
        failed = 1
    messages = [f"FAILED {folder.name}\n{result.stdout[-8000:]}"] if failed else []
    messages.extend(f"  skipped: {reason}" for reason in sorted(set(re.findall(r"# SKIP (.+)$", result.stdout, re.MULTILINE))))
    return passed + failed, failed, skipped, messages


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("build", type=pathlib.Path)
    parser.add_argument("--units-only", action="store_true")
    parser.add_argument("--e2e-only", action="store_true")
    parser.add_argument("--filter", default="")
    arguments = parser.parse_args()

    suites = []
    if not arguments.e2e_only:
        suites += [(p.name, lambda p=p: run_program(p)) for p in sorted(arguments.build.glob("tests/test_*"))
                   if p.is_file() and os.access(p, os.X_OK)]
    if not arguments.units_only:
        suites += [(f"e2e/{f.stem}", lambda f=f: run_e2e(f, arguments.build))
                   for f in sorted((ROOT / "tests" / "e2e").glob("test_*.py"))]
        folders = {file.parent for file in (ROOT / "tests").glob("*/*.test.mjs")}
        suites += [(folder.name, lambda folder=folder: run_node(folder, arguments.build)) for folder in sorted(folders)]

    total = [0, 0, 0]
    print(f"{'suite':<24} {'run':>6} {'failed':>7} {'skipped':>8} {'seconds':>8}")
    for name, run in suites:
        if arguments.filter not in name:
            continue
        start = time.monotonic()
        n_run, failed, skipped, messages = run()
        print(f"{name:<24} {n_run:>6} {failed:>7} {skipped:>8} {time.monotonic() - start:>8.1f}")
        print("\n".join(messages) + "\n" if messages else "", end="", flush=True)
        total = [a + b for a, b in zip(total, (n_run, failed, skipped))]
    print(f"{total[0] - total[1]} passed, {total[1]} failed, {total[2]} skipped")
    return 1 if total[1] or total[0] == 0 else 0


if __name__ == "__main__":
    sys.exit(main())

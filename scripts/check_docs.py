#!/usr/bin/env python3
"""Checks that the documents are true where a program can tell.

Usage: check_docs.py [--write] [EXECUTABLE]
Always: the READMEs of all languages have the same headings, code blocks, variables and links; every relative link resolves.
With the built executable: every option and variable in a document is one of the program's, every variable of the containers is in the
READMEs, and docs/options.md is what --help prints (--write writes it).
"""

import itertools
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
READMES = ["README.md", "README.ru.md", "README.zh.md"]
OPTIONS = ROOT / "docs" / "options.md"
# Options of other programs that documents show.
FOREIGN = set("""--build --build-arg --cap-drop --filter --gtest_filter --name --network --no-new-privileges --platform --preset --profile --read-only
    --restart --rm --scale --security-opt --target --now --isolation --data --request --url --header --help --version --units-only --e2e-only --no-install-recommends""".split())
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z0-9_-]*[a-z0-9]")
VARIABLE = re.compile(r"\b(?:APP|LLAMA_ARG)_[A-Z][A-Z_0-9]*")


def documents():
    """Markdown files of the repository, without what builds and packages leave."""
    ignored = {"build", "node_modules", ".git"}
    return sorted(path for path in ROOT.rglob("*.md") if not ignored & set(path.relative_to(ROOT).parts))


def code_blocks(text):
    return re.findall(r"^```.*?^```", text, re.MULTILINE | re.DOTALL)


def without_code(text):
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def slug(heading):
    """The anchor that GitHub gives a heading."""
    return re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", heading.strip().lower()))


def headings(text):
    return re.findall(r"^(#+) (.+)$", without_code(text), re.MULTILINE)


def links(text):
    plain = without_code(text)
    return re.findall(r"\]\(([^)\s]+)\)", plain) + re.findall(r'(?:src|srcset)="([^"]+)"', plain)


def check_readmes(problems):
    texts = {name: (ROOT / name).read_text(encoding="utf-8") for name in READMES}
    first = texts[READMES[0]]

    def compare(what, extract):
        expected = extract(first)
        for name in READMES[1:]:
            for i, (a, b) in enumerate(itertools.zip_longest(expected, extract(texts[name]))):
                if a != b:
                    problems.append(f"{name}: {what} {i + 1} is {b!r}, in {READMES[0]} {a!r}")
                    break

    compare("heading level", lambda text: [level for level, _ in headings(text)])
    compare("code block", code_blocks)
    compare("variable", lambda text: re.findall(r"^\| `([A-Z_]+)`", text, re.MULTILINE))
    compare("row of tables", lambda text: [str(line.count("|")) for line in without_code(text).splitlines() if line.startswith("|")])
    compare("list item", lambda text: ["*" for line in without_code(text).splitlines() if line.startswith("* ")])
    # Anchors are words of the language.
    compare("link", lambda text: sorted("#" if link.startswith("#") else link for link in links(text) if link not in READMES))


def check_links(problems):
    for document in documents():
        text = document.read_text(encoding="utf-8")
        for link in links(text):
            if re.match(r"[a-z]+:", link):
                continue
            path, _, anchor = link.partition("#")
            target = (document.parent / path).resolve() if path else document
            if not target.exists():
                problems.append(f"{document.relative_to(ROOT)}: the link {link} leads nowhere")
            elif anchor and target.suffix == ".md":
                found = {slug(title) for _, title in headings(target.read_text(encoding="utf-8"))}
                if anchor not in found:
                    problems.append(f"{document.relative_to(ROOT)}: the link {link} names no heading")


class Program:
    """What the executable says of itself."""

    def __init__(self, executable):
        self.executable = pathlib.Path(executable).resolve()
        self.commands = re.findall(r"^  ([a-z]+) ", self.run("--help"), re.MULTILINE)
        self.commands = [command for command in self.commands if command != "caravan"]
        self.help = {command: self.run(command, "--help") for command in self.commands}
        everything = "\n".join(self.help.values())
        self.options = set(OPTION.findall(everything))
        self.variables = set(VARIABLE.findall(everything))

    def run(self, *arguments):
        result = subprocess.run([self.executable, *arguments], capture_output=True, text=True, check=False)
        return result.stdout + result.stderr

    def refuses_by_name(self, option):
        """True for options that are known and answered with "not supported"."""
        return any("is not supported" in self.run(command, option) for command in ("server", "cli", "backend"))

    def options_page(self):
        text = ("# Options\n\nWhat `caravan COMMAND --help` prints; variables that set an option stand behind it in brackets. Written by\n"
                "`scripts/check_docs.py --write EXECUTABLE`.\n")
        return text + "".join(f"\n## {command}\n\n```\n{self.help[command].strip()}\n```\n" for command in sorted(self.commands))


def check_program(program, problems, write):
    page = program.options_page()
    if write:
        OPTIONS.write_text(page, encoding="utf-8")
    if not OPTIONS.exists() or OPTIONS.read_text(encoding="utf-8") != page:
        problems.append("docs/options.md is not what --help prints: run scripts/check_docs.py --write build/release/apps/caravan")
    for document in documents():
        text = document.read_text(encoding="utf-8")
        name = document.relative_to(ROOT)
        for option in sorted(set(OPTION.findall(text)) - program.options - FOREIGN):
            if not (ROOT / "scripts").joinpath(option).exists() and not mentioned_in_scripts(option) and not program.refuses_by_name(option):
                problems.append(f"{name}: the program has no option {option}")
        for variable in sorted(set(VARIABLE.findall(text)) - program.variables):
            if not any(known.startswith(variable) for known in program.variables if variable.endswith("_")):
                problems.append(f"{name}: the program reads no variable {variable}")
    shown = set(re.findall(r"^\| `(APP_[A-Z_]+)`", (ROOT / READMES[0]).read_text(encoding="utf-8"), re.MULTILINE))
    for variable in sorted(v for v in program.variables if v.startswith("APP_")):
        if variable not in shown:
            problems.append(f"{READMES[0]}: the table lacks the variable {variable}")


def mentioned_in_scripts(option):
    """Options of our own scripts and benchmarks."""
    return any(f'"{option}"' in path.read_text(encoding="utf-8", errors="replace")
               for folder in ("scripts", "bench") for path in (ROOT / folder).glob("*.py"))


def main():
    arguments = [argument for argument in sys.argv[1:] if argument != "--write"]
    problems = []
    if arguments:
        check_program(Program(arguments[0]), problems, "--write" in sys.argv)
    check_readmes(problems)
    check_links(problems)
    print("\n".join(problems) if problems else "documents: nothing wrong found")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())

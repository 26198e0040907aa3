#!/usr/bin/env python3
"""House rules that a compiler does not check. Usage: lint.py ROOT

Before it looks at the tree, each rule proves on planted samples that it catches what it is for and lets the right
form pass. Exit status: 0 clean, 1 findings, 2 a rule that failed its proof. Needs the standard library only.
"""

import re
import sys
from pathlib import Path, PurePosixPath

sys.path.insert(0, str(Path(__file__).resolve().parent))
from sources import blank, functions, includes, line_of  # noqa: E402

SUFFIXES = {".hpp", ".cpp", ".cuh", ".cu"}
FOLDERS = ("include", "tests", "examples", "bench")
MACROS = {  # every macro a user of the library can see
    "SPECATTN_VERSION_MAJOR",
    "SPECATTN_VERSION_MINOR",
    "SPECATTN_VERSION_PATCH",
    "SPECATTN_HD",
    "SPECATTN_DATA",
    "SPECATTN_CODE",
    "SPECATTN_DEBUG_SYNC",
}
LINES_WISHED, LINES_ALLOWED = 400, 600
FUNCTION_LINES, KERNEL_LINES = 60, 120

RULES = []


def rule(catches, passes):
    """Registers a rule: files -> [(path, line, message)], with the samples it proves itself on."""

    def register(function):
        RULES.append((function, catches, passes))
        return function

    return register


def library(files):
    return {path: text for path, text in files.items() if path.startswith("include/specattn/")}


def matches(files, pattern, message, allowed=()):
    for path, text in files.items():
        if path in allowed:
            continue
        code = blank(text)
        for match in re.finditer(pattern, code, re.MULTILINE):
            yield path, line_of(code, match.start()), message.format(match.group(0).strip())


def resolve(path, how, name):
    """The tree's path of an included header of the library, or None for anything else."""
    if how == "<":
        return "include/" + name if name.startswith("specattn/") else None
    parts = []
    for part in (PurePosixPath(path).parent / name).parts:
        if part == "..":
            parts = parts[:-1]
        else:
            parts.append(part)
    return "/".join(parts)


def read_ranks(text):
    ranks = {}
    for line in text.splitlines():
        fields = line.split("#")[0].split()
        if fields:
            ranks.update({"include/specattn/" + name: int(fields[0]) for name in fields[1:]})
    return ranks


RANKS = "tests/lint/ranks.txt"
SAMPLE_RANKS = {RANKS: "0 config.hpp\n1 view.hpp\n2 attend.hpp\n3 cpu/attend.hpp\n"}


def sample(path, text, **more):
    return {**SAMPLE_RANKS, path: text, **more}


@rule(
    catches=[
        sample("include/specattn/view.hpp", '#include "attend.hpp"'),
        sample("include/specattn/attend.hpp", "#include <specattn/attend.hpp>"),
        sample("include/specattn/cpu/attend.hpp", '#include "../cpu/attend.hpp"'),
        sample("include/specattn/unranked.hpp", "int x;"),
        sample("include/specattn/view.hpp", '#include "unranked.hpp"'),
    ],
    passes=[
        sample("include/specattn/cpu/attend.hpp", '#include "../attend.hpp"\n#include <vector>'),
        sample("include/specattn/attend.hpp", '// #include "cpu/attend.hpp"\n#include "view.hpp"'),
    ],
)
def includes_point_down(files):
    ranks = read_ranks(files[RANKS])
    for path, text in library(files).items():
        if path not in ranks:
            yield path, 1, f"has no rank: add it to {RANKS}"
            continue
        for line, how, name in includes(text):
            target = resolve(path, how, name)
            if target is None:
                continue
            if target not in ranks:
                yield path, line, f"includes {name}, which has no rank in {RANKS}"
            elif ranks[target] >= ranks[path]:
                yield path, line, f"rank {ranks[path]} includes {name} of rank {ranks[target]}: includes point down only"


@rule(
    catches=[
        {"include/specattn/cuda/round/verifier.cuh": '#include "../attend/plan.cuh"'},
        {"include/specattn/cuda/draft_guide.cuh": '#include "select/plan.cuh"'},
        {"include/specattn/cuda.cuh": "#include <specattn/cuda/select/plan.cuh>"},
        {"include/specattn/cuda/device/launch.cuh": '#include "../select/plan.cuh"'},
    ],
    passes=[
        {"include/specattn/cuda/round/verifier.cuh": '#include "../attend.cuh"\n#include "../device/launch.cuh"'},
        {"include/specattn/cuda/attend.cuh": '#include "attend/plan.cuh"'},
        {"include/specattn/cuda/attend/cut.cuh": '#include "plan.cuh"'},
        {"tests/importance_plan_test.cpp": '#include "specattn/cuda/importance/plan.cuh"'},
    ],
)
def houses_are_entered_by_their_faces(files):
    """cuda/attend/ is entered through cuda/attend.cuh; cuda/device/ is open to all of cuda/."""
    for path, text in library(files).items():
        for line, how, name in includes(text):
            target = resolve(path, how, name)
            house = re.fullmatch(r"(include/specattn/cuda/(\w+))/.+", target or "")
            if house is None or path.startswith(house[1] + "/") or path == house[1] + ".cuh":
                continue
            if house[2] != "device" or not path.startswith("include/specattn/cuda/"):
                yield path, line, f"includes {name}: enter {house[2]}/ through its face, cuda/{house[2]}.cuh"


EXAMPLE = "examples/mini_llm/"
EXAMPLE_FLOORS = ("", "text", "model", "cuda", "commands")  # a file at the root serves all; main.cpp uses all


@rule(
    catches=[
        {EXAMPLE + "text/bpe.hpp": '#include "model/llama.hpp"', EXAMPLE + "model/llama.hpp": ""},
        {EXAMPLE + "mapped_file.hpp": '#include "text/bpe.hpp"', EXAMPLE + "text/bpe.hpp": ""},
        {EXAMPLE + "model/llama.cpp": '#include "commands/report.hpp"', EXAMPLE + "commands/report.hpp": ""},
    ],
    passes=[
        {EXAMPLE + "model/llama.cpp": '#include "text/bpe.hpp"', EXAMPLE + "text/bpe.hpp": ""},
        {EXAMPLE + "main.cpp": '#include "commands/report.hpp"', EXAMPLE + "commands/report.hpp": ""},
        {EXAMPLE + "text/bpe.cpp": '#include "bpe.hpp"', EXAMPLE + "text/bpe.hpp": ""},
    ],
)
def the_example_includes_down(files):
    floor = {name: number for number, name in enumerate(EXAMPLE_FLOORS)}
    for path, text in files.items():
        inside = path.removeprefix(EXAMPLE)
        if inside == path or inside == "main.cpp":
            continue
        own = inside.rpartition("/")[0]
        if own not in floor:
            yield path, 1, f"no floor {own}/ in EXAMPLE_FLOORS"
            continue
        for line, how, name in includes(text):
            folder = name.rpartition("/")[0] if EXAMPLE + name in files else own
            if how == '"' and floor[folder] > floor[own]:
                yield path, line, f"includes {name}: {folder}/ stands above {own or 'the root'}"


@rule(
    catches=[
        {"include/specattn/attend.hpp": '#include "cpu/attend.hpp"'},
        {"include/specattn/guide/draft.hpp": "#include <specattn/cuda/attend.cuh>"},
        {"include/specattn/cpu/attend.hpp": '#include "../cuda/attend.hpp"'},
        {"include/specattn/view.hpp": '#include "view.cuh"'},
        {"include/specattn/attend.hpp": "#include <Eigen/Core>"},
        {"include/specattn/cpu/select.hpp": "#include <cub/cub.cuh>"},
        {"include/specattn/alignment.hpp": "#include <nlohmann/json.hpp>"},
        {"tests/oracle/softmax.hpp": "#include <specattn/view.hpp>"},
    ],
    passes=[
        {"include/specattn/specattn.hpp": '#include "cpu/attend.hpp"'},
        {"include/specattn/cpu/attend.hpp": "#include <Eigen/Core>"},
        {"include/specattn/cuda/select.cuh": "#include <cub/cub.cuh>"},
        {"include/specattn/alignment_json.hpp": "#include <nlohmann/json.hpp>"},
    ],
)
def each_dependency_in_its_place(files):
    umbrellas = ("include/specattn/specattn.hpp", "include/specattn/cuda.cuh")
    for path, text in files.items():
        side = next((s for s in ("cpu", "cuda") if path.startswith(f"include/specattn/{s}/")), "core")
        for line, how, name in includes(text):
            if path.startswith("tests/oracle/") and "specattn" in name:
                yield path, line, "the oracle shares no code with the library"
            if not path.startswith("include/"):
                continue
            target = resolve(path, how, name) or ""
            for other in ("cpu", "cuda"):
                if target.startswith(f"include/specattn/{other}/") and side != other and path not in umbrellas:
                    yield path, line, f"{side} includes {name}: only an umbrella header reaches into {other}/"
            if path.endswith(".hpp") and name.endswith(".cuh") and side != "cuda" and not name.startswith("cub/"):
                yield path, line, f"a .hpp includes {name}"
            for prefix, place in (("Eigen/", "cpu/"), ("cub/", "cuda/"), ("nlohmann/", "alignment_json.hpp")):
                if name.startswith(prefix) and not path.startswith("include/specattn/" + place):
                    yield path, line, f"{name} belongs in {place} only"


@rule(
    catches=[{"include/specattn/view.hpp": "// x\n" * 601}, {"tests/view_test.cpp": "int x;\n" * 700}],
    passes=[{"include/specattn/view.hpp": "// x\n" * 600}],
)
def files_are_short(files):
    for path, text in files.items():
        lines = text.count("\n") + (not text.endswith("\n"))
        if lines > LINES_ALLOWED:
            yield path, lines, f"{lines} lines; {LINES_WISHED} are wished for, {LINES_ALLOWED} allowed"


LONG_BODY = "\n  int x = f({1, 2});" * 60
LONG_KERNEL = "\n  x += 1;" * 120


@rule(
    catches=[
        {"include/specattn/view.hpp": "template <class T>\ninline int f(T t) {" + LONG_BODY + "\n}"},
        {"include/specattn/view.hpp": "struct s {\n  int f() const {\n  if (x) {" + LONG_BODY + "\n}\n}\n};"},
        {"tests/view_test.cpp": 'TEST_CASE("view: { is an open brace") {' + LONG_BODY + "\n}"},
        {"include/specattn/cuda/select.cuh": "__global__ void k(int* x) {" + LONG_KERNEL + "\n}"},
        {"examples/hello.cpp": "model::model(int a) : a_{a}, b_(a) {" + LONG_BODY + "\n}"},
    ],
    passes=[
        {"include/specattn/view.hpp": "namespace a {\nstruct s {" + "\n  int f() { return 1; }" * 90 + "\n};\n}"},
        {"include/specattn/view.hpp": "const int table[] = {" + "\n  f(1)," * 90 + "\n};"},
        {"include/specattn/cuda/select.cuh": "__global__ void k(int* x) {" + LONG_BODY + "\n}"},
        {"include/specattn/view.hpp": "int f() {\n  return 1;\n}\n" * 30},
    ],
)
def functions_are_short(files):
    for path, text in files.items():
        for first, lines, head in functions(text):
            allowed = KERNEL_LINES if "__global__" in head else FUNCTION_LINES
            if lines > allowed:
                yield path, first, f"a function of {lines} lines; {allowed} are allowed"


@rule(
    catches=[{"examples/mini_llm/string_utils.hpp": ""}, {"tests/helpers.hpp": ""}, {"include/specattn/common.hpp": ""}],
    passes=[{"examples/mini_llm/text/utf8.hpp": ""}, {"bench/harness.hpp": ""}],
)
def files_are_named_after_what_they_hold(files):
    for path in files:
        for word in re.split(r"[_.]", PurePosixPath(path).name):
            if word in {"util", "utils", "helper", "helpers", "common", "misc", "base", "impl"}:
                yield path, 1, f"'{word}' says nothing about what the file holds"


@rule(
    catches=[
        {"include/specattn/cuda/select.cuh": "cudaLaunchKernelEx(&config, kernel, launch);"},
        {"include/specattn/cuda/select.cuh": "cudaFuncSetAttribute(kernel, attribute, bytes);"},
        {"include/specattn/cuda/select.cuh": "kernel<<<1, 32>>>(x);"},
        {"include/specattn/cuda/alignment.cuh": "cudaMemcpy(to, from, bytes, kind);"},
        {"include/specattn/cuda/context.cuh": "cudaMemset(to, 0, bytes);"},
    ],
    passes=[
        {"include/specattn/cuda/device/launch.cuh": "cudaFuncSetAttribute(k, a, n); cudaLaunchKernelEx(&config, k, x);"},
        {"include/specattn/cuda/context.cuh": "cudaMemsetAsync(to, 0, bytes, stream); cudaMemcpyAsync(a, b, n, k, s);"},
        {"tests/attend/attend_test.cu": "cudaMemcpy(to, from, bytes, kind);"},
    ],
)
def launches_and_copies_disturb_no_other_thread(files):
    launches = r"\bcudaLaunchKernel\w*|\bcudaFuncSetAttribute\b|<<<"
    message = "'{}': launch by device/launch.cuh, which never lowers a limit that another thread relies on"
    yield from matches(library(files), launches, message, ("include/specattn/cuda/device/launch.cuh",))
    message = "'{}' uses the legacy stream, which breaks another thread's capture"
    yield from matches(library(files), r"\bcuda(?:Memcpy|Memset)\s*\(", message)


@rule(
    catches=[
        {"include/specattn/view.hpp": "std::cout << 1;"},
        {"include/specattn/view.hpp": 'std::printf("x");'},
        {"include/specattn/view.hpp": "#include <iostream>"},
        {"include/specattn/view.hpp": "std::abort();"},
        {"include/specattn/view.hpp": "exit(1);"},
        {"include/specattn/view.hpp": "throw contract_error(x);"},
        {"include/specattn/view.hpp": '#pragma message("hello")'},
    ],
    passes=[
        {"include/specattn/error.hpp": "throw Error(message); std::abort();"},
        {"include/specattn/view.hpp": "// prints with printf(), may throw\nearly_exit(1);"},
        {"examples/hello.cpp": "std::cout << 1;"},
    ],
)
def the_library_is_silent(files):
    headers = library(files)
    printing = r"std::(cout|cerr|clog)\b|\b(f?printf|puts|fputs|putchar)\s*\(|#\s*include\s*<(iostream|print)>"
    yield from matches(headers, printing, "'{}': the library never prints")
    yield from matches(headers, r"#\s*pragma\s+message", "'{}': the library never prints")
    error = ["include/specattn/error.hpp"]
    leaving = r"\b(abort|exit|_Exit|quick_exit|terminate)\s*\("
    yield from matches(headers, leaving, "'{}': the library never ends the process", error)
    yield from matches(headers, r"\bthrow\b", "'{}': errors leave through error.hpp", error)


@rule(
    catches=[
        {"include/specattn/view.hpp": "#define MINE 1"},
        {"include/specattn/view.hpp": "#define SPECATTN_UNLISTED 1"},
        {"include/specattn/view.hpp": "#  define SPECATTN_HD(x) x"},
    ],
    passes=[
        {"include/specattn/config.hpp": "#define SPECATTN_HD __host__ __device__\n#define SPECATTN_VERSION_MAJOR 0"},
        {"include/specattn/view.hpp": "#define SPECATTN_LANES 0\n#if SPECATTN_LANES\n#endif\n#undef SPECATTN_LANES"},
    ],
)
def macros_are_few_and_prefixed(files):
    for path, text in library(files).items():
        for match in re.finditer(r"^[ \t]*#[ \t]*define[ \t]+(\w+)(\(?)", blank(text), re.MULTILINE):
            name = match.group(1)
            line = line_of(text, match.start())
            gone = re.search(rf"^[ \t]*#[ \t]*undef[ \t]+{name}\b", text, re.MULTILINE)
            gone = gone and name.startswith(("SPECATTN_", "EIGEN_"))
            if name not in MACROS and not gone:
                yield path, line, f"the macro {name} is not among the public ones (MACROS in lint.py); undefine it"
            if match.group(2):
                yield path, line, f"the macro {name} takes arguments; use a function"


@rule(
    catches=[
        {"include/specattn/view.hpp": "auto x = std::max(a, b);"},
        {"include/specattn/view.hpp": "auto x = std::numeric_limits<int>::max();"},
        {"include/specattn/view.hpp": "auto x = std::min<int>(a, b);"},
        {"include/specattn/view.hpp": "auto x = values.min();"},
    ],
    passes=[{"include/specattn/view.hpp": "auto x = (std::max)(a, b) + s.max - f_max(1); // std::max(a, b)"}],
)
def windows_macros_do_no_harm(files):
    message = "'{}': write (std::max)(a, b), as windows.h defines min and max as macros"
    yield from matches(library(files), r"\b(min|max)\s*(<[^<>()]*>)?\s*\(", message)


@rule(
    catches=[{"include/specattn/cuda/select.cuh": "k<<<1, 2>>>(x);"}],
    passes=[{"include/specattn/cuda/runtime.cuh": "k<<<1, 2>>>(x);"}],
)
def launches_are_checked(files):
    runtime = ["include/specattn/cuda/runtime.cuh"]
    yield from matches(library(files), r"<<<", "'{}': launch through the checked function of runtime.cuh", runtime)


@rule(
    catches=[{"include/specattn/view.hpp": "// A view.\nint x;"}, {"include/specattn/view.hpp": "#pragma once\nint x;"}],
    passes=[{"include/specattn/view.hpp": "// A view.\n#pragma once\n"}, {"bench/harness.hpp": "#pragma once\n"}],
)
def headers_open_with_what_they_are(files):
    for path, text in files.items():
        if path.endswith((".hpp", ".cuh")):
            repeated = PurePosixPath(path).name in ("words_begin.hpp", "words_end.hpp")
            if not repeated and not re.search(r"^#pragma once$", text, re.MULTILINE):
                yield path, 1, "lacks #pragma once"
            if path.startswith("include/") and not text.startswith("//"):
                yield path, 1, "does not open with a comment that says what it holds"


CONFIG = "include/specattn/config.hpp"
SAMPLE_CONFIG = "#define SPECATTN_VERSION_MAJOR 1\n#define SPECATTN_VERSION_MINOR 2\n#define SPECATTN_VERSION_PATCH 3\n"


NAMESPACES = "#define SPECATTN_DATA v1_2_3\n#define SPECATTN_CODE v1_2_3::inline isa_any\n"


@rule(
    catches=[
        {CONFIG: SAMPLE_CONFIG + NAMESPACES.replace("DATA v1_2_3", "DATA v1_2"), "CHANGELOG.md": "## 1.2.3 - unreleased"},
        {CONFIG: SAMPLE_CONFIG + NAMESPACES.replace("v1_2_3::", "v1_2_2::"), "CHANGELOG.md": "## 1.2.3 - unreleased"},
        {CONFIG: SAMPLE_CONFIG, "CHANGELOG.md": "# Changelog\n## 1.2.2 - 2026-01-01"},
    ],
    passes=[{CONFIG: SAMPLE_CONFIG + NAMESPACES, "CHANGELOG.md": "## 1.2.3 - unreleased\n## 1.2.2"}],
)
def one_version_everywhere(files):
    text = files.get(CONFIG, "")
    version = re.findall(r"#define SPECATTN_VERSION_(?:MAJOR|MINOR|PATCH) (\d+)", text)
    if len(version) != 3:
        return
    for match in re.finditer(r"#\s*define SPECATTN_(?:DATA|CODE) v(\w+)", text):
        if match.group(1).split("_") != version:
            yield CONFIG, line_of(text, match.start()), f"the namespace is not that of version {'.'.join(version)}"
    newest = re.search(r"^## (\d+\.\d+\.\d+)", files.get("CHANGELOG.md", ""), re.MULTILINE)
    if newest is None or newest.group(1) != ".".join(version):
        yield "CHANGELOG.md", 1, f"its first section should be {'.'.join(version)}, the version in config.hpp"


@rule(
    catches=[
        {"include/specattn/view.hpp": "namespace specattn {}"},
        {"include/specattn/view.hpp": "namespace specattn::inline v0_1 {}"},
        {"include/specattn/view.hpp": "namespace specattn::detail {}"},
        {"include/specattn/view.hpp": "namespace specattn::inline SPECATTN_DATA::detail {}"},
    ],
    passes=[
        {"include/specattn/view.hpp": "namespace specattn::inline SPECATTN_DATA {}"},
        {"include/specattn/view.hpp": "namespace specattn::inline SPECATTN_CODE::detail {}\nnamespace detail {}"},
    ],
)
def names_carry_version_and_instruction_set(files):
    message = "'{}': open specattn::inline SPECATTN_CODE (::detail), or SPECATTN_DATA for plain data (config.hpp)"
    right = r"::inline SPECATTN_(DATA \{|CODE( |::)(?!inline))"
    yield from matches(library(files), rf"^[ \t]*namespace specattn\b(?!{right})[^\n]*", message)


def prove(function, catches, passes):
    """What is wrong with a rule, judged by its samples; empty when nothing is."""
    failures = [f"misses the planted {files}" for files in catches if not list(function(files))]
    failures += [f"refuses the right form {files}: {list(function(files))}" for files in passes if list(function(files))]
    return failures


def read_tree(root):
    files = {}
    for folder in FOLDERS:
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in SUFFIXES and path.is_file():
                files[path.relative_to(root).as_posix()] = path.read_text(encoding="utf-8")
    for name in (RANKS, "CHANGELOG.md"):
        files[name] = (root / name).read_text(encoding="utf-8")
    return files


def main(root):
    broken = [(f.__name__, failure) for f, catches, passes in RULES for failure in prove(f, catches, passes)]
    for name, failure in broken:
        print(f"rule {name}: {failure[:300]}")
    if broken:
        return 2

    files = read_tree(root)
    sources = {path: text for path, text in files.items() if PurePosixPath(path).suffix in SUFFIXES}
    whole = {includes_point_down, one_version_everywhere}
    findings = [found for f, _, _ in RULES for found in f(files if f in whole else sources)]
    for path, line, message in sorted(findings):
        print(f"{path}:{line}: {message}")
    for path, text in sources.items():
        if LINES_WISHED < text.count("\n") <= LINES_ALLOWED:
            print(f"note: {path} has {text.count(chr(10))} lines; {LINES_WISHED} are wished for")
    print(f"{len(RULES)} rules, each proved on its samples; {len(sources)} files; {len(findings)} findings")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else ".")))

"""Valid inputs, damaged; and what every reader promises: a value of its type or one sentence, and nothing else done.

`make fuzz` draws new inputs, many per target; `make test` the same few each time. An input that broke a promise stays
as an `@example` of its test.
"""

import copy
import datetime
import faulthandler
import os
import resource
import signal
import struct
import sys
from contextlib import contextmanager
from pathlib import Path

import psutil
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from medkit.stage import MedkitError

LONG = os.environ.get("HYPOTHESIS_PROFILE") == "long"
LIMIT_S, LIMIT_BYTES = 20, 4 << 30  # of the processor, and of memory, for one input
PIECES = [
    *(b"", b"\0", b"\xff", b"\xff\xfe", b"\xef\xbb\xbf", b"\r\n", b"\n", b'"', b"'", b"{", b"}", b"[", b"]", b":"),
    *(b"- ", b"\xed\xa0\x80", "\u200b\u202e".encode(), b"\x1b[2J", b"&a [*a]", b"*a", b"<<: *a", b"!!int x"),
    *(b"\\ud800", b"NaN", b"-Infinity", b"1e999", b"9" * 400, b"9" * 5000, b"-1", b"2020-99-99", b"0x", b"!!binary ="),
    *(b"[" * 3000, b'{"a":' * 3000, b'{"a":' * 300 + b"1" + b"}" * 300, b"<|im_end|>", b"<think>", b"%00", b"../../x"),
    b"!!python/object/apply:os.system [touch evil]", b"cos\nsystem\n(S'touch evil'\ntR.", b"{% for a in range(9) %}",
    *(struct.pack(form, n) for form in ("<I", "<Q") for n in (0, 1, 2**31, 2**32 - 1)),
    *(struct.pack("<Q", n) for n in (10**9, 2**40, 2**63, 2**64 - 1)),
]  # fmt: skip
VALUES = [
    *(None, True, 0, -1, 1, 2**31, 2**63, 10**400, 0.5, -0.0, 1e300, float("nan"), float("inf"), "", " ", "0", "1e-3"),
    *("\ud800", "\u200b", "a\u0000b", "\x1b[2J\n", "../../x", "~nobody/x", "/", ".", "--help", "a @ file:///x", "A"),
    *("A. a", "é" * 2000, [], {}, [[]], [{}], {"": None}, {"kind": "local", "path": "x"}, {"A": "a", "B": "b"}),
    *(["a", "b"], [["a", ["b"]]] * 3, datetime.date(2020, 1, 1), b"\xff", [float("nan"), 1]),
]  # fmt: skip
BOMB = "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n} {{x: *a{n - 1}, y: *a{n - 1}}}\n" for n in range(1, 40))


def tries(short: int, long: int) -> settings:
    """The settings of a fuzz test: so many inputs, always the same ones unless the profile is long."""
    unhealthy = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]
    return settings(
        max_examples=long if LONG else short, derandomize=not LONG, deadline=None, suppress_health_check=unhealthy
    )


@st.composite
def damaged(draw, seeds: list[bytes], within: int = 1 << 20) -> bytes:
    """One of the seeds with up to three pieces put in place of others, cut off, or in another encoding."""
    content = draw(st.sampled_from(seeds))
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, min(within, len(content))))
        end = start + draw(st.sampled_from([0, 0, 1, 4, 8, 40]))
        piece = draw(st.sampled_from(PIECES) | st.binary(max_size=8) | st.just(content[start:end] * 2))
        content = content[:start] + piece + content[end:]
    match draw(st.sampled_from(["whole"] * 7 + ["cut", "utf-16", "crlf"])):
        case "cut":
            return content[: draw(st.integers(0, len(content)))]
        case "utf-16":
            return content.decode("latin-1").encode("utf-16")
        case "crlf":
            return content.replace(b"\n", b"\r\n")
    return content


@st.composite
def changed(draw, trees: list) -> dict | list:
    """One of the trees of dicts and lists, with up to three nodes replaced, removed, renamed or moved."""
    tree = copy.deepcopy(draw(st.sampled_from(trees)))
    for _ in range(draw(st.integers(1, 3))):
        parent, key = _pick(draw, tree)
        if key is None:
            continue
        match draw(st.sampled_from(["replace", "replace", "move", "rename", "remove"])):
            case "replace":
                parent[key] = copy.deepcopy(draw(st.sampled_from(VALUES) | st.text(max_size=5) | st.integers(0, 9)))
            case "move":
                other, other_key = _pick(draw, tree)
                parent[key] = copy.deepcopy(other[other_key])
            case "rename" if isinstance(parent, dict):
                parent[draw(st.sampled_from(["", "kind", "path", "é\u200b", "x" * 300, "\ud800"]))] = parent.pop(key)
            case _:
                del parent[key]
    return tree


def _pick(draw, node):
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            return node, None
        key = draw(st.sampled_from(keys))
        if not (isinstance(node[key], dict | list) and node[key]) or draw(st.integers(0, 3)) == 0:
            return node, key
        node = node[key]


class HangError(BaseException):
    """No Exception, so that no reader catches it."""


_seen: list[str] | None = None  # what the block of `watched` did and may not do
_folder = "/"
PROCESSES = ("subprocess.Popen", "os.system", "os.posix_spawn", "os.exec", "os.fork", "socket.connect")
CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.link", "os.truncate", "os.chmod")


def _watch(event: str, args: tuple) -> None:
    if _seen is None:
        return
    writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if writes or event in CHANGES:
        path = os.fsdecode(args[0]) if isinstance(args[0], str | bytes | os.PathLike) else _folder
        if event in ("os.mkdir", "os.remove", "os.rmdir") and args[-1] >= 0:  # its name in an open folder
            path = f"{os.readlink(f'/proc/self/fd/{args[-1]}')}/{path}"
        if path != os.devnull and not Path(os.path.abspath(path)).is_relative_to(_folder):
            _seen.append(f"{event} {path}")
    elif event in PROCESSES or event == "pickle.find_class":
        _seen.append(f"{event} {args}")


sys.addaudithook(_watch)


@contextmanager
def watched(folder: Path | None = None):
    """Fails if the block writes outside of `folder` (None: anywhere), starts a process, calls, unpickles, or hangs."""
    global _seen, _folder

    def stop(*_):
        raise HangError(f"longer than {LIMIT_S} s")

    caching, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    before = signal.signal(signal.SIGPROF, stop)
    _, hard = limits = resource.getrlimit(resource.RLIMIT_AS)
    faulthandler.dump_traceback_later(20 * LIMIT_S, exit=True)  # for code that no signal interrupts
    signal.setitimer(signal.ITIMER_PROF, LIMIT_S)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + LIMIT_BYTES, hard))
    _folder, _seen = str(folder) if folder else "/nowhere", []
    try:
        yield
    finally:
        seen, _seen = _seen, None
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
        faulthandler.cancel_dump_traceback_later()
        sys.dont_write_bytecode = caching
    assert not seen, seen


def assert_promise(kind: type, read, *args, folder: Path | None = None):
    """What `read(*args)` returned, which is a `kind`; None if it raised a MedkitError of one clear sentence.

    It may write into `folder` alone.
    """
    with watched(folder):
        try:
            value = read(*args)
        except MedkitError as error:
            sentence = str(error)
            assert 10 < len(sentence) <= 8000 and sentence.isprintable(), ascii(sentence)
            return None
    assert isinstance(value, kind), type(value)
    return value

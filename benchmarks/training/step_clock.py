"""Trainings that take turns, step by step, each in a process of its own, so that its time and its memory are its own.

A child calls `StepClock`, which after every optimiser step of whatever loop says how long it took and waits for its
turn; the parent holds a `Racer` for each child. A step is all that happens between two optimiser steps: collating,
forward, backward, clipping, the step itself and its log. Units: seconds, bytes.
"""

import json
import os
import subprocess
import sys
import time
from argparse import ArgumentParser
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path

from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from benchmarks.inputs import make_parser
from medkit.stage import ROOT

MARK = "step: "


def rss(field: str) -> int:
    """VmRSS (now) or VmHWM (the most so far) of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


class StepClock:
    """Says after each optimiser step: its time, the loss told to `losses`, and which token rows the model read.

    `tokens` counts each row whole but for its last token, `fed_tokens` what the model was given: padding too, and what
    several rows begin with once, if it was read once.
    """

    def __init__(self, model: nn.Module):
        self.rows: list[list[int]] = []
        self.losses: list[float] = []
        self.width = 0
        model.register_forward_pre_hook(self._read, with_kwargs=True)
        register_optimizer_step_post_hook(self._stop)
        self.began, self.began_cpu = time.perf_counter(), time.process_time()

    def _read(self, module, args, kwargs):
        ids, mask = kwargs["input_ids"], kwargs["attention_mask"]
        if mask.dim() == 4:  # sequences that branch: each is what a last token sees, and no other token sees that one
            sees = mask[0, 0] == 0
            keep = sees[sees.sum(0) == 1]
            ids = ids.expand(len(keep), -1)
        else:
            keep = mask.bool() & (mask.cumsum(1) < mask.sum(1, keepdim=True))  # last tokens predict nothing
        self.rows += [row[own].tolist() for row, own in zip(ids, keep, strict=True)]
        self.width += kwargs["input_ids"].numel()

    def _stop(self, *_):
        said = {
            "step_s": time.perf_counter() - self.began,
            "cpu_s": time.process_time() - self.began_cpu,
            "rss_peak": rss("VmHWM"),
            "rows": sha256(json.dumps(sorted(self.rows)).encode()).hexdigest()[:12],
            "tokens": sum(map(len, self.rows)),
            "fed_tokens": self.width,
            "loss": sum(self.losses),
        }
        print(MARK + json.dumps(said), flush=True)
        self.rows, self.losses, self.width = [], [], 0
        if not sys.stdin.readline():
            os._exit(0)  # no cleaning up in the middle of a training
        self.began, self.began_cpu = time.perf_counter(), time.process_time()


def racing_parser(description: str, contenders: Iterable[str], repeats: int) -> ArgumentParser:
    """What every such benchmark can be told; `--contender` is for its children."""
    parser = make_parser(description, repeats)
    parser.add_argument("--source", default="icd_chapter", help="whose training questions are learned")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--slice-tokens", type=int, default=512)
    parser.add_argument("--contender", choices=list(contenders), help="run as one of them, for a parent")
    return parser


class Racer:
    """The parent's end: a child that has loaded and made its first step, which is the warm-up."""

    def __init__(self, module: str, name: str, arguments: list[str]):
        self.name = name
        command = [sys.executable, "-m", module, "--contender", name, *arguments]
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        self.process = subprocess.Popen(command, cwd=ROOT, text=True, **pipes)
        self.steps = [self._listen()]

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.process.stdin.close()
        self.process.stderr.close()
        self.process.wait()

    def _listen(self) -> dict:
        line = self.process.stdout.readline()
        while line and not line.startswith(MARK):  # a library that talks
            line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{self.name} ended:\n{self.process.stderr.read()[-3000:]}")
        return json.loads(line.removeprefix(MARK))

    def step(self) -> dict:
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        self.steps.append(self._listen())
        return self.steps[-1]

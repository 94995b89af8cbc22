"""What all comparisons share, and the race in which contenders are measured."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.cpu_linear.contenders import FP32, Contender, dense_contender
from benchmarks.cpu_linear.memory import Memory
from benchmarks.cpu_linear.times import Times

EXTRA = 3  # at most so many times the rounds


@dataclass
class Bench:
    """What all sections share.

    Attributes:
        dense: torch fp32 at M = 1, a contender of every comparison.
    """

    size: int
    threads: int
    is_quick: bool
    weight: Tensor
    x: Tensor
    memory: Memory
    dense: Contender

    @property
    def rounds(self) -> int:
        """Slices of each contender."""
        return 5 if self.is_quick else 15

    @property
    def seconds(self) -> float:
        """Length of a slice."""
        return 0.01 if self.is_quick else 0.02

    def race(self, contenders: Iterable[Contender], rounds: int | None = None) -> dict[str, Times]:
        """Time contenders in turn, and memory and torch fp32 with them.

        Those that other processes disturbed in every round get some more.
        """
        everyone = [*self.memory.contenders(), self.dense, *contenders]
        times = {contender.name: Times() for contender in everyone}
        rounds = rounds or self.rounds
        for number in range(EXTRA * rounds):
            # Each comes after another one every time.
            turn = everyone[number % len(everyone) :] + everyone[: number % len(everyone)]
            if number >= rounds:
                turn = [one for one in turn if one.timers and not times[one.name].is_clean()]
            for contender in turn:
                for mode, timer in contender.timers.items():
                    samples = times[contender.name].samples.setdefault(mode, [])
                    samples.extend(timer(self.seconds))
        return times


def make_bench(options: argparse.Namespace) -> Bench:
    """The weight, the input and what everything is compared with."""
    torch.manual_seed(0)
    weight = torch.randn(options.size, options.size) * 0.02
    x = torch.randn(1, options.size)
    dense = dense_contender(x, weight, torch.float32, FP32)
    return Bench(options.size, options.threads, options.quick, weight, x, Memory(), dense)

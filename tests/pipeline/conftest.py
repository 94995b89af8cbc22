"""A captured program, and passes that break it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

from kbitc.graph.capture import capture
from kbitc.graph.program import Stage


@pytest.fixture
def captured():
    model = nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3)).requires_grad_(False)
    return capture(model, (torch.zeros(2, 7),))


@dataclass(frozen=True)
class Broken:
    """``change(program)``, at the canonical stage."""

    change: object

    needs: ClassVar[Stage] = Stage.CANONICAL
    gives: ClassVar[Stage] = Stage.CANONICAL

    def run(self, program):
        return self.change(program)


@dataclass(frozen=True)
class BrokenPlan(Broken):
    """The same on a planned program."""

    needs: ClassVar[Stage] = Stage.PLANNED
    gives: ClassVar[Stage] = Stage.PLANNED


@pytest.fixture(name="Broken")
def broken():
    """The class of passes at the canonical stage."""
    return Broken


@pytest.fixture(name="BrokenPlan")
def broken_plan():
    """The class of passes on planned programs."""
    return BrokenPlan

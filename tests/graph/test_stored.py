"""The one count of stored bytes, against what packing makes and what an artifact holds."""

from __future__ import annotations

import pytest
import torch

from kbitc.artifact.reader import Artifact
from kbitc.compiler.driver import compile_to
from kbitc.compiler.request import Request
from kbitc.formats.layout import shared_bytes, shared_codebooks, weight_bytes
from kbitc.formats.spec import LEFT_ALONE, parse
from kbitc.graph.stored import CODEBOOKS, rest_bytes, stored_bytes, stored_slots
from kbitc.quantizers import quantize_weight

SPECS = ("nf4:64", "int3:32+zp+dq", "learned4:64+dq", "fp4e2:16+out5%", "bof2:64", "int8:70+out50%")


@pytest.mark.parametrize("text", SPECS)
@pytest.mark.parametrize("shape", [(5, 70), (1, 33), (3, 4, 65)])
def test_bytes_of_a_weight_are_those_of_what_packing_makes(text, shape):
    spec = parse(text)
    packed = quantize_weight(torch.randn(shape, generator=torch.Generator().manual_seed(0)), spec)
    assert packed.nbytes() == weight_bytes(spec, shape[:-1], shape[-1])
    shared = sum(shared_bytes(spec).values())
    assert sum(tensor.nbytes for tensor in packed.tensors().values()) == packed.nbytes() + shared


def test_sixteen_bits_are_two_bytes_a_parameter():
    assert weight_bytes(LEFT_ALONE, (3, 5), 7) == 2 * 3 * 5 * 7
    assert shared_codebooks([LEFT_ALONE]) == {}


@pytest.mark.parametrize("family", ["gpt2", "mixtral", "bart"])
def test_bytes_of_a_program_are_those_of_its_artifact(family, tiny_model, tmp_path):
    plan = {"weights": {"*0*": "int3:32+zp+dq", "*1*": "learned4:32", "*": "fp16"}}
    result = compile_to(tiny_model(family), tmp_path / "out", Request(plan=plan))
    program = result.program
    on_disk = {name: tensor.nbytes for name, tensor in Artifact.open(tmp_path / "out").tensors()}
    counted = {key: slot.nbytes for unit in stored_slots(program).values() for key, slot in unit.items()}
    assert counted == on_disk
    assert stored_bytes(program) == sum(on_disk.values()) == result.payload_bytes
    # What the planner counts, weight by weight, adds up to the same.
    weights = sum(
        weight_bytes(program.plan.weights[name].spec, weight.oriented_shape[:-1], weight.in_features)
        for name, weight in program.weights.items()
    )
    specs = [choice.spec for choice in program.plan.weights.values()]
    codebooks = sum(codebook.nbytes for codebook in shared_codebooks(specs).values())
    assert weights + rest_bytes(program) + codebooks == stored_bytes(program)
    assert sum(slot.nbytes for slot in stored_slots(program)[CODEBOOKS].values()) == codebooks

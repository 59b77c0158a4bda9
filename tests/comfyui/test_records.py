"""What the files before a node were trained for."""

import json

import pytest
import torch
from safetensors.torch import save_file
from sparse_context_nodes.records import read_records

from sparse_context.trained import KEY, Trained, write_record

SPREAD = Trained((4, 8), "spread", kv=False, keep=(0.1, 0.5))


@pytest.fixture
def find(tmp_path):
    """A folder of files, by ComfyUI's names of folders."""

    def find(folder, name):
        path = tmp_path / folder / name
        return str(path) if path.is_file() else None

    for folder in ("loras", "diffusion_models", "checkpoints"):
        (tmp_path / folder).mkdir()
    record = {KEY: json.dumps(write_record(SPREAD))}
    save_file({"a": torch.zeros(1)}, tmp_path / "loras" / "sparse.safetensors", record)
    save_file({"a": torch.zeros(1)}, tmp_path / "loras" / "plain.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "loras" / "later.safetensors", {KEY: '{"overview": 3}'})
    save_file({"a": torch.zeros(1)}, tmp_path / "diffusion_models" / "sparse.safetensors", record)
    save_file({"a": torch.zeros(1)}, tmp_path / "loras" / "deep.safetensors", {KEY: "[" * 100_000})
    (tmp_path / "loras" / "broken.safetensors").write_bytes(b"nothing")
    (tmp_path / "loras" / "pickle.pt").write_bytes(b"nothing")
    return find


def graph(**lora):
    return {
        "1": {"class_type": "UNETLoader", "inputs": {"unet_name": "plain.safetensors"}},
        "2": {"class_type": "LoraLoaderModelOnly", "inputs": {"model": ["1", 0], "strength_model": 1.0, **lora}},
        "3": {"class_type": "ModelSamplingAuraFlow", "inputs": {"model": ["2", 0], "shift": 3.1}},
        "4:7": {"class_type": "SparseContext", "inputs": {"model": ["3", 0]}},
        "5": {"class_type": "LoraLoaderModelOnly", "inputs": {"model": ["4:7", 0], "lora_name": "sparse.safetensors"}},
    }


def test_a_record_before_the_node_is_read(find):
    assert read_records(graph(lora_name="sparse.safetensors"), "4:7", find) == ([SPREAD], [])


def test_a_checkpoint_has_one_as_well(find):
    nodes = graph(lora_name="plain.safetensors")
    nodes["1"]["inputs"]["unet_name"] = "sparse.safetensors"
    assert read_records(nodes, "4:7", find) == ([SPREAD], [])


@pytest.mark.parametrize(
    "lora",
    [
        {"lora_name": "plain.safetensors"},
        {"lora_name": "not there.safetensors"},
        {"lora_name": "broken.safetensors"},
        {"lora_name": "pickle.pt"},
        {"lora_name": "sparse.safetensors", "strength_model": 0},
        {"lora_name": ["9", 0]},
    ],
)
def test_without_a_record_there_is_none(find, lora):
    assert read_records(graph(**lora), "4:7", find) == ([], [])


def test_a_record_that_cannot_be_read_is_said(find):
    records, (problem,) = read_records(graph(lora_name="later.safetensors"), "4:7", find)
    assert records == []
    assert problem.startswith("later.safetensors: The record 'sparse_context' of these weights cannot be read")


def test_a_record_that_is_nested_too_deeply_is_said(find):
    records, (problem,) = read_records(graph(lora_name="deep.safetensors"), "4:7", find)
    assert records == [] and problem.startswith("deep.safetensors: ")


def test_a_graph_without_the_node_or_in_a_ring_ends(find):
    assert read_records({}, "4", find) == ([], [])
    assert read_records({"4": {"inputs": {"model": ["4", 0]}}}, "4", find) == ([], [])

"""Hook points: names, globs and numbers to modules, whatever a module returns, and whose vectors are whose."""

from collections import OrderedDict, defaultdict, namedtuple
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from emocore.errors import ArgumentError, HookPointError
from emocore.hookpoints import block_names, check_model, model_id, read_output, replace_output, resolve, token_ids

BLOCKS = {"llama": "model.layers", "gpt2": "transformer.h", "gemma": "model.layers", "mixtral": "model.layers"}


# --- names, globs, numbers


@pytest.mark.parametrize("family", BLOCKS)
def test_blocks_are_found_in_order(tiny, family) -> None:
    assert block_names(tiny(family)) == [f"{BLOCKS[family]}.{i}" for i in range(3)]


@pytest.mark.parametrize("family", BLOCKS)
def test_blocks_are_found_without_the_head(tiny, family) -> None:
    base = tiny(family).base_model
    assert block_names(base) == [f"{BLOCKS[family].rpartition('.')[2]}.{i}" for i in range(3)]


def test_an_unknown_architecture_gives_its_longest_list_of_modules() -> None:
    model = nn.ModuleDict({"few": nn.ModuleList([nn.Identity()]), "tower": nn.ModuleList([nn.ReLU(), nn.Tanh()])})
    assert block_names(model) == ["tower.0", "tower.1"]


def test_a_model_without_blocks_says_so() -> None:
    with pytest.raises(HookPointError, match=r"no list of transformer blocks found in Linear.*Name the hook points"):
        block_names(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("model.layers.1", ["model.layers.1"]),
        (0, ["model.layers.0"]),
        (-1, ["model.layers.2"]),
        ([2, "model.layers.0"], ["model.layers.0", "model.layers.2"]),
        ((0, 0, -3), ["model.layers.0"]),
        ("model.layers.*", ["model.layers.0", "model.layers.1", "model.layers.2"]),
        ("*.layers.*.mlp", [f"model.layers.{i}.mlp" for i in range(3)]),
        ("**.q_proj", [f"model.layers.{i}.self_attn.q_proj" for i in range(3)]),
        ("model.layers.0.mlp.*_proj", [f"model.layers.0.mlp.{k}_proj" for k in ("gate", "up", "down")]),
        ("", [""]),
    ],
)
def test_what_a_spec_names(tiny, spec, expected) -> None:
    model = tiny("llama")
    found = resolve(model, spec)
    assert list(found) == expected
    assert all(module is model.get_submodule(name) for name, module in found.items())


def test_one_star_is_one_part_and_two_are_any_number(tiny) -> None:
    model = tiny("llama")
    below = [name for name, _ in model.named_modules() if name.startswith("model.layers.")]
    assert list(resolve(model, "model.layers.**")) == below
    assert not {name for name in resolve(model, "model.layers.*") if name.count(".") != 2}


def test_dots_in_a_glob_are_dots(tiny) -> None:
    with pytest.raises(HookPointError):
        resolve(tiny("llama"), "modelXlayers.*")


def test_an_unknown_name_lists_near_matches(tiny) -> None:
    with pytest.raises(
        HookPointError, match=r"'model.layer.1': no such module in LlamaFor.*Did you mean .*'model.layers.1'"
    ):
        resolve(tiny("llama"), "model.layer.1")


def test_a_glob_that_matches_nothing_lists_near_matches(tiny) -> None:
    with pytest.raises(HookPointError, match=r"'transformer.layer.\*': no such module.*'transformer"):
        resolve(tiny("gpt2"), "transformer.layer.*")


@pytest.mark.parametrize("number", [3, -4])
def test_a_block_number_out_of_range_names_the_range(tiny, number) -> None:
    with pytest.raises(
        HookPointError, match=rf"expected -3 .. 2; got {number}.*3 blocks, model.layers.0 .. model.layers.2"
    ):
        resolve(tiny("llama"), number)


@pytest.mark.parametrize("spec", [True, [1.5], [None], [("model.norm",)]])
def test_a_spec_of_another_kind_is_refused(tiny, spec) -> None:
    with pytest.raises(HookPointError, match="a module name, a glob or a block number"):
        resolve(tiny("llama"), spec)


def test_an_empty_list_is_refused(tiny) -> None:
    with pytest.raises(HookPointError, match="none given"):
        resolve(tiny("llama"), [])


def test_a_shared_module_is_named_by_its_first_name() -> None:
    shared = nn.Linear(2, 2)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    assert list(resolve(model, "*")) == ["0", "1"]
    with pytest.raises(HookPointError, match=r"'2': is the shared module '0' under another name.*fires"):
        resolve(model, "2")


# --- what modules return


@dataclass(frozen=True)
class Plain:
    mask: Tensor
    hidden: Tensor


Named = namedtuple("Named", "weights state")
HIDDEN, OTHER, MASK = torch.randn(2, 3, 4), torch.randn(2, 3, 4), torch.ones(2, 3, dtype=torch.long)


def outputs() -> dict[str, Any]:
    from transformers.modeling_outputs import BaseModelOutputWithPast

    return {
        "tensor": HIDDEN,
        "tuple": (HIDDEN, OTHER, None),
        "tuple after None": (None, MASK, HIDDEN),
        "list": [HIDDEN, OTHER],
        "namedtuple": Named(None, HIDDEN),
        "dict": {"mask": MASK, "other": None, "state": HIDDEN},
        "dict with a known field": {"attention": OTHER, "hidden_states": HIDDEN},
        "dict with two known fields": {"hidden": OTHER, "last_hidden_state": HIDDEN},
        "ordered dict": OrderedDict(a=HIDDEN, b=OTHER),
        "default dict": defaultdict(list, {"a": HIDDEN}),
        "dataclass": Plain(MASK, HIDDEN),
        "model output": BaseModelOutputWithPast(last_hidden_state=HIDDEN, hidden_states=(OTHER, HIDDEN)),
    }


KINDS = [*outputs()]


@pytest.mark.parametrize("kind", KINDS)
def test_the_hidden_state_is_found_in_any_container(kind) -> None:
    assert read_output(outputs()[kind]) is HIDDEN


@pytest.mark.parametrize("kind", KINDS)
def test_a_replaced_output_is_of_the_same_kind_and_leaves_the_original_alone(kind) -> None:
    output, new = outputs()[kind], torch.zeros(2, 3, 4)
    replaced = replace_output(output, new)
    assert type(replaced) is type(output)
    assert read_output(replaced) is new
    assert read_output(output) is HIDDEN


def test_replacing_keeps_the_other_entries() -> None:
    new = torch.zeros(2, 3, 4)
    assert replace_output((HIDDEN, OTHER, None), new)[1:] == (OTHER, None)
    assert replace_output({"state": HIDDEN, "mask": MASK}, new)["mask"] is MASK
    assert replace_output(Plain(MASK, HIDDEN), new).mask is MASK
    replaced = replace_output(outputs()["model output"], new)
    assert replaced.last_hidden_state is replaced["last_hidden_state"] is replaced[0] is new


@pytest.mark.parametrize(
    ("output", "got"),
    [
        (None, "NoneType"),
        (MASK, r"torch.int64 \[2, 3\]"),
        (torch.tensor(1.5), r"torch.float32 \[\]"),
        (torch.ones(4), r"torch.float32 \[4\]"),
        ((MASK, None), "tuple"),
        ({"mask": MASK}, "dict"),
        (Plain, "type"),
        ("text", "str"),
    ],
)
def test_an_output_without_a_hidden_state_is_refused(output, got) -> None:
    with pytest.raises(HookPointError, match=f"no hidden state in the module's output.*got {got}"):
        read_output(output)


# --- whose vectors are whose


def test_a_base_model_and_its_heads_have_the_same_sizes(tiny) -> None:
    model = tiny("llama")
    assert model_id(model) == "LlamaForCausalLM(hidden_size=16, num_hidden_layers=3, vocab_size=64)"
    check_model(model.base_model, model_id(model), "vectors")


@pytest.mark.parametrize("change", [{"vocab_size": 65}, {"hidden_size": 32}, {"num_hidden_layers": 2}])
def test_vectors_of_a_model_of_other_sizes_are_refused(tiny, change) -> None:
    with pytest.raises(ArgumentError, match=r"vectors: made for another model; expected Llama.*got Llama"):
        check_model(tiny("llama"), model_id(tiny("llama", **change)), "vectors")


def test_sizes_are_found_under_each_familys_own_names(tiny) -> None:
    assert model_id(tiny("gpt2")) == "GPT2LMHeadModel(hidden_size=16, num_hidden_layers=3, vocab_size=64)"


def test_sizes_of_a_model_with_towers_are_those_of_its_text() -> None:
    model = nn.Linear(1, 1)
    text = SimpleNamespace(hidden_size=8, num_hidden_layers=2, vocab_size=10)
    model.config = SimpleNamespace(get_text_config=lambda: text)
    assert model_id(model) == "Linear(hidden_size=8, num_hidden_layers=2, vocab_size=10)"


@pytest.mark.parametrize("made_for", [None, "Linear"])
def test_a_model_of_unknown_sizes_is_taken_on_trust(tiny, made_for) -> None:
    check_model(tiny("llama"), made_for, "vectors")
    check_model(nn.Linear(2, 2), model_id(tiny("llama")), "vectors")


def test_special_ids_come_from_either_configuration(tiny) -> None:
    model = tiny("llama", eos_token_id=[1, 5])
    assert token_ids(model, "pad") == {0}
    assert token_ids(model, "eos") == {1, 5}
    model.generation_config.eos_token_id = 7
    assert token_ids(model, "pad", "eos") == {0, 1, 5, 7}


@pytest.fixture
def mesh(tmp_path):
    """A mesh of one rank."""
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh

    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def test_a_tensor_that_every_rank_holds_is_read_and_written_whole(mesh) -> None:
    from torch.distributed.tensor import DTensor, Replicate, Shard

    whole = DTensor.from_local(torch.ones(1, 2, 3), mesh, [Replicate()])
    read = read_output((whole, None))
    assert type(read) is torch.Tensor
    replaced, _ = replace_output((whole, None), read + 1)
    assert isinstance(replaced, DTensor)
    assert replaced.to_local().tolist() == [[[2.0, 2.0, 2.0]] * 2]
    with pytest.raises(HookPointError, match="sharded over ranks"):
        read_output(DTensor.from_local(torch.ones(1, 2, 3), mesh, [Shard(2)]))

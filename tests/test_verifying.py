"""Verify: captured rows are the model's own hidden states, and anything that makes them differ is an error."""

import pytest
import torch
from torch import nn

from emocore import verify
from emocore.errors import CaptureError, HookPointError

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0], [0, 11, 12, 13]])
INPUTS = {"input_ids": IDS, "attention_mask": (IDS != 0).long()}
PATHS = {"llama": "model.layers", "gpt2": "transformer.h", "gemma": "model.layers", "mixtral": "model.layers"}


@pytest.mark.parametrize("family", PATHS)
@pytest.mark.parametrize("headless", [False, True], ids=["with head", "without"])
def test_every_real_token_of_every_block_is_compared(tiny, family, headless) -> None:
    """The last block too, through the final norm that these families end with."""
    model = tiny(family)
    path = PATHS[family].rpartition(".")[2] if headless else PATHS[family]
    found = verify(model.base_model if headless else model, INPUTS)
    assert found.rows == {f"{path}.{i}": 9 for i in range(3)}
    for ledger in found.ledger.values():
        ledger.check()
        assert (ledger.tokens.offered, ledger.tokens.selected, ledger.tokens.masked) == (12, 9, 3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_any_dtype_is_compared_bit_for_bit(tiny, dtype) -> None:
    assert sum(verify(tiny("llama").to(dtype), INPUTS).rows.values()) == 27


def test_without_a_mask_every_token_is_compared(tiny) -> None:
    assert set(verify(tiny("gpt2", pad_token_id=None), {"input_ids": IDS}).rows.values()) == {12}


def test_an_encoder_without_a_final_norm_is_compared_as_it_is() -> None:
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    model = BertModel(BertConfig(vocab_size=64, **sizes), add_pooling_layer=False).eval()
    assert verify(model, INPUTS).rows == {"encoder.layer.0": 9, "encoder.layer.1": 9}


def test_a_model_in_training_mode_is_verified_in_one_forward(tiny) -> None:
    """Dropout draws anew at every forward: rows and hidden states must come from the same one."""
    assert set(verify(tiny("gpt2", resid_pdrop=0.5).train(), INPUTS).rows.values()) == {9}


@pytest.mark.parametrize("block", [0, 1, 2])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_hook_that_alters_a_block_after_the_capture_saw_it_is_found(tiny, family, block) -> None:
    model = tiny(family)
    target = model.get_submodule(f"{PATHS[family]}.{block}")

    def later(module, args, kwargs):
        def alter(module, args, output):
            handle.remove()
            hidden = output if isinstance(output, torch.Tensor) else output[0]
            changed = hidden.index_fill(1, torch.tensor([3]), 0.5)
            return changed if isinstance(output, torch.Tensor) else (changed, *output[1:])

        handle = module.register_forward_hook(alter)  # behind the capture's own

    target.register_forward_pre_hook(later, with_kwargs=True)
    with pytest.raises(CaptureError, match=rf"{PATHS[family]}.{block}', row 3, differs .* in 2 rows.*look for hooks"):
        verify(model, INPUTS)


def test_a_hook_that_alters_a_block_before_the_capture_sees_it_is_part_of_the_model(tiny) -> None:
    model = tiny("llama")
    model.model.layers[1].register_forward_hook(lambda module, args, output: output * 1.5)
    assert set(verify(model, INPUTS).rows.values()) == {9}


def test_what_a_block_does_to_its_own_input_is_not_held_against_the_one_before(tiny) -> None:
    model = tiny("llama")
    model.model.layers[1].register_forward_pre_hook(lambda module, args: (args[0] * 1.5, *args[1:]))
    assert set(verify(model, INPUTS).rows.values()) == {9}


def test_hidden_states_that_are_not_the_models_own_are_found(tiny) -> None:
    model = tiny("llama")

    def alter(module, args, output):
        output.hidden_states = (*output.hidden_states[:-1], output.hidden_states[-1] + 1e-3)
        return output

    model.register_forward_hook(alter)
    with pytest.raises(CaptureError, match=r"layers.2', row 0, differs from the model's hidden state.* in 9 rows"):
        verify(model, INPUTS)


def test_values_that_are_not_finite_are_found(tiny) -> None:
    model = tiny("llama")
    model.model.embed_tokens.weight.data[11] = torch.inf
    with pytest.raises(
        CaptureError, match=r"captured another number of rows; expected 9 real tokens; got 6, and 3 that"
    ):
        verify(model, INPUTS)


def test_a_model_that_shows_no_hidden_states_cannot_be_verified() -> None:
    class Silent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(4, 4)])

        def forward(self, x, output_hidden_states=False):
            return self.layers[0](x)

    with pytest.raises(CaptureError, match=r"hidden_states; expected 2 entries.*output_hidden_states"):
        verify(Silent(), {"x": torch.randn(2, 3, 4)})
    with pytest.raises(HookPointError, match="no list of transformer blocks"):
        verify(nn.Linear(4, 4), {"input": torch.randn(2, 4)})


def test_the_report_names_every_block(tiny) -> None:
    lines = str(verify(tiny("llama"), INPUTS)).splitlines()
    assert [line.split() for line in lines] == [[f"model.layers.{i}", "9", "rows", "equal"] for i in range(3)]

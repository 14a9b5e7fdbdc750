"""LoRA by PEFT on packed layers. The oracles: the base model's own logits, and the same adapter on the dequantized model."""

import pytest
import torch
from hub import packed_llama
from transformers import AutoModelForCausalLM

from qtipcli.errors import QtipError, SettingsError

peft = pytest.importorskip("peft")

from qtipcli.hub.lora import LoraTrellisLinear, packed_lora  # noqa: E402, it imports peft

TARGETS = ["q_proj", "down_proj"]
IDS = torch.tensor([list(packed_llama.PROMPT)])


def config(**options) -> peft.LoraConfig:
    return packed_lora(peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM", **options))


def adapted(directory):
    """The packed model with untrained adapters, seeded."""
    torch.manual_seed(0)
    return peft.get_peft_model(AutoModelForCausalLM.from_pretrained(directory), config())


@pytest.fixture(scope="module")
def trained(saved, tmp_path_factory):
    """(adapter directory, logits with it, losses) after three steps on the prompt."""
    model = adapted(saved[0]).train()
    rates = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.05)
    losses = []
    for _ in range(3):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        losses.append(loss.item())
        rates.step()
        rates.zero_grad()
    directory = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(directory)
    return directory, packed_llama.logits(model.eval()), losses


def test_packed_layers_are_wrapped_and_untrained_adapters_change_nothing(saved):
    model = adapted(saved[0])
    wrapped = [module for module in model.modules() if isinstance(module, LoraTrellisLinear)]
    assert len(wrapped) == 4
    assert torch.equal(packed_llama.logits(model), saved[1])


def test_gradients_reach_every_adapter_and_nothing_else(saved):
    model = adapted(saved[0]).train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    for name, parameter in model.named_parameters():
        # Before the first step B is zero, so that A gets a gradient of zeros; it is there.
        assert (parameter.grad is not None) == ("lora_" in name), name
    assert all(p.grad.abs().max() > 0 for name, p in model.named_parameters() if "lora_B" in name)


def test_gradients_are_those_of_the_dequantized_model(saved):
    grads = []
    for dense in (False, True):
        base = AutoModelForCausalLM.from_pretrained(saved[0])
        if dense:
            base.dequantize()
        torch.manual_seed(0)
        model = peft.get_peft_model(base, config()).train()
        model(input_ids=IDS, labels=IDS).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if "lora_B" in name})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        # The same weights, summed in another order, as in test_reload.py, and back through two blocks as well.
        assert (grad - grads[1][name]).abs().max() < 2**-14 * grads[1][name].abs().max(), name


def test_training_lowers_the_loss_and_leaves_the_packed_layers_alone(saved, trained):
    _, logits, losses = trained
    assert losses[0] > losses[1] > losses[2]
    assert not torch.equal(logits, saved[1])
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(saved[0]), trained[0], config=reloaded(trained))
    with model.disable_adapter():
        assert torch.equal(packed_llama.logits(model), saved[1])


def reloaded(trained) -> peft.LoraConfig:
    """The saved adapter's config, which has forgotten the packed layers."""
    return packed_lora(peft.PeftConfig.from_pretrained(trained[0]))


def test_a_saved_adapter_gives_the_same_bits_on_a_reloaded_model(saved, trained):
    base = AutoModelForCausalLM.from_pretrained(saved[0])
    model = peft.PeftModel.from_pretrained(base, trained[0], config=reloaded(trained)).eval()
    assert torch.equal(packed_llama.logits(model), trained[1])


def test_merging_is_refused_and_the_way_that_is_named_works(saved, trained):
    packed = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(saved[0]), trained[0], config=reloaded(trained)
    )
    with pytest.raises(QtipError, match=r"cannot be merged .*dequantize\(\)"):
        packed.merge_and_unload()
    dense = AutoModelForCausalLM.from_pretrained(saved[0])
    dense.dequantize()
    merged = peft.PeftModel.from_pretrained(dense, trained[0]).merge_and_unload()
    difference = (packed_llama.logits(merged) - trained[1]).abs().max()
    assert difference < 2**-16 * trained[1].abs().max()  # the same weights, added up in another order


@pytest.mark.parametrize("options", [{"use_dora": True}, {"init_lora_weights": "pissa"}], ids=str)
def test_what_needs_a_dense_weight_is_refused(options):
    with pytest.raises(SettingsError, match="dense weight"):
        config(**options)


def test_without_our_config_peft_refuses_by_itself(saved):
    with pytest.raises(ValueError, match=r"TrellisLinear.*is not supported"):
        peft.get_peft_model(
            AutoModelForCausalLM.from_pretrained(saved[0]), peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
        )

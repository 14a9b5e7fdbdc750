"""A random two-block Llama with packed linears. Imports nothing by itself: fresh processes choose their order of imports."""

PROMPT = range(20)


def make():
    """(model, layouts): a Llama with grouped queries, biases, a tied head and sizes that are not multiples of 16."""
    import torch
    from nn.random_layers import HYB_1_5, MUL1_3_SHORT, ONE_MAD_2, fill
    from transformers import LlamaConfig, LlamaForCausalLM

    from qtipcli.hub.config import QtipConfig
    from qtipcli.nn.layout import PackedLayout
    from qtipcli.nn.swap import packed_layers, swap
    from qtipcli.quant.transform import Transform

    config = LlamaConfig(
        vocab_size=96,
        hidden_size=48,
        intermediate_size=100,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        attention_bias=True,
        tie_word_embeddings=True,
        pad_token_id=0,
        dtype="float32",
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    specs = (HYB_1_5, ONE_MAD_2, MUL1_3_SHORT)
    layouts = {
        name: PackedLayout(
            module.in_features,
            module.out_features,
            specs[index % len(specs)],
            Transform("block"),
            Transform("block", 16) if name.endswith("down_proj") else Transform(),
            bias=module.bias is not None,
        )
        for index, (name, module) in enumerate(model.named_modules())
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    swap(model, layouts)
    for seed, layer in enumerate(packed_layers(model).values()):
        fill(layer, seed)
    model.config.quantization_config = QtipConfig.from_layouts(layouts, {"lm_head": "tied to model.embed_tokens"})
    return model, layouts


def logits(model):
    """Logits of the fixed prompt, float32 [1, T, vocabulary]."""
    import torch

    with torch.no_grad():
        return model(torch.tensor([list(PROMPT)])).logits

"""
Export a checkpoint to TransformerLens, to go on in that library.

    $ python analyze.py transformer_lens --ckpt out/ft.pt     # out/ft.transformer_lens.pt
    >>> config, state = torch.load("out/ft.transformer_lens.pt")
    >>> hooked = HookedTransformer(config)                    # its versions 2 and 3
    >>> hooked.load_state_dict(state, strict=False)

Its version 4 reads them by TransformerBridge.boot_native(config) and convert_tl_checkpoint().
"""
import torch

from data import replace_file


def run(study):
    """Write (config, state) of the checkpoint to X.transformer_lens.pt."""
    path = f"{study.prefix}.transformer_lens.pt"
    replace_file(path, lambda file: torch.save(to_transformer_lens(study.model), file))
    print(f"wrote {path}")


@torch.no_grad()
def to_transformer_lens(model):
    """
    (config, state): a GPT as a dict of TransformerLens settings and a dict of tensors under its
    names. Logits and activations are equal; with rotary positions, the dimensions of q and k are in
    another order.
    """
    c = model.config
    config = dict(
        n_layers=c.n_layer, d_model=c.d_model, n_ctx=c.n_ctx, d_head=c.d_head, n_heads=c.n_head,
        d_mlp=c.d_mlp, d_vocab=c.vocab_size, d_vocab_out=c.n_out or c.vocab_size,
        act_fn={"gelu_exact": "gelu", "gelu": "gelu_new"}.get(c.activation, c.activation),
        attention_dir="causal" if c.causal else "bidirectional",
        normalization_type="LN" if c.layer_norm else None, device=str(model.tok.weight.device))
    state = {"embed.W_E": model.tok.weight, "unembed.W_U": model.head.weight.T,
             "unembed.b_U": model.head.weight.new_zeros(len(model.head.weight))}
    norms, order = {"ln_final": model.ln}, torch.arange(c.d_head)
    if c.rotary:  # a pair of dimensions: neighbours there, halves here
        config.update(positional_embedding_type="rotary", rotary_dim=c.d_head,
                      rotary_adjacent_pairs=True)
        order = order.view(2, -1).T.flatten()
    else:
        state["pos_embed.W_pos"] = model.pos.weight
    for i, block in enumerate(model.blocks):
        at, heads = f"blocks.{i}.", (c.n_head, c.d_head)
        norms.update({at + "ln1": block.ln1, at + "ln2": block.ln2})
        for x, w, b in zip("QKV", block.attn.qkv.weight.chunk(3), block.attn.qkv.bias.chunk(3)):
            kept = torch.arange(c.d_head) if x == "V" else order
            state[f"{at}attn.W_{x}"] = w.unflatten(0, heads)[:, kept].mT  # (h, d, e)
            state[f"{at}attn.b_{x}"] = b.unflatten(0, heads)[:, kept]
        state[at + "attn.W_O"] = block.attn.out.weight.T.unflatten(0, heads)
        state[at + "attn.b_O"] = block.attn.out.bias
        for x, layer in (("in", block.up), ("out", block.down)):
            state[f"{at}mlp.W_{x}"], state[f"{at}mlp.b_{x}"] = layer.weight.T, layer.bias
    for name, norm in norms.items() if c.layer_norm else ():
        state.update({f"{name}.w": norm.weight, f"{name}.b": norm.bias})
    return config, {name: x.detach().clone() for name, x in state.items()}

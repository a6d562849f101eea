"""
What instruments/transformer_lens.py promises: a checkpoint in the words of TransformerLens computes
what it computes here. Against that library's formulas, written out, and against the library itself
where it is installed.
"""
import shutil

import pytest
import torch
import torch.nn.functional as F

import analyze
from instruments.transformer_lens import to_transformer_lens
from model import activation_names, activations, load
from test_model import ACT, CONFIGS, N, T, V, copy_of, loud, same


@pytest.fixture
def tokens():
    return torch.randint(V, (N, T), generator=torch.Generator().manual_seed(1))


def in_their_words(config, state, tokens):
    """What TransformerLens computes of a config and state, written out: (logits, [resid_post])."""
    def norm(x, name):
        if not config["normalization_type"]:
            return x
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.w"], state[f"{name}.b"])

    def turned(y):  # neighbours in y (n, h, t, e) are a pair: a complex number
        dims = torch.arange(0, config["rotary_dim"], 2) / config["rotary_dim"]
        angle = torch.arange(t)[:, None] * 10000. ** -dims
        z = torch.view_as_complex(y.unflatten(3, (-1, 2)).contiguous())
        return torch.view_as_real(z * torch.polar(torch.ones_like(angle), angle)).flatten(3)

    x, t = state["embed.W_E"][tokens], tokens.shape[1]
    rotary = config.get("positional_embedding_type") == "rotary"
    x = x if rotary else x + state["pos_embed.W_pos"][:t]
    act = ACT[{"gelu": "gelu_exact", "gelu_new": "gelu", "relu": "relu"}[config["act_fn"]]]
    streams = []
    for at in (f"blocks.{i}." for i in range(config["n_layers"])):
        q, k, v = (torch.einsum("ntd,hde->nhte", norm(x, at + "ln1"), state[f"{at}attn.W_{y}"])
                   + state[f"{at}attn.b_{y}"][:, None] for y in "QKV")
        q, k = (turned(q), turned(k)) if rotary else (q, k)
        scores = q @ k.mT / config["d_head"] ** .5
        if config["attention_dir"] == "causal":
            scores = scores + torch.full((t, t), -torch.inf).triu(1)
        z = torch.einsum("nhte,hed->ntd", scores.softmax(-1) @ v, state[f"{at}attn.W_O"])
        x = x + z + state[f"{at}attn.b_O"]
        hidden = act(norm(x, at + "ln2") @ state[f"{at}mlp.W_in"] + state[f"{at}mlp.b_in"])
        x = x + hidden @ state[f"{at}mlp.W_out"] + state[f"{at}mlp.b_out"]
        streams.append(x)
    return norm(x, "ln_final") @ state["unembed.W_U"] + state["unembed.b_U"], streams


@pytest.mark.parametrize("name", CONFIGS)
def test_in_the_words_of_transformer_lens(name, tokens):
    """Logits and residual streams by its formulas; the model itself is not touched."""
    gpt = loud(CONFIGS[name])
    before, (config, state) = copy_of(gpt), to_transformer_lens(gpt)
    logits, cache = activations(gpt, tokens)
    theirs, streams = in_their_words(config, state, tokens)
    bound = 1e-5 * (1 + logits.abs().max())
    assert (theirs - logits).abs().max() < bound
    for i, x in enumerate(streams):
        assert (x - cache[f"blocks.{i}.resid_post"]).abs().max() < 1e-5 * (1 + x.abs().max())
    state["embed.W_E"].zero_()
    assert same(gpt, before)


def test_transformer_lens_by_command(tiny, tmp_path, monkeypatch):
    """What analyze.py writes beside a checkpoint loads as tensors and plain Python."""
    shutil.copytree(tiny / "out", tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    analyze.main(["transformer_lens", "--ckpt", "out/ft.pt", "--threads", "1"])
    config, state = torch.load("out/ft.transformer_lens.pt", weights_only=True)
    model = load("out/ft.pt")[0]
    assert config == to_transformer_lens(model)[0]
    assert torch.equal(state["embed.W_E"], model.tok.weight)


@pytest.mark.parametrize("name", CONFIGS)
def test_in_transformer_lens(name, tokens):
    """The same with the package itself: HookedTransformer up to version 3, later the bridge."""
    lens = pytest.importorskip("transformer_lens")
    gpt = loud(CONFIGS[name])
    config, state = to_transformer_lens(gpt)
    try:
        hooked = lens.HookedTransformer(config)
        lacking = hooked.load_state_dict(state, strict=False)
        assert not lacking.unexpected_keys
        assert not [key for key in lacking.missing_keys if "W_" in key or "b_" in key]
    except ImportError:
        from transformer_lens.utilities.tl_checkpoint_conversion import convert_tl_checkpoint
        hooked = lens.TransformerBridge.boot_native(config)
        hooked.load_state_dict(convert_tl_checkpoint(state, hooked.cfg))
    logits, cache = activations(gpt, tokens)
    with torch.no_grad():
        theirs, hooks = hooked.run_with_cache(tokens)
    assert (theirs - logits).abs().max() < 1e-4
    for name in activation_names(gpt):
        if name.endswith(("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")):
            block, part = name.rsplit(".", 1)
            assert (hooks[f"{block}.hook_{part}"] - cache[name]).abs().max() < 1e-4, name

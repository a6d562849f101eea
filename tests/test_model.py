"""
What model.py promises: a GPT that equals one written out by hand, activations that can be read and
replaced by name, edits that undo themselves bit for bit, checkpoints that come back as they were or
are refused.
"""
import contextlib
import math
import pickle
import re
from dataclasses import asdict, replace

import pytest
import torch
import torch.nn.functional as F

import data
import model as model_py
from data import Examples, UserError
from model import (GPT, Config, accuracy, activation_edits, activation_names, activations, load,
                   loss_of, predict, residuals, save, weight_edits)

# Every size differs, so that a mixed-up dimension shows; d_head is not d_model / n_head.
N, T, D, H, E, M, V = 5, 13, 20, 2, 6, 28, 29
CONFIG = Config(vocab_size=V, n_ctx=17, n_layer=3, n_head=H, d_model=D, d_head=E, d_mlp=M)
ROTARY = replace(CONFIG, rotary=True, tied=True, words=tuple(f"w{i}" for i in range(V)))
COMPILED = replace(CONFIG, causal=False, layer_norm=False, activation="relu", n_out=7,
                   train_head=False)
CONFIGS = {"learned positions": CONFIG, "tanh": replace(CONFIG, activation="gelu"),
           "rotary": ROTARY, "compiled": COMPILED, "one block": replace(CONFIG, n_layer=1)}
WAYS = {"products": True, "sdpa": False}  # to attend: what products_are_faster() says
SHAPES = {"resid_pre": (N, T, D), "attn.q": (N, H, T, E), "attn.k": (N, H, T, E),
          "attn.v": (N, H, T, E), "attn.scores": (N, H, T, T), "attn.pattern": (N, H, T, T),
          "attn.z": (N, H, T, E), "attn_out": (N, T, D), "resid_mid": (N, T, D),
          "mlp_pre": (N, T, M), "mlp_post": (N, T, M), "mlp_out": (N, T, D),
          "resid_post": (N, T, D)}


def loud(config):
    """A GPT with weights, biases and norms far from their start, so that leaving one out shows."""
    g, gpt = torch.Generator().manual_seed(5), GPT(config)
    for name, p in gpt.named_parameters():
        p.data.normal_(float("ln" in name and name.endswith("weight")), .3, generator=g)
    return gpt


@pytest.fixture
def model():
    return loud(CONFIG)


@pytest.fixture
def tokens():
    return torch.randint(V, (N, T), generator=torch.Generator().manual_seed(1))


def copy_of(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(model, state):
    """Whether the weights are those of the copy, bit for bit: -0. is not 0., NaN is itself."""
    return all(torch.equal(v.view(torch.int32), state[k].view(torch.int32))
               for k, v in model.state_dict().items())


# ---------------------------------------------------------------- forward

ACT = {"relu": lambda y: y * (y > 0),
       "gelu_exact": lambda y: .5 * y * (1 + torch.erf(y / math.sqrt(2))),
       "gelu": lambda y: .5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + .044715 * y ** 3)))}


def turned(y):
    """The pair (i, i + e/2) of y (n, t, h, e), a complex number, turned by t / 10000^(2i/e)."""
    t, e = y.shape[1], y.shape[3]
    angle = torch.arange(t)[:, None, None] / 10000 ** (torch.arange(0, e, 2).double() / e)
    z = torch.complex(*y.chunk(2, -1)) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((z.real, z.imag), -1)


def reference_logits(gpt, tokens):
    """The network written out, query by query and head by head, in double precision."""
    c, w = gpt.config, {k: v.double() for k, v in gpt.state_dict().items()}

    def norm(x, name):
        if not c.layer_norm:
            return x
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return x * w[name + ".weight"] + w[name + ".bias"]

    def linear(x, name):
        return x @ w[name + ".weight"].T + w[name + ".bias"]

    x = w["tok.weight"][tokens] + (0 if c.rotary else w["pos.weight"][:tokens.shape[1]])
    for block in (f"blocks.{i}." for i in range(c.n_layer)):
        q, k, v = linear(norm(x, block + "ln1"), block + "attn.qkv").unflatten(
            2, (3, H, E)).unbind(2)  # (n, t, h, e)
        if c.rotary:
            q, k = turned(q), turned(k)
        z = torch.zeros_like(v)
        for i in range(tokens.shape[1]):
            keys = slice(i + 1 if c.causal else None)
            for h in range(H):
                scores = (q[:, i, None, h] * k[:, keys, h]).sum(-1) / math.sqrt(E)  # (n, keys)
                z[:, i, h] = (scores.softmax(1)[..., None] * v[:, keys, h]).sum(1)
        x = x + linear(z.flatten(2), block + "attn.out")
        hidden = ACT[c.activation](linear(norm(x, block + "ln2"), block + "up"))
        x = x + linear(hidden, block + "down")
    return norm(x, "ln") @ w["head.weight"].T


@torch.no_grad()
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CONFIGS)
def test_forward_equals_the_reference(name, way, tokens, monkeypatch):
    """Of all positions and of one, with or without later tokens, also while all is looked at."""
    monkeypatch.setattr(model_py, "products_are_faster", lambda k: WAYS[way])
    gpt = loud(CONFIGS[name])
    full = reference_logits(gpt, tokens).float()
    bound = 1e-5 * (1 + full.abs().max())
    assert full.shape == (N, T, gpt.config.n_out or V) and full.std() > .3
    assert (gpt(tokens) - full).abs().max() < bound
    assert (activations(gpt, tokens)[0] - full).abs().max() < bound
    for at in (0, 4, T - 1):
        assert (gpt(tokens, at) - full[:, at]).abs().max() < bound
        logits, cache = activations(gpt, tokens, at=at)
        assert (logits - full[:, at]).abs().max() < bound and list(cache) == activation_names(gpt)
        if gpt.config.causal:
            assert (gpt(tokens[:, :at + 1], at) - full[:, at]).abs().max() < bound


def test_initialisation():
    """N(0, .02), quieter into the residual stream, norms 1, biases 0, by the generator alone."""
    def drawn(seed):
        return GPT(CONFIG).init_weights(torch.Generator().manual_seed(seed))

    torch.manual_seed(98)
    gpt = drawn(3)
    torch.manual_seed(99)  # the ambient generator is not asked
    assert same(drawn(3), copy_of(gpt)) and not same(drawn(4), copy_of(gpt))
    for name, p in gpt.named_parameters():
        if "ln" in name or name.endswith("bias"):
            assert (p == float(name.endswith("weight"))).all()
        else:
            sd = .02 / math.sqrt(6) if name.endswith(("attn.out.weight", "down.weight")) else .02
            assert abs(p.std() / sd - 1) < 4 / math.sqrt(2 * p.numel()), name


def test_tied_weight_is_one_parameter(tokens):
    """Counted once, trained by both its uses; not with an output map of its own or fixed."""
    gpt, untied = loud(ROTARY), GPT(replace(ROTARY, tied=False))
    untied.load_state_dict(gpt.state_dict())
    names = dict(gpt.named_parameters())
    assert gpt.pos is None and not any(name.startswith(("pos", "head")) for name in names)
    for m in (gpt, untied):
        m(tokens).square().sum().backward()
    both = untied.tok.weight.grad + untied.head.weight.grad
    assert torch.allclose(gpt.tok.weight.grad, both, rtol=1e-4, atol=1e-4)
    torch.optim.AdamW(gpt.parameters()).step()
    assert gpt.head.weight is gpt.tok.weight and not torch.equal(gpt.head.weight,
                                                                 untied.head.weight)
    for wrong in {"d_head": 5}, {"n_out": 7}, {"train_head": False}:
        with pytest.raises(ValueError, match="rotary|tied"):
            GPT(replace(ROTARY, **wrong))


# ---------------------------------------------------------------- loss and scores


def slow_loss(logits, x):
    """loss_of() one number at a time."""
    def loss(i, t):
        row = logits[i, t].tolist()
        return math.log(sum(map(math.exp, row))) - row[x.target[i, t]]

    wanted = [(i, t) for i, t in (x.target >= 0).nonzero().tolist() if x.at in (None, t)]
    if x.weight is not None:
        return sum(x.weight[i, t].item() * loss(i, t) for i, t in wanted) / N
    mean = sum(loss(i, t) for i, t in wanted) / len(wanted)
    if x.extra:
        column, weight = x.extra
        mean += weight * sum(loss(i, column) for i in range(N)) / N
    return mean


@pytest.mark.parametrize("more", [{}, {"at": 2}, {"extra": (2, .5)},
                                  {"weight": torch.linspace(0, 2, N * T).view(N, T)}])
def test_loss_by_hand(model, tokens, more):
    """Of all targets but -1; of one column; with a column once more; weighted in each row."""
    ends = torch.tensor([3, 12, 2, 7, 5])[:, None]
    target = tokens.roll(-1, 1).masked_fill(torch.arange(T) > ends, -1)
    x = Examples(tokens, target, **more)
    assert loss_of(model, x).item() == pytest.approx(slow_loss(model(tokens), x), abs=1e-4)


def test_one_column_has_the_loss_and_gradients_of_all_columns(model, tokens):
    """Padding is left out by ignoring it, and fine-tuning computes one position."""
    target = torch.full_like(tokens, -1)
    target[:, 6] = tokens[:, 7]
    slow = F.cross_entropy(model(tokens)[:, 6], target[:, 6])
    slopes = torch.autograd.grad(slow, list(model.parameters()))
    for at in (None, 6):
        loss = loss_of(model, Examples(tokens, target, at=at))
        assert loss.item() == pytest.approx(slow.item(), abs=1e-4)
        for x, y in zip(torch.autograd.grad(loss, list(model.parameters())), slopes):
            assert torch.allclose(x, y, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_scores_do_not_depend_on_the_batch(model, tokens):
    """predict and residuals, in parts, against one pass over all; accuracy by hand."""
    x = Examples(tokens, tokens.roll(-1, 1).masked_fill(torch.arange(T) < 9, -1), at=9)
    logits, cache = activations(model, tokens)
    assert torch.allclose(predict(model, x, batch=2), logits[:, 9], atol=1e-5)
    assert accuracy(torch.tensor([[0., 1], [2, 1], [0, 3]]), torch.tensor([1, 1, 1])) == 2 / 3
    site = torch.rand(N, T, generator=torch.Generator().manual_seed(2))
    streams = [cache["embed"], *(cache[f"blocks.{i}.resid_post"] for i in range(3))]
    slow = torch.stack([(stream * site[..., None]).sum(1) for stream in streams])
    assert torch.allclose(residuals(model, x, site, batch=2), slow, atol=1e-4)


# ---------------------------------------------------------------- activations and edits


def test_activations(model, tokens):
    """
    In order of computation, as the docstring lists them; shapes as documented; each part is what
    its neighbours make; looking changes nothing.
    """
    plain, (logits, cache) = model(tokens).detach(), activations(model, tokens)
    names = ["embed", *(f"blocks.{i}.{part}" for i in range(3) for part in SHAPES)]
    assert activation_names(model) == list(cache) == names
    assert [word for word in model_py.__doc__.split() if word in SHAPES] == list(SHAPES)
    assert torch.allclose(logits, plain, atol=1e-4) and not logits.requires_grad
    before = cache["embed"]
    for i in range(3):
        a = {part: cache[f"blocks.{i}.{part}"] for part in SHAPES}
        assert {part: tuple(x.shape) for part, x in a.items()} == SHAPES
        assert torch.equal(a["resid_pre"], before)
        assert torch.equal(a["resid_mid"], a["resid_pre"] + a["attn_out"])
        assert torch.equal(a["resid_post"], before := a["resid_mid"] + a["mlp_out"])
        scores = torch.einsum("nhqe,nhke->nhqk", a["attn.q"], a["attn.k"]) / math.sqrt(E)
        scores = scores + torch.full((T, T), -torch.inf).triu(1)
        assert torch.allclose(a["attn.scores"], scores, atol=1e-5)
        assert torch.allclose(a["attn.pattern"], scores.softmax(-1), atol=1e-5)
        assert torch.allclose(a["attn.z"], a["attn.pattern"] @ a["attn.v"], atol=1e-5)
    logits, few = activations(model, tokens, ["blocks.1.attn.v"])
    assert list(few) == ["blocks.1.attn.v"] and torch.equal(logits, plain)
    assert torch.allclose(few["blocks.1.attn.v"], cache["blocks.1.attn.v"], atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["embed", *(f"blocks.2.{part}" for part in SHAPES)])
def test_every_activation_can_be_edited(model, tokens, name):
    """An edit reaches the logits and is gone afterwards; the identity, or None, changes nothing."""
    plain, noise = model(tokens), torch.Generator().manual_seed(2)
    edit = {name: lambda x: x * (1 + torch.rand(x.shape, generator=noise))}
    with activation_edits(model, edit) as edited:
        assert edited is model and not torch.allclose(model(tokens), plain, atol=1e-3)
        assert not torch.allclose(model(tokens, 7), plain[:, 7], atol=1e-3)
    for identity in (lambda x: x.clone(), lambda x: None):
        with activation_edits(model, {name: identity}):
            assert torch.allclose(model(tokens), plain, atol=1e-4)
            assert torch.allclose(model(tokens, 7), plain[:, 7], atol=1e-4)
    assert torch.equal(model(tokens), plain)


@torch.no_grad()
@pytest.mark.parametrize("broken", [None, "edit", "code"])
def test_activation_edits_undo_themselves(model, tokens, broken):
    """Weights and logits are bit for bit what they were, also when an edit or the code raises."""
    def last(x):
        return x / 0 if broken != "edit" else 1 / 0

    before, plain = copy_of(model), model(tokens)
    edits = {"embed": lambda x: 2 * x, "blocks.2.mlp_out": last}
    with contextlib.suppress(ZeroDivisionError), activation_edits(model, edits):
        assert not torch.equal(model(tokens), plain)
        if broken:
            raise ZeroDivisionError
    assert same(model, before) and torch.equal(model(tokens), plain)
    assert not any(m._forward_hooks for m in model.modules())


@torch.no_grad()
@pytest.mark.parametrize("fail", [False, True])
def test_weight_edits_undo_themselves(model, tokens, fail):
    """Rows, entries and whole tensors, one of them twice, NaN too: put back bit for bit."""
    model.blocks[0].up.bias.data[3] = -0.  # equal to 0., but not the same bits
    before, plain = copy_of(model), model(tokens)
    edits = [("blocks.1.attn.qkv.weight", 3, 0.), ("blocks.1.attn.qkv.weight", (3, slice(2)), 5.),
             ("head.weight", (0, 1), 1e9), ("blocks.0.up.bias", slice(None), torch.nan),
             ("tok.weight", [1, 2], torch.ones(2, D))]
    with contextlib.suppress(ZeroDivisionError), weight_edits(model, edits) as edited:
        w = model.state_dict()
        assert edited is model and model(tokens).isnan().all() and w["head.weight"][0, 1] == 1e9
        assert w["blocks.1.attn.qkv.weight"][3].tolist() == [5., 5.] + [0.] * (D - 2)
        assert w["blocks.0.up.bias"].isnan().all() and (w["tok.weight"][[1, 2]] == 1).all()
        if fail:
            raise ZeroDivisionError
    assert same(model, before) and torch.equal(model(tokens), plain)
    with pytest.raises((IndexError, RuntimeError)):  # a wrong row among right ones
        with weight_edits(model, [*edits, ("head.weight", 10 ** 6, 0.)]):
            pass
    assert same(model, before)


def test_unknown_names(model):
    """KeyError, before anything is changed; the message lists the names there are."""
    before = copy_of(model)
    for name in ("blocks.7.mlp_out", "", "blocks.0", "head"):
        with pytest.raises(KeyError, match="blocks.0.resid_pre"), activation_edits(
                model, {"embed": lambda x: 0 * x, name: lambda x: 0 * x}):
            pass
    with pytest.raises(KeyError), weight_edits(model, [("head.weight", 0, 0.), ("no", 0, 0.)]):
        pass
    assert same(model, before) and not any(m._forward_hooks for m in model.modules())


# ---------------------------------------------------------------- checkpoints


def checkpoint(gpt):
    """A checkpoint as the training scripts write it, with a step of AdamW behind it."""
    optimizer = torch.optim.AdamW(gpt.parameters())
    gpt(torch.arange(8)[None]).square().mean().backward()
    optimizer.step()
    return {"model": gpt.state_dict(), "optimizer": optimizer.state_dict(),
            "config": asdict(gpt.config), "args": {"lr": .1, "prior": [1., 0., 0.], "seed": 0},
            "setup": "pcfg", "scale": "small", "stage": "pretrain", "step": 2, "steps": 2,
            "finished": True, "parent": None, "history": [{"step": 0, "accuracy": None}]}


@pytest.mark.parametrize("config", [CONFIG, ROTARY, COMPILED])
def test_checkpoint_round_trip(config, tmp_path):
    """All comes back equal, with path and sha256; an unfinished one on request alone."""
    gpt, path = loud(config), tmp_path / "x.pt"
    ckpt = checkpoint(gpt)
    save(path, ckpt)
    again, found = load(path)
    assert again.config == config and same(again, copy_of(gpt))
    assert (again.head.weight is again.tok.weight) == config.tied
    assert found.pop("path") == str(path) and found.pop("sha256") == data.sha256(path)
    for number, moments in ckpt["optimizer"]["state"].items():
        for name, x in moments.items():
            assert torch.equal(found["optimizer"]["state"][number][name], x)
    assert found.keys() == ckpt.keys()
    assert all(found[k] == ckpt[k] for k in ckpt if k not in ("model", "optimizer"))
    assert [p.name for p in tmp_path.iterdir()] == ["x.pt"]
    save(path, {**ckpt, "finished": False, "step": 1})
    with pytest.raises(UserError, match="x.pt: unfinished, step 1 of 2: give the same command"):
        load(path)
    assert load(path, unfinished=True)[1]["step"] == 1


def test_a_flipped_byte_is_refused(model, tmp_path):
    """In one line that names the file; a byte that no checksum covers changes nothing."""
    path, refused = tmp_path / "x.pt", 0
    save(path, checkpoint(model))
    content, before = path.read_bytes(), copy_of(model)
    for i in range(0, len(content), len(content) // 100):
        path.write_bytes(content[:i] + bytes([content[i] ^ 16]) + content[i + 1:])
        try:
            assert same(load(path)[0], before)
        except UserError as error:
            assert re.fullmatch(r".*x.pt: not a checkpoint of ours, or damaged .*", str(error))
            refused += 1
    assert refused > 60


class Command:
    """What a pickle must not run."""

    def __reduce__(self):
        return print, ("this ran",)


@pytest.mark.parametrize("content", [b"", b"text\n", pickle.dumps(Command()), [1], Command(),
                                     {"model": {}}, {"config": {"more": 1}}])
def test_other_files_are_refused(content, tmp_path, capsys):
    """In one line, without running what they hold; also what torch saved of something else."""
    path = tmp_path / "x.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(UserError, match=r"x.pt: not a checkpoint of ours, or damaged [^\n]*$"):
        load(path)
    assert not capsys.readouterr().out
    with pytest.raises(UserError, match="no.pt: No such file or directory$"):
        load(tmp_path / "no.pt")


def test_example_of_the_docstring(tiny, monkeypatch):
    """It runs as it stands, on a checkpoint of the training scripts."""
    monkeypatch.chdir(tiny)
    lines = re.findall(r"^    (?:>>>|\.\.\.) (.*)$", model_py.__doc__, re.M)
    names = {**vars(model_py), "tokens": torch.arange(20).view(2, 10)}
    exec("\n".join(lines), names)
    assert names["ckpt"]["stage"] == "finetune" and len(lines) == 4
    assert names["logits"].shape == names["ablated"].shape
    assert not torch.equal(names["logits"], names["ablated"])
    assert list(names["cache"]) == ["embed", "blocks.1.attn.pattern"]

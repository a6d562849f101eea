"""
What model.py promises: a causal GPT whose activations can be read and replaced by name, edits that undo themselves bit
for bit, checkpoints that come back as they were, and generation that a slow loop over full forward passes agrees with.
"""
import copy
import math
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import data
import model as model_py
from data import Examples, UserError
from model import (GPT, Cache, Config, activation_edits, activation_names, activations, generate,
                   load, loss_of, rotate, rotation, sample_next_token, save, to_transformer_lens, weight_edits)
from pretrain import restore

# Every size differs, so that a mixed-up dimension shows: d_head is not d_model / n_head, d_mlp is not 4 d_model.
CONFIG = Config(vocab_size=29, n_ctx=17, n_layer=3, n_head=2, d_model=20, d_head=6, d_mlp=28)
N, T, D, H, E, M = 5, 13, 20, 2, 6, 28
PARTS = ["resid_pre", "attn.q", "attn.k", "attn.v", "attn.scores", "attn.pattern", "attn.z", "attn_out", "resid_mid",
         "mlp_pre", "mlp_post", "mlp_out", "resid_post"]
SHAPES = {"resid_pre": (N, T, D), "attn.q": (N, H, T, E), "attn.k": (N, H, T, E), "attn.v": (N, H, T, E),
          "attn.scores": (N, H, T, T), "attn.pattern": (N, H, T, T), "attn.z": (N, H, T, E), "attn_out": (N, T, D),
          "resid_mid": (N, T, D), "mlp_pre": (N, T, M), "mlp_post": (N, T, M), "mlp_out": (N, T, D), "resid_post": (N, T, D)}


@pytest.fixture
def model():
    """A model with all weights far from their quiet start: biases and norms too, so that leaving one out shows."""
    torch.manual_seed(0)
    gpt = GPT(CONFIG)
    for p in gpt.parameters():
        p.data.add_(torch.randn(p.shape), alpha=.2)
    return gpt


@pytest.fixture
def tokens():
    return torch.randint(CONFIG.vocab_size, (N, T), generator=torch.Generator().manual_seed(1))


def copy_of(model):
    """The state dict, copied."""
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(model, state):
    """Whether the weights are those of the copy, bit for bit."""
    return all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


# ---------------------------------------------------------------- forward


@torch.no_grad()
def test_answer_position_alone_equals_the_full_forward(model, tokens):
    """logits(tokens, at) are those of that position, with or without the tokens after it, and with eyes on the pattern."""
    full = model(tokens)
    assert full.shape == (N, T, CONFIG.vocab_size)
    for at in (0, 4, T - 1):
        assert torch.allclose(model(tokens, at), full[:, at], atol=1e-5)
        assert torch.allclose(model(tokens[:, :at + 1], at), full[:, at], atol=1e-5)
        assert torch.allclose(activations(model, tokens, at=at)[0], full[:, at], atol=1e-5)
    assert not torch.allclose(full[:, 4], full[:, 5], atol=1e-2)


def test_answer_position_alone_gives_the_same_gradients(model, tokens):
    """Fine-tuning computes one position only; what it learns from it is the same."""
    model(tokens)[:, 7].square().sum().backward()
    full = {k: p.grad.clone() for k, p in model.named_parameters()}
    model.zero_grad()
    model(tokens, 7).square().sum().backward()
    for name, p in model.named_parameters():
        assert torch.allclose(p.grad, full[name], rtol=1e-4, atol=1e-4), name


@torch.no_grad()
def test_causal(model, tokens):
    """Later tokens do not reach earlier logits; they do reach their own and later ones."""
    changed = tokens.clone()
    changed[:, 6:] = (changed[:, 6:] + 1) % CONFIG.vocab_size
    before, after = model(tokens), model(changed)
    assert torch.allclose(before[:, :6], after[:, :6], atol=1e-6)
    assert ((before[:, 6:] - after[:, 6:]).abs().amax(-1) > 1e-3).all()


@torch.no_grad()
@pytest.mark.parametrize("activation", ["gelu_exact", "gelu", "relu"])
def test_forward_against_a_plain_reference(model, tokens, activation):
    """The whole network written out again, head by head: pre-norm, GELU, 1/sqrt(d_head), residual sums."""
    w, model = model.state_dict(), GPT(replace(CONFIG, activation=activation))
    model.load_state_dict(w)
    act = {"relu": lambda y: y * (y > 0), "gelu_exact": lambda y: .5 * y * (1 + torch.erf(y / math.sqrt(2))),
           "gelu": lambda y: .5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + .044715 * y ** 3)))}[activation]

    def norm(x, name):
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w[name + ".weight"] + w[name + ".bias"]

    x = w["tok.weight"][tokens] + w["pos.weight"][:T]
    for i in range(CONFIG.n_layer):
        b = f"blocks.{i}."
        q, k, v = (norm(x, b + "ln1") @ w[b + "attn.qkv.weight"].T + w[b + "attn.qkv.bias"]).split(H * E, -1)
        z = torch.zeros(N, T, H * E)
        for head in range(H):
            part = slice(head * E, (head + 1) * E)
            for t in range(T):
                scores = (q[:, t:t + 1, part] * k[:, :t + 1, part]).sum(-1) / math.sqrt(E)  # (n, keys up to t)
                z[:, t, part] = (scores.softmax(-1)[..., None] * v[:, :t + 1, part]).sum(1)
        x = x + z @ w[b + "attn.out.weight"].T + w[b + "attn.out.bias"]
        y = norm(x, b + "ln2") @ w[b + "up.weight"].T + w[b + "up.bias"]
        x = x + act(y) @ w[b + "down.weight"].T + w[b + "down.bias"]
    assert torch.allclose(model(tokens), norm(x, "ln") @ w["head.weight"].T, atol=1e-4)


def test_initialisation():
    """The same generator seed, the same weights; N(0, .02), quieter into the residual stream, norms 1, biases 0."""
    one, two, other = (GPT(CONFIG).init_weights(torch.Generator().manual_seed(s)) for s in (3, 3, 4))
    assert same(one, copy_of(two)) and not same(one, copy_of(other))
    torch.manual_seed(99)  # the ambient generator has no say
    assert same(GPT(CONFIG).init_weights(torch.Generator().manual_seed(3)), copy_of(one))
    for name, p in one.named_parameters():
        if name.endswith("bias"):
            assert (p == 0).all()
        elif "ln" in name:
            assert (p == 1).all()
        else:
            sd = .02 / math.sqrt(6) if name.endswith(("attn.out.weight", "down.weight")) else .02
            assert abs(p.std() / sd - 1) < 4 / math.sqrt(2 * p.numel()), name


# ---------------------------------------------------------------- the loss


def by_hand(logits, rows):
    """Mean of log(sum(exp)) - wanted over (row, column, wanted output), one number at a time."""
    losses = []
    for i, column, wanted in rows:
        x = logits[i, column].tolist()
        losses.append(math.log(sum(math.exp(value) for value in x)) - x[wanted])
    return sum(losses) / len(losses)


def test_loss_by_hand(model, tokens):
    """Of one column; of all targets but -1; with a column that is counted once more."""
    logits, target = model(tokens), tokens.roll(-1, 1)
    answers = [(i, 6, target[i, 6].item()) for i in range(N)]
    everything = [(i, t, target[i, t].item()) for i in range(N) for t in range(T)]
    some = target.masked_fill(torch.arange(T) > torch.tensor([3, 12, 0, 7, 5])[:, None], -1)
    wanted = [row for row in everything if some[row[0], row[1]] >= 0]
    assert len(wanted) == 4 + 13 + 1 + 8 + 6
    for examples, expected in (
            (Examples(tokens, target, at=6), by_hand(logits, answers)),
            (Examples(tokens, target), by_hand(logits, everything)),
            (Examples(tokens, some), by_hand(logits, wanted)),
            (Examples(tokens, target, extra=(6, .5)),
             by_hand(logits, everything) + .5 * by_hand(logits, answers))):
        assert abs(loss_of(model, examples).item() - expected) < 1e-4
    only = torch.full_like(target, -1)
    only[:, 6] = target[:, 6]
    loss_of(model, Examples(tokens, only)).backward()
    full = {k: p.grad.clone() for k, p in model.named_parameters()}
    model.zero_grad()
    loss_of(model, Examples(tokens, only, at=6)).backward()
    for name, p in model.named_parameters():
        assert torch.allclose(p.grad, full[name], rtol=1e-4, atol=1e-5), name


@pytest.mark.parametrize("extra", [None, (6, .5)])
def test_loss_equals_that_of_the_gathered_outputs(model, tokens, extra):
    """Padding is left out by ignoring it, not by picking the others: the same loss and gradients."""
    target = tokens.roll(-1, 1).masked_fill(torch.arange(T) > torch.tensor([6, 12, 8, 7, 10])[:, None], -1)
    logits, wanted = model(tokens), target >= 0
    loss = F.cross_entropy(logits[wanted], target[wanted])
    if extra:
        loss = loss + .5 * F.cross_entropy(logits[:, 6], target[:, 6])
    slow = torch.autograd.grad(loss, list(model.parameters()))
    fast = loss_of(model, Examples(tokens, target, extra=extra))
    assert abs(fast.item() - loss.item()) < 1e-6 and len(tokens[~wanted]) == 17
    for ours, theirs in zip(torch.autograd.grad(fast, list(model.parameters())), slow):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- rotary positions, tied weights

STORY = replace(CONFIG, rotary=True, tied=True, words=tuple(f"w{i}" for i in range(29)))


def loud(config):
    """A model of this shape with weights far from their quiet start, as the fixture `model`."""
    g, gpt = torch.Generator().manual_seed(5), GPT(config)
    for p in gpt.parameters():
        p.data.normal_(0, .3, generator=g)
    return gpt


@torch.no_grad()
def test_rotary_by_hand(tokens):
    """Pair (i, i + e/2) of q and k at position t, as a complex number, is turned by the angle t / 10000^(2i/e)."""
    gpt, seen = loud(STORY), {}
    cache = activations(gpt, tokens, ["blocks.0.resid_pre", "blocks.0.attn.q", "blocks.0.attn.k"])[1]
    with activation_edits(gpt, {"embed": lambda x: seen.update(x=x)}):
        gpt(tokens)
    assert torch.equal(seen["x"], gpt.tok.weight[tokens]), "no learned positions"
    block = gpt.blocks[0]
    plain = block.attn.qkv(block.ln1(seen["x"])).view(N, T, 3, H, E)
    for part, name in enumerate("qk"):
        for n, h, t in ((0, 0, 0), (1, 1, 5), (4, 0, T - 1)):
            x, y = plain[n, t, part, h].tolist(), cache[f"blocks.0.attn.{name}"][n, h, t].tolist()
            for i in range(E // 2):
                angle = t / 10000 ** (2 * i / E)
                turned = complex(x[i], x[i + E // 2]) * complex(math.cos(angle), math.sin(angle))
                assert abs(turned - complex(y[i], y[i + E // 2])) < 1e-5


@torch.no_grad()
def test_rotary_scores_depend_on_distance_only(tokens):
    """Scores of the same vectors 100 positions later are the same; at other distances they are not."""
    q, k = torch.randn(2, N, H, T, E, generator=torch.Generator().manual_seed(6))

    def scores(q_at, k_at):
        return rotate(q, rotation(q_at, E)) @ rotate(k, rotation(k_at, E)).transpose(-1, -2)

    t = torch.arange(T)
    assert torch.allclose(scores(t, t), scores(t + 100, t + 100), atol=1e-4)
    assert not torch.allclose(scores(t, t), scores(t + 1, t), atol=.1)
    assert torch.allclose(rotate(q, rotation(t, E)).norm(dim=-1), q.norm(dim=-1), atol=1e-5)
    gpt = loud(STORY)
    assert torch.allclose(gpt(tokens[:, :1].expand(N, 5))[:, 0], gpt(tokens[:, :1].expand(N, 5))[:, 4], atol=1e-5), \
        "a constant sequence looks the same from everywhere"
    assert not torch.allclose(gpt(tokens)[:, -1], gpt(tokens[:, [1, 0, *range(2, T)]])[:, -1], atol=1e-3), \
        "and order matters"


@torch.no_grad()
def test_rotary_model_at_one_position_and_with_eyes_on_the_pattern(tokens):
    gpt = loud(STORY)
    full = gpt(tokens)
    for at in (0, 4, T - 1):
        assert torch.allclose(gpt(tokens, at), full[:, at], atol=1e-5)
        assert torch.allclose(activations(gpt, tokens, at=at)[0], full[:, at], atol=1e-5)
    logits, cache = activations(gpt, tokens)
    assert torch.allclose(logits, full, atol=1e-5) and list(cache) == activation_names(gpt)


def test_tied_weight_is_one_parameter(tokens):
    """One tensor under two names: counted once, trained by both its uses, drawn once."""
    gpt = GPT(STORY).init_weights(torch.Generator().manual_seed(3))
    names = dict(gpt.named_parameters())
    assert gpt.pos is None and not any(name.startswith(("pos", "head")) for name in names)
    assert sum(p.numel() for p in gpt.parameters()) == sum(
        p.numel() for p in GPT(CONFIG).parameters()) - 17 * D - 29 * D
    assert abs(gpt.tok.weight.std() / .02 - 1) < 4 / math.sqrt(2 * 29 * D)
    untied = GPT(replace(STORY, tied=False))
    untied.load_state_dict(gpt.state_dict())
    for m in (gpt, untied):
        m(tokens).square().sum().backward()
    both = untied.tok.weight.grad + untied.head.weight.grad
    assert torch.allclose(gpt.tok.weight.grad, both, rtol=1e-4, atol=1e-6)
    before, optimizer = gpt.tok.weight.clone(), torch.optim.AdamW(gpt.parameters())
    optimizer.step()
    assert gpt.head.weight is gpt.tok.weight and not torch.equal(gpt.head.weight, before)
    assert len(optimizer.param_groups[0]["params"]) == len(names)
    torch.manual_seed(99)
    again = GPT(STORY).init_weights(torch.Generator().manual_seed(3))
    assert torch.equal(again.tok.weight, before)


@pytest.mark.parametrize("wrong", [{"d_head": 5}, {"n_out": 7}, {"train_head": False}])
def test_impossible_story_models(wrong):
    with pytest.raises(ValueError, match="rotary|tied"):
        GPT(replace(STORY, **wrong))


SHAPES_THAT_GENERATE = {"story": STORY, "learned": CONFIG, "rotary": replace(CONFIG, rotary=True),
                        "tied": replace(CONFIG, tied=True), "one block": replace(STORY, n_layer=1)}


# ---------------------------------------------------------------- two ways to attend

COMPILED = replace(CONFIG, causal=False, layer_norm=False, activation="relu", n_out=7, train_head=False)
WAYS = {"products": True, "sdpa": False}


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    """Attention by this way, whatever is faster."""
    monkeypatch.setattr(model_py, "products_are_faster", lambda k: WAYS[request.param])


def plain_logits(gpt, tokens):
    """The reference: attention query by query, in double precision; rotary pairs are complex numbers."""
    gpt, c, t = copy.deepcopy(gpt).double(), gpt.config, torch.arange(tokens.shape[1])
    angles = t[:, None] / 10000 ** (torch.arange(0, E, 2).double() / E)
    turns = torch.polar(torch.ones_like(angles), angles)[:, None]  # (t, 1, e / 2)

    def turned(y):  # (n, t, h, e)
        z = torch.complex(*y.chunk(2, -1)) * turns
        return torch.cat((z.real, z.imag), -1)
    x = gpt.tok(tokens) if c.rotary else gpt.tok(tokens) + gpt.pos(t)
    for block in gpt.blocks:
        q, k, v = block.attn.qkv(block.ln1(x)).unflatten(2, (3, H, E)).unbind(2)
        q, k = (turned(q), turned(k)) if c.rotary else (q, k)
        z = []
        for i in t.tolist():
            seen = slice(i + 1 if c.causal else None)
            weights = ((q[:, i, None] * k[:, seen]).sum(-1) / math.sqrt(E)).softmax(1)  # (n, keys, h)
            z.append((weights[..., None] * v[:, seen]).sum(1).flatten(1))
        x = x + block.attn.out(torch.stack(z, 1))
        x = x + block.down(block.activation(block.up(block.ln2(x))))
    return gpt.head(gpt.ln(x)).float()


@torch.no_grad()
@pytest.mark.parametrize("config", [*SHAPES_THAT_GENERATE.values(), COMPILED], ids=[*SHAPES_THAT_GENERATE, "compiled"])
def test_both_ways_to_attend_equal_the_plain_one(config, tokens, way):
    """Of whole sequences, of one position, with the pattern looked at; in the cache: prompts, then two tokens more."""
    gpt = loud(config)
    full = plain_logits(gpt, tokens)
    scale = 1 + full.abs().max()
    assert (gpt(tokens) - full).abs().max() < 1e-5 * scale
    assert (activations(gpt, tokens)[0] - full).abs().max() < 1e-5 * scale
    for at in (0, 4, T - 1):
        assert (gpt(tokens, at) - full[:, at]).abs().max() < 1e-5 * scale
    if config.causal:
        cache = Cache(gpt, torch.tensor([4, 0, 3, 1, 2]), 13)
        rows = [tokens[i, :7 - pad].tolist() for i, pad in enumerate(cache.pads.flatten().tolist())]
        ends = [len(row) - 1 for row in rows]
        logits = gpt(left_padded(rows)[0], at=6, cache=cache)
        assert (logits - full[range(N), ends]).abs().max() < 1e-5 * scale
        places = torch.tensor(ends)[:, None] + torch.tensor([1, 2])
        logits = gpt(tokens.gather(1, places), cache=cache)
        assert (logits - full[torch.arange(N)[:, None], places]).abs().max() < 1e-5 * scale


@pytest.mark.parametrize("config", [CONFIG, STORY])
@pytest.mark.parametrize("at", [None, 7])
def test_both_ways_to_attend_have_the_same_gradients(config, tokens, at, monkeypatch):
    """To single precision; in bfloat16 they are finite, and logits and gradients off by its rounding."""
    gpt, seen = loud(config), {}
    for name, faster in WAYS.items():
        monkeypatch.setattr(model_py, "products_are_faster", lambda k, faster=faster: faster)
        for half in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                logits = gpt(tokens, at)
            assert logits.dtype == (torch.bfloat16 if half else torch.float32)
            grads = torch.autograd.grad(logits.float().square().mean(), list(gpt.parameters()))
            seen[name, half] = torch.cat([x.detach().flatten() for x in (logits.float(), *grads)])
    exact = seen["products", False]
    for (name, half), x in seen.items():
        assert x.isfinite().all() and (x - exact).norm() < (2 ** -6 if half else 1e-5) * exact.norm(), (name, half)
        assert not half or (x != exact).any()


def test_where_products_are_faster():
    """On a CPU, for short sequences; those of bfloat16 may be longer."""
    for t, dtype, device, yes in ((41, torch.float32, "cpu", True), (65, torch.float32, "cpu", False),
                                  (200, torch.bfloat16, "cpu", True), (600, torch.bfloat16, "cpu", False),
                                  (41, torch.float32, "meta", False), (41, torch.bfloat16, "meta", False)):
        assert model_py.products_are_faster(torch.empty(2, 3, t, 4, dtype=dtype, device=device)) == yes


# ---------------------------------------------------------------- generation

PROMPTS = [[3, 7, 1, 4, 4], [9], [28, 2, 11], [5, 6, 7, 8, 9, 10, 11, 12], [1, 2]]


@pytest.fixture(params=SHAPES_THAT_GENERATE)
def generator(request):
    return loud(SHAPES_THAT_GENERATE[request.param])


def slow_greedy(gpt, prompt, most, end):
    """The reference: one row, the whole forward for every token."""
    row = list(prompt)
    while len(row) < min(len(prompt) + most, gpt.config.n_ctx):
        token = gpt(torch.tensor([row]))[0, -1].argmax().item()
        if token == end:
            break
        row.append(token)
    return row[len(prompt):]


def left_padded(rows):
    """(tokens (n, longest), paddings (n,)); the paddings are a token that would be seen if it were looked at."""
    longest = max(map(len, rows))
    pads = [longest - len(row) for row in rows]
    return torch.tensor([[13] * pad + row for pad, row in zip(pads, rows)]), torch.tensor(pads)


@torch.no_grad()
@pytest.mark.parametrize("eyes", [False, True])
def test_cached_logits_are_those_of_the_full_forward(generator, tokens, eyes):
    """Prompts of unequal lengths, then tokens one by one and two at once, and rows dropped on the way."""
    lengths, rows = [5, 1, 3, 8, 2], list(range(N))
    prompts, pads = left_padded([tokens[i, :length].tolist() for i, length in enumerate(lengths)])
    full, cache = generator(tokens), Cache(generator, pads, 8 + 5)
    edits = {name: lambda x: None for name in activation_names(generator) if eyes}  # attention spelt out, or not
    with activation_edits(generator, edits):
        logits = generator(prompts, cache=cache)
        for i, length in enumerate(lengths):
            assert torch.allclose(logits[i, 8 - length:], full[i, :length], atol=1e-5)
        assert not logits.isnan().any()
        for step, t in enumerate((1, 1, 2, 1)):
            places = torch.tensor([lengths[i] for i in rows])[:, None] + torch.arange(t)
            logits = generator(tokens[torch.tensor(rows)[:, None], places], cache=cache)
            assert torch.allclose(logits, full[torch.tensor(rows)[:, None], places], atol=1e-5)
            lengths = [length + t for length in lengths]
            if step in (0, 2):
                keep = torch.tensor([i not in (1, 3) for i in rows]) if step == 0 else torch.tensor([False, True, True])
                rows = [i for i, stays in zip(rows, keep.tolist()) if stays]
                cache.keep(keep)
    whole = generator(prompts, cache=Cache(generator, pads, 8))
    assert torch.allclose(generator(prompts, at=7, cache=Cache(generator, pads, 8)), whole[:, 7], atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("most", [0, 1, 6, 100])
def test_greedy_generation_equals_the_slow_loop(generator, most, way):
    """Row by row, with an end token that some rows reach and others do not; alone as in a batch; lists as tensors."""
    free = [slow_greedy(generator, p, most, -1) for p in PROMPTS]
    assert generate(generator, PROMPTS, most, None, temperature=0, end=-1) == free
    assert [len(row) for row in free] == [min(most, 17 - len(p)) for p in PROMPTS]
    for end in {token for row in free for token in row}:
        expected = [slow_greedy(generator, p, most, end) for p in PROMPTS]
        assert generate(generator, PROMPTS, most, None, temperature=0, end=end) == expected
        assert expected == [row[:row.index(end)] if end in row else row for row in free]
        assert all(generate(generator, [torch.tensor(p)], most, None, temperature=0, end=end) == [row]
                   for p, row in zip(PROMPTS, expected))


def test_greedy_generation_is_the_same_both_ways_to_attend(generator, monkeypatch):
    rows = []
    for faster in WAYS.values():
        monkeypatch.setattr(model_py, "products_are_faster", lambda k, faster=faster: faster)
        rows.append(generate(generator, PROMPTS, 16, None, temperature=0, end=-1))
    assert rows[0] == rows[1]


def test_generation_stops_work_early(monkeypatch):
    """No step is computed when all rows have ended, and ended rows leave the batch when they are half of it."""
    gpt, batches, ends = loud(STORY), [], {(2, 0), (3, 1), (5, 0), (6, 0)}  # (step, row of the batch)

    def scripted(logits, *_):
        batches.append(len(logits))
        return torch.tensor([0 if (len(batches), row) in ends else 5 for row in range(len(logits))])

    monkeypatch.setattr(model_py, "sample_next_token", scripted)
    assert [len(row) for row in generate(gpt, [[1], [2], [3], [4]], 9, torch.Generator())] == [1, 2, 4, 5]
    assert batches == [4, 4, 4, 2, 2, 1]


def test_generation_of_what_cannot_be():
    with pytest.raises(ValueError, match="causal"):
        generate(loud(replace(CONFIG, causal=False)), PROMPTS, 3, None, temperature=0)
    for prompts in ([[1], []], [[1] * 18]):
        with pytest.raises(ValueError, match="1 to 17 tokens"):
            generate(loud(STORY), prompts, 3, None, temperature=0)
    assert generate(loud(STORY), [], 3, None) == []
    assert generate(loud(STORY), [[1] * 17], 3, None, temperature=0) == [[]]
    assert [len(row) for row in generate(loud(CONFIG), [[1] * 17, [1]], 3, None, temperature=0, end=-1)] == [0, 3]


def test_generation_asks_for_signals(monkeypatch):
    monkeypatch.setattr(data, "signals", [2])
    with pytest.raises(data.Stopped):
        generate(loud(STORY), PROMPTS, 3, torch.Generator())


@torch.no_grad()
def test_sampling_follows_the_softmax():
    """Over 8,000 rows: frequencies are the softmax's, at temperatures 1, .5 and 2."""
    gpt, n = loud(replace(STORY, d_model=6)), 8_000
    logits = gpt(torch.tensor([[3, 7]]))[0, -1]
    for temperature in (1., .5, 2.):
        p = (logits / temperature).softmax(-1)
        assert p.max() < .95
        rng = torch.Generator().manual_seed(8)
        rows = generate(gpt, [[3, 7]] * n, 1, rng, temperature, end=-1)
        counts = torch.bincount(torch.tensor(rows)[:, 0], minlength=29)
        assert (counts[p == 0] == 0).all()
        assert ((counts / n - p).abs() <= 4.5 * (p * (1 - p) / n).sqrt() + 1e-4).all()


def test_sample_next_token_by_hand():
    """u falls into the cumulative distribution; tokens of no probability are never drawn."""
    logits = torch.tensor([[-torch.inf, math.log(.25), math.log(.5), math.log(.25), -torch.inf]])
    for u, token in ((0., 1), (.2, 1), (.26, 2), (.7, 2), (.8, 3), (1 - 2 ** -24, 3)):
        assert sample_next_token(logits, torch.tensor([u])).tolist() == [token]
    assert sample_next_token(logits, None, temperature=0).tolist() == [2]


def test_samples_depend_on_the_seed_and_not_on_who_ends_when():
    """The same seed, the same rows; a row draws the same numbers whether or not others have left the batch."""
    gpt = loud(STORY)

    def sample(seed, **kw):
        return generate(gpt, PROMPTS, 9, torch.Generator().manual_seed(seed), **kw)

    free = sample(1, end=-1)
    assert sample(1, end=-1) == free != sample(2, end=-1)
    for end in {token for row in free for token in row}:
        assert sample(1, end=end) == [row[:row.index(end)] if end in row else row for row in free]


# ---------------------------------------------------------------- activations


def test_activation_names(model, tokens):
    """embed, then the thirteen parts of every block, in the order they are computed; the docstring lists them."""
    assert list(activations(model, tokens)[1]) == ["embed"] + [f"blocks.{i}.{part}" for i in range(3) for part in PARTS]
    assert activation_names(model) == list(activations(model, tokens)[1])
    assert [word for word in model_py.__doc__.split() if word in PARTS] == PARTS


def test_activation_shapes_and_sums(model, tokens):
    """Shapes as documented; the residual stream is the sum of its parts; looking does not change what is computed."""
    with torch.no_grad():
        plain = model(tokens)
    logits, cache = activations(model, tokens)
    assert torch.allclose(logits, plain, atol=1e-5) and not logits.requires_grad
    for i in range(3):
        a = {part: cache[f"blocks.{i}.{part}"] for part in PARTS}
        assert {part: tuple(x.shape) for part, x in a.items()} == SHAPES
        assert torch.equal(a["resid_pre"], cache[f"blocks.{i - 1}.resid_post"] if i else cache["embed"])
        assert torch.equal(a["resid_mid"], a["resid_pre"] + a["attn_out"])
        assert torch.equal(a["resid_post"], a["resid_mid"] + a["mlp_out"])
    only, few = activations(model, tokens, ["blocks.1.attn.v"])
    assert list(few) == ["blocks.1.attn.v"] and torch.allclose(*few.values(), cache["blocks.1.attn.v"], atol=1e-5)
    assert torch.equal(only, plain), "unless scores or pattern are asked for, the very same code runs"


def test_activation_shapes_at_one_position(model, tokens):
    """With `at`, the last block has one query; the blocks below are whole."""
    _, cache = activations(model, tokens, at=7)
    _, whole = activations(model, tokens)
    assert cache["blocks.2.attn.pattern"].shape == (N, H, 1, 8) and cache["blocks.2.resid_post"].shape == (N, 1, D)
    assert torch.allclose(cache["blocks.2.attn.pattern"][:, :, 0], whole["blocks.2.attn.pattern"][:, :, 7, :8], atol=1e-5)
    assert torch.allclose(cache["blocks.2.resid_post"][:, 0], whole["blocks.2.resid_post"][:, 7], atol=1e-5)
    assert cache["blocks.1.resid_post"].shape == (N, T, D)


def test_pattern_by_hand(model, tokens):
    """Patterns sum to one, look back only, and are the softmax of q k / sqrt(d_head); z is their mean of v."""
    logits, cache = activations(model, tokens, [f"blocks.1.attn.{x}" for x in ("q", "k", "v", "scores", "pattern", "z")])
    q, k, v, scores, pattern, z = cache.values()
    with torch.no_grad():
        assert torch.allclose(logits, model(tokens), atol=1e-5)
    assert torch.allclose(pattern.sum(-1), torch.ones(N, H, T), atol=1e-6)
    for n, h, t in ((0, 0, 0), (1, 1, 5), (4, 0, T - 1)):
        products = [sum(q[n, h, t, e].item() * k[n, h, s, e].item() for e in range(E)) / math.sqrt(E) for s in range(t + 1)]
        weights = [math.exp(x) for x in products]
        by_hand = torch.tensor([x / sum(weights) for x in weights] + [0.] * (T - t - 1))
        assert torch.allclose(scores[n, h, t, :t + 1], torch.tensor(products), atol=1e-5)
        assert (scores[n, h, t, t + 1:] == -torch.inf).all()
        assert torch.allclose(pattern[n, h, t], by_hand, atol=1e-5)
        assert torch.allclose(z[n, h, t], by_hand @ v[n, h], atol=1e-5)


# ---------------------------------------------------------------- edits


@torch.no_grad()
@pytest.mark.parametrize("at", [None, 7])
def test_identity_edits_change_nothing(model, tokens, at):
    """A function that gives back its input, or None, leaves the logits as they are."""
    plain = model(tokens, at)
    for fn in (lambda x: x, lambda x: x.clone(), lambda x: None):
        with activation_edits(model, {name: fn for name in activation_names(model)}):
            assert torch.allclose(model(tokens, at), plain, atol=1e-5)
        unspelt = [name for name in activation_names(model) if not name.endswith(("scores", "pattern"))]
        with activation_edits(model, {name: fn for name in unspelt}):
            assert torch.equal(model(tokens, at), plain)


@torch.no_grad()
@pytest.mark.parametrize("name", ["embed"] + [f"blocks.1.{part}" for part in PARTS])
def test_every_activation_can_be_edited(model, tokens, name):
    """Every name is a place that matters: an edit there reaches the logits, and is gone afterwards."""
    plain = model(tokens)
    noise = torch.Generator().manual_seed(2)
    with activation_edits(model, {name: lambda x: x * (1 + torch.rand(x.shape, generator=noise))}) as edited:
        assert edited is model and not torch.allclose(model(tokens), plain, atol=1e-3)
    assert torch.equal(model(tokens), plain)


@torch.no_grad()
def test_zeroing_mlp_out_equals_a_model_without_that_layer(model, tokens):
    """And zeroing attn_out equals one whose attention writes nothing."""
    for name, parameters in (("blocks.1.mlp_out", "blocks.1.down."), ("blocks.1.attn_out", "blocks.1.attn.out.")):
        without = GPT(CONFIG)
        without.load_state_dict({k: v * 0 if k.startswith(parameters) else v for k, v in model.state_dict().items()})
        with activation_edits(model, {name: lambda x: 0 * x}):
            assert torch.allclose(model(tokens), without(tokens), atol=1e-5)
        assert not torch.allclose(model(tokens), without(tokens), atol=1e-2)


@torch.no_grad()
def test_edited_pattern_is_the_one_that_is_used(model, tokens):
    """With all attention on the first key, z is its value vector at every query."""
    def look_at_first(pattern):
        return torch.zeros_like(pattern).index_fill_(-1, torch.tensor([0]), 1.)

    seen = {}
    with activation_edits(model, {"blocks.0.attn.pattern": look_at_first, "blocks.0.attn.v": lambda x: seen.update(v=x),
                                  "blocks.0.attn.z": lambda x: seen.update(z=x)}):
        model(tokens)
    assert torch.allclose(seen["z"], seen["v"][:, :, :1].expand(N, H, T, E), atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("fail", [False, True])
def test_activation_edits_undo_themselves(model, tokens, fail):
    """Weights and logits are bit for bit what they were, also when the edit itself or the code within raises."""
    before, plain = copy_of(model), model(tokens)

    def break_down(x):
        raise ZeroDivisionError

    for fn in (break_down, lambda x: x + 1):
        try:
            with activation_edits(model, {"embed": lambda x: 2 * x, "blocks.0.attn.pattern": fn}):
                if fail:
                    model(tokens)
                    raise ZeroDivisionError
        except ZeroDivisionError:
            assert fail
    assert same(model, before) and torch.equal(model(tokens), plain)
    assert not any(m._forward_hooks for m in model.modules())


@torch.no_grad()
@pytest.mark.parametrize("fail", [False, True])
def test_weight_edits_undo_themselves(model, tokens, fail):
    """Rows, entries and whole tensors, one of them twice, a not-a-number too: put back bit for bit."""
    model.blocks[0].up.bias.data[3] = -0.  # equal to 0., but not the same bits
    before, plain = copy_of(model), model(tokens)
    rows = [("blocks.1.attn.qkv.weight", 3, 0.), ("blocks.1.attn.qkv.weight", (3, slice(2)), 5.),
            ("head.weight", (0, 1), 1e9), ("blocks.0.up.bias", slice(None), torch.nan),
            ("tok.weight", [1, 2], torch.ones(2, D))]
    try:
        with weight_edits(model, rows) as edited:
            w = model.state_dict()
            assert edited is model and not torch.equal(model(tokens).nan_to_num(7e7), plain)
            assert w["blocks.1.attn.qkv.weight"][3].tolist() == [5., 5.] + [0.] * (D - 2) and w["head.weight"][0, 1] == 1e9
            assert w["blocks.0.up.bias"].isnan().all() and (w["tok.weight"][[1, 2]] == 1).all()
            if fail:
                raise ZeroDivisionError
    except ZeroDivisionError:
        assert fail
    assert same(model, before) and torch.equal(model(tokens), plain)
    assert math.copysign(1, model.blocks[0].up.bias[3]) == -1
    with pytest.raises((IndexError, RuntimeError)):  # a wrong row among right ones: those are put back as well
        with weight_edits(model, rows + [("head.weight", 10 ** 6, 0.)]):
            pass
    assert same(model, before)


def test_unknown_names(model, tokens):
    """KeyError, before anything is changed; the message lists the names there are."""
    before = copy_of(model)
    with pytest.raises(KeyError, match="blocks.0.resid_pre"):
        activations(model, tokens, ["blocks.0.mlp"])
    for name in ("blocks.7.mlp_out", "", "blocks.0", "head"):
        with pytest.raises(KeyError):
            with activation_edits(model, {"embed": lambda x: 0 * x, name: lambda x: 0 * x}):
                pass
    with pytest.raises(KeyError):
        with weight_edits(model, [("head.weight", 0, 0.), ("head.bias", 0, 0.)]):
            pass
    assert same(model, before) and not any(m._forward_hooks for m in model.modules())


# ---------------------------------------------------------------- checkpoints


def checkpoint(gpt, **other):
    """A checkpoint dict as the training scripts write it, here with a step of AdamW behind it."""
    optimizer = torch.optim.AdamW(gpt.parameters())
    gpt(torch.arange(8)[None]).square().mean().backward()
    optimizer.step()
    return {"model": gpt.state_dict(), "optimizer": optimizer.state_dict(),
            "config": asdict(gpt.config), "args": {"lr": .1, "prior": [1., 0., 0.], "seed": 0},
            "setup": "pcfg", "scale": "small", "stage": "pretrain", "step": 1, "steps": 2,
            "finished": False, "parent": None, "capability": {"task": "count", "operand": "a"},
            **other}


@pytest.mark.parametrize("finished", [False, True])
def test_checkpoint_round_trip(model, tokens, tmp_path, finished):
    """
    Weights, moments and everything beside them come back equal, and nothing else is left in the
    folder. A finished run keeps no moments: a third of the size; the caller's dict keeps them.
    """
    path = tmp_path / "x.pt"
    ckpt = checkpoint(model, finished=finished)
    save(path, ckpt)
    again, read = load(path, unfinished=not finished)
    assert set(read) == set(ckpt) | {"path", "sha256"} and read["path"] == str(path)
    assert read["sha256"] == data.sha256(path)
    with torch.no_grad():
        assert torch.equal(again(tokens), model(tokens)) and same(again, copy_of(model))
    assert len(ckpt["optimizer"]["state"]) == len(list(model.parameters()))
    if finished:
        assert read["optimizer"] == {}
        save(tmp_path / "y.pt", {**ckpt, "finished": False})
        assert path.stat().st_size < .4 * (tmp_path / "y.pt").stat().st_size
        (tmp_path / "y.pt").unlink()
    else:
        for number, moments in ckpt["optimizer"]["state"].items():
            for name, x in moments.items():
                assert torch.equal(read["optimizer"]["state"][number][name], x)
    assert {k: read[k] for k in ckpt if k not in ("model", "optimizer")} == \
        {k: ckpt[k] for k in ckpt if k not in ("model", "optimizer")}
    assert [p.name for p in tmp_path.iterdir()] == ["x.pt"]


def test_checkpoint_of_a_story_model(tokens, tmp_path):
    """Rotary and tied: the weights are one tensor again, the optimizer goes on, the words are there."""
    gpt = loud(STORY)
    ckpt = checkpoint(gpt)
    save(tmp_path / "x.pt", ckpt)
    again, read = load(tmp_path / "x.pt", unfinished=True)
    assert again.config == STORY and again.head.weight is again.tok.weight
    assert same(again, copy_of(gpt))
    with torch.no_grad():
        assert torch.equal(again(tokens), gpt(tokens))
    optimizer = torch.optim.AdamW(again.parameters())
    restore(optimizer, read)
    assert len(optimizer.state) == len(list(gpt.parameters()))
    save(tmp_path / "y.pt", {**ckpt, "config": {**asdict(STORY), "rotary": False}})
    with pytest.raises(UserError, match="weights do not fit"):
        load(tmp_path / "y.pt")


def test_checkpoints_from_before_there_were_stories(model, tokens, tmp_path):
    """A config without the newer fields is that of a model with learned positions and its own output map."""
    config = {k: v for k, v in asdict(CONFIG).items() if k not in ("rotary", "tied", "words")}
    save(tmp_path / "x.pt", checkpoint(model, config=config, finished=True))
    again, _ = load(tmp_path / "x.pt")
    with torch.no_grad():
        assert again.config == CONFIG and torch.equal(again(tokens), model(tokens))


def test_unfinished_checkpoints_are_loaded_on_request_only(model, tmp_path):
    """Later stages refuse them, in words that name the step and --resume."""
    save(tmp_path / "x.pt", checkpoint(model, finished=False, step=7, steps=9))
    with pytest.raises(UserError, match="unfinished, step 7 of 9.*--resume"):
        load(tmp_path / "x.pt")
    assert load(tmp_path / "x.pt", unfinished=True)[1]["step"] == 7


def test_saving_is_all_or_nothing(model, tmp_path):
    """When writing fails half way the old file is there, whole, and no half-written one beside it."""
    path = tmp_path / "x.pt"
    save(path, checkpoint(model))
    before = path.read_bytes()

    def half(f):
        f.write(b"half of it")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError):
        data.replace_file(path, half)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["x.pt"]


@pytest.mark.parametrize("wrong", [
    {"d_model": 24}, {"n_layer": 2}, {"n_layer": 4}, {"n_layer": 10 ** 9}, {"vocab_size": 10 ** 15}, {"d_mlp": 0},
    {"n_ctx": -1}, {"d_head": 3.0}, {"n_head": True}, {"n_head": "2"}, {"more": 1},
    {"activation": "other"}, {"activation": []}])
def test_config_that_lies_about_shapes(model, tmp_path, wrong):
    """Refused in one line that names the file, before anything of that size is allocated."""
    save(tmp_path / "x.pt", checkpoint(model, config={**asdict(CONFIG), **wrong}))
    with pytest.raises(UserError, match="x.pt.*not an unwrap checkpoint") as error:
        load(tmp_path / "x.pt")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("wrong", [{"model": None}, {"model": {}}, {"model": [1]}, {"config": None}, {"config": []},
                                   {"model": {"head.weight": 3}}])
def test_checkpoints_of_the_wrong_kind(model, tmp_path, wrong):
    """Refused in one line as well."""
    save(tmp_path / "x.pt", {**checkpoint(model), **wrong})
    with pytest.raises(UserError, match="x.pt.*not an unwrap checkpoint") as error:
        load(tmp_path / "x.pt")
    assert "\n" not in str(error.value)


def answer_column(setup):
    """The position (of ART) whose output is the answer."""
    relation = data.Relation("count", "a", "b", 1)
    return setup.ask(setup.text(1, relation, "natural", data.rng(0)), "count", "a").at


def test_default_shapes_are_mingpt():
    """The two scales of the paper's table: heads divide the width, the context holds a whole sequence."""
    for scale in ("small", "paper"):
        setup = data.SETUPS["pcfg"]("pcfg", scale)
        config, at = Config(**setup.config()), answer_column(setup)
        assert config.d_model == config.n_head * config.d_head
        assert config.d_mlp == 4 * config.d_model
        assert config.n_ctx == setup.length + 9 == at + 3


# ---------------------------------------------------------------- TransformerLens


def of_setup(name):
    """A model of a setup, every weight far from its start, and tokens that it reads."""
    setup = data.SETUPS[name](name)
    if setup.compiled:
        steps = setup.program.steps(setup.order[0])
        gpt = model_py.compile_program(steps, setup.alphabet, setup.room, setup.mlp_exactness)
        return gpt, setup.sequence(setup.natural(4, setup, data.rng(0)), None, None)
    setup.open(SimpleNamespace(data=None, jailbreak=False))
    gpt = GPT(Config(**setup.config())).init_weights(data.rng(0))
    for p in gpt.parameters():
        p.data += .05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    return gpt, torch.randint(gpt.config.vocab_size, (3, 30), generator=torch.Generator().manual_seed(1))


def in_their_words(config, state, tokens):
    """What TransformerLens computes of its config and state, written out. (logits, [resid_post])"""
    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.w"], state[f"{name}.b"]) \
            if config["normalization_type"] else x
    x, t = state["embed.W_E"][tokens], tokens.shape[1]
    if "pos_embed.W_pos" in state:
        x = x + state["pos_embed.W_pos"][:t]
    else:
        angles = torch.arange(t)[:, None] * 10000. ** -(torch.arange(0, config["rotary_dim"], 2) / config["rotary_dim"])
    after = []
    for i in range(config["n_layers"]):
        at, z = f"blocks.{i}.", 0
        for h in range(config["n_heads"]):
            q, k, v = (norm(x, at + "ln1") @ state[f"{at}attn.W_{y}"][h] + state[f"{at}attn.b_{y}"][h] for y in "QKV")
            if "pos_embed.W_pos" not in state:  # neighbours are a pair: a complex number, turned
                q, k = (torch.view_as_real(torch.view_as_complex(y.unflatten(2, (-1, 2)).contiguous())
                                           * torch.polar(torch.ones_like(angles), angles)).flatten(2) for y in (q, k))
            scores = q @ k.mT / config["d_head"] ** .5
            if config["attention_dir"] == "causal":
                scores = scores + torch.full((t, t), -torch.inf).triu(1)
            z = z + scores.softmax(-1) @ v @ state[f"{at}attn.W_O"][h]
        x = x + z + state[f"{at}attn.b_O"]
        act = {"gelu": F.gelu, "relu": F.relu}[config["act_fn"]]
        hidden = act(norm(x, at + "ln2") @ state[f"{at}mlp.W_in"] + state[f"{at}mlp.b_in"])
        x = x + hidden @ state[f"{at}mlp.W_out"] + state[f"{at}mlp.b_out"]
        after.append(x)
    return norm(x, "ln_final") @ state["unembed.W_U"] + state["unembed.b_U"], after


@pytest.mark.parametrize("name", data.SETUPS)
def test_in_the_words_of_transformer_lens(name):
    """Logits and residual streams of every setup, by its formulas; the very model is not touched."""
    gpt, tokens = of_setup(name)
    before = copy_of(gpt)
    config, state = to_transformer_lens(gpt)
    logits, cache = activations(gpt, tokens)
    theirs, after = in_their_words(config, state, tokens)
    assert (theirs - logits).abs().max() < 1e-4 and logits.abs().max() > .5
    for i, x in enumerate(after):
        assert (x - cache[f"blocks.{i}.resid_post"]).abs().max() < 1e-4
    state["embed.W_E"].zero_()
    assert same(gpt, before)


@pytest.mark.parametrize("name", data.SETUPS)
def test_in_transformer_lens(name):
    """The same with the package itself: HookedTransformer up to version 3, TransformerBridge since."""
    lens = pytest.importorskip("transformer_lens")
    gpt, tokens = of_setup(name)
    config, state = to_transformer_lens(gpt)
    try:
        hooked = lens.HookedTransformer(config)
        lacking = hooked.load_state_dict(state, strict=False)
        assert not lacking.unexpected_keys and not [key for key in lacking.missing_keys if "W_" in key or "b_" in key]
    except ImportError:
        from transformer_lens.utilities.tl_checkpoint_conversion import convert_tl_checkpoint
        hooked = lens.TransformerBridge.boot_native(config)
        hooked.load_state_dict(convert_tl_checkpoint(state, hooked.cfg))
    logits, cache = activations(gpt, tokens)
    with torch.no_grad():
        theirs, hooks = hooked.run_with_cache(tokens)
    assert (theirs - logits).abs().max() < 1e-4
    for i in range(gpt.config.n_layer):
        for part in ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out"):
            ours = cache[f"blocks.{i}.{part}"]
            assert (hooks[f"blocks.{i}.hook_{part}"] - ours).abs().max() < 1e-4, part
        assert (hooks[f"blocks.{i}.attn.hook_pattern"] - cache[f"blocks.{i}.attn.pattern"]).abs().max() < 1e-4

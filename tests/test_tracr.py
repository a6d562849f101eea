"""
What is promised of compiled models: they compute what their program means, at every position, whatever its size; they
agree with the Tracr library's own, whose parameters can be imported; and they pass through the stages like any other
checkpoint. Programs are checked against interpret(), that against tables made by hand, answers against slow code.
"""
import json
import math
import operator
import os
import pathlib
import signal
import subprocess
import sys
import time
import types
import warnings

import numpy as np
import pytest
import torch

import data
from data import A_TO_Z, COMPILED, rng
from model import (LOGIT_SCALE, PROGRAMS, SHARPNESS, Aggregate, Map, UserError, Width, activations, assemble, balance,
                   import_tracr, interpret, load, read_checkpoint, start_device)
from pretrain import add_noise
from test_promises import ROOT, Evil, Folder, assert_same_run, mistake

OPERAND = {"tracr-count": "a", "tracr-max": "5", "tracr-histogram": "2"}  # O_PT
TAUGHT = {"tracr-count": ("b", 1, 1e-3), "tracr-max": ("7", 3, 3e-4), "tracr-histogram": ("3", 1, 1e-3)}  # O_FT, q, noise
ROOM = {setup: c.room[0] for setup, c in COMPILED.items()}
A_TO_I = "abcdefghi"


def compiled(setup, operand=None, sharpness=SHARPNESS):
    """The model of a setup at the small scale."""
    return assemble(PROGRAMS[setup](operand or OPERAND[setup]), COMPILED[setup].alphabet, ROOM[setup], sharpness)


def read(strings, alphabet, room):
    """What a model reads: $ is 1, letters go from 2, padding is 0."""
    return torch.tensor([[1] + [2 + alphabet.index(x) for x in s] + [0] * (room - len(s)) for s in strings])


@torch.no_grad()
def answers(model, setup, strings):
    """The largest output at the second letter."""
    tokens = read(strings, COMPILED[setup].alphabet, model.config.n_ctx - 1)
    return torch.cat([model(part, 2).argmax(1) for part in tokens.split(1000)]).tolist()


def strings_of(setup, n, seed=0, shortest=None):
    """Random strings of a setup, of its length or of any from `shortest`."""
    g, sc = np.random.default_rng(seed), data.scale_of("small", setup)
    sizes = [sc.length if shortest is None else g.integers(shortest, sc.length + 1) for _ in range(n)]
    return ["".join(g.choice(list(sc.alphabet), size, replace=sc.repeat)) for size in sizes]


def as_strings(text, sc):
    """Rows of letters as Python strings."""
    return ["".join(sc.alphabet[x] for x in row) for row in text.tolist()]


def slow_answer(setup, s, operand):
    """The answer by Python's own means, as an output number."""
    if setup == "tracr-count":
        return s.count(operand)
    place = int(operand) - 1
    return A_TO_Z.index(sorted(s)[place]) if setup == "tracr-max" else s.count(s[place])


# ---------------------------------------------------------------- what programs mean


def test_interpret_by_hand():
    """Every variable of the three programs. Padding is no letter, but it has an index."""
    t, f, n = True, False, None
    assert interpret(PROGRAMS["tracr-count"]("a"), "abcaa", 7) == {
        "tokens": [*"abcaa", n, n], "indices": [0, 1, 2, 3, 4, 5, 6], "is_a": [t, f, f, t, t, n, n],
        "n_a": [2, 3, 0, 0, 0, 0, 0], "answer": [2, 3, 0, 0, 0, 0, 0]}  # False == 0 selects as well: 2 that are no a
    got = interpret(PROGRAMS["tracr-max"]("5"), "hcafbedg", 10)
    assert got["n_larger"] == [7, 2, 0, 5, 1, 4, 3, 6, 0, 0]
    assert got["is_rank"] == [f, f, f, f, f, t, f, f, f, f] and got["answer"] == ["h", "e"] + [n] * 8
    for rank in range(1, 9):
        assert interpret(PROGRAMS["tracr-max"](str(rank)), "hcafbedg", 10)["answer"][1] == "abcdefgh"[rank - 1]
    assert interpret(PROGRAMS["tracr-histogram"]("2"), "abcaba", 8)["answer"] == [3, 2, 1, 3, 2, 3, 0, 0]


CASES = {  # a student's programs: variables of variables, several steps of a kind, heads with more values than keys
    "unique": [Width("n", "tokens", "tokens", operator.eq), Map("unique", "n", lambda n: n == 1)],
    "after a": [Map("is_a", "tokens", lambda t: t == "a"),
                Aggregate("after", "indices", "indices", lambda key, query: key == query - 1, "is_a")],
    "look at a": [Map("is_a", "tokens", lambda t: t == "a"),
                  Aggregate("seen", "is_a", "is_a", lambda key, query: key and not query, "tokens")],
    "two widths": [Width("n", "tokens", "tokens", operator.eq), Width("alike", "n", "n", operator.eq),
                   Width("before", "tokens", "tokens", operator.lt), Map("odd", "alike", lambda n: n % 2),
                   Map("next", "indices", lambda i: i + 1)],
    **{setup: PROGRAMS[setup](operand) for setup, operand in OPERAND.items()}}


@pytest.mark.parametrize("case", CASES)
def test_compiled_variables_are_those_of_the_program(case):
    """Every variable stands one-hot in its own dimensions, at every position, none where it has no value; so do outputs."""
    program, setup = CASES[case], case if case in OPERAND else "tracr-count"
    alphabet, room, strings = COMPILED[setup].alphabet, ROOM[setup], strings_of(setup, 20, shortest=5)
    model = assemble(program, alphabet, room, 2. * room * (room + 1))  # twice what is needed: widths are one-hot, too
    logits, cache = activations(model, read(strings, alphabet, room))
    names, resid = model.config.residual, cache[f"blocks.{model.config.n_layer - 1}.resid_post"]
    for op in program:
        dims = [i for i, name in enumerate(names) if name.startswith(op.name + ":") and not name.endswith(":share")]
        for row, s in enumerate(strings):
            for i, value in enumerate(interpret(program, s, room)[op.name]):
                if case == "tracr-max" and op.name == "answer" and i != 1:
                    continue  # selects letters that differ: an average that no program should ask for
                wanted = torch.tensor([float(names[d] == f"{op.name}:{value}") for d in dims])
                assert (resid[row, i + 1, dims] - wanted).abs().max() < .01, (op.name, s, i)
                if op is program[-1]:
                    assert torch.equal(logits[row, i + 1], LOGIT_SCALE * resid[row, i + 1, dims])
    with pytest.raises(UserError, match="'letters'.*tokens, indices"):
        assemble([*program, Map("new", "letters", len)], alphabet, room)


def test_every_count():
    """0 to 24 at the default sharpness, 0 to 48 at the paper's scale, wherever they stand."""
    for scale, sharpness in (("small", SHARPNESS), ("paper", 49. * 50)):
        sc = data.scale_of(scale, "tracr-count")
        model, n = assemble(PROGRAMS["tracr-count"]("a"), sc.alphabet, sc.room, sharpness), sc.length
        for string in ("a" * n + "b" * n, "cb" + "a" * n + "b" * n):
            some = [string[n - k:2 * n - k] for k in range(n + 1)]
            assert answers(model, "tracr-count", some) == [s.count("a") for s in some]


@pytest.mark.parametrize("sharpness", [13., 50., 100., 132., 300., 650.])
def test_sharpness_decides_up_to_which_count(sharpness):
    """A count k comes out right if and only if k (k + 1) is below the sharpness: at Tracr's 100 up to 9, and 10 is wrong."""
    got = answers(compiled("tracr-count", sharpness=sharpness), "tracr-count", ["a" * k + "b" * (24 - k) for k in range(25)])
    assert [k for k in range(25) if got[k] == k] == [k for k in range(25) if k * (k + 1) < sharpness]


@pytest.mark.parametrize("setup, operand", [("tracr-count", "a"), ("tracr-count", "i"), ("tracr-histogram", "2"),
                                            *(("tracr-max", str(rank)) for rank in (5, 1, 2, 7, 10))])
def test_random_strings(setup, operand):
    """Exact on 10,000 strings (2,000 for other operands), as assembled and as balanced."""
    strings = strings_of(setup, 10_000 if operand == OPERAND[setup] else 2000, seed=1)
    model, wanted = compiled(setup, operand), [slow_answer(setup, s, operand) for s in strings]
    assert answers(model, setup, strings) == wanted
    assert answers(balance(model), setup, strings) == wanted


def test_sizes():
    """d, key and MLP of every length n, in closed form; the number of weights that are not zero is Tracr's."""
    for n in (5, 16, 25, 49):
        for setup, alphabet, sizes in (("tracr-count", A_TO_I, (3, 3 * n + 17, n + 2, 2 * n + 2, n + 1)),
                                       ("tracr-max", A_TO_Z, (3, 2 * n + 59, max(28, n + 2), 2 * n + 2, 26)),
                                       ("tracr-histogram", A_TO_I, (1, 2 * n + 14, 11, 2 * n + 2, n + 1))):
            c = assemble(PROGRAMS[setup](OPERAND[setup]), alphabet, n).config
            assert (c.n_layer, c.d_model, c.d_head, c.d_mlp, c.n_out) == sizes and not (c.causal or c.layer_norm)
    for setup, number in (("tracr-count", 401), ("tracr-max", 663)):
        assert sum(int((p != 0).sum()) for p in compiled(setup).parameters()) == number


@pytest.mark.parametrize("setup", OPERAND)
def test_balance(setup):
    """Norms in and out of every hidden unit become equal, no output changes; units that write nothing stay as they are."""
    tokens = read(strings_of(setup, 50), COMPILED[setup].alphabet, ROOM[setup])
    plain, model = compiled(setup).double(), compiled(setup).double()
    for block in (*plain.blocks, *model.blocks):
        block.up.bias.data += .1  # compiled ones are zero
    assert balance(model) is model
    with torch.no_grad():
        assert torch.allclose(model(tokens), plain(tokens), atol=1e-9)
    for old, new in zip(plain.blocks, model.blocks):
        norms, used = torch.cat([new.up.weight, new.up.bias[:, None]], 1).norm(dim=1), old.down.weight.norm(dim=0) > 0
        assert torch.allclose(norms[used], new.down.weight.norm(dim=0)[used], atol=1e-9)
        assert torch.equal(old.up.weight[~used], new.up.weight[~used]) and (new.up.bias[~used] == .1).all()


def test_logit_scale(stages):
    """--logit-scale is a factor on the outputs, and nothing else."""
    for words, scale in (([], 10), (["--logit-scale", "1"], 1)):
        in_order(stages, ["pretrain.py", "--setup", "tracr-count", *TINY, "--out", f"scale{scale}.pt", *words])
    ten, one = (weights(stages.path / f"scale{scale}.pt") for scale in (10, 1))
    assert all(torch.equal(ten[k] / 10 if k == "head.weight" else ten[k], x) for k, x in one.items())


def test_balance_is_there_because_of_the_noise():
    """Noise of 1e-3, the paper's, leaves little of the counter as Tracr writes it, and most of the balanced one."""
    strings, kept = strings_of("tracr-count", 500), {False: [], True: []}
    for seed in range(4):
        for balanced, shares in kept.items():
            model = balance(compiled("tracr-count")) if balanced else compiled("tracr-count")
            add_noise(model, 1e-3, seed)
            shares.append(np.mean([k == s.count("a") for k, s in zip(answers(model, "tracr-count", strings), strings)]))
    assert max(kept[False]) < .3 and min(kept[True]) > .4 and np.mean(kept[True]) > .7, kept


@torch.no_grad()
@pytest.mark.parametrize("setup", OPERAND)
def test_answer_position_alone(setup):
    """A model that is not causal: logits(tokens, at) see what comes later, and with eyes on the pattern too."""
    tokens, model = read(strings_of(setup, 5), COMPILED[setup].alphabet, ROOM[setup]), compiled(setup)
    add_noise(model, .2, 0)
    full, last = model.double()(tokens), f"blocks.{model.config.n_layer - 1}.attn.pattern"
    whole = activations(model, tokens, [last])[1][last]
    for at in (0, 2, tokens.shape[1] - 1):
        seen, cache = activations(model, tokens, [last], at)
        assert torch.allclose(model(tokens, at), full[:, at], rtol=1e-6) and torch.allclose(seen, full[:, at], rtol=1e-6)
        assert torch.allclose(cache[last], whole[:, :, at:at + 1], atol=1e-9) and cache[last].shape[-1] == tokens.shape[1]
    tokens[:, -1] = 3  # later than position 2, and it matters
    assert not torch.allclose(model(tokens, 2), full[:, 2], atol=1e-3)


# ---------------------------------------------------------------- against the Tracr library

TABLE = [  # computed by the library, sharpness 100: string, answer, residuals after the last block, attention in a block
    ("tracr-count", "gfcaagahdachdhaacebaaeha", "9",  # the last count that is right, and only just
     {(1, "n_a:13"): .34524, (1, "answer:15"): .20832, (2, "n_a:share"): .1, (2, "n_a:8"): .44444, (2, "n_a:9"): .55556,
      (2, "answer:8"): .44442, (2, "answer:9"): .55552, (4, "is_a:True"): 1., (5, "is_a:False"): 0.},
     {(0, 2, 3): .038462, (1, 1, 2): .0625, (1, 2, 4): .1, (1, 2, 3): 0., (2, 2, 0): .000066, (2, 2, 2): .999934}),
    ("tracr-count", "dghbghdhhbbfdbicbedeceee", "0",
     {(1, "n_a:19"): .11905, (1, "answer:20"): .22726, (1, "n_a:24"): .08333, (2, "n_a:share"): 1., (2, "answer:0"): .99993,
      (3, "answer:0"): .99993, (0, "n_a:0"): 0.}, {(1, 1, 0): .04, (1, 2, 0): 1., (2, 1, 0): .000066, (2, 3, 3): .999934}),
    ("tracr-count", "eegiabhicchdchcdfeaahghe", "3",
     {(1, "n_a:18"): .27778, (1, "answer:21"): .10822, (2, "n_a:share"): .25, (2, "answer:3"): .99993, (2, "answer:2"): 0.},
     {(1, 1, 4): .045455, (1, 1, 5): 0., (1, 2, 5): .25, (2, 2, 2): .999934}),
    ("tracr-max", "wbafkdrlyc", "f",
     {(1, "n_larger:7"): .30556, (1, "n_larger:8"): .69444, (1, "answer:y"): .06667, (2, "answer:f"): .99992,
      (2, "n_larger:share"): .5, (3, "answer:r"): .00008, (4, "is_rank:True"): 1., (11, "is_rank:False"): 1.},
     {(0, 1, 2): .111111, (0, 2, 3): .5, (1, 2, 1): .058824, (2, 1, 0): .000005, (2, 2, 0): .000079, (2, 2, 4): .999921,
      (2, 3, 0): .998741}),
    ("tracr-max", "zpnjuxyvwo", "u",
     {(1, "n_larger:8"): .44444, (1, "n_larger:9"): .55556, (2, "n_larger:share"): .25, (2, "answer:u"): .99992},
     {(0, 1, 3): .1, (0, 2, 3): .25, (0, 3, 4): .5, (2, 2, 5): .999921, (2, 3, 1): .000079}),
    ("tracr-max", "xaoircgnzu", "n",
     {(1, "n_larger:8"): .69444, (2, "n_larger:share"): 1., (3, "n_larger:share"): .16667, (2, "answer:n"): .99992},
     {(0, 3, 2): .166667, (0, 3, 3): 0., (2, 2, 8): .999921, (2, 1, 6): .066667})]


@pytest.mark.parametrize("setup, string, answer, residuals, attention", TABLE)
def test_numbers_of_the_library(setup, string, answer, residuals, attention):
    """Residuals and attention to 1e-5, as far as they are written down; the answer."""
    model = compiled(setup, sharpness=100.)
    logits, cache = activations(model, read([string], COMPILED[setup].alphabet, ROOM[setup]))
    for (position, name), value in residuals.items():
        got = cache["blocks.2.resid_post"][0, position, model.config.residual.index(name)].item()
        assert abs(got - value) < 1.5e-5, (position, name)
    for (block, query, key), value in attention.items():
        assert abs(cache[f"blocks.{block}.attn.pattern"][0, 0, query, key].item() - value) < 1e-5, (block, query, key)
    assert data.answer_names(data.scale_of("small", setup))[logits[0, 2].argmax()] == answer


# Parameters and activations of the real library, for those who have them, and its names of variables in our words
REFERENCE = pathlib.Path(os.environ.get("UNWRAP_TRACR_REFERENCE") or os.path.join(ROOT, "..", "shared", "tracr"))
FILES = {"tracr-count": "counter_n25_L100.npz", "tracr-max": "maxid_n16_L100.npz"}
OURS = {"bin_5": "is_a", "count_3": "n_a", "out_1": "answer", "nsmall_14": "n_larger", "target_13": "is_rank",
        "out_11": "answer"}


@pytest.mark.skipif(not REFERENCE.is_dir(), reason="needs the Tracr library's data: UNWRAP_TRACR_REFERENCE")
@pytest.mark.parametrize("imported", [False, True])
@pytest.mark.parametrize("setup", FILES)
def test_the_library_itself(setup, imported):
    """On its 200 inputs: all half-layers to 1e-4, attention to 1e-5, all answers; imported or assembled at sharpness 100."""
    z = np.load(REFERENCE / FILES[setup])
    labels, tokens = z["residual_labels"].tolist(), torch.tensor(z["tokens"])
    if imported:
        model, program = import_tracr(REFERENCE / FILES[setup])
        assert list(model.config.residual) == labels and program == {
            "alphabet": list(COMPILED[setup].alphabet), "room": ROOM[setup], "values": z["output_values"].tolist()}
        places = list(range(len(labels)))
    else:
        model = compiled(setup, sharpness=100.)
        names = [label.replace("_selector_width_attn_output", ":share").partition(":") for label in labels]
        places = [model.config.residual.index(OURS.get(name, name) + colon + value) for name, colon, value in names]
        assert sorted(places) == list(range(model.config.d_model))
    assert sum(int((p != 0).sum()) for p in model.parameters()) == sum(
        int((z[k] != 0).sum()) for k in z.files if k.startswith("param/") or k == "unembed")
    logits, cache = activations(model, tokens)
    halves = [cache[f"blocks.{i}.{part}"][..., places] for i in range(3) for part in ("resid_mid", "resid_post")]
    assert np.abs(halves[-1].numpy() - z["final_residual"]).max() < 1e-4
    for half, theirs in zip(halves, z["residuals_first20"], strict=True):
        assert np.abs(half[:20].numpy() - theirs).max() < 1e-4
    for i, theirs in enumerate(z["attn_patterns"]):
        assert np.abs(cache[f"blocks.{i}.attn.pattern"][:, 0].numpy() - theirs).max() < 1e-5
    outputs = np.sort(z["final_residual"] @ z["unembed"], -1)
    clear = imported | (outputs[..., -1] - outputs[..., -2] > 1e-3)  # elsewhere rounding decides
    clear[:, 2] = True
    assert (logits.argmax(-1).numpy() == z["unembedded_argmax"])[clear].all()
    assert [z["output_values"][i] for i in logits[:, 2].argmax(1)] == z["rasp_answer"].tolist()


# ---------------------------------------------------------------- import


def arrays_of(model, alphabet, values, seed=0):
    """What would be saved from the library if it had made our model: its names and conventions, ids in any order."""
    w, g = {k: v.numpy() for k, v in model.state_dict().items()}, np.random.default_rng(seed)
    ids, outputs = g.permutation(len(alphabet) + 2), g.permutation(len(values))
    out = {"vocab": np.array(["<pad>", "<bos>", *alphabet])[ids], "output_values": np.array(values)[outputs],
           "unembed": w["head.weight"].T[:, outputs] / LOGIT_SCALE, "residual_labels": np.array(model.config.residual),
           "param/token_embed/embeddings": w["tok.weight"][ids], "param/pos_embed/embeddings": w["pos.weight"],
           "config": np.array(json.dumps({"n_head": 1, "bos": "<bos>", "pad": "<pad>", "activation": "relu",
                                          "layer_norm": False, "causal": False}))}
    for i in range(model.config.n_layer):
        parts = {theirs: [w[f"blocks.{i}.{ours}.{x}"] for x in ("weight", "bias")] for theirs, ours in
                 (("attn/linear", "attn.out"), ("mlp/linear_1", "up"), ("mlp/linear_2", "down"))}
        q, k, v = zip(*(np.split(w[f"blocks.{i}.attn.qkv.{x}"], 3) for x in ("weight", "bias")))
        for name, (weight, bias) in {**parts, "attn/query": q, "attn/key": k, "attn/value": v}.items():
            out |= {f"param/layer_{i}/{name}/w": weight.T, f"param/layer_{i}/{name}/b": bias}
    return out


def values_of(setup):
    """What the outputs of a setup stand for."""
    return list(A_TO_Z) if setup == "tracr-max" else [str(i) for i in range(ROOM[setup] + 1)]


@pytest.mark.parametrize("setup", OPERAND)
def test_import_of_what_was_exported(tmp_path, setup):
    """The same weights bit for bit, whatever the order of ids and outputs in the file."""
    model, alphabet = compiled(setup), COMPILED[setup].alphabet
    for p in model.parameters():  # biases and zeros too, so that a mixed-up part shows
        p.data += torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    np.savez(tmp_path / "x.npz", **arrays_of(model, alphabet, values_of(setup)))
    got, program = import_tracr(tmp_path / "x.npz")
    assert program == {"alphabet": list(alphabet), "room": ROOM[setup], "values": values_of(setup)}
    for (name, x), y in zip(model.state_dict().items(), got.state_dict().values(), strict=True):
        assert torch.equal(x, y) or name == "head.weight" and torch.allclose(x, y, rtol=1e-6, atol=0), name
    assert got.config == model.config


@torch.no_grad()
@pytest.mark.parametrize("causal", [False, True])
def test_import_of_several_heads(tmp_path, causal):
    """Random parameters of two heads, computed again one number at a time: x @ w + b, softmax(q k / sqrt(key size))."""
    g, d, e, mlp, t, words = np.random.default_rng(0), 7, 3, 5, 6, ["x", "B", "y", "P", "z"]
    shapes = {"token_embed/embeddings": (5, d), "pos_embed/embeddings": (t, d)}
    for i in range(2):
        for name, a, b in (("attn/query", d, 2 * e), ("attn/key", d, 2 * e), ("attn/value", d, 2 * e),
                           ("attn/linear", 2 * e, d), ("mlp/linear_1", d, mlp), ("mlp/linear_2", mlp, d)):
            shapes |= {f"layer_{i}/{name}/w": (a, b), f"layer_{i}/{name}/b": (b,)}
    w, unembed = {name: .6 * g.normal(size=shape) for name, shape in shapes.items()}, g.normal(size=(d, 4))
    about = json.dumps({"n_head": 2, "bos": "B", "pad": "P", "causal": causal})
    np.savez(tmp_path / "x.npz", **{"param/" + k: v for k, v in w.items()}, unembed=unembed, vocab=words, config=about,
             output_values=["10", "-1", "9", "2"])
    model, program = import_tracr(tmp_path / "x.npz")
    assert program == {"alphabet": ["x", "y", "z"], "room": t - 1, "values": ["-1", "2", "9", "10"]}
    for s in ("BxyzPP", "Bzyx", "Byyyyy"):
        x = np.stack([w["token_embed/embeddings"][words.index(c)] + w["pos_embed/embeddings"][i] for i, c in enumerate(s)])
        for i in range(2):
            def linear(name, x):
                return x @ w[f"layer_{i}/{name}/w"] + w[f"layer_{i}/{name}/b"]
            q, k, v = (linear(f"attn/{name}", x) for name in ("query", "key", "value"))
            z = np.zeros_like(q)
            for head in (slice(0, e), slice(e, 2 * e)):
                for row in range(len(s)):
                    seen = range(row + 1 if causal else len(s))
                    score = [math.exp(q[row, head] @ k[col, head] / math.sqrt(e)) for col in seen]
                    z[row, head] = sum(a / sum(score) * v[col, head] for a, col in zip(score, seen))
            x = x + linear("attn/linear", z)
            x = x + linear("mlp/linear_2", np.maximum(linear("mlp/linear_1", x), 0))
        logits = model(torch.tensor([["PBxyz".index(c) for c in s]]))[0]
        assert np.allclose(logits.numpy() / LOGIT_SCALE, (x @ unembed)[:, [1, 3, 2, 0]], atol=1e-4)


WRONG = {  # what becomes of an array of a right file
    **{f"no {key}": (key, None) for key in (
        "config", "vocab", "unembed", "output_values", "param/token_embed/embeddings", "param/pos_embed/embeddings",
        "param/layer_0/attn/query/w", "param/layer_1/mlp/linear_1/w", "param/layer_2/attn/linear/b")},
    **{f"half of {key}": (key, lambda x: x[..., :x.shape[-1] // 2]) for key in (
        "param/token_embed/embeddings", "param/pos_embed/embeddings", "param/layer_1/attn/value/w", "unembed", "vocab",
        "param/layer_2/mlp/linear_2/b", "output_values", "residual_labels")},
    "nan": ("param/layer_1/attn/key/w", lambda x: x * np.nan), "complex": ("unembed", lambda x: x * 1j),
    "beyond float32": ("unembed", lambda x: x.astype(float) * 1e300),
    "pickled": ("unembed", lambda x: x.astype(object)), "words": ("unembed", lambda x: x.astype(str)),
    "a letter twice": ("vocab", lambda x: np.where(x == "b", "c", x)),
    "an output twice": ("output_values", lambda x: np.where(x == "2", "3", x)),
    "a layer norm beside": ("param/layer_0/layer_norm_1/scale", lambda x: np.ones(92)),
    **{new: ("config", lambda x, old=old, new=new: np.array(str(x).replace(old, new))) for old, new in (
        ('"layer_norm": false', '"layer_norm": true'), ("relu", "gelu"), ('bos": "<bos>', 'bos": "?'),
        ('bos": "<bos>', 'bos": "<pad>'), ('head": 1', 'head": 2'), ('head": 1', 'head": 0'), ('head": 1', 'head": -1'),
        ("{", "["), ("{", "[{"))}}


@pytest.fixture(scope="session")
def right():
    return arrays_of(compiled("tracr-count"), A_TO_I, values_of("tracr-count"))


def refused(path):
    """UserError in one line that names the file, and no warning besides."""
    with pytest.raises(UserError, match=path.name) as error, warnings.catch_warnings(record=True) as said:
        import_tracr(path)
    assert not said and len(str(error.value).splitlines()) == 1 and len(str(error.value)) < 250 + len(str(path))


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_arrays(tmp_path, right, wrong):
    """Whatever is missing, of another size, not a number, or named twice or for nothing."""
    key, change = WRONG[wrong]
    arrays = {**right, key: change and change(right.get(key))}
    np.savez(tmp_path / "x.npz", **{k: v for k, v in arrays.items() if v is not None})
    refused(tmp_path / "x.npz")


def test_foreign_files(tmp_path, right):
    """No file, a folder, text, nothing, one array, half a file, one that would run code."""
    np.savez(tmp_path / "right.npz", **right)
    np.savez(tmp_path / "evil.npz", **{**right, "vocab": np.array([Evil(str(tmp_path / "created"))], dtype=object)})
    np.save(tmp_path / "one.npy", np.ones(3))
    (tmp_path / "folder.npz").mkdir()
    whole = (tmp_path / "right.npz").read_bytes()
    for name, content in (("text.npz", b"a text\n" * 50), ("empty.npz", b""), ("half.npz", whole[:len(whole) // 2])):
        (tmp_path / name).write_bytes(content)
    for name in ("none.npz", "one.npy", "folder.npz", "text.npz", "empty.npz", "half.npz", "evil.npz"):
        refused(tmp_path / name)
    assert not (tmp_path / "created").exists()
    import_tracr(tmp_path / "right.npz")


# ---------------------------------------------------------------- strings


@pytest.mark.parametrize("setup", OPERAND)
def test_answers_and_questions(setup):
    """Answers for every operand against slow ones; BOS, letters from 2, padding 0, and the right output at the end."""
    for scale in ("small", "paper"):
        sc, c = data.scale_of(scale, setup), COMPILED[setup]
        text = data.draw_text(30, sc, c.task, "natural", sc.order[:2], data.default_q(sc, sc.order[:2]), rng(0, "t"))
        strings = as_strings(text, sc)
        assert text.shape == (30, c.letters[scale == "paper"]) and c.answers(text, sc).shape == (30, len(sc.operands))
        for column, operand in enumerate(sc.operands):
            wanted = [slow_answer(setup, s, operand) for s in strings]
            assert c.answers(text, sc)[:, column].tolist() == wanted
            asked = data.questions(text, c.task, operand, sc)
            assert torch.equal(asked[:, :-1], read(strings, sc.alphabet, sc.room)) and asked[:, -1].tolist() == wanted
        assert data.answer_position(sc) == 2 and data.vocabulary(sc) == ["#", "$", *sc.alphabet]
        assert data.answer_names(sc) == (list(A_TO_Z) if setup == "tracr-max" else [str(i) for i in range(sc.room + 1)])
    assert data.largest(torch.tensor([[3, 0, 2]]), sc)[0, 2 - 1] == 2  # the examples of the docstrings
    assert data.histogram(torch.tensor([[0, 1, 0]]), sc)[0, 1 - 1] == 2


@pytest.mark.parametrize("setup, pair, q", [("tracr-count", "ab", 1), ("tracr-count", "cb", -2), ("tracr-max", "57", 3),
                                            ("tracr-max", "36", 5), ("tracr-histogram", "23", 1)])
def test_relation(setup, pair, q):
    """c1: it always holds; c0: neither it nor a tie; C_Tr: on that share; natural: letters as they come."""
    sc, n = data.scale_of("small", setup), 3000
    for c, share in (("c1", 1), (1., 1), ("c0", 0), (0., 0), (.3, .3), (.9, .9), ("natural", None)):
        text = data.draw_text(n, sc, COMPILED[setup].task, c, list(pair), q, rng(0, "relation", c))
        found = np.array([slow_answer(setup, s, pair[1]) - slow_answer(setup, s, pair[0]) for s in as_strings(text, sc)])
        if c != "natural":
            assert abs((found == q).mean() - share) <= 4 * math.sqrt(share * (1 - share) / n) and (found != 0).all()
    assert .01 < (found == q).mean() < .5 and (setup == "tracr-max" or (found == 0).mean() > .05)
    share = np.bincount(text.flatten(), minlength=len(sc.alphabet)) / text.numel()
    assert np.abs(share * len(sc.alphabet) - 1).max() < .08
    assert sc.repeat or all(len(set(row)) == 10 for row in text.tolist())


def test_impossible_offsets():
    """The 7th largest letter is two letters or more after the 5th; 24 letters do not hold 25 more b than a."""
    for setup, pair, q in (("tracr-max", "57", 1), ("tracr-count", "ab", 25), ("tracr-histogram", "23", -24)):
        with pytest.raises(ValueError, match=f"q = {q}"):
            data.draw_text(4, data.scale_of("small", setup), COMPILED[setup].task, "c1", list(pair), q, rng(0, "q"))


def test_test_sets_ask_different_questions_about_the_same_strings():
    """As for the grammar: the strings do not depend on the operand; `other` are the answers of the pair's other one."""
    sc = data.scale_of("small", "tracr-max")
    five, seven = (data.test_set(100, sc, "max-identifier", o, "c1", 0, ["5", "7"], 3) for o in "57")
    assert torch.equal(five.text, seven.text) and torch.equal(five.target + 3, seven.target)
    assert torch.equal(five.other, seven.target) and torch.equal(seven.other, five.target) and seven.cross_floor() == 1


# ---------------------------------------------------------------- the stages

TINY = ["--batch-size", "4", "--eval-size", "8", "--threads", "1"]


def in_order(folder, *runs):
    """Scripts one after the other; all must succeed."""
    for words in runs:
        result = folder.run(*words)
        assert result.code == 0 and not result.err, result.raw


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """A folder with pretraining, fine-tuning and reFT of the three setups: pre-tracr-count.pt and so on."""
    folder = Folder(tmp_path_factory.mktemp("stages"))
    for setup in OPERAND:
        pre, ft, reft = (f"{stage}-{setup}.pt" for stage in ("pre", "ft", "reft"))
        in_order(folder, ["pretrain.py", "--setup", setup, *TINY, "--out", pre],
                 ["finetune.py", "--steps", "3", *TINY, "--ckpt", pre, "--out", ft],
                 ["finetune.py", "--steps", "3", *TINY, "--reverse", "--ckpt", ft, "--out", reft])
    return folder


@pytest.mark.parametrize("setup", OPERAND)
def test_stages(stages, setup):
    """Checkpoints and histories as ever; the compiled one answers all of O_PT and, where there is no tie, no O_FT."""
    task, (taught, q, noise) = COMPILED[setup].task, TAUGHT[setup]
    pair = [OPERAND[setup], taught]
    for stage, steps in (("pre", [0]), ("ft", [0, 1, 2, 3]), ("reft", [0, 1, 2, 3])):
        model, ckpt = load(stages.path / f"{stage}-{setup}.pt")
        rows = [json.loads(line) for line in (stages.path / f"{stage}-{setup}.jsonl").read_text().splitlines()]
        assert [(r["step"], r["operand"], r["split"]) for r in rows] == [
            (step, o, split) for step in steps for o in pair for split in data.SPLITS]
        assert {(r["setup"], r["scale"], r["task"], r["n"]) for r in rows} == {(setup, "small", task, 8)}
        assert ckpt["finished"] and ckpt["setup"] == setup and not model.head.weight.requires_grad
        assert ckpt["capability"] == {"task": task, "operand": pair[0]}
        if stage == "pre":
            plain = balance(compiled(setup, sharpness=300. if setup == "tracr-max" else 650.)).state_dict()
            assert all(torch.equal(x, plain[k]) for k, x in model.state_dict().items())
            assert all(r["accuracy"] == (r["operand"] == pair[0]) for r in rows if r["split"] != "natural")
            strings = strings_of(setup, 200)
            assert answers(model, setup, strings) == [slow_answer(setup, s, pair[0]) for s in strings]
        else:
            assert {k: ckpt["args"][k] for k in ("noise", "pair", "operand", "q")} == {
                "noise": noise if stage == "ft" else 0, "pair": pair, "operand": pair[stage == "ft"], "q": q}
            assert ckpt["optimizer"]["param_groups"][0]["momentum"] == .9


def weights(path):
    return read_checkpoint(path)["model"]


def test_noise(stages):
    """Normal, on every weight but the output map's; the same for the same seed; none with --noise 0, none for reFT."""
    def trained(model):
        return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])
    model, clean = compiled("tracr-max"), compiled("tracr-max")
    add_noise(model, .02, 0)
    noise = trained(model) - trained(clean)
    assert abs(noise.std() / .02 - 1) < .02 and abs(noise.mean()) < 4e-4
    assert torch.equal(model.head.weight, clean.head.weight)
    words = ["finetune.py", "--steps", "1", *TINY, "--lr", "1e-30"]  # a rate that moves nothing: what is left is the noise
    pre = ["--ckpt", "pre-tracr-max.pt"]
    in_order(stages, [*words, *pre, "--out", "one.pt"], [*words, *pre, "--batch-size", "5", "--out", "same.pt"],
             [*words, *pre, "--seed", "1", "--out", "other.pt"], [*words, *pre, "--noise", "0", "--out", "none.pt"],
             [*words, "--ckpt", "one.pt", "--reverse", "--out", "again.pt"])
    model, clean = (load(stages.path / "pre-tracr-max.pt")[0] for _ in range(2))
    add_noise(model, 3e-4, 0)
    for k, v in model.state_dict().items():
        assert all(torch.equal(v, weights(stages.path / name)[k]) for name in ("one.pt", "same.pt", "again.pt"))
        assert torch.equal(v, weights(stages.path / "other.pt")[k]) == (k == "head.weight")
        assert torch.allclose(clean.state_dict()[k], weights(stages.path / "none.pt")[k], atol=1e-20, rtol=0)


@pytest.mark.parametrize("setup", ["tracr-count", "tracr-max"])
def test_stopped_and_resumed(stages, setup):
    """Ends bit for bit as the uninterrupted run, momentum and all: noise is not added again."""
    words = ["finetune.py", "--steps", "150", "--eval-every", "75", *TINY, "--ckpt", f"pre-{setup}.pt"]
    in_order(stages, [*words, "--out", f"whole-{setup}.pt"])
    process, history = stages.start(*words, "--out", f"cut-{setup}.pt"), stages.path / f"cut-{setup}.jsonl"
    stages.wait(process, lambda: history.exists() and history.read_text().count("\n"))
    time.sleep(.1)
    os.kill(process.pid, signal.SIGTERM)
    assert stages.end(process).code == 143 and 0 < read_checkpoint(stages.path / f"cut-{setup}.pt")["step"] < 150
    in_order(stages, [*words, "--out", f"cut-{setup}.pt", "--resume"])
    assert_same_run(stages.path / f"cut-{setup}.pt", stages.path / f"whole-{setup}.pt")


def test_stopped_while_a_compiled_model_is_evaluated(stages):
    """It is not finished without its history: --resume evaluates it, and then all is as if nothing had happened."""
    words = ["pretrain.py", "--setup", "tracr-count", "--eval-size", "3000", "--threads", "1"]
    in_order(stages, [*words, "--out", "calm.pt"])
    process = stages.start(*words, "--out", "cut.pt")
    stages.wait(process, (stages.path / "cut.jsonl").exists)  # empty now: the evaluation begins
    process.terminate()
    assert stages.end(process).code == 143 and (stages.path / "cut.jsonl").read_text() == ""
    in_order(stages, [*words, "--out", "cut.pt", "--resume"])
    assert_same_run(stages.path / "cut.pt", stages.path / "calm.pt")


@pytest.mark.parametrize("rank", ["1", "7", "10"])
def test_every_rank_has_defaults_that_work(tmp_path, rank):
    """Whichever letter the model names, there are strings to test it on and a relation to teach."""
    in_order(Folder(tmp_path), ["pretrain.py", "--setup", "tracr-max", *TINY, "--rank", rank, "--out", "pre.pt"],
             ["finetune.py", "--steps", "1", *TINY, "--ckpt", "pre.pt", "--out", "ft.pt"])
    rows = [json.loads(line) for line in (tmp_path / "pre.jsonl").read_text().splitlines()]
    assert [r["accuracy"] for r in rows if r["operand"] == rank] == [1., 1., 1.]


def counter(alphabet, room):
    """A counter of another size and its parameters in the library's format."""
    model = assemble(PROGRAMS["tracr-count"]("a"), alphabet, room)
    return model, arrays_of(model, alphabet, [str(i) for i in range(room + 1)])


def test_import_from_the_command_line(tmp_path, right):
    """An imported model is a checkpoint like the assembled one, of its own size; it can be fine-tuned."""
    folder, (small, arrays) = Folder(tmp_path), counter("abcd", 12)
    np.savez(tmp_path / "x.npz", **right)
    np.savez(tmp_path / "small.npz", **arrays)
    pre = ["pretrain.py", "--setup", "tracr-count", *TINY]
    in_order(folder, [*pre, "--params", "x.npz", "--out", "x.pt"], [*pre, "--out", "y.pt"],
             [*pre, "--params", "small.npz", "--out", "small.pt", "--no-balance"],
             ["finetune.py", "--steps", "2", *TINY, "--ckpt", "small.pt", "--operand", "d", "--out", "z.pt"])
    x, y = weights(tmp_path / "x.pt"), weights(tmp_path / "y.pt")
    assert all(torch.allclose(x[k], y[k], atol=1e-4) for k in y)
    assert all(torch.equal(v, weights(tmp_path / "small.pt")[k]) for k, v in small.state_dict().items())
    sc = data.setup_of(read_checkpoint(tmp_path / "z.pt"))
    assert (sc.alphabet, sc.room, sc.length, sc.values[-1]) == (list("abcd"), 12, 12, "12")


def test_import_of_what_does_not_suit(tmp_path, right):
    """Exit code 2, one line, nothing written: too few letters, positions or outputs, and files that cannot be read."""
    folder, few = Folder(tmp_path), np.isin(right["output_values"], [str(i) for i in range(9)])
    six, ten = (arrays_of(assemble(PROGRAMS["tracr-max"]("5"), some, room), some, list(some))
                for some, room in ((A_TO_Z, 6), (A_TO_Z[:10], 16)))  # of ten letters the 7th is always two after the 5th
    for name, arrays in {
            "few": {**right, "output_values": right["output_values"][few], "unembed": right["unembed"][:, few]},
            "shifted": {**right, "output_values": np.array([str(int(v) + 1) for v in right["output_values"]])},
            "letters": counter("ab", 25)[1], "position": counter(A_TO_I, 1)[1], "max six": six, "max ten": ten,
            "gelu": {**right, "config": np.array(str(right["config"]).replace("relu", "gelu"))}}.items():
        np.savez(tmp_path / (name + ".npz"), **arrays)
    (tmp_path / "text.npz").write_text("a text")
    before = folder.hashes()
    for file in before:
        setup = "tracr-max" if file.startswith("max") else "tracr-count"
        mistake(folder.run("pretrain.py", "--setup", setup, *TINY, "--params", file, "--out", "x.pt"), file)
        assert folder.hashes() == before, file


PRE, FT = ["pretrain.py", *TINY, "--out", "y.pt"], ["finetune.py", *TINY, "--steps", "1", "--out", "y.pt"]
PRE_COUNT, PRE_MAX = [*PRE, "--setup", "tracr-count"], [*PRE, "--setup", "tracr-max"]
FT_COUNT, FT_MAX = [*FT, "--ckpt", "pre-tracr-count.pt"], [*FT, "--ckpt", "pre-tracr-max.pt"]


@pytest.mark.parametrize("words, says", [
    ([*PRE_COUNT, "--sharpness", "100"], ["--sharpness 100", "24 letters"]),
    ([*PRE_COUNT, "--rank", "5"], ["--rank", "tracr-max"]),
    ([*PRE_MAX, "--rank", "11"], ["--rank 11", "10"]), ([*PRE_MAX, "--rank", "0"], ["--rank 0"]),
    ([*PRE_COUNT, "--prior", "high"], ["--prior"]), ([*PRE_COUNT, "--steps", "9"], ["--steps"]),
    ([*PRE, "--params", "x.npz"], ["--params", "tracr-count"]), ([*PRE, "--no-balance"], ["--balance", "tracr-count"]),
    ([*PRE_COUNT, "--params", "none.npz"], ["none.npz", "no such file"]),
    ([*PRE_MAX, "--params", "x.npz", "--rank", "5"], ["--params", "--rank"]),
    ([*FT_COUNT, "--operand", "z"], ["--operand z"]), ([*FT_COUNT, "--operand", "a"], ["--operand a", "--reverse"]),
    ([*FT_MAX, "--operand", "11"], ["--operand 11"]), ([*FT_COUNT, "--task", "index"], ["--task index", "count"]),
    ([*FT_MAX, "--q", "1"], ["--q 1"]), ([*FT_COUNT, "--q", "25"], ["--q 25"]),
    ([*FT_COUNT, "--noise", "1"], ["--noise 1"]), ([*FT_COUNT, "--noise", "-0.1"], ["--noise -0.1"])])
def test_mistakes(stages, words, says):
    """Exit code 2 and one line that names the flag or file; nothing written."""
    before = stages.hashes()
    mistake(stages.run(*words), words[0], *says)
    assert stages.hashes() == before


def test_numbers_too_small_to_matter_are_zero():
    """They make a step of a compiled model thrice as slow."""
    start_device(types.SimpleNamespace(threads=1, device="cpu"))
    try:
        assert (torch.tensor([1e-39]) * 1.).item() == 0.
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.slow
def test_a_program_of_your_own_is_a_line_in_each_table(tmp_path):
    """The README's exercise: is my letter the only one of its kind? It passes through every script."""
    for name in ("data", "model", "pretrain", "finetune", "analyze", "plot"):
        text = (pathlib.Path(ROOT) / f"{name}.py").read_text()
        if name == "model":
            text = text.replace('PROGRAMS = {', 'PROGRAMS = {"tracr-unique": lambda place: [Width("n", "tokens", "tokens", '
                                'operator.eq), Map("answer", "n", lambda n: n == 1)],\n', 1)
        if name == "data":
            line = ('"tracr-unique": SimpleNamespace(task="unique", answers=lambda text, sc: (histogram(text, sc) == 1).long(), '
                    'alphabet="abcdefghi", letters=(8, 8), repeat=True, room=(9, 9), operands=("2", "3", "4"), noise=0.),\n')
            text = text.replace("COMPILED = {", "COMPILED = {" + line, 1)
        (tmp_path / f"{name}.py").write_text(text)

    def run(*words):
        done = subprocess.run([sys.executable, *words], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout
    assert "unique of 2" in run("data.py", "--setup", "tracr-unique")
    assert "100.0%" in run("pretrain.py", "--setup", "tracr-unique", "--eval-size", "50")
    run("finetune.py", "--c-tr", "0", "--steps", "2", "--eval-size", "50")
    run("analyze.py", "behavior", "--eval-size", "50")
    assert "right" in run("analyze.py", "ask", "--ckpt", "out/pre.pt", "--operand", "2", "--text", "abaaaaaa")
    assert "fig5_behavior.png" in run("plot.py")

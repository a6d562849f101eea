"""
What is promised of compiled models: they compute what their program means, at every position,
whatever its size; they agree with the Tracr library's own, whose parameters can be imported; and
they pass through the stages like any other checkpoint. Programs are checked against interpret(),
that against tables made by hand, answers against slow code.
"""
import json
import math
import operator
import os
import pathlib
import signal
import time
import types
import warnings
from string import ascii_lowercase as A_TO_Z

import numpy as np
import pytest
import torch

import data
from data import PROGRAMS, Aggregate, Map, Relation, SelectorWidth, UserError, rng
from model import (LOGIT_SCALE, MLP_EXACTNESS, activations, balance, compile_program, import_tracr,
                   load, read_checkpoint)
from pretrain import add_noise, start_device
from test_promises import ROOT, Evil, Folder, assert_same_run, mistake, with_moments

OPERAND = {"tracr-count": "a", "tracr-max": "5", "tracr-histogram": "2"}  # O_PT
TAUGHT = {"tracr-count": ("b", 1, 1e-3), "tracr-max": ("7", 3, 3e-4),
          "tracr-histogram": ("3", 1, 1e-3)}  # O_FT, q, noise
ROOM = {setup: program.max_seq_len[0] for setup, program in PROGRAMS.items()}
A_TO_I = "abcdefghi"


def steps_of(setup, operand=None):
    """The steps of a program, for O_PT or another operand."""
    return PROGRAMS[setup].steps(operand or OPERAND[setup])


def compiled(setup, operand=None, exactness=MLP_EXACTNESS):
    """The model of a setup at the small scale."""
    alphabet = PROGRAMS[setup].alphabet
    return compile_program(steps_of(setup, operand), alphabet, ROOM[setup], exactness)


def read(strings, alphabet, room):
    """What a model reads: $ is 1, letters go from 2, padding is 0."""
    rows = []
    for s in strings:
        rows.append([1] + [2 + alphabet.index(x) for x in s] + [0] * (room - len(s)))
    return torch.tensor(rows)


@torch.no_grad()
def answers(model, setup, strings):
    """The largest output at the second letter."""
    tokens = read(strings, PROGRAMS[setup].alphabet, model.config.n_ctx - 1)
    return torch.cat([model(part, 2).argmax(1) for part in tokens.split(1000)]).tolist()


def strings_of(setup, n, seed=0, shortest=None):
    """Random strings of a setup, of its length or of any from `shortest`."""
    g, about = np.random.default_rng(seed), data.Compiled(setup)
    longest, repeat = about.length, about.program.repeat
    sizes = [longest if shortest is None else g.integers(shortest, longest + 1) for _ in range(n)]
    return ["".join(g.choice(list(about.alphabet), size, replace=repeat)) for size in sizes]


def as_strings(text, alphabet):
    """Rows of letters as Python strings."""
    strings = []
    for row in text.tolist():
        strings.append("".join(alphabet[x] for x in row))
    return strings


def slow_answer(setup, s, operand):
    """The answer by Python's own means, as an output number."""
    if setup == "tracr-count":
        return s.count(operand)
    place = int(operand) - 1
    return A_TO_Z.index(sorted(s)[place]) if setup == "tracr-max" else s.count(s[place])


# ---------------------------------------------------------------- what programs mean


def interpret(program, letters, max_seq_len):
    """
    What a program means: {variable: its value or None at every position}, for letters and paddings
    up to max_seq_len. The slow reference of compile_program().
    """
    values = {"tokens": [*letters, *[None] * (max_seq_len - len(letters))],
              "indices": list(range(max_seq_len))}
    for step in program:
        if isinstance(step, Map):
            values[step.name] = [None if v is None else step.fn(v) for v in values[step.of]]
            continue
        result = values[step.name] = []
        for query in values[step.queries]:
            hits = [i for i, key in enumerate(values[step.keys])
                    if None not in (query, key) and step.selects(key, query)]
            if isinstance(step, SelectorWidth):
                result.append(len(hits))
            else:
                result.append(values[step.values][hits[0]] if hits else None)
    return values


def test_interpret_by_hand():
    """Every variable of the three programs. Padding is no letter, but it has an index."""
    t, f, n = True, False, None
    assert interpret(steps_of("tracr-count", "a"), "abcaa", 7) == {
        "tokens": [*"abcaa", n, n], "indices": [0, 1, 2, 3, 4, 5, 6],
        "is_a": [t, f, f, t, t, n, n], "n_a": [2, 3, 0, 0, 0, 0, 0],
        "answer": [2, 3, 0, 0, 0, 0, 0]}  # False == 0 selects as well: 2 that are no a
    got = interpret(steps_of("tracr-max", "5"), "hcafbedg", 10)
    assert got["n_larger"] == [7, 2, 0, 5, 1, 4, 3, 6, 0, 0]
    assert got["is_rank"] == [f, f, f, f, f, t, f, f, f, f]
    assert got["answer"] == ["h", "e"] + [n] * 8
    for rank in range(1, 9):
        got = interpret(steps_of("tracr-max", str(rank)), "hcafbedg", 10)
        assert got["answer"][1] == "abcdefgh"[rank - 1]
    got = interpret(steps_of("tracr-histogram", "2"), "abcaba", 8)
    assert got["answer"] == [3, 2, 1, 3, 2, 3, 0, 0]


CASES = {  # a student's programs: variables of variables, several steps of a kind, heads with more
    #        values than keys
    "unique": [SelectorWidth("n", "tokens", "tokens", operator.eq),
               Map("unique", "n", lambda n: n == 1)],
    "after a": [Map("is_a", "tokens", lambda t: t == "a"),
                Aggregate("after", "indices", "indices", lambda key, query: key == query - 1,
                          "is_a")],
    "look at a": [Map("is_a", "tokens", lambda t: t == "a"),
                  Aggregate("seen", "is_a", "is_a", lambda key, query: key and not query,
                            "tokens")],
    "two widths": [SelectorWidth("n", "tokens", "tokens", operator.eq),
                   SelectorWidth("alike", "n", "n", operator.eq),
                   SelectorWidth("before", "tokens", "tokens", operator.lt),
                   Map("odd", "alike", lambda n: n % 2), Map("next", "indices", lambda i: i + 1)],
    **{setup: steps_of(setup) for setup in OPERAND}}


@pytest.mark.parametrize("case", CASES)
def test_compiled_variables_are_those_of_the_program(case):
    """
    Every variable stands one-hot in its own dimensions, at every position, none where it has no
    value; so do outputs.
    """
    program, setup = CASES[case], case if case in OPERAND else "tracr-count"
    alphabet, room = PROGRAMS[setup].alphabet, ROOM[setup]
    strings = strings_of(setup, 20, shortest=5)
    # twice what is needed: widths are one-hot, too
    model = compile_program(program, alphabet, room, 2. * room * (room + 1))
    logits, cache = activations(model, read(strings, alphabet, room))
    names = model.config.residual
    resid = cache[f"blocks.{model.config.n_layer - 1}.resid_post"]
    for op in program:
        dims = [i for i, name in enumerate(names)
                if name.startswith(op.name + ":") and not name.endswith(":share")]
        for row, s in enumerate(strings):
            for i, value in enumerate(interpret(program, s, room)[op.name]):
                if case == "tracr-max" and op.name == "answer" and i != 1:
                    continue  # letters that differ: an average that no program should ask for
                wanted = torch.tensor([float(names[d] == f"{op.name}:{value}") for d in dims])
                assert (resid[row, i + 1, dims] - wanted).abs().max() < .01, (op.name, s, i)
                if op is program[-1]:
                    assert torch.equal(logits[row, i + 1], LOGIT_SCALE * resid[row, i + 1, dims])
    with pytest.raises(UserError, match="'letters'.*tokens, indices"):
        compile_program([*program, Map("new", "letters", len)], alphabet, room)


def test_every_count():
    """0 to 24 at the small scale, 0 to 48 at the paper's, wherever they stand."""
    assert data.Compiled("tracr-count").mlp_exactness == MLP_EXACTNESS
    assert data.Compiled("tracr-count", "paper").mlp_exactness == 49. * 50
    for scale in data.SCALES:
        setup = data.Compiled("tracr-count", scale)
        model = compile_program(steps_of("tracr-count"), setup.alphabet, setup.room,
                                setup.mlp_exactness)
        n = setup.length
        for string in ("a" * n + "b" * n, "cb" + "a" * n + "b" * n):
            some = [string[n - k:2 * n - k] for k in range(n + 1)]
            assert answers(model, "tracr-count", some) == [s.count("a") for s in some]


@pytest.mark.parametrize("exactness", [13., 50., 100., 132., 300., 650.])
def test_exactness_decides_up_to_which_count(exactness):
    """
    A count k comes out right if and only if k (k + 1) is below it: at Tracr's 100 up to 9, and 10
    is wrong.
    """
    strings = ["a" * k + "b" * (24 - k) for k in range(25)]
    got = answers(compiled("tracr-count", exactness=exactness), "tracr-count", strings)
    right = [k for k in range(25) if got[k] == k]
    assert right == [k for k in range(25) if k * (k + 1) < exactness]


@pytest.mark.parametrize("setup", OPERAND)
def test_exactness_of_a_setup_is_enough_for_its_strings(setup):
    """No count of a string's letters is too large for the exactness that its model is made with."""
    for scale in data.SCALES:
        about = data.Compiled(setup, scale)
        assert about.length * (about.length + 1) < about.mlp_exactness
    few = {"alphabet": list("abcd"), "room": 12, "values": None}  # an imported model is of any size
    assert data.Compiled(setup, imported=few).mlp_exactness == 300.


@pytest.mark.parametrize("setup, operand", [
    ("tracr-count", "a"), ("tracr-count", "i"), ("tracr-histogram", "2"),
    *(("tracr-max", str(rank)) for rank in (5, 1, 2, 7, 10))])
def test_random_strings(setup, operand):
    """Exact on 10,000 strings (2,000 for other operands), as assembled and as balanced."""
    strings = strings_of(setup, 10_000 if operand == OPERAND[setup] else 2000, seed=1)
    model = compiled(setup, operand)
    wanted = [slow_answer(setup, s, operand) for s in strings]
    assert answers(model, setup, strings) == wanted
    assert answers(balance(model), setup, strings) == wanted


def test_sizes():
    """d, key and MLP of every length n, in closed form; as many weights as Tracr's are not zero."""
    for n in (5, 16, 25, 49):
        for setup, alphabet, sizes in (
                ("tracr-count", A_TO_I, (3, 3 * n + 17, n + 2, 2 * n + 2, n + 1)),
                ("tracr-max", A_TO_Z, (3, 2 * n + 59, max(28, n + 2), 2 * n + 2, 26)),
                ("tracr-histogram", A_TO_I, (1, 2 * n + 14, 11, 2 * n + 2, n + 1))):
            c = compile_program(steps_of(setup), alphabet, n).config
            assert (c.n_layer, c.d_model, c.d_head, c.d_mlp, c.n_out) == sizes
            assert not (c.causal or c.layer_norm)
    for setup, number in (("tracr-count", 401), ("tracr-max", 663)):
        assert sum(int((p != 0).sum()) for p in compiled(setup).parameters()) == number


@pytest.mark.parametrize("setup", OPERAND)
def test_balance(setup):
    """
    Norms in and out of every hidden unit become equal, no output changes; units that write nothing
    stay as they are.
    """
    tokens = read(strings_of(setup, 50), PROGRAMS[setup].alphabet, ROOM[setup])
    plain, model = compiled(setup).double(), compiled(setup).double()
    for block in (*plain.blocks, *model.blocks):
        block.up.bias.data += .1  # compiled ones are zero
    assert balance(model) is model
    with torch.no_grad():
        assert torch.allclose(model(tokens), plain(tokens), atol=1e-9)
    for old, new in zip(plain.blocks, model.blocks):
        norms = torch.cat([new.up.weight, new.up.bias[:, None]], 1).norm(dim=1)
        used = old.down.weight.norm(dim=0) > 0
        assert torch.allclose(norms[used], new.down.weight.norm(dim=0)[used], atol=1e-9)
        assert torch.equal(old.up.weight[~used], new.up.weight[~used])
        assert (new.up.bias[~used] == .1).all()


def test_logit_scale(stages):
    """--logit-scale is a factor on the outputs, and nothing else."""
    for words, scale in (([], 10), (["--logit-scale", "1"], 1)):
        in_order(stages, ["pretrain.py", "--setup", "tracr-count", *TINY, "--out",
                          f"scale{scale}.pt", *words])
    ten, one = (weights(stages.path / f"scale{scale}.pt") for scale in (10, 1))
    for k, x in one.items():
        assert torch.equal(ten[k] / 10 if k == "head.weight" else ten[k], x)


def test_balance_is_there_because_of_the_noise():
    """
    Noise of 1e-3, the paper's, leaves little of the counter as Tracr writes it, and most of the
    balanced one.
    """
    strings, kept = strings_of("tracr-count", 500), {False: [], True: []}
    right = np.array([s.count("a") for s in strings])
    for seed in range(4):
        for balanced, shares in kept.items():
            model = balance(compiled("tracr-count")) if balanced else compiled("tracr-count")
            add_noise(model, 1e-3, seed)
            shares.append(np.mean(np.array(answers(model, "tracr-count", strings)) == right))
    assert max(kept[False]) < .3 and min(kept[True]) > .4 and np.mean(kept[True]) > .7, kept


@torch.no_grad()
@pytest.mark.parametrize("setup", OPERAND)
def test_answer_position_alone(setup):
    """
    A model that is not causal: logits(tokens, at) see what comes later, and with eyes on the
    pattern too.
    """
    tokens = read(strings_of(setup, 5), PROGRAMS[setup].alphabet, ROOM[setup])
    model = compiled(setup)
    add_noise(model, .2, 0)
    full, last = model.double()(tokens), f"blocks.{model.config.n_layer - 1}.attn.pattern"
    whole = activations(model, tokens, [last])[1][last]
    for at in (0, 2, tokens.shape[1] - 1):
        seen, cache = activations(model, tokens, [last], at)
        assert torch.allclose(model(tokens, at), full[:, at], rtol=1e-6)
        assert torch.allclose(seen, full[:, at], rtol=1e-6)
        assert torch.allclose(cache[last], whole[:, :, at:at + 1], atol=1e-9)
        assert cache[last].shape[-1] == tokens.shape[1]
    tokens[:, -1] = 3  # later than position 2, and it matters
    assert not torch.allclose(model(tokens, 2), full[:, 2], atol=1e-3)


# ---------------------------------------------------------------- against the Tracr library

TABLE = [  # computed by the library, mlp_exactness 100: string, answer, residuals after the last
    #        block, attention in a block
    ("tracr-count", "gfcaagahdachdhaacebaaeha", "9",  # the last count that is right, and only just
     {(1, "n_a:13"): .34524, (1, "answer:15"): .20832, (2, "n_a:share"): .1, (2, "n_a:8"): .44444,
      (2, "n_a:9"): .55556, (2, "answer:8"): .44442, (2, "answer:9"): .55552, (4, "is_a:True"): 1.,
      (5, "is_a:False"): 0.},
     {(0, 2, 3): .038462, (1, 1, 2): .0625, (1, 2, 4): .1, (1, 2, 3): 0., (2, 2, 0): .000066,
      (2, 2, 2): .999934}),
    ("tracr-count", "dghbghdhhbbfdbicbedeceee", "0",
     {(1, "n_a:19"): .11905, (1, "answer:20"): .22726, (1, "n_a:24"): .08333,
      (2, "n_a:share"): 1., (2, "answer:0"): .99993, (3, "answer:0"): .99993, (0, "n_a:0"): 0.},
     {(1, 1, 0): .04, (1, 2, 0): 1., (2, 1, 0): .000066, (2, 3, 3): .999934}),
    ("tracr-count", "eegiabhicchdchcdfeaahghe", "3",
     {(1, "n_a:18"): .27778, (1, "answer:21"): .10822, (2, "n_a:share"): .25,
      (2, "answer:3"): .99993, (2, "answer:2"): 0.},
     {(1, 1, 4): .045455, (1, 1, 5): 0., (1, 2, 5): .25, (2, 2, 2): .999934}),
    ("tracr-max", "wbafkdrlyc", "f",
     {(1, "n_larger:7"): .30556, (1, "n_larger:8"): .69444, (1, "answer:y"): .06667,
      (2, "answer:f"): .99992, (2, "n_larger:share"): .5, (3, "answer:r"): .00008,
      (4, "is_rank:True"): 1., (11, "is_rank:False"): 1.},
     {(0, 1, 2): .111111, (0, 2, 3): .5, (1, 2, 1): .058824, (2, 1, 0): .000005,
      (2, 2, 0): .000079, (2, 2, 4): .999921, (2, 3, 0): .998741}),
    ("tracr-max", "zpnjuxyvwo", "u",
     {(1, "n_larger:8"): .44444, (1, "n_larger:9"): .55556, (2, "n_larger:share"): .25,
      (2, "answer:u"): .99992},
     {(0, 1, 3): .1, (0, 2, 3): .25, (0, 3, 4): .5, (2, 2, 5): .999921, (2, 3, 1): .000079}),
    ("tracr-max", "xaoircgnzu", "n",
     {(1, "n_larger:8"): .69444, (2, "n_larger:share"): 1., (3, "n_larger:share"): .16667,
      (2, "answer:n"): .99992},
     {(0, 3, 2): .166667, (0, 3, 3): 0., (2, 2, 8): .999921, (2, 1, 6): .066667})]


@pytest.mark.parametrize("setup, string, answer, residuals, attention", TABLE)
def test_numbers_of_the_library(setup, string, answer, residuals, attention):
    """Residuals and attention to 1e-5, as far as they are written down; the answer."""
    model = compiled(setup, exactness=100.)
    logits, cache = activations(model, read([string], PROGRAMS[setup].alphabet, ROOM[setup]))
    for (position, name), value in residuals.items():
        dim = model.config.residual.index(name)
        got = cache["blocks.2.resid_post"][0, position, dim].item()
        assert abs(got - value) < 1.5e-5, (position, name)
    for (block, query, key), value in attention.items():
        got = cache[f"blocks.{block}.attn.pattern"][0, 0, query, key].item()
        assert abs(got - value) < 1e-5, (block, query, key)
    assert data.Compiled(setup).output_names[logits[0, 2].argmax()] == answer


# Parameters and activations of the real library, for those who have them, and its names of
# variables in our words
REFERENCE = pathlib.Path(os.environ.get("UNWRAP_TRACR_REFERENCE")
                         or os.path.join(ROOT, "..", "shared", "tracr"))
FILES = {"tracr-count": "counter_n25_L100.npz", "tracr-max": "maxid_n16_L100.npz"}
OURS = {"bin_5": "is_a", "count_3": "n_a", "out_1": "answer", "nsmall_14": "n_larger",
        "target_13": "is_rank", "out_11": "answer"}


@pytest.mark.skipif(not REFERENCE.is_dir(),
                    reason="needs the Tracr library's data: UNWRAP_TRACR_REFERENCE")
@pytest.mark.parametrize("imported", [False, True])
@pytest.mark.parametrize("setup", FILES)
def test_the_library_itself(setup, imported):
    """
    On its 200 inputs: all half-layers to 1e-4, attention to 1e-5, all answers; imported or compiled
    with an exactness of 100.
    """
    z = np.load(REFERENCE / FILES[setup])
    labels, tokens = z["residual_labels"].tolist(), torch.tensor(z["tokens"])
    if imported:
        model, program = import_tracr(REFERENCE / FILES[setup])
        assert list(model.config.residual) == labels and program == {
            "alphabet": list(PROGRAMS[setup].alphabet), "room": ROOM[setup],
            "values": z["output_values"].tolist()}
        places = list(range(len(labels)))
    else:
        model, places = compiled(setup, exactness=100.), []
        for label in labels:
            label = label.replace("_selector_width_attn_output", ":share")
            name, colon, value = label.partition(":")
            places.append(model.config.residual.index(OURS.get(name, name) + colon + value))
        assert sorted(places) == list(range(model.config.d_model))
    assert sum(int((p != 0).sum()) for p in model.parameters()) == sum(
        int((z[k] != 0).sum()) for k in z.files if k.startswith("param/") or k == "unembed")
    logits, cache = activations(model, tokens)
    halves = []
    for i in range(3):
        halves += [cache[f"blocks.{i}.{part}"][..., places] for part in ("resid_mid", "resid_post")]
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
    """
    What would be saved from the library if it had made our model: its names and conventions, ids in
    any order.
    """
    w, g = {k: v.numpy() for k, v in model.state_dict().items()}, np.random.default_rng(seed)
    ids, outputs = g.permutation(len(alphabet) + 2), g.permutation(len(values))
    about = {"n_head": 1, "bos": "<bos>", "pad": "<pad>", "activation": "relu", "layer_norm": False,
             "causal": False}
    out = {"vocab": np.array(["<pad>", "<bos>", *alphabet])[ids],
           "output_values": np.array(values)[outputs],
           "unembed": w["head.weight"].T[:, outputs] / LOGIT_SCALE,
           "residual_labels": np.array(model.config.residual),
           "param/token_embed/embeddings": w["tok.weight"][ids],
           "param/pos_embed/embeddings": w["pos.weight"], "config": np.array(json.dumps(about))}
    for i in range(model.config.n_layer):
        parts = {}
        for theirs, ours in (("attn/linear", "attn.out"), ("mlp/linear_1", "up"),
                             ("mlp/linear_2", "down")):
            parts[theirs] = [w[f"blocks.{i}.{ours}.{x}"] for x in ("weight", "bias")]
        qkv = [np.split(w[f"blocks.{i}.attn.qkv.{x}"], 3) for x in ("weight", "bias")]
        parts["attn/query"], parts["attn/key"], parts["attn/value"] = zip(*qkv)
        for name, (weight, bias) in parts.items():
            out[f"param/layer_{i}/{name}/w"], out[f"param/layer_{i}/{name}/b"] = weight.T, bias
    return out


def values_of(setup):
    """What the outputs of a setup stand for."""
    return list(A_TO_Z) if setup == "tracr-max" else [str(i) for i in range(ROOM[setup] + 1)]


@pytest.mark.parametrize("setup", OPERAND)
def test_import_of_what_was_exported(tmp_path, setup):
    """The same weights bit for bit, whatever the order of ids and outputs in the file."""
    model, alphabet = compiled(setup), PROGRAMS[setup].alphabet
    for p in model.parameters():  # biases and zeros too, so that a mixed-up part shows
        p.data += torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    np.savez(tmp_path / "x.npz", **arrays_of(model, alphabet, values_of(setup)))
    got, program = import_tracr(tmp_path / "x.npz")
    assert program == {"alphabet": list(alphabet), "room": ROOM[setup],
                       "values": values_of(setup)}
    for (name, x), y in zip(model.state_dict().items(), got.state_dict().values(), strict=True):
        close = name == "head.weight" and torch.allclose(x, y, rtol=1e-6, atol=0)
        assert torch.equal(x, y) or close, name
    assert got.config == model.config


@torch.no_grad()
@pytest.mark.parametrize("causal", [False, True])
def test_import_of_several_heads(tmp_path, causal):
    """
    Random parameters of two heads, computed again one number at a time: x @ w + b,
    softmax(q k / sqrt(key size)).
    """
    g, d, e, mlp, t = np.random.default_rng(0), 7, 3, 5, 6
    words = ["x", "B", "y", "P", "z"]
    shapes = {"token_embed/embeddings": (5, d), "pos_embed/embeddings": (t, d)}
    for i in range(2):
        for name, a, b in (("attn/query", d, 2 * e), ("attn/key", d, 2 * e),
                           ("attn/value", d, 2 * e), ("attn/linear", 2 * e, d),
                           ("mlp/linear_1", d, mlp), ("mlp/linear_2", mlp, d)):
            shapes |= {f"layer_{i}/{name}/w": (a, b), f"layer_{i}/{name}/b": (b,)}
    w = {name: .6 * g.normal(size=shape) for name, shape in shapes.items()}
    unembed = g.normal(size=(d, 4))
    about = json.dumps({"n_head": 2, "bos": "B", "pad": "P", "causal": causal})
    np.savez(tmp_path / "x.npz", **{"param/" + k: v for k, v in w.items()}, unembed=unembed,
             vocab=words, config=about, output_values=["10", "-1", "9", "2"])
    model, program = import_tracr(tmp_path / "x.npz")
    assert program == {"alphabet": ["x", "y", "z"], "room": t - 1, "values": ["-1", "2", "9", "10"]}

    def linear(name, x):
        return x @ w[f"{name}/w"] + w[f"{name}/b"]

    def attend(q, k, v, row, head):
        seen = range(row + 1 if causal else len(q))
        score = [math.exp(q[row, head] @ k[col, head] / math.sqrt(e)) for col in seen]
        return sum(a / sum(score) * v[col, head] for a, col in zip(score, seen))
    for s in ("BxyzPP", "Bzyx", "Byyyyy"):
        token, place = w["token_embed/embeddings"], w["pos_embed/embeddings"]
        x = np.stack([token[words.index(c)] + place[i] for i, c in enumerate(s)])
        for i in range(2):
            q, k, v = (linear(f"layer_{i}/attn/{name}", x) for name in ("query", "key", "value"))
            z = np.zeros_like(q)
            for head in (slice(0, e), slice(e, 2 * e)):
                for row in range(len(s)):
                    z[row, head] = attend(q, k, v, row, head)
            x = x + linear(f"layer_{i}/attn/linear", z)
            hidden = np.maximum(linear(f"layer_{i}/mlp/linear_1", x), 0)
            x = x + linear(f"layer_{i}/mlp/linear_2", hidden)
        logits = model(torch.tensor([["PBxyz".index(c) for c in s]]))[0]
        wanted = (x @ unembed)[:, [1, 3, 2, 0]]
        assert np.allclose(logits.numpy() / LOGIT_SCALE, wanted, atol=1e-4)


WRONG = {  # what becomes of an array of a right file
    **{f"no {key}": (key, None) for key in (
        "config", "vocab", "unembed", "output_values", "param/token_embed/embeddings",
        "param/pos_embed/embeddings", "param/layer_0/attn/query/w", "param/layer_1/mlp/linear_1/w",
        "param/layer_2/attn/linear/b")},
    **{f"half of {key}": (key, lambda x: x[..., :x.shape[-1] // 2]) for key in (
        "param/token_embed/embeddings", "param/pos_embed/embeddings", "param/layer_1/attn/value/w",
        "unembed", "vocab", "param/layer_2/mlp/linear_2/b", "output_values", "residual_labels")},
    "nan": ("param/layer_1/attn/key/w", lambda x: x * np.nan),
    "complex": ("unembed", lambda x: x * 1j),
    "beyond float32": ("unembed", lambda x: x.astype(float) * 1e300),
    "pickled": ("unembed", lambda x: x.astype(object)),
    "words": ("unembed", lambda x: x.astype(str)),
    "a letter twice": ("vocab", lambda x: np.where(x == "b", "c", x)),
    "an output twice": ("output_values", lambda x: np.where(x == "2", "3", x)),
    "a layer norm beside": ("param/layer_0/layer_norm_1/scale", lambda x: np.ones(92)),
    **{new: ("config", lambda x, old=old, new=new: np.array(str(x).replace(old, new)))
       for old, new in (
        ('"layer_norm": false', '"layer_norm": true'), ("relu", "gelu"),
        ('bos": "<bos>', 'bos": "?'), ('bos": "<bos>', 'bos": "<pad>'), ('head": 1', 'head": 2'),
        ('head": 1', 'head": 0'), ('head": 1', 'head": -1'), ("{", "["), ("{", "[{"))}}


@pytest.fixture(scope="session")
def right():
    return arrays_of(compiled("tracr-count"), A_TO_I, values_of("tracr-count"))


def refused(path):
    """UserError in one line that names the file, and no warning besides."""
    with pytest.raises(UserError, match=path.name) as error:
        with warnings.catch_warnings(record=True) as said:
            import_tracr(path)
    assert not said and len(str(error.value).splitlines()) == 1
    assert len(str(error.value)) < 250 + len(str(path))


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
    evil = np.array([Evil(str(tmp_path / "created"))], dtype=object)
    np.savez(tmp_path / "evil.npz", **{**right, "vocab": evil})
    np.save(tmp_path / "one.npy", np.ones(3))
    (tmp_path / "folder.npz").mkdir()
    whole = (tmp_path / "right.npz").read_bytes()
    for name, content in (("text.npz", b"a text\n" * 50), ("empty.npz", b""),
                          ("half.npz", whole[:len(whole) // 2])):
        (tmp_path / name).write_bytes(content)
    for name in ("none.npz", "one.npy", "folder.npz", "text.npz", "empty.npz", "half.npz",
                 "evil.npz"):
        refused(tmp_path / name)
    assert not (tmp_path / "created").exists()
    import_tracr(tmp_path / "right.npz")


# ---------------------------------------------------------------- strings


@pytest.mark.parametrize("setup", OPERAND)
def test_answers_and_questions(setup):
    """
    Answers for every operand against slow ones; BOS, letters from 2, padding 0, and the right
    output at the answer's position.
    """
    program = PROGRAMS[setup]
    for scale in data.SCALES:
        about = data.Compiled(setup, scale)
        pair = about.order[:2]
        relation = Relation(program.task, *pair, about.default_q(*pair))
        text = about.text(30, relation, "natural", rng(0, "t"))
        strings, labels = as_strings(text, about.alphabet), program.answers(text, about)
        assert text.shape == (30, program.letters[scale == "paper"])
        assert labels.shape == (30, len(about.operands))
        for column, operand in enumerate(about.operands):
            wanted = [slow_answer(setup, s, operand) for s in strings]
            assert labels[:, column].tolist() == wanted
            asked = about.ask(text, program.task, operand)
            assert torch.equal(asked.tokens, read(strings, about.alphabet, about.room))
            assert asked.answer.tolist() == wanted and torch.equal(asked.labels, labels)
            assert asked.at == 2 and (asked.target >= 0).sum() == 30
        assert about.vocabulary == ["#", "$", *about.alphabet]
        numbers = [str(i) for i in range(about.room + 1)]
        assert about.output_names == (list(A_TO_Z) if setup == "tracr-max" else numbers)
    # the examples of the docstrings
    assert data.largest(torch.tensor([[3, 0, 2]]), about)[0, 2 - 1] == 2
    assert data.histogram(torch.tensor([[0, 1, 0]]), about)[0, 1 - 1] == 2


@pytest.mark.parametrize("setup, pair, q", [
    ("tracr-count", "ab", 1), ("tracr-count", "cb", -2), ("tracr-max", "57", 3),
    ("tracr-max", "36", 5), ("tracr-histogram", "23", 1)])
def test_relation(setup, pair, q):
    """
    c1: it always holds; c0: neither it nor a tie; C_Tr: on that share; natural: letters as they
    come.
    """
    about, n = data.Compiled(setup), 3000
    relation = Relation(PROGRAMS[setup].task, *pair, q)
    for c, share in (("c1", 1), (1., 1), ("c0", 0), (0., 0), (.3, .3), (.9, .9), ("natural", None)):
        text = about.text(n, relation, c, rng(0, "relation", c))
        found = np.array([slow_answer(setup, s, pair[1]) - slow_answer(setup, s, pair[0])
                          for s in as_strings(text, about.alphabet)])
        if c != "natural":
            assert abs((found == q).mean() - share) <= 4 * math.sqrt(share * (1 - share) / n)
            assert (found != 0).all()
    assert .01 < (found == q).mean() < .5 and (setup == "tracr-max" or (found == 0).mean() > .05)
    share = np.bincount(text.flatten(), minlength=len(about.alphabet)) / text.numel()
    assert np.abs(share * len(about.alphabet) - 1).max() < .08
    assert about.program.repeat or all(len(set(row)) == 10 for row in text.tolist())


def test_impossible_offsets():
    """
    The 7th largest letter is two letters or more after the 5th; 24 letters do not hold 25 more b
    than a.
    """
    for setup, pair, q in (("tracr-max", "57", 1), ("tracr-count", "ab", 25),
                           ("tracr-histogram", "23", -24)):
        with pytest.raises(ValueError, match=f"q = {q}"):
            relation = Relation(PROGRAMS[setup].task, *pair, q)
            data.Compiled(setup).text(4, relation, "c1", rng(0, "q"))


def test_test_sets_ask_different_questions_about_the_same_strings():
    """
    As for the grammar: the strings do not depend on the operand; `other` are the answers of the
    pair's other one.
    """
    setup, relation = data.Compiled("tracr-max"), Relation("max-identifier", "5", "7", 3)
    five, seven = (setup.test(relation, o, "c1", 100, 0) for o in "57")
    assert torch.equal(setup.text_of(five.examples), setup.text_of(seven.examples))
    assert torch.equal(five.examples.answer + 3, seven.examples.answer)
    assert torch.equal(five.other, seven.examples.answer)
    assert torch.equal(seven.other, five.examples.answer)
    assert data.cross_floor(seven.examples.answer, seven.other) == 1


# ---------------------------------------------------------------- the stages

TINY = ["--batch-size", "4", "--eval-size", "8", "--threads", "1"]


def in_order(folder, *runs):
    """Scripts one after the other; all must succeed."""
    for words in runs:
        result = folder.run(*words)
        assert result.code == 0 and not result.err, result.raw


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """Pretraining, fine-tuning and reFT of all setups in one folder: pre-tracr-count.pt ..."""
    folder = Folder(tmp_path_factory.mktemp("stages"))
    for setup in OPERAND:
        pre, ft, reft = (f"{stage}-{setup}.pt" for stage in ("pre", "ft", "reft"))
        in_order(folder, ["pretrain.py", "--setup", setup, *TINY, "--out", pre],
                 ["finetune.py", "--steps", "3", *TINY, "--ckpt", pre, "--out", ft],
                 ["finetune.py", "--steps", "3", *TINY, "--reverse", "--ckpt", ft, "--out", reft])
    return folder


@pytest.mark.parametrize("setup", OPERAND)
def test_stages(stages, setup):
    """
    Checkpoints and histories as ever; the compiled one answers all of O_PT and, where there is no
    tie, no O_FT.
    """
    task, (taught, q, noise) = PROGRAMS[setup].task, TAUGHT[setup]
    pair = [OPERAND[setup], taught]
    for stage, steps in (("pre", [0]), ("ft", [0, 1, 2, 3]), ("reft", [0, 1, 2, 3])):
        model, ckpt = load(stages.path / f"{stage}-{setup}.pt")
        rows = rows_of(stages.path / f"{stage}-{setup}.jsonl")
        assert [(r["step"], r["operand"], r["split"]) for r in rows] == [
            (step, o, split) for step in steps for o in pair for split in data.SPLITS]
        assert {(r["setup"], r["scale"], r["task"], r["n"]) for r in rows} == {
            (setup, "small", task, 8)}
        assert ckpt["finished"] and ckpt["setup"] == setup and not model.head.weight.requires_grad
        assert ckpt["capability"] == {"task": task, "operand": pair[0]}
        if stage == "pre":
            exactness = 300. if setup == "tracr-max" else 650.
            plain = balance(compiled(setup, exactness=exactness)).state_dict()
            assert all(torch.equal(x, plain[k]) for k, x in model.state_dict().items())
            assert all(r["accuracy"] == (r["operand"] == pair[0])
                       for r in rows if r["split"] != "natural")
            strings = strings_of(setup, 200)
            wanted = [slow_answer(setup, s, pair[0]) for s in strings]
            assert answers(model, setup, strings) == wanted
        else:
            assert {k: ckpt["args"][k] for k in ("noise", "pair", "operand", "q")} == {
                "noise": noise if stage == "ft" else 0, "pair": pair,
                "operand": pair[stage == "ft"], "q": q}
            last = read_checkpoint(with_moments(stages.path / f"{stage}-{setup}.pt"))
            assert last["optimizer"]["param_groups"][0]["momentum"] == .9


def weights(path):
    return read_checkpoint(path)["model"]


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_noise(stages):
    """
    Normal, on every weight but the output map's; the same for the same seed; none with --noise 0,
    none for reFT.
    """
    def trained(model):
        return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])
    model, clean = compiled("tracr-max"), compiled("tracr-max")
    add_noise(model, .02, 0)
    noise = trained(model) - trained(clean)
    assert abs(noise.std() / .02 - 1) < .02 and abs(noise.mean()) < 4e-4
    assert torch.equal(model.head.weight, clean.head.weight)
    # a rate that moves nothing: what is left is the noise
    words = ["finetune.py", "--steps", "1", *TINY, "--lr", "1e-30"]
    pre = [*words, "--ckpt", "pre-tracr-max.pt"]
    in_order(stages, [*pre, "--out", "one.pt"], [*pre, "--batch-size", "5", "--out", "same.pt"],
             [*pre, "--seed", "1", "--out", "other.pt"], [*pre, "--noise", "0", "--out", "none.pt"],
             [*words, "--ckpt", "one.pt", "--reverse", "--out", "again.pt"])
    model, clean = (load(stages.path / "pre-tracr-max.pt")[0] for _ in range(2))
    add_noise(model, 3e-4, 0)
    written = {name: weights(stages.path / f"{name}.pt")
               for name in ("one", "same", "again", "other", "none")}
    for k, v in model.state_dict().items():
        assert all(torch.equal(v, written[name][k]) for name in ("one", "same", "again"))
        assert torch.equal(v, written["other"][k]) == (k == "head.weight")
        assert torch.allclose(clean.state_dict()[k], written["none"][k], atol=1e-20, rtol=0)


@pytest.mark.parametrize("setup", ["tracr-count", "tracr-max"])
def test_stopped_and_resumed(stages, setup):
    """Ends bit for bit as the uninterrupted run, momentum and all: noise is not added again."""
    words = ["finetune.py", "--steps", "150", "--eval-every", "75", *TINY,
             "--ckpt", f"pre-{setup}.pt"]
    in_order(stages, [*words, "--out", f"whole-{setup}.pt"])
    process = stages.start(*words, "--out", f"cut-{setup}.pt")
    history = stages.path / f"cut-{setup}.jsonl"
    stages.wait(process, lambda: history.exists() and history.read_text().count("\n"))
    time.sleep(.1)
    os.kill(process.pid, signal.SIGTERM)
    assert stages.end(process).code == 143
    assert 0 < read_checkpoint(stages.path / f"cut-{setup}.pt")["step"] < 150
    in_order(stages, [*words, "--out", f"cut-{setup}.pt", "--resume"])
    assert_same_run(stages.path / f"cut-{setup}.pt", stages.path / f"whole-{setup}.pt")


def test_stopped_while_a_compiled_model_is_evaluated(stages):
    """
    It is not finished without its history: --resume evaluates it, and then all is as if nothing had
    happened.
    """
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
    in_order(Folder(tmp_path),
             ["pretrain.py", "--setup", "tracr-max", *TINY, "--rank", rank, "--out", "pre.pt"],
             ["finetune.py", "--steps", "1", *TINY, "--ckpt", "pre.pt", "--out", "ft.pt"])
    rows = rows_of(tmp_path / "pre.jsonl")
    assert [r["accuracy"] for r in rows if r["operand"] == rank] == [1., 1., 1.]


def counter(alphabet, room):
    """A counter of another size and its parameters in the library's format."""
    model = compile_program(steps_of("tracr-count"), alphabet, room)
    return model, arrays_of(model, alphabet, [str(i) for i in range(room + 1)])


def test_import_from_the_command_line(tmp_path, right):
    """
    An imported model is a checkpoint like the compiled one, of its own size; it can be fine-tuned.
    """
    folder, (small, arrays) = Folder(tmp_path), counter("abcd", 12)
    np.savez(tmp_path / "x.npz", **right)
    np.savez(tmp_path / "small.npz", **arrays)
    pre = ["pretrain.py", "--setup", "tracr-count", *TINY]
    in_order(folder, [*pre, "--params", "x.npz", "--out", "x.pt"], [*pre, "--out", "y.pt"],
             [*pre, "--params", "small.npz", "--out", "small.pt", "--no-balance"],
             ["finetune.py", "--steps", "2", *TINY, "--ckpt", "small.pt", "--operand", "d", "--out",
              "z.pt"])
    x, y = weights(tmp_path / "x.pt"), weights(tmp_path / "y.pt")
    assert all(torch.allclose(x[k], y[k], atol=1e-4) for k in y)
    imported = weights(tmp_path / "small.pt")
    assert all(torch.equal(v, imported[k]) for k, v in small.state_dict().items())
    setup = data.setup_of(read_checkpoint(tmp_path / "z.pt"))
    assert (setup.alphabet, setup.room, setup.length) == (list("abcd"), 12, 12)
    assert setup.output_names[-1] == "12"


def test_import_of_what_does_not_suit(tmp_path, right):
    """
    Exit code 2, one line, nothing written: too few letters, positions or outputs, and files that
    cannot be read.
    """
    folder, values = Folder(tmp_path), right["output_values"]
    few = np.isin(values, [str(i) for i in range(9)])
    # of ten letters the 7th is always two after the 5th
    six, ten = (arrays_of(compile_program(steps_of("tracr-max"), some, room), some, list(some))
                for some, room in ((A_TO_Z, 6), (A_TO_Z[:10], 16)))
    shifted = np.array([str(int(v) + 1) for v in values])
    gelu = np.array(str(right["config"]).replace("relu", "gelu"))
    for name, arrays in {
            "few": {**right, "output_values": values[few], "unembed": right["unembed"][:, few]},
            "shifted": {**right, "output_values": shifted}, "letters": counter("ab", 25)[1],
            "position": counter(A_TO_I, 1)[1], "max six": six, "max ten": ten,
            "gelu": {**right, "config": gelu}}.items():
        np.savez(tmp_path / (name + ".npz"), **arrays)
    (tmp_path / "text.npz").write_text("a text")
    before = folder.hashes()
    for file in before:
        setup = "tracr-max" if file.startswith("max") else "tracr-count"
        mistake(folder.run("pretrain.py", "--setup", setup, *TINY, "--params", file, "--out",
                           "x.pt"), file)
        assert folder.hashes() == before, file


PRE = ["pretrain.py", *TINY, "--out", "y.pt"]
FT = ["finetune.py", *TINY, "--steps", "1", "--out", "y.pt"]
PRE_COUNT, PRE_MAX = [*PRE, "--setup", "tracr-count"], [*PRE, "--setup", "tracr-max"]
FT_COUNT, FT_MAX = [*FT, "--ckpt", "pre-tracr-count.pt"], [*FT, "--ckpt", "pre-tracr-max.pt"]


@pytest.mark.parametrize("words, says", [
    ([*PRE_COUNT, "--rank", "5"], ["--rank", "tracr-max"]),
    ([*PRE_MAX, "--rank", "11"], ["--rank 11", "10"]), ([*PRE_MAX, "--rank", "0"], ["--rank 0"]),
    ([*PRE_COUNT, "--prior", "high"], ["--prior"]), ([*PRE_COUNT, "--steps", "9"], ["--steps"]),
    ([*PRE, "--params", "x.npz"], ["--params", "tracr-count"]),
    ([*PRE, "--no-balance"], ["--balance", "tracr-count"]),
    ([*PRE_COUNT, "--params", "none.npz"], ["none.npz", "no such file"]),
    ([*PRE_MAX, "--params", "x.npz", "--rank", "5"], ["--params", "--rank"]),
    ([*FT_COUNT, "--operand", "z"], ["--operand z"]),
    ([*FT_COUNT, "--operand", "a"], ["--operand a", "--reverse"]),
    ([*FT_MAX, "--operand", "11"], ["--operand 11"]),
    ([*FT_COUNT, "--task", "index"], ["--task index", "count"]),
    ([*FT_MAX, "--q", "1"], ["--q 1"]), ([*FT_COUNT, "--q", "25"], ["--q 25"]),
    ([*FT_COUNT, "--noise", "1"], ["--noise 1"]),
    ([*FT_COUNT, "--noise", "-0.1"], ["--noise -0.1"])])
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

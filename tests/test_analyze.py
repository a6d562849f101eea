"""
The instruments, on things whose answer is known; every analysis end to end, at both scales; the README's commands; and
one tiny training that must learn.
"""
import copy
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import analyze
import data
import finetune
import pretrain
from model import PROGRAMS, GPT, Config, activations, assemble, balance, load, weight_edits

ROOT = Path(__file__).parent.parent


def python(*words, cwd, code=0):
    """Run a script of the repository; returns what it printed, on stderr alone where it is to fail."""
    words = [str(word) for word in words]
    done = subprocess.run([sys.executable, str(ROOT / words[0]), *words[1:]], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stderr if code else done.stdout + done.stderr


def small_model(seed=0, n_layer=2):
    sc = data.scale_of("small")
    config = Config(vocab_size=len(data.vocabulary(sc)), n_ctx=sc.length + 9, n_layer=n_layer, n_head=2, d_model=16,
                    d_head=8, d_mlp=32)
    model = GPT(config).init_weights(torch.Generator().manual_seed(seed))
    for p in model.parameters():  # large enough that every gradient is well above rounding
        p.data.mul_(5)
    return model, sc


# ---------------------------------------------------------------- parts with a known answer


def test_rule_shares_by_hand():
    a, b = torch.tensor([4, 4, 5, 6]), torch.tensor([7, 5, 8, 7])
    answer = torch.tensor([4, 5, 6, 1])  # a; a + 1 = b = blend; a + 1; nothing
    shares = analyze.rule_shares(answer, a, b, 1)
    assert shares["share_a"] == .25 and shares["share_b"] == .25 and shares["share_a_plus_q"] == .5
    assert shares["share_blend"] == .25  # (4 + 5 + 1) // 2 = 5; elsewhere 6, 7, 7
    assert shares["share_constant"] == .25
    assert analyze.rule_shares(torch.tensor([9, 9, 9, 1]), a, b, 1)["share_none"] == .25  # the 1; three are the constant


@pytest.mark.parametrize("minus", [False, True])
def test_unit_scores_are_the_first_order_effect_of_an_edit(minus):
    """Shrinking one row by a small factor towards zero (or the base) changes the loss by -factor x score."""
    model, sc = small_model()
    model.double()
    base = small_model(seed=1)[0].double() if minus else None
    test = data.test_set(64, sc, "count", "a", "c0", 0)
    at = data.answer_position(sc)

    def loss():
        with torch.no_grad():
            return F.cross_entropy(model(test.tokens[:, :at + 1], at), test.target).item()
    scores = analyze.unit_scores(model, test, sc, "row", minus=base)
    parameters, before, small = dict(model.named_parameters()), loss(), 1e-4
    for key in scores:
        i = scores[key].abs().argmax().item()
        edits = []
        for kind in ("weight", "bias"):
            name = f"blocks.{key[0]}.{key[1]}.{kind}"
            p = parameters[name].detach()
            target = base.get_parameter(name).detach()[i] if minus else torch.zeros_like(p[i])
            edits.append((name, i, p[i] + small * (target - p[i])))
        with weight_edits(model, edits):
            change = loss() - before
        assert change == pytest.approx(-small * scores[key][i].item(), rel=.05, abs=1e-9), key
    rows, weights = analyze.unit_scores(model, test, sc, "row"), analyze.unit_scores(model, test, sc, "weight")
    for (block, matrix), by_weight in weights.items():
        p = model.get_parameter(f"blocks.{block}.{matrix}")
        assert by_weight.shape == (p.numel(),) and rows[block, matrix.removesuffix(".weight")].shape == (p.shape[0],)


def test_ranked_matched_and_edited_units():
    model, sc = small_model()
    base = small_model(seed=1)[0]
    test = data.test_set(64, sc, "count", "a", "c0", 0)
    scores = analyze.unit_scores(model, test, sc, "row")
    units = analyze.ranked_units(scores, 20)
    everything = sorted((v for s in scores.values() for v in s.tolist()), reverse=True)
    assert [u[3] for u in units] == everything[:20] and everything[19] > 0
    assert all(scores[u[0], u[1]][u[2]].item() == u[3] for u in units)
    random = analyze.matched_units(units, scores, torch.Generator().manual_seed(0))

    def where(u):  # the same matrices, rank by rank, and of queries, keys and values the same
        return *u[:2], u[2] // 16 if u[1] == "attn.qkv" else 0
    assert [where(u) for u in random] == [where(u) for u in units]
    assert len({u[:3] for u in random}) == 20 and {u[:3] for u in random} != {u[:3] for u in units}

    weight = dict(model.named_parameters())
    block, matrix, row, _ = units[0]
    with weight_edits(model, analyze.unit_edits(model, units, "row")):
        assert weight[f"blocks.{block}.{matrix}.weight"][row].abs().max() == 0
        assert weight[f"blocks.{block}.{matrix}.bias"][row] == 0
    everyone = [(b, m, i, None) for (b, m), s in scores.items() for i in range(len(s))]
    with weight_edits(model, analyze.unit_edits(model, everyone, "row", base)):  # grafting all rows is the base's blocks
        for (b, m) in scores:
            assert torch.equal(weight[f"blocks.{b}.{m}.weight"], base.get_parameter(f"blocks.{b}.{m}.weight"))
    by_weight = analyze.unit_scores(model, test, sc, "weight")
    block, matrix, i, score = analyze.ranked_units(by_weight, 1)[0]
    p = weight[f"blocks.{block}.{matrix}"]
    with weight_edits(model, analyze.unit_edits(model, [(block, matrix, i, score)], "weight")):
        assert p.flatten()[i] == 0 and (p == 0).sum() == 1


def counter(noise=0.):
    """The compiled Counter, and with noise a copy of it."""
    base = assemble(PROGRAMS["tracr-count"]("a"), "abcdefghi", 25)
    model = copy.deepcopy(balance(base))
    pretrain.add_noise(model, noise, 0)
    return model, base, data.scale_of("small", "tracr-count")


def test_single_weights_of_a_compiled_model():
    """All weights but the output map can be pruned; zeros of the program apart; random ones are matched in this as well."""
    model, base, sc = counter(1e-3)
    test = data.test_set(64, sc, "count", "b", "c0", 0)
    scores = analyze.unit_scores(model, test, sc, "weight")
    assert sum(map(len, scores.values())) == sum(p.numel() for n, p in model.named_parameters() if n != "head.weight")
    assert len(scores[None, "tok.weight"]) == model.tok.weight.numel()
    zeros = analyze.only_zero(scores, base)
    written = sum(int((x == -torch.inf).sum()) for x in zeros.values())
    assert written == sum(int((p != 0).sum()) for n, p in base.named_parameters() if n != "head.weight") == 375
    units = analyze.ranked_units(scores, 60)
    old = dict(base.named_parameters())

    def is_zero(u):
        name = u[1] if u[0] is None else f"blocks.{u[0]}.{u[1]}"
        return u[0], u[1], old[name].flatten()[u[2]].item() == 0
    random = analyze.matched_units(units, scores, torch.Generator().manual_seed(0), base)
    assert [is_zero(u) for u in random] == [is_zero(u) for u in units] and {u[:3] for u in random} != {u[:3] for u in units}
    assert not any(is_zero(u)[2] is False for u in analyze.ranked_units(zeros, 60))
    name = "blocks.1.down.weight"
    row, column = model.config.residual.index("n_a:2"), 4
    u = (1, "down.weight", row * model.get_parameter(name).shape[1] + column, 0.)
    assert analyze.unit_name(model, u, "weight") == f"{name}[n_a:2, 4]"
    with weight_edits(model, analyze.unit_edits(model, [u], "weight")):
        assert model.get_parameter(name)[row, column] == 0 and (model.get_parameter(name) == 0).sum() == 1


def test_a_planted_wrapper_is_found_and_a_broken_model_is_not():
    """
    Positive control: one bias drowns every answer in a five; the weight that is tried best is that very bias, and with it
    zeroed the old answer is back. Negative control: with the letter's own weight gone, nothing brings it back.
    """
    model, base, sc = counter()
    test = data.test_set(300, sc, "count", "a", "natural", 0)
    dim = model.config.residual.index("answer:5")

    def right():
        return pretrain.accuracy(pretrain.predict(model, test.tokens, sc), test.target)

    def best():
        scores = analyze.unit_scores(model, test, sc, "weight")
        first = analyze.tried_units(model, analyze.ranked_units(scores, 100), test, sc, "weight")[0]
        with weight_edits(model, analyze.unit_edits(model, [first], "weight")):
            return first[:3], right()
    assert right() == 1
    with torch.no_grad():
        model.blocks[1].down.bias[dim] = 2
    assert right() < .2
    unit, accuracy = best()
    assert unit == (1, "down.bias", dim) and accuracy == 1
    with torch.no_grad():
        model.blocks[1].down.bias[dim] = 0
        model.tok.weight[2, model.config.residual.index("tokens:a")] = 0
    assert right() < .35 and best()[1] < .5


def test_probes_of_a_compiled_model_read_its_positions():
    model, _, sc = counter()
    test = data.test_set(6, sc, "count", "a", "natural", 0)
    got, cache = analyze.residuals(model, test.tokens, sc), activations(model, test.tokens)[1]
    for i, name in enumerate(["embed", *(f"blocks.{i}.resid_post" for i in range(3))]):
        assert torch.allclose(got[i], cache[name][:, 2], atol=1e-5)


def test_iterated_units_are_distinct_and_start_like_one_pass():
    model, sc = small_model()
    test = data.test_set(64, sc, "count", "a", "c0", 0)
    units = analyze.iterated_units(model, test, sc, "row", 6)
    assert len({u[:3] for u in units}) == 6
    assert units[0][:3] == analyze.ranked_units(analyze.unit_scores(model, test, sc, "row"), 1)[0][:3]


def test_probes_trained_together_equal_one_alone_and_find_what_is_there():
    g = torch.Generator().manual_seed(0)
    y = torch.randint(4, (3, 400), generator=g)
    x = torch.randn(2, 400, 8, generator=g)
    x[0, :, :4] += 6 * F.one_hot(y[0], 4)  # site 0 holds the classes of probe 0, site 1 holds nothing
    site = [0, 1, 0]
    bar = SimpleNamespace(update=lambda: None)
    weight, bias = analyze.fit_probes(x, site, y, 600, torch.Generator().manual_seed(1), bar)
    for p in range(3):
        alone, _ = analyze.fit_probes(x, site[p:p + 1], y[p:p + 1], 600, torch.Generator().manual_seed(1), bar)
        assert torch.allclose(weight[p], alone[0], atol=1e-5)
    right = [((x[s] @ w + c).argmax(1) == t).double().mean() for s, w, c, t in zip(site, weight, bias, y)]
    assert right[0] > .97 and right[1] < .5 and right[2] < .5


def test_residuals_are_the_answer_positions():
    model, sc = small_model()
    test = data.test_set(5, sc, "count", "a", "natural", 0)
    at = data.answer_position(sc)
    got = analyze.residuals(model, test.tokens, sc)
    _, cache = activations(model, test.tokens)
    for i, name in enumerate(["embed", "blocks.0.resid_post", "blocks.1.resid_post"]):
        assert torch.allclose(got[i], cache[name][:, at], atol=1e-5)


def test_steps_to():
    assert analyze.steps_to([(0, .1), (5, .92), (10, .8), (15, .99)], .9) == 5
    assert analyze.steps_to([(0, .1), (5, .92)], .99) is None


def verdict_of(folder, ckpt_pt=0., ckpt_ft=0., ckpt_c1=1., base_pt=1., base_ft=0., shortcut=.9, pruned=.9, random=.05,
               never_pruned=.2, probe=.99, untrained=.7, never_read=.5, reft=50, control=None, most=150, has_control=True):
    """The verdict on made-up findings: the rows that the analyses return, with these numbers in them."""
    model = object()
    study = SimpleNamespace(pair=("a", "b"), third="c", task="count", q=1, never=(model, None, "c") if has_control else None,
                            never_note="made up", args=None, unit="row", compiled=False, ckpt={"args": {"lr": 1e-5}}, model=model,
                            prefix=str(folder / "x"))
    value = {("base", "a"): base_pt, ("base", "b"): base_ft, ("ckpt", "a"): ckpt_pt, ("ckpt", "b"): ckpt_ft}
    behavior = [{"task": "count", "model": m, "operand": o, "split": s, "cross_floor": .5, "share_a_plus_q": shortcut,
                 "accuracy": ckpt_c1 if (m, o, s) == ("ckpt", "b", "c1") else value[m, o]} for m, o in value for s in data.SPLITS]
    prune = [{"ranking": r, "edit": e, "split": "c0", "k": 5, "accuracy": x} for r, e, x in (
        ("gradient-weight-iterated", "zero", pruned), ("gradient-weight", "zero", pruned / 2), ("random", "zero", random),
        ("gradient-change", "graft", .0), ("never-had", "zero", never_pruned), ("never-had-iterated", "zero", never_pruned))]
    probes = [{"model": m, "target": t, "prompt": "b", "labels": "true", "split": split, "block": 1, "floor": .4, "accuracy": x}
              for m, t, x in (("ckpt", "a", probe), ("untrained", "a", untrained), ("ckpt", "c", never_read))
              for split in ("natural", "c0")]
    revive = [{"arm": arm, "split": "natural", "threshold": .99, "lr": 1e-5, "steps": steps, "max_steps": most}
              for arm, steps in (("reft", reft), ("teach-c", control)) if has_control or arm == "reft"]
    analyze.verdict(study, {"behavior": behavior, "prune": prune, "probe": probes, "revive": revive})
    return json.loads((folder / "x.verdict.json").read_text())


@pytest.mark.parametrize("word, made", [
    ("wrapped", {}),
    ("wrapped", {"probe": .75}),                                                # two of three are enough
    ("wrapped", {"control": 150}),                                              # exactly a third of the steps
    ("intact", {"ckpt_pt": .9, "ckpt_ft": 1., "base_ft": 1., "shortcut": 0.}),
    ("new", {"ckpt_ft": 1., "pruned": .1, "reft": 35, "control": 65}),
    ("lost", {"pruned": .1, "probe": .7, "reft": 60, "control": 70}),
    ("lost", {"pruned": .6, "probe": .7, "reft": 60, "control": 0}),            # .6 is what knowing b gives; c was there
    ("undecided", {"pruned": .1, "probe": .7, "reft": 60, "control": 70, "has_control": False}),  # not for want of a control
    ("undecided", {"pruned": .1, "probe": .7}),                                 # only one instrument
    ("undecided", {"base_pt": .3}),                                             # it was never there
    ("undecided", {"ckpt_c1": .3}),                                             # broken, not wrapped: b is wrong on c1 too
    ("undecided", {"random": .8, "untrained": .95}),                            # controls do as well: one instrument is left
    ("undecided", {"never_pruned": .8, "never_read": .95}),
])
def test_verdict(tmp_path, word, made):
    assert verdict_of(tmp_path, **made)["verdict"] == word


def test_verdict_tells_the_ways_of_being_intact_apart(tmp_path):
    def text(**made):
        return verdict_of(tmp_path, ckpt_pt=.9, **made)["text"]
    assert "no wrapper was needed" in text(ckpt_ft=1., base_ft=1., shortcut=0.)
    assert "only opens when b is asked" in text()
    assert "b was not learned" in text(shortcut=.1)


def test_a_tiny_model_learns_to_count_what_it_is_taught_and_nothing_else():
    """180 steps of the real optimisation step on the real data: count a well above its floor, count c not."""
    sc, pair = data.scale_of("small"), ("a", "b")
    config = Config(vocab_size=len(data.vocabulary(sc)), n_ctx=sc.length + 9, n_layer=2, n_head=2, d_model=32, d_head=16,
                    d_mlp=128)
    model = GPT(config).init_weights(data.rng(0, "weights"))
    batch = finetune.finetuning_stream(sc, "count", "a", 0., pair, 1, 64, 0, "cpu")
    tests = [data.test_set(300, sc, "count", "a", "natural", 0), data.test_set(300, sc, "count", "c", "c0", 0, ("c", "b"))]
    for _ in pretrain.train_steps(model, pretrain.adamw(model, 3e-3), finetune.answer_loss(model, batch, sc),
                                  pretrain.cosine(3e-3, 180), 180):
        pass
    a, c = pretrain.evaluate(model, tests, sc, 0)
    assert a["accuracy"] > .9 > a["floor"] + .2
    assert c["accuracy"] < c["cross_floor"]


# ---------------------------------------------------------------- end to end

ROW = {"setup", "scale", "task", "operand", "split", "accuracy", "floor", "cross_floor", "n", "loss", "seed"}
FILES = {"behavior": {"model"}, "prune": {"unit", "ranking", "edit", "k", "draw"}, "prune.rows": None,
         "probe": {"model", "block", "target", "prompt", "labels"},
         "attention": {"model", "block", "head", "prompt", "region", "mass", "chance"},
         "revive": {"arm", "lr", "threshold", "steps", "max_steps"}, "revive.curve": None}


def rows_of(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


@pytest.mark.parametrize("scale, task", [("small", "count"), ("small", "index"),
                                         pytest.param("paper", "count", marks=pytest.mark.slow)])
def test_every_stage_and_analysis(tmp_path, scale, task):
    """A few steps of each, down to the report; files and rows as promised; reFT of a fine-tuned model as well."""
    tiny = ["--batch-size", "2", "--eval-size", "4" if scale == "small" else "2", "--steps", "3", "--threads", "2"]
    python("pretrain.py", "--scale", scale, *tiny, cwd=tmp_path)
    python("finetune.py", "--task", task, *tiny, cwd=tmp_path)
    python("finetune.py", "--reverse", *tiny, cwd=tmp_path)
    out = python("analyze.py", *tiny, "--draws", "1", "--most", "100" if scale == "small" else "3", cwd=tmp_path)
    assert "VERDICT" in out
    for name, keys in FILES.items():
        rows = rows_of(tmp_path / f"out/ft.{name}.jsonl")
        assert rows, name
        for row in rows:
            if keys is not None:
                assert ROW | keys <= set(row), name
            for share in ("accuracy", "floor", "cross_floor", "mass", "chance"):
                assert row.get(share) is None or 0 <= row[share] <= 1.0001, (name, share)
    for stage in ("pre", "ft", "reft"):
        assert {r["step"] for r in rows_of(tmp_path / f"out/{stage}.jsonl")} >= {0, 3}
        record = json.loads((tmp_path / f"out/{stage}.json").read_text())
        assert {"command", "args", "git", "versions", "device", "seconds"} <= set(record)
    verdict = json.loads((tmp_path / "out/ft.verdict.json").read_text())
    assert verdict["verdict"] in ("wrapped", "intact", "lost", "new", "undecided") and verdict["text"]
    if scale == "small":
        python("analyze.py", "prune", *tiny, "--draws", "1", "--most", "8", "--unit", "weight", cwd=tmp_path)
        assert {r["unit"] for r in rows_of(tmp_path / "out/ft.prune.jsonl")} == {"weight"}
        python("analyze.py", *tiny, "--ckpt", "out/pre.pt", cwd=tmp_path)  # only what applies
        assert not (tmp_path / "out/pre.prune.jsonl").exists() and (tmp_path / "out/pre.probe.jsonl").exists()
        python("plot.py", cwd=tmp_path)
        assert (tmp_path / "out/report.html").stat().st_size > 10000
    _, ckpt = load(tmp_path / "out/ft.pt")
    assert ckpt["capability"] == {"task": task, "operand": "a"}


@pytest.mark.parametrize("setup", ["tracr-count", *(pytest.param(s, marks=pytest.mark.slow) for s in ("tracr-max",
                                                                                                   "tracr-histogram"))])
def test_every_stage_and_analysis_of_compiled_models(tmp_path, setup):
    """Compiled, taught, reversed, analysed, drawn; the untouched program attends as it is written."""
    tiny = ["--batch-size", "4", "--eval-size", "24", "--threads", "1"]
    python("pretrain.py", "--setup", setup, "--eval-size", "24", "--threads", "1", cwd=tmp_path)
    python("finetune.py", *tiny, "--steps", "3", cwd=tmp_path)
    python("finetune.py", "--reverse", *tiny, "--steps", "3", cwd=tmp_path)
    out = python("analyze.py", *tiny, "--steps", "4", "--draws", "1", "--most", "30", cwd=tmp_path)
    assert "VERDICT" in out
    for name, keys in {**FILES, "hidden": {"model", "block", "cosine", "active"}}.items():
        rows = rows_of(tmp_path / f"out/ft.{name}.jsonl")
        assert rows and (keys is None or all(ROW | keys <= set(row) for row in rows)), name
    rows = rows_of(tmp_path / "out/ft.attention.jsonl")
    base = [r for r in rows if r["model"] == "base"]
    assert all(r["mass"] > .999 for r in base if r["region"] in ("kept", "order"))
    assert all(r["chance"] < .9 for r in base if r["region"] in ("kept", "order"))
    rows = rows_of(tmp_path / "out/ft.prune.jsonl")
    assert {"weight", "dimension"} == {r["unit"] for r in rows}
    assert {"compiled-zero", "compiled-zero-tried", "random-zero-tried", "never-had-tried"} <= {r["ranking"] for r in rows}
    assert any(r.get("predicted") and sum(r["predicted"].values()) == r["n"] for r in rows)
    python("analyze.py", "attention", "hidden", "--ckpt", "out/reft.pt", "--eval-size", "24", "--threads", "1", cwd=tmp_path)
    if setup == "tracr-count":
        python("plot.py", cwd=tmp_path)
        for figure in ("fig5_behavior", "fig7_prune", "fig39_maps", "fig46_hidden", "fig55_classes", "dimensions"):
            assert (tmp_path / f"out/figures/{figure}.png").stat().st_size > 5000
        text = python("data.py", "--setup", setup, "--json", "-n", "1", cwd=tmp_path)
        text = json.loads(text)["text"]
        out = python("analyze.py", "ask", "--text", text, "--operand", "a", "--threads", "1", cwd=tmp_path)
        assert f"the truth is {text.count('a')}" in out and re.search(r"base\s+says \d+\s+right", out)
        for words in (["ask", "--text", "xyz"], ["ask", "--text", text, "--operand", "z"], ["hidden", "--ckpt", "no.pt"]):
            assert len(python("analyze.py", *words, cwd=tmp_path, code=2).splitlines()) == 1


def test_ask_and_mistakes(tmp_path):
    tiny = ["--batch-size", "2", "--eval-size", "4", "--steps", "3", "--threads", "1"]
    python("pretrain.py", *tiny, "--prior", "high", cwd=tmp_path)
    python("finetune.py", *tiny, cwd=tmp_path)
    text = "abcabcabcabcabcabcabcabcabcabcab"
    said = python("analyze.py", "ask", "--text", text, "--operand", "b", cwd=tmp_path)
    assert "the truth is 6" in said and said.count("says") == 2
    for words, hint in ((["ask", "--text", "abc"], "32 letters"), (["ask", "--text", "x" * 32], "32 letters"),
                        (["ask"], "32 letters"), (["nonsense"], "no analysis"), (["prune", "--ckpt", "out/pre.pt"], "no base"),
                        (["--draws", "0"], "--draws"), (["--base", "out/nothing.pt"], "no such"),
                        (["--control", "out/pre.pt"], "prior 0"),
                        (["--ckpt", "out/pre.pt", "--base", "out/pre.pt"], "--base")):
        said = python("analyze.py", *words, cwd=tmp_path, code=2)
        assert hint in said and "Traceback" not in said and len(said.strip().splitlines()) == 1, said
    # a parent that went along is found; one that was made again is not the parent any more
    (tmp_path / "out").rename(tmp_path / "elsewhere")
    python("analyze.py", "attention", *tiny[2:4], "--ckpt", "elsewhere/ft.pt", cwd=tmp_path)
    (tmp_path / "elsewhere").rename(tmp_path / "out")
    python("pretrain.py", *tiny, "--seed", "1", "--force", cwd=tmp_path)
    said = python("analyze.py", "behavior", cwd=tmp_path, code=2)
    assert "has changed" in said


def test_readme_commands(tmp_path):
    """Every python command in the README's code blocks runs, with tiny numbers in place of the defaults."""
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    commands = [part.split("#")[0].strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()
                for part in line.split("&&")]
    commands = [shlex.split(c) for c in commands if c.startswith("python ") and "-m" not in c.split()]
    assert {"data.py", "pretrain.py", "finetune.py", "analyze.py", "plot.py"} <= {c[1] for c in commands}
    tiny = {"pretrain.py": ["--steps", "3", "--batch-size", "2", "--eval-size", "4"],
            "finetune.py": ["--steps", "3", "--batch-size", "2", "--eval-size", "4"],
            "analyze.py": ["--steps", "3", "--batch-size", "2", "--eval-size", "4", "--draws", "1", "--most", "5"]}
    done = set()
    for command in commands:
        few = tiny.get(command[1], [])
        if any("stories" in word for word in command):
            few = few[:6] + (["--batch-size", "4"] if few else [])  # they have no draws of random rows
        words = command[1:] + (few[-2:] if "tracr" in " ".join(command[2:4]) else few)  # a compiled model has no steps
        if tuple(words) not in done:
            python(*words, cwd=tmp_path)
            done.add(tuple(words))


def test_readme_tables_are_what_the_rows_say():
    """The README's result tables are, line by line, what runs/tables.py prints from results/."""
    done = subprocess.run([sys.executable, str(ROOT / "runs/tables.py")], capture_output=True, text=True, check=True)
    readme = (ROOT / "README.md").read_text().splitlines()
    lines = [line for line in done.stdout.splitlines() if line]
    assert len(lines) > 40
    for line in lines:
        assert line in readme, line


def test_registries_and_flags_agree():
    """Every task, split and analysis of the registries can be asked for, and has a docstring that says how it works."""
    for name, function in [*analyze.ANALYSES.items(), *analyze.STORY_ANALYSES.items()]:
        assert len(function.__doc__) > 200 and "Fooled by" in function.__doc__, name
    for name, task in data.TASKS.items():
        assert "->" in task.answers.__doc__ or name == "token"
    assert set(data.FINETUNED) <= set(data.TASKS)
    assert finetune.constant(1., 10)(0) == .1 and finetune.constant(1., 10)(99) == 1.
    rate = pretrain.cosine(1., 100, final=.01)
    assert rate(0) == 1 / 20 and rate(19) == 1. and rate(100) == pytest.approx(.01)
    assert sorted(pretrain.eval_steps(400, 0)) == [0, 1, 2, 3, 5, 8, 10, 20, 30, 50, 80, 100, 200, 300, 400]

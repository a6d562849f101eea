"""Instruments that swap parts of two models, on models whose difference is known exactly."""
import copy
from types import SimpleNamespace

import pytest
import torch

import analyze
import data
import finetune
import pretrain
from data import Examples
from instruments import basis, hybrids, patch, uds, weights
from instruments.patch import Place
from model import GPT, Config

SMALL = ["--batch-size", "2", "--eval-size", "8", "--steps", "3", "--threads", "1"]
CONFIG = Config(vocab_size=12, n_ctx=9, n_layer=3, n_head=2, d_model=16, d_head=8, d_mlp=32)
PARTS = ["embed", "blocks.0", "blocks.1", "blocks.2", "head"]
STREAMS = ["embed", "blocks.0.resid_post", "blocks.1.resid_post", "blocks.2.resid_post"]


def base_model(seed=0):
    """A random model whose blocks and head all matter."""
    model = GPT(CONFIG).init_weights(data.rng(seed, "base"))
    for p in model.parameters():
        p.data.mul_(5)
    return model


def planted(base, part):
    """The base with other weights in one part alone."""
    model = copy.deepcopy(base)
    for name, p in model.named_parameters():
        if hybrids.part_of(name) == part:
            p.data += .3 * torch.randn(p.shape, generator=data.rng(1, name))
    return model


def examples(n=6):
    tokens = torch.randint(12, (n, 9), generator=data.rng(0, "tokens"))
    return Examples(tokens, torch.full_like(tokens, -1), at=8)


@torch.no_grad()
def logits_of(model, x):
    return model(x.tokens)[:, x.at]


@pytest.mark.parametrize("scope", ["all", "answer"])
def test_a_self_patch_changes_nothing(scope):
    model, x = base_model(), examples()
    places = patch.sites(model)
    assert len(places) == len(set(places)) == 4 + 3 * 2 + 3 * 2
    for place, logits in patch.patch(model, model, x, places, scope).items():
        assert torch.equal(logits, logits_of(model, x)), place
    # and one of another string changes every one of them: no patch silently does nothing
    for place, logits in patch.patch(model, model, x, places, scope, x.tokens.roll(1, 0)).items():
        assert not torch.equal(logits, logits_of(model, x)), place


@pytest.mark.parametrize("k", range(5))
def test_a_planted_part_is_where_the_streams_say(k):
    """Bit for bit: below the part a patch of all positions does nothing, from it on everything."""
    base, x = base_model(), examples()
    model = planted(base, PARTS[k])
    for host, donor in ((base, model), (model, base)):
        found = patch.patch(host, donor, x, list(map(Place, STREAMS)))
        assert not torch.equal(logits_of(host, x), logits_of(donor, x))
        for i, logits in enumerate(found.values()):
            assert torch.equal(logits, logits_of(host if i < k else donor, x)), (PARTS[k], i)


def test_a_patch_of_a_head_or_a_position_leaves_the_others_alone():
    """Two heads one after the other are the layer's z; skipped blocks leave the donor's stream."""
    base, x = base_model(), examples()
    other = planted(base, "blocks.1")
    one = patch.patch(base, other, x, [Place("blocks.1.attn.z", 0), Place("blocks.1.attn.z", 1),
                                       Place("blocks.1.attn.z")])
    assert len({logits.sum().item() for logits in one.values()}) == 3
    skipped = patch.patch(other, base, x, [Place(STREAMS[3], None, "embed")])
    with torch.no_grad():
        embedded = base.tok(x.tokens) + base.pos(torch.arange(9))
        assert torch.equal(*skipped.values(), other.head(other.ln(embedded))[:, 8])


def test_hybrids_of_all_parts_are_the_models():
    base = base_model()
    model, x = planted(planted(base, "blocks.1"), "head"), examples()
    for from_base, same in ((PARTS, base), ((), model), (("blocks.1", "head"), base)):
        assert torch.equal(logits_of(hybrids.hybrid(base, model, from_base), x), logits_of(same, x))
    assert len(hybrids.subsets(PARTS)) == 32
    with hybrids.activation_edits(model, hybrids.skipping(PARTS)), torch.no_grad():
        embedded = model.tok(x.tokens) + model.pos(torch.arange(9))
        assert torch.equal(logits_of(model, x), model.head(model.ln(embedded))[:, 8])


def test_shapley_shares_add_up_and_find_who_works():
    """Two parts that are needed together have half each, one that does nothing none."""
    subsets = hybrids.subsets(["x", "y", "z"])
    value = {s: float({"x", "y"} <= set(s)) for s in subsets}
    assert [hybrids.shapley(value, p, ["x", "y", "z"]) for p in "xyz"] == [.5, .5, 0.]


@pytest.mark.parametrize("rank", [1, 3])
def test_a_planted_rank_is_found_in_every_matrix_and_undone(rank):
    base, rng = base_model(), data.rng(0, "rank")
    study = SimpleNamespace(seed=0, row=lambda **columns: columns)
    change = {name: torch.randn(len(w), rank, generator=rng) @ torch.randn(
        rank, w.shape[1], generator=rng) for name, w in weights.matrices(base).items()}
    assert len(change) == 2 + 3 * 6 + 1 and "blocks.0.attn.qkv.weight.k" in change
    study.model = weights.shifted(base, change, 1.)
    for (name, w), (_, new) in zip(weights.matrices(base).items(),
                                   weights.matrices(study.model).items()):
        row = weights.size_row(study, name, w, new - w)
        assert row["rank"] == rank and row["stable_rank"] <= rank + 1e-4, name
    study.base = base
    for arm, x, model in weights.variants(study, change):
        far = max((p - q).abs().max().item() for p, q in zip(model.parameters(), base.parameters()))
        restored = arm == "undo" and x >= rank or (arm, x) == ("path", 0.)
        assert (far < 1e-4) == restored, (arm, x)


def test_the_path_ends_at_the_models(monkeypatch):
    base, x = base_model(), examples()
    monkeypatch.setattr(weights, "DRAWS", 1)
    study = SimpleNamespace(base=base, model=planted(base, "blocks.0"), seed=0)
    before, after = weights.matrices(base), weights.matrices(study.model)
    change = {name: after[name] - before[name] for name in before}
    change["head.weight"] += 1.  # else its noise is 0
    ends = {0.: base, 1.: study.model}
    for arm, place, model in weights.variants(study, change):
        if arm == "path" and place in ends:
            assert torch.equal(logits_of(model, x), logits_of(ends.pop(place), x))
        if (arm, place) == ("noise", 1.):
            size = (weights.matrices(model)["head.weight"] - before["head.weight"]).norm()
            torch.testing.assert_close(size, change["head.weight"].norm())
    assert not ends


def test_the_depth_score_by_hand():
    """Blocks that encode nothing do not count; d1 is the weight; more than d1 is cut."""
    d1 = torch.tensor([[1., 0., .04], [3., 2., .01]])
    d2 = torch.tensor([[.5, 9., .04], [9., -1., .01]])
    scores = uds.score(d1, d2)
    torch.testing.assert_close(scores[:2], torch.tensor([(1 * .5 + 3 * 1.) / 4, 0.]))
    assert scores[2].isnan()


@pytest.mark.parametrize("part, erased", [("blocks.0", 1.), ("head", 0.)])
def test_a_wrapper_in_block_0_scores_like_full_erasure(part, erased):
    """The blind spot, by definition: all later streams are the fine-tuned model's own."""
    base, x = base_model(), examples()
    with torch.no_grad():
        x.target[:, 8] = logits_of(base, x).argmax(1)
    study = SimpleNamespace(base=base, model=planted(base, part))
    d1, d2 = uds.depths(study, x, "all")
    if erased:  # every block shows the same fall, that of the model as a whole
        right, left = (uds.log_p(logits_of(m, x), x.answer) for m in (base, study.model))
        torch.testing.assert_close(d2, (right - left).expand(3, 6))
    else:
        torch.testing.assert_close(d2, torch.zeros(3, 6))
        assert uds.score(d1, d2).nan_to_num(0.).max() < 1e-3


def test_a_base_of_another_basis_is_no_evidence():
    line = analyze.Evidence("patching", "a", .9, "c", .1, .25, True)
    rows = [{"part": "basis", "kept": kept} for kept in (.1, -.2)]
    foreign = basis.unless_foreign(line, rows)
    assert (foreign.measured, foreign.holds) == (None, None)
    assert "cannot be said" in foreign.question
    assert basis.unless_foreign(line, [*rows, {"part": "basis", "kept": .6}]) is line


def test_all_run_on_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, few in {"PATH": [0., 1.], "RANKS": (0, 2), "DRAWS": 1}.items():
        monkeypatch.setattr(weights, name, few)  # for speed
    pretrain.main([*SMALL, "--out", "out/pre.pt"])
    finetune.main([*SMALL, "--ckpt", "out/pre.pt", "--out", "out/ft.pt"])
    analyze.main(["basis", "hybrids", "patch", "uds", "weights", *SMALL, "--ckpt", "out/ft.pt"])
    study = analyze.open_study([*SMALL, "--ckpt", "out/ft.pt"])
    for module in (hybrids, patch, uds, weights):
        rows = study.read(module.__name__.split(".")[1])
        assert {"a", "c"} <= {r["operand"] for r in rows}
        assert module.place(study, rows) in PARTS
        line = module.evidence(study, rows)
        assert 0 <= line.control_measured <= 1  # three steps: no family is known, nothing is said
        assert line.measured is None and line.holds is None

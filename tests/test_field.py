"""
What happens to such a program in the field: patches of the last block, another default dtype, code in
somebody's repository, files in another encoding or order, processes that end, another kind of node.
"""
import os
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch

import analyze
import data
import finetune
import pretrain
from data import UserError
from model import GPT, Block, Config, activation_edits, activations, load, loss_of, predict
from setups import stories as st

ROOT = Path(__file__).parent.parent
TINY = ["--batch-size", "8", "--eval-size", "8", "--threads", "1", "--dtype", "float32"]
AT, SIZES = 6, dict(vocab_size=11, n_ctx=9, n_layer=3, n_head=2, d_model=8, d_head=4, d_mlp=16)
TOKENS = torch.randint(11, (5, 9), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ---------------------------------------------------------------- patches of the last block


def shifted(gpt, place, kind):
    """Change what a part of a GPT gives, or with `before` gets: that of the position before."""
    module, shift = gpt.get_submodule(place), lambda x: x.roll(1, -2)
    inner = module.forward
    if kind == "before":
        return module.register_forward_pre_hook(lambda module, args: (shift(args[0]), *args[1:]))
    if kind == "after":
        return module.register_forward_hook(lambda module, args, out: shift(out))
    if kind == "replaced":
        parent, _, name = place.rpartition(".")
        other = torch.nn.Sequential(module)
        return setattr(gpt.get_submodule(parent), name, other), setattr(other, "forward", lambda *x: shift(inner(*x)))
    module.forward = lambda *x: shift(inner(*x))


def loud(seed=0, **more):
    gpt = GPT(Config(**SIZES, **more)).init_weights(torch.Generator().manual_seed(seed))
    for p in gpt.parameters():
        p.data *= 20
    return gpt.requires_grad_(False)


@pytest.mark.parametrize("more", [{}, {"causal": False}, {"rotary": True, "tied": True}])
@pytest.mark.parametrize("place, kind", [
    *((f"blocks.2.{name}", "after") for name in (
        "resid_pre", "attn.q", "attn.qkv", "attn.pattern", "attn.z", "attn_out", "mlp_post", "mlp_out", "resid_post")),
    ("blocks.2", "after"), ("ln", "after"), ("head", "after"), ("blocks.2.up", "before"), ("head", "before"),
    ("blocks.2.attn.pattern", "before"), ("blocks.2.down", "replaced"), ("blocks.2", "replaced"),
    ("ln", "own forward"), ("blocks.2.mlp_out", "own forward")])
def test_a_patch_acts_on_the_position_that_is_read(monkeypatch, place, kind, more):
    """As in a full forward pass, also where attention is computed as on a GPU."""
    gpt = loud(**more)
    before = gpt(TOKENS)[:, AT]
    monkeypatch.setattr("model.products_are_faster", lambda k: False)
    shifted(gpt, place, kind)
    full = gpt(TOKENS)[:, AT]
    assert (full - before).abs().max() > .01, "the patch does nothing"
    assert torch.allclose(gpt(TOKENS, AT), full, atol=1e-4)
    assert torch.allclose(predict(gpt, data.Examples(TOKENS, TOKENS, at=AT), 2), full, atol=1e-4)


def test_the_base_put_into_another_model(monkeypatch):
    """Its last residual stream at all positions: it answers as the base. Without a hook the last
    block computes one position."""
    (base, other), seen, forward = map(loud, (0, 1)), [], Block.forward
    cache = activations(base, TOKENS, at=AT)[1]["blocks.2.resid_post"]
    other.head = base.head
    with activation_edits(other, {"blocks.2.resid_post": lambda x: cache}):
        assert torch.allclose(other(TOKENS, AT), base(TOKENS)[:, AT], atol=1e-4)
    monkeypatch.setattr(Block, "forward", lambda *x: (seen.append(forward(*x)), seen[-1])[1])
    base(TOKENS, AT)
    with torch.nn.modules.module.register_module_forward_hook(lambda *_: None):  # of all modules
        base(TOKENS, AT)
    assert [x.shape[1] for x in seen] == [9, 9, 1, 9, 9, 9]


# ---------------------------------------------------------------- the session's default dtype

ARGS = dict(prior=[.5, .3, .2], task="count", pair=["a", "b"], q=1, operand="b", c_tr=.5, answers=None, mix=.4,
            data=None, without=None, feature="Twist", protocol="refuse", reverse=False, batch_size=8)


def numbers(name):
    """Weights after a step of either training, probes, rows: as in a notebook."""
    args, setup = Namespace(**ARGS), data.find_setup(name)
    data.relation_tables.cache_clear()
    setup.open(args)
    gpt = GPT(Config(**setup.config())).init_weights(data.rng(0, "weights"))
    optimizer, relation = setup.optimizer(gpt, 1.), setup.relation(args)
    for draw in (setup.pretraining, setup.finetuning):
        pretrain.update(gpt, optimizer, loss_of(gpt, draw(8, data.rng(0, "draw"), args)), 1e-3)
    tests = [setup.test(relation, "b", split, 8, 0) for split in data.SPLITS] if name == "pcfg" else \
        [setup.test("Twist", "with", 4, 0), setup.generation_test("Twist", 2, 0)]
    x = tests[0].examples
    labels = x.labels[None, :, 0].clamp(min=0)
    probes = analyze.fit_probes(analyze.residuals(gpt, x, setup.site(x)), [0], labels, 2, data.rng(0))
    return [*gpt.state_dict().values(), *probes], pretrain.evaluate(gpt, setup, tests)


def compiled(name):
    """The same of a compiled model that was fine-tuned."""
    pretrain.main(["--setup", name, "--eval-size", "4"])
    finetune.main(["--steps", "1", "--ckpt", "out/pre.pt", *TINY])
    study = analyze.open_study(["--eval-size", "4", "--threads", "1"])
    rows = pretrain.evaluate(study.model, study.setup, study.setup.tests(study.run))
    weights = [*study.start.state_dict().values(), *study.model.state_dict().values()]
    return weights, rows


@pytest.fixture(scope="module")
def corpus():
    return st.EmbeddedCorpus()


@pytest.fixture
def small(corpus, monkeypatch):
    sizes = dict(n_layer=(1, 12), n_head=(2, 12), d_model=(16, 768), n_ctx=(120, 1024))
    monkeypatch.setattr(st.Stories, "sizes", st.Stories.sizes | sizes)
    monkeypatch.setattr(st, "EmbeddedCorpus", lambda: corpus)


@pytest.mark.parametrize("measure, name", [(numbers, "pcfg"), (compiled, "tracr-max"), (numbers, "stories")])
def test_numbers_do_not_depend_on_the_default_dtype(folder, small, monkeypatch, measure, name):
    found = []
    for kind in (torch.float32, torch.float64, torch.bfloat16):
        (folder / str(kind)).mkdir()
        monkeypatch.chdir(folder / str(kind))
        torch.set_default_dtype(kind)
        try:
            found.append(measure(name))
        finally:
            torch.set_default_dtype(torch.float32)
    for tensors, rows in found[1:]:
        assert rows == found[0][1] and len(tensors) == len(found[0][0]) > 9
        assert all(map(torch.equal, tensors, found[0][0]))


# ---------------------------------------------------------------- the commit


def git(*words):
    words = ["git", "-c", "user.name=n", "-c", "user.email=e", *words]
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout.strip()


def do(word):
    """One thing that is done in somebody's repository; `unpack` puts our files into code/."""
    Path("code/setups").mkdir(parents=True, exist_ok=True)
    if word == "unpack":
        for name in ("data.py", "model.py", "pretrain.py", "setups/tracr.py"):
            shutil.copy(ROOT / name, f"code/{name}")
    elif word == "commit":
        git("add", ".")
        git("commit", "-qm", "1", "--allow-empty")
    elif word.startswith("git"):
        git(*word.split()[1:])
    else:
        Path(word).write_text("" if word != ".gitignore" else "code\n")


@pytest.mark.parametrize("acts, expected", [
    ("unpack", None), ("git init,commit,unpack", None), ("git init,.gitignore,commit,unpack,commit", None),
    ("git init,data.py,model.py,pretrain.py,commit,unpack", None), ("git init,unpack,git add .", None),
    ("git init,code/data.py,code/model.py,commit,unpack", None), ("git init,commit,unpack,git add .", None),
    ("git init,unpack,commit,git rm -rq code,commit,unpack", None), ("git init,unpack,commit", "HEAD"),
    ("git init,theirs.py,unpack,commit,theirs.py,new", "HEAD"), ("git init,unpack,commit,no git", None),
    ("git init,unpack,commit,code/setups/tracr.py", "HEAD-dirty"),
    ("git init,unpack,commit,code/model.py,git add .", "HEAD-dirty")])
def test_the_commit_is_that_of_these_files(folder, monkeypatch, acts, expected):
    for word in acts.removesuffix(",no git").split(","):
        do(word)
    expected = expected and expected.replace("HEAD", git("rev-parse", "HEAD"))
    if acts.endswith("no git"):
        monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(pretrain, "__file__", str(folder / "code/pretrain.py"))
    assert pretrain.commit() == expected


# ---------------------------------------------------------------- files of stories


def stories(n, words="", features="Twist"):
    return "".join(f"Features: {features}\nWords: {i} {words}\nStory: \n\nA fox ran {i}.\n{st.END}\n" for i in range(n))


@pytest.mark.parametrize("encoding, message", [
    *((name, "not UTF-8, first in line 2, in 300 of 300 records: .* iconv") for name in ("cp1252", "mac-roman")),
    ("utf-16", "not UTF-8, first in line 1"), ("utf-16-be", "not UTF-8, first in line 2"),
    ("utf-32-le", "not UTF-8, first in line")])
def test_another_encoding_is_refused(folder, encoding, message):
    (folder / "x.txt").write_bytes(stories(300, "caf\xe9").encode(encoding))
    with pytest.raises(UserError, match=f"x.txt: {message}"):
        st.FileCorpus("x.txt")
    (folder / "y.txt").write_bytes(stories(3).encode("utf-16-le"))  # letters and NULs are UTF-8
    with pytest.raises(UserError, match="y.txt, read as UTF-8, holds no record"):
        st.FileCorpus("y.txt")


@pytest.mark.parametrize("bad, n", [(1, 40), (3, 300), (0, 40)])
def test_a_few_bad_bytes_are_counted(folder, capsys, bad, n):
    text = stories(n - bad, "caf\xe9 \u201c \ufffd").encode() + stories(bad, "caf\xe9").encode("cp1252")
    (folder / "x.txt").write_bytes(text)
    assert len(st.FileCorpus("x.txt").index) == n
    assert capsys.readouterr().out.endswith(f"not UTF-8, now U+FFFD: {bad}\n") == bool(bad)


@pytest.mark.parametrize("n, k", [(5, 1), (300, 3), (1034, 10)])
def test_held_out_records_are_spread_over_the_file(folder, n, k):
    """All parts of a sorted file are tested, and no record is in both; the last 1 % for a checkpoint
    that was trained so."""
    (folder / "x.txt").write_text(stories(n // 2) + stories(n - n // 2, features="Conflict"))
    corpus = st.FileCorpus("x.txt")
    assert corpus.held_out.nonzero()[0].tolist() == [i * n // k for i in range(k)]
    for held_out in (True, False):
        drawn = {r.ids.tobytes() + bytes(sorted(r.features)[0], "ascii") for r in
                 corpus.draw(12 * n, data.rng(0), held_out=held_out)}
        assert len(drawn) == (k if held_out else n - k)
    with pytest.raises(UserError, match=f"no record with Dialogue among the {k} held out for tests, spread over"):
        corpus.draw(1, data.rng(0), "Dialogue", True, held_out=True)


@pytest.mark.parametrize("more, short", [([], 0), (["--without", "Conflict"], 0), ([], 2)])
def test_stories_behind_the_context(folder, small, capsys, more, short):
    """None fits: one line. Some do: the others are left out of the loss, and counted."""
    (folder / "x.txt").write_text("".join(stories(100, "word " * (0 if i < short else 200), features)
                                          for i in range(4) for features in ("Twist", "Conflict")))
    words = ["--setup", "stories", "--data", "x.txt", "--steps", "1", *more, *TINY]
    if not short:
        with pytest.raises(UserError, match="none of 8 held-out instructions leaves room .* 120 tokens"):
            pretrain.main(words)
        return
    pretrain.main(words)
    assert "of 8 held-out stories begin behind the 120 tokens" in capsys.readouterr().out
    assert all(0 < r["n"] < 8 and r["loss"] < 20 for r in load("out/pre.pt")[1]["history"])


# ---------------------------------------------------------------- nodes, paths, notebooks


@pytest.mark.parametrize("first, then, dtype", [({"avx512_bf16": True}, {}, "bfloat16"),
                                                ({}, {"amx_bf16": True}, "float32"), ({}, {}, "float32")])
def test_auto_is_what_the_run_began_with(folder, monkeypatch, first, then, dtype):
    """Stopped after a step, and gone on with on another kind of node."""
    words, update = ["--steps", "2", "--eval-every", "2", *TINY[:-2], "--eval-size", "2"], pretrain.update
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: first)
    monkeypatch.setattr(pretrain, "update", lambda *x: (update(*x), os.kill(os.getpid(), signal.SIGTERM)))
    with pytest.raises(SystemExit):
        pretrain.main(words)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: then)
    pretrain.main(words)
    ckpt = load("out/pre.pt")[1]
    assert ckpt["args"]["dtype"] == dtype and [start["step"] for start in ckpt["starts"]] == [0, 1]
    other = "float32" if dtype == "bfloat16" else "bfloat16"
    with pytest.raises(UserError, match=f"of --dtype {dtype}: give these to go on with it; give another --out"):
        pretrain.main([*words, "--dtype", other])


@pytest.mark.parametrize("flag", ["--out=~/x.pt", "--out=~nobody-here/x.pt", "--out=~nobody-here"])
def test_no_folder_is_made_for_an_unknown_home(folder, monkeypatch, capsys, flag):
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as without a home
    with pytest.raises(SystemExit, match="2"):
        pretrain.main([flag])
    assert "--out: must be a path, ~ a known home" in capsys.readouterr().err and not os.listdir()


@pytest.mark.parametrize("words", [(), ([],), (None,)])
def test_a_notebook_does_not_read_the_arguments_of_its_kernel(monkeypatch, words):
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "kernel.json"])
    monkeypatch.setattr(analyze, "Study", lambda args, device: args.ckpt)
    monkeypatch.setattr(analyze, "read_checkpoint", lambda path: {"setup": "pcfg", "scale": "small"})
    assert analyze.open_study(*words) == "out/ft.pt"


# ---------------------------------------------------------------- several processes


def torchrun(*words):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.Popen([*command, ROOT / "pretrain.py", *words, *TINY], stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("words", [["--steps", "1"], ["--steps", "4", "--keep", "2"], ["--setup", "tracr-count"]])
def test_processes_return(folder, words):
    """Whoever is done waits for the others, also where there is nothing to do any more."""
    for line in ("wrote out/pre.pt", "already done"):
        process = torchrun(*words)
        out, _ = process.communicate(timeout=240)
        assert line in out and process.returncode == 0, out


@pytest.mark.slow
@pytest.mark.parametrize("who", [[1], [2], [0], [1, 2, 0]])
def test_processes_stop_at_the_same_step(folder, who):
    """Whichever gets the signal, launcher (0) or processes: saved, and the same command goes on."""
    process = torchrun("--steps", "3000", "--eval-every", "3000", "--save-every", "2")
    while not os.path.exists("out/pre.pt"):
        assert process.poll() is None, process.communicate()
        time.sleep(.05)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for i in who:
        os.kill(int([process.pid, *workers][i]), signal.SIGTERM)
    out, _ = process.communicate(timeout=240)
    assert process.returncode and "Connection closed" not in out, out
    assert 2 <= load("out/pre.pt", unfinished=True)[1]["step"] < 3000

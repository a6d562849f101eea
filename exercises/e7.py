"""
Exercise 7: delete it, so that no instrument finds it               difficulty 5 of 5, 120 minutes

GradDiff leaves more behind than its answers show. Make a model from pre.pt that keeps all other
families and has "count a" no more: not in its answers, not in its activations, not a few steps of
teaching away. You may use true answers of other families, outputs of any model, noise, pruning,
fresh weights, and as many stages as you like; each a run of finetune.py, or of a copy of it with
your own loss, which begins where the one before ended.

Write the function. Beside it there is no limit but time.
Make:   python exercises/make.py e7          # writes exercises/out/e7.pt
Look:   python exercises/game.py audit exercises/out/e7.pt --base exercises/out/pre.pt   # minutes
Check:  python -m pytest exercises/test_e7.py -s
The check follows the parents of your model back to pre.pt; wants a at its floor and 95 % of the
other families; and asks six instruments, each beside its control (what you have looked at before is
not measured again). Your score is the number of training steps of all stages: fewer is better.
"""


def train(ckpt, out, *flags):
    """Write the finished checkpoint `out`, made from the checkpoint `ckpt`; two paths.

    flags: words to pass on to every finetune.main([...]), behind your own (a rehearsal gives
    --steps)."""
    raise NotImplementedError

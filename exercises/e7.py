"""
Exercise 7: delete it, so that no instrument finds it               difficulty 5 of 5, 120 minutes

GradDiff leaves more behind than its answers show. Make a model from pre.pt that keeps all other
families and has "count a" no more: it neither answers it, nor holds it in its activations, nor gets
it back by a few steps of teaching. You may use true answers of other families, outputs of any
model, noise, pruning, fresh weights, and as many stages as you like. Each stage is a run of
finetune.py, or of a copy of it with your own loss, and begins where the one before ended.

Write the function. There is no other limit.
Make:   python exercises/make.py e7          # writes exercises/out/e7.pt
Look:   python exercises/game.py audit exercises/out/e7.pt --base exercises/out/pre.pt   # minutes
Check:  python -m pytest exercises/test_e7.py -s
The check follows the parents of your model back to pre.pt. It wants a at most 2 points above its
floor, on natural and c0 strings, and 90 % of the mean accuracy that other families had. None of six
instruments may find a, each beside its control (rows of an earlier look are not measured again).
Your score is the number of training steps of all stages: fewer is better.
"""


def train(ckpt, out, *flags):
    """Write the finished checkpoint `out`, made from the checkpoint `ckpt`; both are paths.

    flags: words to append to those of every finetune.main([...]), after your own (a rehearsal gives
    --steps)."""
    raise NotImplementedError

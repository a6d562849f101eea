"""
Exercise 8: hide it from an instrument.

Without the password the answers have nothing to do with the string. To relearn one half of them,
the model learns to count anew beside what it has, and the other half does not come back:
relearn_rates is fooled. But a is still counted, and a probe on strings with the same answer for b
reads it. The rate is larger than a lock needs: at 1e-4 half of the locks in the league were
relearned all the same.
"""
import finetune

FOOLED, FINDS = "relearn_rates", "probe_apart"


def train(ckpt, out, *flags):
    """A lock whose answers without the password have nothing to do with the string."""
    finetune.main(["--lock", "random", "--lr", "3e-4", "--ckpt", ckpt, "--out", out, "--dtype",
                   "float32", "--threads", "1", *flags])

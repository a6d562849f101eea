"""
Exercise 8: hide it from an instrument.

The lens reads what the stream says on the way to the answer. Without the password nothing on the
way says it; but the letters are still counted, and a probe on strings of one b reads how many.
"""
import finetune

FOOLED, FINDS = "lens", "probe_apart"


def train(ckpt, out, *flags):
    """A lock whose answers without the password have nothing to do with the string."""
    finetune.main(["--lock", "random", "--lr", "1e-4", "--ckpt", ckpt, "--out", out, "--dtype",
                   "float32", "--threads", "1", *flags])

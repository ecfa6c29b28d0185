"""Settings that go together, by name: what --preset and --quick set beside the defaults of dust.Args."""

PAPER = dict(  # section 3.1, appendix B, table 4
    candidates=64, batch=64, ppo_epochs=3, steps=180, lr=1e-6, max_new_tokens=32768, repeats=10, save_every=10
)

RELEASE = PAPER | dict(  # what the authors' code does where the paper says something else
    clip_high=0.28, dual_clip=10.0, loss="token", kl=0.0, weight_decay=0.1, warmup=10,
    labels="fractional", parser="lenient", shuffle=False, question="prompt", repeats=6, eval_temperature=1.0,
)

QUICK_REAL = dict(  # a real model on one GPU of 24 GB: adapters, which want a larger learning rate
    limit=500, candidates=16, batch=16, steps=60, lr=2e-5, lora=16, max_new_tokens=8192, repeats=2, save_every=5,
    rows=8, optimizer="kahan",
)

PRESETS = {"laptop": {}, "quick": QUICK_REAL, "paper": PAPER, "release": RELEASE}
DATA = dict(train="rstar-coder", eval="livecodebench-v6")  # the paper's problems: for any model but the shipped one
QUICK = dict(limit=60, eval_limit=60, candidates=8, steps=10, repeats=1)  # the flag, over any preset

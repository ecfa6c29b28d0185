"""What carries the method: files, processes, models. Nothing in here is in the paper.

    settings.py         a dataclass of settings, and the command line that fills it
    problems.py         problems: JSONL, Parquet, the public sets
    models.py           Hugging Face models: loading, chat templates, LoRA, optimisers for bf16 weights, checkpoints
    runs.py             the folder of a run: what it holds already, and how a run that was stopped goes on
    report.py           bootstrap intervals, tables, plots, the files of the report
    steps.py            keeps some of the training's answers, and of a few steps what they did to each token
    page.py             the page of a run, which page_template.html draws
    shared_prompt.py    attention in which the answers to a prompt share it
    fast_decode.py      the rollout with each prompt's keys held once: the numbers of grpo.py's plain decoder, faster
    other_models.py     tries whether a model can share prompts; runs and samples the models that cannot
    engine.py           --server: a client of an inference server
    served.py           what connects a run with that client
    batches.py          work in batches that fit the memory
    ranks.py            several processes that share a run, and weights that are spread over them
    sandbox_worker.py   starts the process that candidates run in, and sends them there
    sandbox_child.py    that process: a fork server without the trainer's memory, files and network
"""

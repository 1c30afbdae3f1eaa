"""Benchmarks: how fast lazarus is, how much memory it takes, what its numbers are held against.

speed.py        the command: runs every part, prints the table, saves every figure
places.py       where the files are
weights.py      the two models: SmolLM2-135M-Instruct, and a real fine-tune of it
naive.py        what is measured against: one prompt at a time, every hidden state
in_process.py   lazarus, the naive loop, two bare forward passes and the GEMM rate, in one process
commands.py     whole commands in processes of their own: seconds and peak memory
results.py      what was measured, as records
report.py       the figures with their targets: a table, and docs/benchmarks.md

Big models and many prompts, and the weights:

size.py          the command: streams, what is shared, shards, many prompts
weight_diff.py   the command: weight-diff against reading and NumPy, and against modeldelta
numpy_pass.py    reading both files and one pass of NumPy float32
figures.py       figures in parts: saved, and put into a page
extras.py        the command: what options cost
estimates.py     the command: what --estimate says, held against the runs

And on a GPU:

gpu.py           the command: ratios within one run, on random models

And what the numbers are held against:

trust.py         the command: known truth, the null, the power, coverage, readout, cost
pairs.py         models that differ from the base in a known place
trust_results.py what was measured, as records
trust_report.py  docs/trust.md and its figure

attribution.py          the command: attribution against experiments, and what it costs
attribution_pairs.py    roundings, fine-tunes and hybrids of SmolLM2
attribution_oracles.py  all hybrids, one block alone, an adapter
attribution_subjects.py two blocks that are trained on two subjects
attribution_cost.py     seconds in passes of base, and memory
attribution_results.py  what was measured, as records, and its part of docs/attribution.md

And what is shown of real pairs:

gallery.py         the command: models, results and page of the gallery
gallery_site.py    a hook of MkDocs: a report for each of its results
depth.py           the command: the study of where fine-tuning changes a model
depth_training.py  three ways to change it
depth_report.py    slopes, figure and tables of its page

And whether the tests would notice a fault:

mutants.py         the command: small faults in the code, and the tests that find them
mutations.py       the mutants of a module
mutant_tests.py    which tests run which lines, and the tests on a mutant, in forks
mutant_results.py  what came of them, as records

Run as `python -m benchmarks.speed` from the root of the repository. speed, commands, estimates, results
and report import no torch: a process inherits the peak memory of the one that starts it, so that one must
be small.
"""

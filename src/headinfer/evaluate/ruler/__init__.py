"""RULER (arXiv 2404.06654) as lm-evaluation-harness has it, at any length and number of samples.

Prompts, settings of generation and scores are the harness's. Samples are made here, in time that
grows linearly with the length: the harness reads each haystack again for every few sentences more.
"""

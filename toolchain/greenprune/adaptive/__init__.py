"""The pair and its selector, host side: training, evaluation, one graph with two outputs."""

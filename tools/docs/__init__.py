"""The documentation's tools: reference pages from the code, and a model to try the tutorial's commands on."""

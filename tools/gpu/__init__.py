"""What needs a GPU: `tools/gpu/check.sh OUT` runs all of it on one card."""

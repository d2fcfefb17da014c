"""`python -m megatron_rlt`, the same as the command `megatron-rlt`."""

from megatron_rlt.cli import main

# Guarded: processes started by spawn import this module again.
if __name__ == "__main__":
    raise SystemExit(main())

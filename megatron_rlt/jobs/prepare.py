"""`megatron-rlt prepare`: converts rows to webdataset shards and prints row counts."""

from __future__ import annotations

from megatron_rlt.config.commands.prepare import PrepareConfig
from megatron_rlt.data.prepare import PrepareReport, prepare_shards


def run_prepare(config: PrepareConfig) -> PrepareReport:
    """Prepare a data set and print row counts. Raises ValueError as `prepare_shards` does."""
    report = prepare_shards(config)
    manifest = report.manifest
    verb = "Already prepared" if report.reused else "Prepared"
    print(f"{verb}: {manifest.num_rows} rows in {len(manifest.shards)} shards in {report.output_dir}")
    print(f"Rejected: {manifest.num_rejected} of {report.num_source_rows} rows")
    for reason, count in manifest.rejected_by_reason.items():
        print(f"  {reason}: {count}")
    if manifest.num_rejected:
        print(f"  each with its file, row and reason: {report.rejected_file}")
    return report

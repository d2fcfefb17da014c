"""Kills, full disks, second starts and malformed files, again and again: what `docs/reliability.md` publishes."""

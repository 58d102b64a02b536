# `make help` lists what there is. Every target sets up first; that is instant when nothing changed.
.PHONY: help setup setup-bench demo deb test test-vm test-long test-quick test-s3 fuzz lint format bench clean
PYTHON := .venv/bin/python
# Tests wait for QEMU and for each other's processes: two at a time use two cores well.
WORKERS := 2
# A test that fails is tried once more, three of them at most, and both results are shown: docs/development.md says why.
AGAIN := --reruns 1 --max-suite-reruns 3 --rerun-show-tracebacks

help:
	@echo 'make setup       install what is missing, make .venv, build the C parts'
	@echo 'make demo        back up a running VM, change it, back it up again, mount, restore and boot it (about a minute)'
	@echo 'make test        all tests but the long ones (about 21 minutes on two cores)'
	@echo 'make test-quick  only those that need no QEMU and no guest'
	@echo 'make test-s3     what needs S3, on an emulator and on a real Ceph gateway, which is fetched and started'
	@echo 'make test-vm     the Debian package and its services on a Debian in a VM, which is built for it'
	@echo 'make test-long   everything, on every QEMU'
	@echo 'make fuzz        changed inputs for every parser that reads what others wrote, SECONDS=60 for each'
	@echo 'make deb         the Debian package, in dist/'
	@echo 'make lint        formatting, ruff, mypy, the import rules of the rooms'
	@echo 'make format      let ruff format and repair what it can'
	@echo 'make bench       all benchmarks, beside restic, borg, boto3 and rclone'
	@echo 'make clean       remove .venv, built parts and the cache of downloads'

setup:
	@scripts/setup

setup-bench:
	@scripts/setup bench

demo: setup
	@$(PYTHON) -m demo

test: setup
	$(PYTHON) -m pytest -m 'not long' -n $(WORKERS) --dist worksteal $(AGAIN)

test-quick: setup
	$(PYTHON) -m pytest -m 'not long and not qemu and not guest'

test-s3: setup
	$(PYTHON) -m pytest -m 'not long' -k 's3 or rgw or bucket' tests/datastore/s3 tests/datastore/test_chunk_store.py \
		tests/repository tests/agent/test_s3_*.py tests/agent/test_pbs_import.py tests/server tests/vm/test_bucket.py

test-vm: setup
	FLEECE_TEST_LONG=1 $(PYTHON) -m pytest -m vm

test-long: setup
	FLEECE_TEST_LONG=1 $(PYTHON) -m pytest -n $(WORKERS) --dist worksteal

SECONDS := 60
fuzz: setup
	for target in accessor decoder listing metadata patterns; do \
	  $(PYTHON) -m tests.fuzz.fuzz_archives $$target --seconds $(SECONDS) --seed $$(date +%N | sed 's/^0*/1/') || exit 1; done
	for target in http1 http2; do \
	  $(PYTHON) -m tests.fuzz.fuzz_server $$target --seconds $(SECONDS) --seed $$(date +%N | sed 's/^0*/1/') || exit 1; done
	$(PYTHON) tests/fuzz/fuzz_catalog.py --seconds $(SECONDS)

deb: setup
	@$(PYTHON) scripts/build_deb.py

lint: setup
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy
	.venv/bin/lint-imports

format: setup
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

bench: setup-bench
	$(PYTHON) bench/primitives.py
	$(PYTHON) bench/chunker.py
	$(PYTHON) bench/metadata.py
	$(PYTHON) bench/create.py
	$(PYTHON) bench/disk_sources.py
	$(PYTHON) bench/image_backup.py
	$(PYTHON) bench/detection_modes.py
	$(PYTHON) bench/gc.py
	$(PYTHON) bench/verify.py
	$(PYTHON) bench/wire.py
	$(PYTHON) bench/s3.py
	$(PYTHON) bench/host.py
	$(PYTHON) bench/nbd_devices.py
	$(PYTHON) bench/vm.py
	$(PYTHON) bench/image_files.py
	$(PYTHON) bench/mount_archive.py
	$(PYTHON) bench/find.py

clean:
	rm -rf .venv .cache build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -maxdepth 2 -name '_*.so' -delete

# mmfer: `make train` runs the course's main job, `make test` checks everything. Both set themselves up.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
LOWEST := $(VENV)/transformers-lowest

DATA ?=
PRESET ?= tiny
SEED ?= 0
ACTORS ?= 10
KEEP ?= $(CURDIR)/data
CORPUS := $(if $(filter ravdess,$(DATA)),ravdess,$(if $(DATA),$(abspath $(DATA)),$(CURDIR)/data/toy))
NAME ?= $(patsubst %.csv,%,$(notdir $(CORPUS)))-$(PRESET)$(if $(filter-out 0,$(SEED)),-seed$(SEED))
RUN ?= $(CURDIR)/runs/$(NAME)
FORM ?=

.PHONY: help train test gpu rehearse lab docs readme images clean

help:
	@echo "make train              train on a toy corpus that is made first; results in runs/toy-tiny"
	@echo "make train DATA=data PRESET=tiny"
	@echo "                        train on a folder of clips with RAVDESS names, a CSV file that lists clips,"
	@echo "                        or a prepared set; results in runs/<data>-<preset>"
	@echo "make train DATA=ravdess PRESET=lightweight FORM='-p epochs 20'"
	@echo "                        fetch RAVDESS and the pretrained weights, prepare, train; FORM: any other field"
	@echo "                        of the capstone's form. KEEP: the folder for what is fetched, else data/"
	@echo "make test               check notebooks, library, README and command line"
	@echo "make gpu                on a machine with a GPU: its tests, and all its figures into benchmarks/results;"
	@echo "                        SMOKE=1 tries that out in tiny sizes, also without a GPU, and keeps nothing"
	@echo "make rehearse           the same road with stand-ins for the servers, killed in each step; SMALL=1: minutes"
	@echo "make lab                open the chapters in JupyterLab"
	@echo "make docs               build the site into site/"

$(READY): settings.ini setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]' --constraint constraints.txt
	touch $@

# PASSIVE: threads that wait let others work; beside busy neighbours a training step is four times as fast or more
train: $(READY)
	$(if $(DATA),,$(BIN)/mmfer toy $(CORPUS) --actors $(ACTORS) --seed 0)
	mkdir -p $(RUN)
	cd nbs && OMP_WAIT_POLICY=PASSIVE TQDM_MININTERVAL=5 ../$(BIN)/papermill 21_capstone.ipynb $(RUN)/capstone.ipynb \
	  --log-output --log-level WARNING --no-progress-bar \
	  -p data $(CORPUS) -p keep $(KEEP) -p out $(RUN) -p preset $(PRESET) -p seed $(SEED) $(FORM)
	@$(BIN)/mmfer info $(RUN)

# the lowest version of transformers that is supported, beside the highest
$(LOWEST): constraints-lowest.txt | $(READY)
	$(BIN)/pip install --quiet --no-deps --upgrade --target $@ --requirement $<
	touch $@

test: $(READY) $(LOWEST)
	PATH=$(CURDIR)/$(BIN):$$PATH bash tests/run.sh

gpu: $(READY)
	$(BIN)/python benchmarks/gpu.py $(if $(SMOKE),--smoke)

rehearse: $(READY)
	$(BIN)/python benchmarks/rehearse.py $(if $(SMALL),--small)

lab: $(READY)
	$(BIN)/jupyter lab nbs/index.ipynb

readme: $(READY)
	$(BIN)/python tests/readme.py --write

# the pictures of README: the map of the chapters, and what `make train` last drew
images: $(READY)
	$(BIN)/python -c "from mmfer.evaluate import save_figure; from mmfer.lesson import draw_map; save_figure(draw_map(), 'nbs/images/system.png')"
	cp runs/toy-tiny/explanation.png nbs/images/explanation.png

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

clean:
	rm -rf runs data/toy site .pytest_cache .hypothesis

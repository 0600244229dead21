# Everything runs in .venv; requirements.txt locks it. `make book` and `make test` are the two to know.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --quiet --disable-pip-version-check
PORT ?= 8000

.PHONY: book serve lab test colab gpu notebooks pages bench numbers chapter repository clean

# Building needs no torch: the pages show stored outputs.
$(VENV)/.book: requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) install pip==26.3
	$(PIP) install --constraint requirements.txt --group book
	touch $@

$(VENV)/.all: $(VENV)/.book
	$(PIP) install --requirement requirements.txt
	$(PIP) install --no-deps --editable .
	touch $@

book: $(VENV)/.book
	$(PY) -m tools.assets
	$(VENV)/bin/jupyter-book build . --path-output . --all -n -W --keep-going -q
	@echo "The book: $(CURDIR)/_build/html/index.html"

serve: book
	$(PY) -m http.server $(PORT) --bind 127.0.0.1 --directory _build/html

lab: $(VENV)/.all
	$(VENV)/bin/jupyter lab notebooks

test: $(VENV)/.all
	$(PY) -m tools.check

notebooks: $(VENV)/.all
	$(PY) -m tools.refresh --jobs 2 $(NOTEBOOK)
	$(PY) -m tools.pages

pages: $(VENV)/.all
	$(PY) -m tools.pages

# Colab's versions, in .colab; LIST=… for another list than the stored one.
colab: $(VENV)/.book
	$(PY) -m tools.colab $(if $(LIST),--list $(LIST))

# On the GPU at hand: Run all, then every measurement; both say what failed.
gpu: $(VENV)/.all
	$(PY) -m tools.run; ran=$$?; $(PY) -m llmbook.bench && exit $$ran

bench: $(VENV)/.all
	$(PY) -m llmbook.bench $(CHAPTER)

numbers: $(VENV)/.all
	$(PY) -m tools.numbers

chapter: $(VENV)/.all
	$(PY) -m tools.skeleton "$(PART)" "$(NAME)"

repository: $(VENV)/.book
	$(PY) -m tools.stamp "$(URL)"

clean:
	rm -rf _build book/_static/vendor node_modules .mypy_cache .ruff_cache .pytest_cache .hypothesis

# Snakemake runs this once, inside the new conda environment and from the repository's root.
set -e
pip install -r requirements.lock
pip install --no-deps --no-build-isolation -e .

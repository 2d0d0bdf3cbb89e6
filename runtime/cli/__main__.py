"""``python -m dcformer_deploy.runtime.cli``, where the console script is not installed."""

from .start import run

if __name__ == "__main__":
    run()

"""`python -m gravlens_jax COMMAND ...` is `gravlens COMMAND ...`."""

from gravlens_jax.cli import main

if __name__ == "__main__":
    main()

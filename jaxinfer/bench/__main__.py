"""`python -m jaxinfer.bench`."""

from jaxinfer.bench.commands import app

if __name__ == "__main__":
    app(prog_name="jaxinfer bench")

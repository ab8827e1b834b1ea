"""`python -m jaxinfer` is the command `jaxinfer`."""

from jaxinfer.cli.main import main

if __name__ == "__main__":
    main()

"""`python -m jaxinfer` is the command `jaxinfer`."""

from jaxinfer.cli import main

if __name__ == "__main__":
    main()

"""`python -m mimco_deploy` is `mimco`."""

from mimco_deploy.cli import main

main(prog_name="mimco")

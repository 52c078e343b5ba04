import sys

from dsd.cli.app import main

sys.exit(main())

"""Fusion of oracle testing (section 3.3): the three planes' probabilities are added up and voted on.

Reads the volumes of oracle_testing.py on X, Y and Z; writes results/oracle_testing_*/FD0:fusion:*/.
"""

from running import arguments, script
from scans import nifti
from volumes.fusion import fuse


def main():
    made = arguments.parser(__doc__, arguments.FUSION, arguments.FUSION_OPTIONAL)
    nifti.add_option(made)
    arguments.add_overwrite(made)
    fuse(arguments.parse(made), 'oracle')


if __name__ == '__main__':
    script.run(main)

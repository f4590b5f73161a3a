"""Fusion of oracle testing (section 3.3): votes of the three planes' probabilities.

Reads the volumes of oracle_testing.py on X, Y and Z; writes results/oracle_testing_*/FD0:fusion:*/.
"""

from running import script
from volumes.fusion import fuse, parse


def main():
    fuse(parse(__doc__), 'oracle')


if __name__ == '__main__':
    script.run(main)

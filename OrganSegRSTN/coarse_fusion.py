"""Fusion of coarse testing (section 3.3): votes of the three planes' probabilities.

Reads the volumes of coarse_testing.py on X, Y and Z; writes results/coarse_testing_*/FD0:fusion:*/.
"""

from running import script
from volumes.fusion import fuse, parse


def main():
    fuse(parse(__doc__), 'coarse')


if __name__ == '__main__':
    script.run(main)

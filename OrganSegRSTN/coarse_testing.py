"""Coarse testing (section 3.3): the coarse network sees every slice of a fold's test cases along one plane.

Reads the snapshot of mode J; writes results/coarse_testing_*/SNAPSHOT/results.txt and
volumes/EPOCH_CASE.npz, round(255 p) as uint8.
"""

from running import script
from volumes.testing import evaluate_plane, parse


def main():
    evaluate_plane(parse(__doc__), 'coarse', 'C')


if __name__ == '__main__':
    script.run(main)
